"""What is asked: prompts of random tokens, lengths, and who is asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Ask", "Mix", "lognormal_lengths", "random_prompt"]


@dataclass(frozen=True)
class Ask:
    """One request: its variant ("" is the base), prompt tokens and output length."""

    variant: str
    prompt: list[int]
    num_output: int


@dataclass(frozen=True)
class Mix:
    """How requests spread over variants.

    Attributes:
        kind: base (no variant), even (in turn) or zipf (the first one most popular).
        num_variants: how many of the variants take part.
    """

    kind: str
    num_variants: int = 0

    @classmethod
    def parse(cls, text: str, num_known: int) -> Mix:
        """`base`, `even`, `even:16`, `zipf`, `zipf:32`; without a number, all variants.

        Raises:
            ValueError: neither of these, or more variants than there are.
        """
        kind, _, number = text.partition(":")
        if kind == "base" and not number:
            return cls("base")
        if kind not in ("even", "zipf") or (number and not number.isdigit()):
            raise ValueError(f"--mix: expected base, even, even:N, zipf or zipf:N, got '{text}'")
        count = int(number) if number else num_known
        if not 1 <= count <= num_known:
            raise ValueError(f"--mix {text}: expected 1 to {num_known} variants, got {count}")
        return cls(kind, count)

    @property
    def name(self) -> str:
        return self.kind if self.kind == "base" else f"{self.kind}:{self.num_variants}"

    def assign(self, names: Sequence[str], count: int, seed: int) -> list[str]:
        """The variant of each of `count` requests. Zipf: weight 1 / rank, drawn at random."""
        taken = names[: self.num_variants]
        if self.kind == "base":
            return [""] * count
        if self.kind == "even":
            return [taken[i % len(taken)] for i in range(count)]
        weights = [1.0 / (rank + 1) for rank in range(len(taken))]
        return random.Random(seed).choices(taken, weights, k=count)


def random_prompt(length: int, vocab: int, rng: random.Random) -> list[int]:
    """Token ids without the first three, which are special in many vocabularies."""
    return rng.choices(range(min(3, vocab - 1), vocab), k=length)


def lognormal_lengths(count: int) -> tuple[list[int], list[int]]:
    """Prompt and output lengths of a chat-like mix: medians 134 and 148, long tails, one seed."""
    rng = random.Random(7)
    prompts = [min(1024, max(8, int(rng.lognormvariate(4.9, 0.9)))) for _ in range(count)]
    outputs = [min(512, max(8, int(rng.lognormvariate(5.0, 0.8)))) for _ in range(count)]
    return prompts, outputs
