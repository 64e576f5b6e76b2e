#!/usr/bin/env bash
# Gathers in build/gpu-kit what a GPU host without package registries lacks: wheels, OpenSSL's
# headers and static library, GoogleTest's sources and, unless --sources is given, everything
# prebuilt: the module, the CUDA library, the C++ tests and the microbenchmarks.
# Copy the working tree with build/gpu-kit to the host; benchmarks/gpu/host.sh uses it there.
#
#   GPU_PYTHON=python3.12   an interpreter of the GPU host's version, with its headers
#   GPU_ARCHITECTURES=90a-real   what the CUDA library is built for
#   GPU_WHEELS="..."        Python packages that the host lacks; what they need comes along
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python=${GPU_PYTHON:-python3.12}
kit=build/gpu-kit
# A host with torch, transformers and pytest has the rest. nlohmann-json and pybind11 are headers.
wheels=${GPU_WHEELS-nlohmann-json pybind11 fastapi pydantic uvicorn openai}

say() { echo "gpu-kit: $*" >&2; }
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
  { say "no $python: set GPU_PYTHON to an interpreter of the GPU host's version"; exit 1; }

rm -rf "$kit"
mkdir -p "$kit"/{wheels,openssl/include/openssl,openssl/lib,zstd/include,zstd/lib}
say "wheels for Python $version"
"$python" -m pip download -q --disable-pip-version-check --no-cache-dir --only-binary=:all: \
  --dest "$kit/wheels" $wheels

say "OpenSSL, zstd and GoogleTest"
headers=$(printf '#include <openssl/evp.h>\n#include <openssl/ssl.h>\n' | c++ -M -x c++ - |
  tr -d '\\' | tr ' ' '\n' | grep '/openssl/')
cp $headers "$kit/openssl/include/openssl/"
archive=$(c++ -print-file-name=libcrypto.a)
[[ -f $archive ]] || { say "libcrypto.a is missing: apt install libssl-dev"; exit 1; }
cp "$archive" "$kit/openssl/lib/"
headers=$(printf '#include <zstd.h>\n' | c++ -M -x c++ - | tr -d '\\' | tr ' ' '\n' | grep '/zstd')
archive=$(c++ -print-file-name=libzstd.a)
[[ -f $archive ]] || { say "libzstd.a is missing: apt install libzstd-dev"; exit 1; }
cp $headers "$kit/zstd/include/"
cp "$archive" "$kit/zstd/lib/"
if [[ -d /usr/src/googletest ]]; then
  cp -r /usr/src/googletest "$kit/googletest"
  rm -rf "$kit"/googletest/*/{test,docs,samples}
fi
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[[ -f $include/Python.h ]] && cp -rL "$include" "$kit/python-include"

if [[ ${1:-} != --sources ]]; then
  say "building for Python $version"
  PYTHON=$python benchmarks/gpu/host.sh build
  mkdir -p "$kit"/prebuilt/{bin,package}
  benchmarks/gpu/host.sh programs | xargs cp -t "$kit/prebuilt/bin"
  cp build/gpu/package/*.so "$kit/prebuilt/package/"
  strip "$kit"/prebuilt/bin/* "$kit"/prebuilt/package/*
fi
say "$(du -sh "$kit" | cut -f1) in $kit"
