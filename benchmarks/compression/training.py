"""BitDelta's second step: the scales of all matrices, trained to the fine-tune's logits."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from artifact import Coded, Codes
from deltazip.compress.scoring.closeness import load_model
from deltazip.compress.walk import Models
from torch import Tensor
from torch.func import functional_call

BATCH_SIZE = 4
LEARNING_RATE = 0.01


def train_scales(
    folder: Path,
    models: Models,
    coded: Mapping[str, Codes],
    sequences: Sequence[tuple[int, ...]],
    *,
    steps: int,
    seed: int,
    device: str,
    learning_rate: float = LEARNING_RATE,
) -> dict[str, Coded]:
    """One scale a matrix, moved by Adam on the mean squared error of the logits.

    What is learnt is the logarithm of a factor on each scale: scales differ by orders of magnitude
    between matrices and models, and one learning rate must suit them all.

    Args:
        folder: the model with untrained scales, whose other tensors stay.

    Source: Liu et al., BitDelta (2024), section 3.2: 200 steps of four sequences.
    """
    student = load_model(folder, None, device=device).requires_grad_(False)
    teacher = load_model(models.finetuned.folder, None, device=device).requires_grad_(False)
    parameters = dict(student.named_parameters())
    names = sorted(coded)
    bases = {name: models.base.read(name).float().to(device) for name in names}
    with torch.no_grad():
        for name in names:  # from here on the difference alone
            parameters[name].sub_(bases[name])
    moves = torch.zeros(len(names), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([moves], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    order = random.Random(seed)
    for _ in range(steps):
        ids, mask = _padded(order.sample(sequences, min(BATCH_SIZE, len(sequences))), device)
        factors = moves.exp()
        weights = {
            name: torch.addcmul(bases[name], parameters[name], factors[i])
            for i, name in enumerate(names)
        }
        ours = functional_call(student, weights, kwargs=_inputs(ids, mask)).logits
        with torch.no_grad():
            theirs = teacher(**_inputs(ids, mask)).logits
        loss = (ours - theirs)[mask.bool()].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    factors = moves.detach().exp().cpu()
    return {
        name: Codes(c.codes, c.bits, c.scales * factors[i], zero=c.zero, step=c.step)
        for i, name in enumerate(names)
        for c in (coded[name],)
    }


def _inputs(ids: Tensor, mask: Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def _padded(sequences: Sequence[tuple[int, ...]], device: str) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids in sequences)
    ids = torch.zeros((len(sequences), longest), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)
