#!/usr/bin/env bash
# Installs with apt what building (or, with the argument "test", testing) needs and the machine lacks.
# Where there is no apt, or no right to use it, it names what is missing and fails.
set -euo pipefail

python=${PYTHON:-python3}
missing=()

need() { # PACKAGE COMMAND...: the package is missing if the command fails
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}
compiles() { # HEADER
  printf '#include <%s>\n' "$1" | c++ -std=c++20 -E -x c++ - -o /dev/null
}
has_python_headers() {
  "$python" -c 'import pathlib, sysconfig, sys
sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())'
}

need python3 command -v "$python"
if command -v "$python" >/dev/null; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "DeltaZip needs Python 3.10 or newer; $python is $("$python" -V). Name another: make PYTHON=..." >&2
    exit 1
  }
fi
need python3-venv "$python" -c 'import ensurepip, venv'
need python3-dev has_python_headers
need g++ compiles concepts
need libssl-dev compiles openssl/evp.h
need libzstd-dev compiles zstd.h
if [[ ${1:-} == test ]]; then
  need libgtest-dev compiles gtest/gtest.h
  need git command -v git
fi

((${#missing[@]})) || exit 0
command="apt-get install -y --no-install-recommends ${missing[*]}"
if ! command -v apt-get >/dev/null; then
  echo "missing, by their Debian names: ${missing[*]}. Install them with your package manager." >&2
  exit 1
fi
as_root=()
if ((EUID != 0)); then
  if ! command -v sudo >/dev/null; then
    echo "missing: ${missing[*]}. As root: $command" >&2
    exit 1
  fi
  as_root=(sudo)
  [[ -n ${CI:-} ]] && as_root+=(-n)
fi
echo "installing: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# The package lists may be old or absent; a second try follows an update.
"${as_root[@]}" $command >/dev/null 2>&1 </dev/null || {
  "${as_root[@]}" apt-get update -q </dev/null
  "${as_root[@]}" $command </dev/null
}
