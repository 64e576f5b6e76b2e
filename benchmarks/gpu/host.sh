#!/usr/bin/env bash
# On a machine with a GPU: builds or takes what build/gpu-kit holds prebuilt, then
#   host.sh test [GTEST_FILTER]   every C++ and Python test of the GPU
#   host.sh sanitize [FILTER]     small ones of every kernel under memcheck, then under racecheck
#   host.sh bench [SUITE...]      the measurements of suite.sh; results in build/gpu-results
#   host.sh exec COMMAND...       a command in the environment that the others have
#   host.sh build                 only the build, in build/gpu
# Needs no network: what the machine lacks comes from build/gpu-kit (pack.sh), what it has is used.
#   PYTHON (python3), GPU_ARCHITECTURES (90a-real), JOBS (all cores), GPU_RESULTS, GPU_CHECKS,
#   SANITIZE_JOBS (12), SANITIZE_TOOLS (memcheck racecheck)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -x .venv/bin/python ]]; then PATH=$PWD/.venv/bin:$PATH; fi
python=${PYTHON:-python3}
kit=$PWD/build/gpu-kit
host=$PWD/build/gpu-host
tree=$PWD/build/gpu
jobs=${JOBS:-$(nproc)}
: "${GPU_FILTER:=*cuda*:*Cuda*:*CUDA*}"
# Every kernel once, in both dtypes, at sizes that a sanitizer gets through.
small=(LinearTest.EveryElement SbmmTest.{ManySmallTasks,EveryElement}
  AttentionTest.{SmallBatches,DecodesOneRow} SampleTest.{SmallRows,EmbedTakes}
  RowwiseTest.{EmbedGathers,BiasAdd,RmsNormMatches,SiluMulKeeps,RopeAppendRotates,GatherRows})
: "${GPU_SMALL_FILTER:=$(printf '*/%s*/cuda_*:' "${small[@]}")}"

say() { echo "gpu: $*" >&2; }
has_header() { printf '#include <%s>\n' "$1" | c++ -E -x c++ - >/dev/null 2>&1; }

# Wheels of the kit, for this interpreter only; the machine's own packages stay as they are.
install_wheels() {
  compgen -G "$kit/wheels/*.whl" >/dev/null || return 0
  if [[ ! -f $host/site/.done || $kit/wheels -nt $host/site/.done ]]; then
    rm -rf "$host/site"
    "$python" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-cache-dir \
      --target "$host/site" "$kit"/wheels/*.whl
    touch "$host/site/.done"
  fi
  export PYTHONPATH=$host/site${PYTHONPATH:+:$PYTHONPATH}
}

# What has cases for a GPU; with GPU_CHECKS=1 also the programs that check single kernels.
targets() {
  echo _C deltazip_cuda deltazip-bench-ops backend_test engine_test model_test \
    deltazip_logits
  if [[ ${GPU_CHECKS:-} ]]; then
    sed -n 's/^deltazip_cuda_check(\([a-z0-9_]*\).*/\1/p' tests/cpp/cuda/CMakeLists.txt
  fi
}

build() {
  local options=(
    -DCMAKE_BUILD_TYPE=Release -DDELTAZIP_CUDA=ON -DDELTAZIP_PYTHON=ON -DDELTAZIP_TESTS=ON
    -DDELTAZIP_BENCHMARKS=ON -DDELTAZIP_PYTHON_OUTPUT=build/gpu/package
    "-DDELTAZIP_CUDA_ARCHITECTURES=${GPU_ARCHITECTURES:-90a-real}"
    -DDELTAZIP_TEST_DATA=tests/data  # from the root: tests may run on another machine
    "-DPython_EXECUTABLE=$("$python" -c 'import sys; print(sys.executable)')"
  )
  if ! has_header openssl/evp.h; then options+=("-DOPENSSL_ROOT_DIR=$kit/openssl"); fi
  if ! has_header zstd.h; then
    options+=("-DZSTD_INCLUDE=$kit/zstd/include" "-DZSTD_LIBRARY=$kit/zstd/lib/libzstd.a")
  fi
  if ! has_header gtest/gtest.h; then
    cmake -S "$kit/googletest" -B "$host/gtest-build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
      -DCMAKE_INSTALL_PREFIX="$host/gtest" -DBUILD_GMOCK=OFF >/dev/null
    cmake --build "$host/gtest-build" --target install >/dev/null
    options+=("-DCMAKE_PREFIX_PATH=$host/gtest")
  fi
  local include
  include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  if [[ ! -f $include/Python.h ]]; then options+=("-DPython_INCLUDE_DIR=$kit/python-include"); fi
  mkdir -p "$tree"
  cmake -S . -B "$tree" -G Ninja "${options[@]}" >"$tree/configure.log" 2>&1 ||
    { cat "$tree/configure.log" >&2; exit 1; }
  cmake --build "$tree" -j "$jobs" --target $(targets)
  cp "$tree/libdeltazip_cuda.so" "$tree/package/"
}

programs() { # TREE: paths of tests, checks and the microbenchmarks
  find "$1/tests" "$1/benchmarks" -type f -executable \
    \( -name '*_test' -o -name '*_check' -o -name 'deltazip-bench-ops' -o -name deltazip_logits \)
}

