"""Intervals for what is measured on a sample of items. Every one covers 95 %.

Items are the unit that is drawn: the tokens of an answer stand or fall together, so a mean over
tokens is resampled by whole items, and two variants are compared on the same items, in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Z = 1.959963984540054
NUM_RESAMPLES = 2000


class Interval(NamedTuple):
    """A value and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def wilson(num_right: int, num_items: int) -> Interval:
    """A share of right answers, with Wilson's score interval.

    It has a width at 0 % and 100 % too, where the usual one claims certainty.

    Raises:
        ValueError: there are no items, or more right answers than items.

    Source: Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    if not 0 <= num_right <= num_items or num_items == 0:
        raise ValueError(f"expected 0 <= right <= items > 0, got {num_right} of {num_items}")
    share, z2 = num_right / num_items, Z * Z
    middle = (share + z2 / (2 * num_items)) / (1 + z2 / num_items)
    half = Z / (1 + z2 / num_items)
    half *= math.sqrt(share * (1 - share) / num_items + z2 / (4 * num_items**2))
    return Interval(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> Interval:
    """Share right in `ours` less share right in `theirs`, answers to the same items.

    The bounds are Wald's with half an answer added to each of the four outcomes, so that full
    agreement on few items does not look like certainty.

    Raises:
        ValueError: not as many answers in both, or none.

    Source: Agresti & Min, Simple improved confidence intervals for comparing matched proportions
    (2005).
    """
    better, worse = _discordant(ours, theirs)
    count = len(ours)
    value, total = (better - worse) / count, count + 2
    middle = (better - worse) / total
    half = Z * math.sqrt(better + worse + 1 - (better - worse) ** 2 / total) / total
    return Interval(
        value, min(value, max(-1.0, middle - half)), max(value, min(1.0, middle + half))
    )


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Probability of so uneven a split of the differing answers if both were equally good.

    Two-sided and exact: the binomial distribution, not its normal approximation.

    Source: McNemar, Note on the sampling error of the difference between correlated proportions
    (1947).
    """
    better, worse = _discordant(ours, theirs)
    count = better + worse
    tail = sum(math.comb(count, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2.0 * tail / 2.0**count)


def _discordant(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[int, int]:
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"expected as many answers in both, got {len(ours)} and {len(theirs)}")
    pairs = list(zip(ours, theirs, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def mean_per_token(sums: Sequence[float], num_tokens: Sequence[int], *, seed: int = 0) -> Interval:
    """A mean over all tokens of all items, with the bootstrap's percentile interval over items.

    Args:
        sums: of each item, over its tokens.
        num_tokens: of each item.
        seed: of the resampling.

    Raises:
        ValueError: not as many counts as sums, or none.
    """
    if len(sums) != len(num_tokens) or not sums:
        raise ValueError(f"expected a count for each sum, got {len(sums)} and {len(num_tokens)}")
    values: npt.NDArray[np.float64] = np.asarray(sums, np.float64)
    counts: npt.NDArray[np.float64] = np.asarray(num_tokens, np.float64)
    generator: Any = np.random.default_rng(seed)
    picks = generator.integers(0, len(values), (NUM_RESAMPLES, len(values)))
    means = values[picks].sum(axis=1) / counts[picks].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    value = float(values.sum() / counts.sum())
    return Interval(value, min(value, float(low)), max(value, float(high)))
