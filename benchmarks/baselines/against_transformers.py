#!/usr/bin/env python3
"""DeltaZip beside transformers on the same machine, threads and run.

    A=benchmarks/baselines/against_transformers.py
    python $A decode --base DIR
    python $A concurrent --base DIR --variant NAME=DELTA=FINETUNED ...

`decode` is batch 1, greedy: tokens per second after the first token, of transformers' generate in
float32 and in bfloat16 (the faster one is the baseline) and of DeltaZip's engine on the checkpoint
as it is. `concurrent` is 16 requests, spread over the base and the variants: one after another in
transformers (each variant its own model, already in memory), all at once in DeltaZip. Rounds
alternate between the two, and each figure is printed with its spread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

PROMPTS = [
    "What is the capital of France, and what is it known for?",
    "A train leaves at 9 and travels 60 km an hour for 3 hours. How far does it go?",
    "Define the word 'lantern'.",
    "Write one sentence about the sea in winter.",
]


def summary(values: list[float]) -> dict[str, float]:
    return {
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
    }


def chat_ids(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return list(ids)


class Engine:
    """The compiled engine, driven as the server drives it: submit, then poll."""

    def __init__(self, base: str, variants: dict[str, str], threads: int) -> None:
        from deltazip import _C

        self._c = _C
        self.engine = _C.Engine(_C.EngineConfig(base=base, num_threads=threads))
        for name, path in variants.items():
            self.engine.add_variant(name, path)
        self.next_id = 1

    def run(self, work: list[tuple[str, list[int]]], num_tokens: int) -> tuple[float, float, int]:
        """Runs all requests at once; returns seconds in all, after the first token, and tokens."""
        alive = set()
        start = time.perf_counter()
        first = start
        total = 0
        for variant, prompt in work:
            sampling = self._c.SamplingParams(
                temperature=0.0, max_tokens=num_tokens, ignore_eos=True
            )
            self.engine.submit(self.next_id, variant, prompt, sampling)
            alive.add(self.next_id)
            self.next_id += 1
        while alive:
            for event in self.engine.poll(256, 1000):
                if event.tokens and total == 0:
                    first = time.perf_counter()
                total += len(event.tokens)
                if event.finish.name == "ERROR":
                    raise SystemExit(f"request {event.request_id} failed: {event.error}")
                if event.finish.name != "NONE":
                    alive.discard(event.request_id)
        end = time.perf_counter()
        return end - start, end - first, total


def torch_generate(model: Any, ids: list[int], num_tokens: int) -> float:
    """Seconds of one greedy generate call, prompt included."""
    import torch

    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    assert out.shape[1] == len(ids) + num_tokens
    return time.perf_counter() - start


def load(folder: str, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def decode(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    ids = chat_ids(tokenizer, PROMPTS[0])
    models = {
        "float32": load(args.base, torch.float32),
        "bfloat16": load(args.base, torch.bfloat16),
    }
    engine = Engine(args.base, {}, args.threads)
    engine.run([("", ids)], 8)
    for model in models.values():
        torch_generate(model, ids, 4)
    rates: dict[str, list[float]] = {name: [] for name in [*models, "deltazip"]}
    for _ in range(args.rounds):
        for name, model in models.items():
            whole = torch_generate(model, ids, args.tokens)
            prefill = torch_generate(model, ids, 1)
            rates[name].append((args.tokens - 1) / (whole - prefill))
        _, after_first, count = engine.run([("", ids)], args.tokens)
        rates["deltazip"].append((count - 1) / after_first)
    best = max(models, key=lambda name: statistics.median(rates[name]))
    ratio = statistics.median(rates["deltazip"]) / statistics.median(rates[best])
    return {
        "unit": "tokens/s after the first",
        "rates": {name: summary(values) for name, values in rates.items()},
        "baseline": best,
        "ratio": ratio,
    }


def concurrent(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    folders = {"": args.base}
    deltas = {}
    for text in args.variant:
        name, delta, finetuned = text.split("=")
        deltas[name] = delta
        folders[name] = finetuned
    names = list(folders)
    work = [
        (names[i % len(names)], chat_ids(tokenizer, PROMPTS[i % len(PROMPTS)]))
        for i in range(args.requests)
    ]
    probe = {dtype: load(args.base, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for model in probe.values():
        torch_generate(model, work[0][1], 4)
    seconds = {d: torch_generate(model, work[0][1], 32) for d, model in probe.items()}
    dtype = min(seconds, key=lambda d: seconds[d])
    probe.clear()
    models = {name: load(folder, dtype) for name, folder in folders.items()}
    engine = Engine(args.base, deltas, args.threads)
    engine.run(work, 4)
    for model in models.values():
        torch_generate(model, work[0][1], 2)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(args.rounds):
        theirs.append(sum(torch_generate(models[name], ids, args.tokens) for name, ids in work))
        ours.append(engine.run(work, args.tokens)[0])
    return {
        "unit": f"seconds for {args.requests} requests of {args.tokens} tokens",
        "transformers": {"dtype": str(dtype), **summary(theirs)},
        "deltazip": summary(ours),
        "ratio": statistics.median(theirs) / statistics.median(ours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the result here")
    sub = parser.add_subparsers(dest="what", required=True)
    for name, run, tokens in (("decode", decode, 128), ("concurrent", concurrent, 64)):
        command = sub.add_parser(name)
        command.add_argument("--base", required=True, help="Hugging Face folder")
        command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--tokens", type=int, default=tokens)
        command.set_defaults(run=run)
        if name == "concurrent":
            command.add_argument("--requests", type=int, default=16)
            command.add_argument(
                "--variant", action="append", default=[], metavar="NAME=DELTA=FINETUNED"
            )
    args = parser.parse_args()
    result = {"machine": platform.processor() or platform.machine(), "threads": args.threads}
    result |= args.run(args)
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
