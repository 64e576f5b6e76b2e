# The measurements that docs/benchmarks.md reports of a GPU; host.sh sources this.
# Each part is one process that writes one file; random checkpoints are made once and shared.

results=${GPU_RESULTS:-build/gpu-results}
files=${GPU_WORKDIR:-}
budget=${GPU_MEMORY_GB:-80} # of an 80 GB card, which has 85 for programs

ops() { # NAME ARGUMENTS...: one sweep of the microbenchmarks
  local name=$1
  shift
  echo "== ops, $name"
  deltazip-bench-ops --device cuda --json "$@" | tee "$results/ops-$name.jsonl"
}
engine() { # NAME ARGUMENTS...: one run of deltazip bench
  local name=$1
  shift
  echo "== engine, $name"
  "$python" -c 'from deltazip.cli import main; main()' bench "$@" --shape llama-2-7b --device cuda \
    --memory-budget "$budget" --workdir "$files" --json "$results/engine-$name.json"
}

part_ops() {
  local shapes=4096x4096,4096x12288,4096x22016,11008x4096
  ops sbmm --op sbmm --min-ms 30 --shape $shapes --deltas 2,8,32 --tokens 1,8 --rotate-mib 128
  ops linear --op linear,linear_each --deltas 32 --min-ms 30 --shape $shapes --tokens 1,8,32,128,2048 --rotate-mib 128
  ops rest --op attention,rms_norm,silu_mul,rope_append,sample --deltas 32 --tokens 1,32 \
    --shape 4096x11008 --heads 32/32x128 --vocab 32000 --context 128,1024 --min-ms 30
}
part_base() { # one model: steps, prefill, throughput
  engine base latency prefill throughput --batch 1,8,16,32,64,128,256 --rounds 2
}
part_mixed() { # the same mix over 16 variants
  engine mixed throughput latency --variants 16 --format int2 --batch 16,32 --mix even --rounds 2
}
part_int2() { engine int2 latency --variants 32 --format int2 --batch 32,64 --mix even; }
part_ternary() { engine ternary latency --variants 32 --format ternary --batch 32,64 --mix even; }
part_int4() { engine int4 latency --variants 16 --format int4 --batch 32 --mix even; }
part_prefill() { engine prefill prefill --variants 1 --format int2 --mix base,even; }
part_load() { engine load load --variants 2 --format int2 --batch 32 --mix base,even --rounds 8; }
parts_known=(ops base mixed int2 ternary int4 prefill load)

run_suite() {
  local part parts=("$@")
  ((${#parts[@]})) || parts=("${parts_known[@]}")
  mkdir -p "$results"
  if [[ -z $files ]]; then
    local home=${TMPDIR:-/tmp} room # 13.5 GB of base and up to 22 GB of deltas
    room=$(df --output=avail -BG /dev/shm | tail -1 | tr -dc 0-9)
    ((room < 40)) || home=/dev/shm
    files=$(mktemp -d "$home/deltazip-bench-XXXXXX")
    trap 'rm -rf "$files"' EXIT
  fi
  for part in "${parts[@]}"; do
    declare -F "part_$part" >/dev/null ||
      { echo "no part '$part': ${parts_known[*]}" >&2; exit 2; }
    "part_$part"
  done
}