# Sets $bin and puts the package with its libraries into PYTHONPATH.
prepare() {
  install_wheels
  local suffix package
  suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  bin=$host/bin
  package=$host/package/deltazip
  rm -rf "$host/package" "$bin"
  mkdir -p "$package" "$bin"
  if [[ -f $kit/prebuilt/package/_C$suffix ]]; then
    say "using what $kit holds prebuilt"
    cp "$kit"/prebuilt/bin/* "$bin/"
    cp "$kit"/prebuilt/package/*.so "$package/"
  else
    say "building in $tree"
    build
    programs "$tree" | xargs cp -t "$bin"
    cp "$tree"/package/*.so "$package/"
  fi
  # A package of links: sources are read in place, the libraries lie beside them.
  local entry
  for entry in python/deltazip/*; do
    [[ $entry == *.so ]] || ln -sfn "$PWD/$entry" "$package/"
  done
  cp "$package"/libdeltazip_cuda.so "$bin/" # where the tests look: next to themselves
  # cuBLASLt of pip's wheels, which lie elsewhere than this package, for where there is no toolkit.
  local cublas
  cublas=$("$python" -c 'import nvidia, pathlib
print(*[str(f.parent) for p in nvidia.__path__ for f in pathlib.Path(p).glob("*/lib/libcublasLt.so.*")][:1])' \
    2>/dev/null || true)
  [[ $cublas ]] && export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$cublas
  export PYTHONPATH=$host/package${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
  export LD_LIBRARY_PATH=$bin${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}

# Runs what of each test binary the filter selects, and the checks that are there.
run_tests() {
  local filter=$1 test failed=() num_run=0
  for test in "$bin"/*_test; do
    "$test" --gtest_filter="$filter" --gtest_list_tests | grep -q '^  ' || continue
    echo "== ${test##*/}"
    num_run=$((num_run + 1))
    "$test" --gtest_filter="$filter" --gtest_brief=1 || failed+=("${test##*/}")
  done
  ((num_run)) || { say "no test has cases for '$filter': is there a GPU?"; failed+=(none); }
  for test in "$bin"/*_check; do
    [[ -x $test ]] || continue
    echo "== ${test##*/}"
    "$test" || failed+=("${test##*/}")
  done
  ((${#failed[@]} == 0)) || { say "failed: ${failed[*]}"; return 1; }
}

# Each test that the filter selects in a process of its own, some at once: the sanitizer's time is
# mostly the host's.
sanitize_tests() { # TOOL FILTER
  local test logs=$host/sanitize/$1
  rm -rf "$logs"
  mkdir -p "$logs"
  for test in "$bin"/*_test; do
    "$test" --gtest_filter="$2" --gtest_list_tests |
      awk -v test="$test" '/^[^ ]/ { suite = $1 } /^  / { print test, suite $1 }'
  done >"$logs/tests"
  [[ -s $logs/tests ]] || { say "no test has cases for '$2': is there a GPU?"; return 1; }
  say "$1: $(wc -l <"$logs/tests") tests"
  # shellcheck disable=SC2016
  xargs -P "${SANITIZE_JOBS:-12}" -L 1 bash -c '
    log=$0/${3//\//.}.log
    compute-sanitizer --tool "$1" --error-exitcode 1 "$2" --gtest_filter="$3" --gtest_brief=1 \
      >"$log" 2>&1 || { cat "$log"; echo "FAILED under $1: $3"; exit 1; }
  ' "$logs" "$1" <"$logs/tests"
}

command=${1:-}
[[ $command ]] && shift
case $command in
  build)
    install_wheels
    build
    ;;
  programs) programs "$tree" ;;
  test)
    prepare
    export DELTAZIP_REQUIRE_GPU=1 # a test that finds no GPU fails instead of being skipped
    status=0
    run_tests "${1:-$GPU_FILTER}" || status=1
    "$python" -m pytest -q -p no:cacheprovider tests/python/gpu || status=1
    # The suite's own engine, LLM, parity and server tests, computed by the device.
    export PATH=$bin:$PATH DELTAZIP_TEST_DEVICE=cuda
    suite=(tests/python/test_{mixed_batch,llm,parity}.py)
    if "$python" -c 'import openai' 2>/dev/null; then
      suite+=(tests/python/server/test_real_engine.py)
    fi
    "$python" -m pytest -q -p no:cacheprovider "${suite[@]}" || status=1
    exit $status
    ;;
  sanitize)
    prepare
    export DELTAZIP_REQUIRE_GPU=1
    for tool in ${SANITIZE_TOOLS:-memcheck racecheck}; do
      SECONDS=0
      sanitize_tests "$tool" "${1:-$GPU_SMALL_FILTER}"
      say "$tool: nothing found in $SECONDS s"
    done
    ;;
  bench)
    prepare
    export PATH=$bin:$PATH
    source benchmarks/gpu/suite.sh
    run_suite "$@"
    ;;
  exec)
    prepare
    export PATH=$bin:$PATH
    exec "$@"
    ;;
  *)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
