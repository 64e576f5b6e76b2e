"""SBMM and the base product beside torch, in one run and on the same number of threads.

torch gets its deltas unpacked to one byte a weight, so that only dequantising (code to float, times
the group's scale) and the matrix product are timed: kinder than unpacking 2:4 words would be.
The two programs take turns and the best of the turns counts, since machines are shared.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def best_us(body: Callable[[], None], seconds: float) -> float:
    """Best time of one call in microseconds, over `seconds` of calls, at least three."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        body()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


def ours_us(binary: Path, threads: int, seconds: float, arguments: list[str]) -> float:
    """Best time of one op in microseconds, by the microbenchmark binary."""
    command = [str(binary), "--threads", str(threads), "--json"]
    command += ["--min-ms", str(int(1000 * seconds)), *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[0])["best_us"])


def torch_linear(columns: int, rows: int, tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    count = 1 + (64 << 20) // (columns * rows * dtype.itemsize)
    weights = [torch.randn(rows, columns).to(dtype) for _ in range(count)]
    x = torch.randn(tokens, columns).to(dtype)
    turn = 0

    def body() -> None:
        nonlocal turn
        turn += 1
        torch.nn.functional.linear(x, weights[turn % count])

    return body


def torch_dequantise(
    columns: int, rows: int, deltas: int, tokens: int, group: int, dtype: torch.dtype
) -> Callable[[], None]:
    size = (deltas, rows, columns // group, group)
    codes = torch.randint(-8, 8, size, dtype=torch.int8)
    scales = torch.rand(deltas, rows, columns // group, 1).to(dtype)
    x = torch.randn(deltas, tokens, columns).to(dtype)

    def body() -> None:
        for delta in range(deltas):
            weight = (codes[delta].to(dtype) * scales[delta]).view(rows, columns)
            torch.nn.functional.linear(x[delta], weight)

    return body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("binary", type=Path, help="deltazip-bench-ops")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtypes = (torch.float32, torch.bfloat16)

    def compare(label: str, ours: list[str], theirs: dict[str, Callable[[], None]]) -> None:
        best = {name: float("inf") for name in ("ours", *theirs)}
        for _ in range(options.turns):
            us = ours_us(options.binary, options.threads, options.seconds, ours)
            best["ours"] = min(best["ours"], us)
            for name, body in theirs.items():
                best[name] = min(best[name], best_us(body, options.seconds))
        ratio = min(best[name] for name in theirs) / best["ours"]
        times = "  ".join(f"{name} {us:9.1f} us" for name, us in best.items())
        print(f"{label:46s} {times}  {ratio:6.2f}x", flush=True)

    for columns, rows in ((576, 1536), (1536, 576), (4096, 4096)):
        shape = ["--shape", f"{columns}x{rows}"]
        for tokens in (1, 16, 64, 256):
            theirs = {"torch float32": torch_linear(columns, rows, tokens, torch.float32)}
            arguments = ["--op", "linear", "--tokens", str(tokens), *shape]
            compare(f"linear bf16 {columns}x{rows}, {tokens} rows", arguments, theirs)
        for kind in ("sparse24_int4", "sparse24_int2", "sparse24_ternary", "dense_int4"):
            theirs = {
                f"torch {str(dtype).removeprefix('torch.')}": torch_dequantise(
                    columns, rows, 4, 4, 64, dtype
                )
                for dtype in dtypes
            }
            arguments = ["--op", "sbmm", "--deltas", "4", "--tokens", "4", "--format", kind]
            arguments += ["--group-size", "64", *shape]
            compare(f"sbmm {kind} {columns}x{rows}, 4 x 4 tokens", arguments, theirs)


if __name__ == "__main__":
    main()
