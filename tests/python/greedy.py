"""Greedy tokens of DeltaZip against transformers, wherever the reference has a clear choice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import device
import numpy as np
import reference
import torch

NUM_GREEDY = 64


def check_greedy(folder: Path, model: Any, prompts: list[list[int]], *arguments: str) -> None:
    """Each of our 64 greedy tokens after each prompt is the reference's, where it has a choice.

    The reference is shown prompt + our tokens in one pass. By induction its own 64 steps would
    choose the same: each choice is made on the same tokens before it.

    In float32 a choice counts if its top-2 gap is above 0.01, a thousandth of these logits; on a
    GPU, which rounds activations, above device.GAP. In bfloat16, where the reference rounds every
    activation and its logits, the gap must be above what rounding can do to two logits: twice the
    95th percentile, over all positions, of the largest difference between its bfloat16 and float32
    logits of the five likeliest tokens.
    """
    rounded_model = copy.deepcopy(model).to(torch.bfloat16)
    ours = reference.our_greedy(folder, prompts, NUM_GREEDY, *arguments)
    rounding: list[float] = []
    gaps: list[float] = []
    same: list[bool] = []
    for prompt, chosen in zip(prompts, ours, strict=True):
        tokens = prompt + chosen[:-1].tolist()
        exact = reference.reference_logits(model, tokens)[len(prompt) - 1 :]
        top = np.sort(exact, axis=1)
        wrong = (top[:, -1] - top[:, -2] > max(0.01, device.GAP)) & (exact.argmax(axis=1) != chosen)
        assert not wrong.any(), f"prompt {prompt}: tokens {np.flatnonzero(wrong)} of {chosen}"

        rounded = reference.reference_logits(rounded_model, tokens)[len(prompt) - 1 :]
        likeliest = np.argsort(-exact, axis=1)[:, :5]
        difference = np.abs(np.take_along_axis(rounded - exact, likeliest, axis=1)).max(axis=1)
        top = np.sort(rounded, axis=1)
        rounding += difference.tolist()
        gaps += (top[:, -1] - top[:, -2]).tolist()
        same += (rounded.argmax(axis=1) == chosen).tolist()

    clear = np.array(gaps) > 2 * np.quantile(rounding, 0.95)
    assert np.array(same)[clear].all(), np.flatnonzero(clear & ~np.array(same))
    assert clear.mean() > 0.5, f"only {clear.mean():.0%} of the choices are clear"
