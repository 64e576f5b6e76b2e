"""Trains every weight of a model on a file of questions and answers: one more thing to compress.

    python benchmarks/compression/finetune.py BASE TRAIN.jsonl OUT --device cuda

AdamW on the answers' tokens, weights in float32 and products in bfloat16; OUT is a model folder in
bfloat16. The same seed gives the same order of samples; sums on a GPU may still differ.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from deltazip.compress.calibration import TokenSequence, encode, load_samples, load_tokenizer
from torch import Tensor

_NO_TARGET = -100
_WARM_UP = 0.05  # share of the steps


def batch_of(
    sequences: Sequence[TokenSequence], end: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and targets [sequences, longest]: the answer and its end."""
    longest = max(len(sequence.ids) for sequence in sequences) + 1
    ids = torch.full((len(sequences), longest), end)
    mask = torch.zeros_like(ids)
    targets = torch.full_like(ids, _NO_TARGET)
    for row, sequence in enumerate(sequences):
        whole = torch.tensor([*sequence.ids, end])
        ids[row, : len(whole)] = whole
        mask[row, : len(whole)] = 1
        targets[row, sequence.prompt_length : len(whole)] = whole[sequence.prompt_length :]
    return ids.to(device), mask.to(device), targets.to(device)


def train(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(args.base)
    samples = [encode(tokenizer, sample) for sample in load_samples(args.train)]
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).to(args.device)
    end = model.generation_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    if end is None:
        raise SystemExit(f"error: {args.base}: generation_config.json names no eos_token_id")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    per_epoch = -(-len(samples) // args.batch_size)
    steps = args.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (_WARM_UP * steps + 1)) * (1 - step / steps)
    )
    order, started = random.Random(args.seed), time.monotonic()
    for epoch in range(args.epochs):
        order.shuffle(samples)
        total = torch.zeros((), device=args.device)
        for at in range(0, len(samples), args.batch_size):
            ids, mask, targets = batch_of(samples[at : at + args.batch_size], end, args.device)
            with torch.autocast(torch.device(args.device).type, torch.bfloat16):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten()
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.detach()
        seconds = time.monotonic() - started
        print(
            f"epoch {epoch + 1}: loss {float(total) / per_epoch:.4f}, {seconds:.0f} s", flush=True
        )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)  # type: ignore[attr-defined]


def main() -> None:
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("base", type=Path)
    out.add_argument("train", type=Path)
    out.add_argument("out", type=Path)
    out.add_argument("--epochs", type=int, default=4)
    out.add_argument("--batch-size", type=int, default=32)
    out.add_argument("--learning-rate", type=float, default=1e-4)
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--device", default="cpu")
    train(out.parse_args())


if __name__ == "__main__":
    main()
