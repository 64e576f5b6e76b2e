"""Values for groups of four columns, and scales for groups of columns, for each type of delta.

The cost of leaving an error d (a row of four) in a group is d C d^T, where C comes from the inverse
Hessian: what is left once every later column has made up for d as well as it can.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from deltazip.compress.pack import PAIRS, SIGN_STATES, TERNARY_STATES, DeltaType

_NUM_SCALE_CANDIDATES = 10
_FP16_MAX = 65504.0
SCALE_BITS = 4
"""Bits of a scale's mantissa, the leading one not counted."""
FULL_SCALE_BITS = 10
"""The same of an 8-bit matrix, whose scales must be as fine as its values."""


def fp16_scales(scales: Tensor, mantissa_bits: int = SCALE_BITS) -> Tensor:
    """Rounded as they will be stored, so that values are chosen for the scale that is used.

    Fewer bits than fp16 has: a step of 3 % is finer than the search, and what is always zero costs
    nothing once packed. By the mantissa, so that subnormal scales keep what fp16 has of them.
    """
    mantissa, exponent = torch.frexp(scales.clamp(min=0.0, max=_FP16_MAX))
    steps = float(2 << mantissa_bits)
    rounded = torch.ldexp((mantissa * steps).round_() / steps, exponent)
    return rounded.clamp_(max=_FP16_MAX).half().float()


Table = tuple[Tensor, ...]


class Chooser:
    """How one type turns weights into values."""

    kept_of_four = 2

    def tables(self, cost: Tensor) -> Table:
        """What `choose` needs to know of each group, computed for all of them at once.

        cost: [groups, 4, 4], C above. Returns tensors [groups, ...].
        """
        raise NotImplementedError

    def choose(self, weights: Tensor, scale: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        """The values of one group of four columns.

        Args:
            weights: [rows, 4].
            scale: [rows, 1].
            table: of the group, without the first dimension.

        Returns:
            Values [rows, 4], whole numbers in float32, and the kept pair's number [rows], uint8.
        """
        raise NotImplementedError

    def nearest(self, weights: Tensor, scale: Tensor) -> Tensor:
        """The value each weight would get by itself, if kept."""
        raise NotImplementedError

    def candidates(self, weights: Tensor) -> Tensor:
        """[candidates, rows]: scales to try for a window of columns [rows, columns]."""
        raise NotImplementedError

    def search_scale(self, weights: Tensor, saliency: Tensor) -> Tensor:
        """The scale [rows] that loses least of weights [rows, columns], columns weighted."""
        best = torch.full((weights.shape[0],), -torch.inf, device=weights.device)
        found = torch.zeros(weights.shape[0], device=weights.device)
        for scale in fp16_scales(self.candidates(weights)):
            kept = self.nearest(weights, scale[:, None]) * scale[:, None]
            gains = (2.0 * weights - kept) * kept * saliency  # w^2 - (w - kept)^2
            if self.kept_of_four == 1:
                total = gains.reshape(weights.shape[0], -1, 4).amax(dim=2).sum(dim=1)
            elif self.kept_of_four == 2:
                a, b, c, d = gains.reshape(weights.shape[0], -1, 4).unbind(dim=2)
                # The larger two of four, without sorting.
                across = torch.maximum(a, b).add_(torch.maximum(c, d))
                total = torch.maximum(across, torch.maximum(a + b, c + d)).sum(dim=1)
            else:
                total = gains.sum(dim=1)
            better = total > best
            best = torch.where(better, total, best)
            found = torch.where(better, scale, found)
        return found


class StateChooser(Chooser):
    """Types with few states a group: all are tried."""

    def __init__(self, states: Tensor, kept: Tensor) -> None:
        self.states, self.kept = states, kept
        self.largest = float(states.max())
        self.kept_of_four = int(states.count_nonzero(dim=1).max())

    def tables(self, cost: Tensor) -> Table:
        # |w - s v|^2_C = const + s (s v C v^T - 2 w C v^T), and s > 0 does not move the minimum.
        weighted = self.states @ cost  # [groups, states, 4]
        squares = (weighted * self.states).sum(dim=2)
        return (torch.cat([-2.0 * weighted.mT, squares[:, None]], dim=1),)

    def choose(self, weights: Tensor, scale: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        state = (torch.cat([weights, scale], dim=1) @ table[0]).argmin(dim=1)
        return self.states[state], self.kept[state]

    def nearest(self, weights: Tensor, scale: Tensor) -> Tensor:
        sign = torch.where(weights < 0, -1.0, 1.0)
        if self.kept_of_four == 1:
            return sign
        if self.largest == 1.0:
            return sign * (weights.abs() > 0.5 * scale)
        return sign * torch.where(weights.abs() > 2.0 * scale, 3.0, 1.0)

    def candidates(self, weights: Tensor) -> Tensor:
        # In units of the window's spread; normal weights want about 1.45 (one sign of four), 1.25
        # (ternary), 0.5 (2-bit).
        spread = weights.square().mean(dim=1).sqrt()
        low, high = (0.8, 2.0) if self.largest == 1.0 else (0.3, 0.8)
        if self.kept_of_four == 1:
            low, high = 1.0, 2.2
        shares = torch.linspace(low, high, _NUM_SCALE_CANDIDATES, device=weights.device)
        return shares[:, None] * spread


class PairChooser(Chooser):
    """Four bits under 2:4: each of the six pairs, its two values rounded one after the other."""

    def __init__(self, low: int, high: int, device: torch.device) -> None:
        self.low, self.high = low, high
        self.pairs = torch.tensor(PAIRS, device=device)
        rest = [[i for i in range(4) if i not in pair] for pair in PAIRS]
        self.rest = torch.tensor(rest, device=device)
        self.take = torch.nn.functional.one_hot(self.pairs, 4).float()  # [6, 2, 4]
        self.take_rest = torch.nn.functional.one_hot(self.rest, 4).float()

    def tables(self, cost: Tensor) -> Table:
        cost = cost[:, None]  # [groups, 1, 4, 4]
        inner = self.take @ cost @ self.take.mT  # [groups, 6, 2, 2], of the kept two
        outer = self.take @ cost @ self.take_rest.mT
        # What the kept two should be, given that the other two become zero, and what that loses.
        share = torch.linalg.solve(inner, outer)
        ideal_of = self.take + share @ self.take_rest  # [groups, 6, 2, 4]
        lost = self.take_rest @ cost @ self.take_rest.mT - outer.mT @ share
        lost_of = torch.linalg.cholesky(lost).mT @ self.take_rest
        table = torch.cat([ideal_of, lost_of], dim=2).transpose(1, 2).reshape(-1, 24, 4)
        first, both = inner[..., 0, 0], inner[..., 0, 1]
        # What is left of the second's error after the first has made up for it.
        left = inner[..., 1, 1] - both.square() / first
        return table, (both / first)[..., None], first[..., None], left[..., None]

    def choose(self, weights: Tensor, scale: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        ideals, ratio, inner, left = table
        ideal0, ideal1, lost0, lost1 = (ideals @ weights.mT).reshape(4, 6, -1)
        steps = scale.mT.clamp(min=1e-30)
        second = (ideal1 / steps).round_().clamp_(self.low, self.high)
        error1 = ideal1 - second * steps
        ideal0 = ideal0 + ratio * error1
        first = (ideal0 / steps).round_().clamp_(self.low, self.high)
        error0 = ideal0 - first * steps
        total = error0.square() * inner + error1.square() * left
        pair = (total + lost0.square() + lost1.square()).argmin(dim=0)
        values = torch.zeros_like(weights)
        places = self.pairs[pair]
        values.scatter_(1, places[:, :1], first.gather(0, pair[None]).mT)
        values.scatter_(1, places[:, 1:], second.gather(0, pair[None]).mT)
        return values, pair.to(torch.uint8)

    def nearest(self, weights: Tensor, scale: Tensor) -> Tensor:
        return (weights / scale.clamp(min=1e-30)).round().clamp(self.low, self.high)

    def candidates(self, weights: Tensor) -> Tensor:
        shares = torch.linspace(0.6, 1.1, _NUM_SCALE_CANDIDATES, device=weights.device)
        return shares[:, None] * weights.abs().amax(dim=1) / -self.low


class DenseChooser(Chooser):
    """No mask: every column is rounded, the columns before it made up for."""

    kept_of_four = 4

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def tables(self, cost: Tensor) -> Table:
        lower = torch.linalg.cholesky(cost.flip(1, 2)).flip(1, 2)  # C = A A^T, A upper
        return (lower / lower.diagonal(dim1=1, dim2=2)[:, None],)

    def choose(self, weights: Tensor, scale: Tensor, table: Table) -> tuple[Tensor, Tensor]:
        lower = table[0]
        values = torch.zeros_like(weights)
        errors = torch.zeros_like(weights)
        for j in range(4):
            ideal = weights[:, j] + errors[:, :j] @ lower[:j, j]
            values[:, j] = self.nearest(ideal[:, None], scale)[:, 0]
            errors[:, j] = weights[:, j] - values[:, j] * scale[:, 0]
        return values, torch.zeros(len(weights), dtype=torch.uint8, device=weights.device)

    def nearest(self, weights: Tensor, scale: Tensor) -> Tensor:
        return (weights / scale.clamp(min=1e-30)).round().clamp(self.low, self.high)

    def candidates(self, weights: Tensor) -> Tensor:
        lowest = 0.55 if self.high < 127 else 0.8
        shares = torch.linspace(lowest, 1.1, _NUM_SCALE_CANDIDATES, device=weights.device)
        return shares[:, None] * weights.abs().amax(dim=1) / -self.low


def chooser_for(type_: DeltaType, device: torch.device) -> Chooser:
    if type_ is DeltaType.SPARSE24_TERNARY:
        states = torch.from_numpy(TERNARY_STATES).float().to(device)
        return StateChooser(states, torch.zeros(32, dtype=torch.uint8, device=device))
    if type_ is DeltaType.SPARSE14_SIGN:
        states = torch.from_numpy(SIGN_STATES).float().to(device)
        return StateChooser(states, torch.zeros(8, dtype=torch.uint8, device=device))
    if type_ is DeltaType.SPARSE24_INT2:
        return StateChooser(*_int2_states(device))
    if type_ is DeltaType.SPARSE24_INT4:
        return PairChooser(-8, 7, device)
    if type_ is DeltaType.DENSE_INT4:
        return DenseChooser(-8, 7)
    if type_ is DeltaType.DENSE_INT8:
        return DenseChooser(-128, 127)
    raise ValueError(f"type {type_.value} has no codes")


def _int2_states(device: torch.device) -> tuple[Tensor, Tensor]:
    levels = (-3.0, -1.0, 1.0, 3.0)
    choices = itertools.product(range(6), levels, levels)
    states, kept = torch.zeros(96, 4), torch.zeros(96, dtype=torch.uint8)
    for number, (pair, first, second) in enumerate(choices):
        states[number, PAIRS[pair][0]], states[number, PAIRS[pair][1]] = first, second
        kept[number] = pair
    return states.to(device), kept.to(device)
