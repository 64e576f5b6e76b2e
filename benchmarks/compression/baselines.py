"""Other ways to make a fine-tune small, each written from its paper.

A method turns the matrices that share their inputs into what artifact.py stores: of the delta
(fine-tuned minus base), or of the whole fine-tuned weights. Where a paper leaves a choice open, the
one that measures better is taken, so that no baseline is beaten by neglect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from artifact import Coded, Codes, LowRank, Plain, Sparse
from deltazip.compress.solve.factor import Factor
from torch import Tensor

GROUP_SIZE = 64
_BLOCK_COLUMNS = 128
_NUM_SHRINKS = 12
_AWQ_STEPS = 20


class Context(NamedTuple):
    """What a method may use besides the weights.

    Attributes:
        hessian: [columns, columns], 2/n * sum(x x^T) of the real inputs; empty if not asked for.
        generator: of the run's seed, on the CPU.
        damping: share of the Hessian's mean diagonal that is added to it.
    """

    hessian: Tensor
    generator: torch.Generator
    damping: float


Encode = Callable[[Sequence[Tensor], Context], Sequence[Coded]]


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        on_delta: compresses fine-tuned minus base; else the fine-tuned weights.
        needs_hessian: walks the calibration tokens through the layers, compressed so far.
        trains_scales: scales are trained afterwards, to the fine-tune's logits.
        source: the paper, and where this differs from it.
    """

    name: str
    source: str
    encode: Encode
    on_delta: bool = True
    needs_hessian: bool = False
    trains_scales: bool = False


# ---- Grids


class Grid(NamedTuple):
    """Scales and zeros [rows, groups] of codes 0..2**bits - 1, exact as stored."""

    scales: Tensor
    zeros: Tensor | None
    bits: int

    @property
    def zero(self) -> int:
        return 1 << (self.bits - 1)

    def expanded(self, group_size: int, columns: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of each weight, [rows, columns] float32."""
        scales = self.scales.float().repeat_interleave(group_size, dim=1)[:, :columns]
        if self.zeros is None:
            return scales, torch.full_like(scales, self.zero)
        return scales, self.zeros.float().repeat_interleave(group_size, dim=1)[:, :columns]

    def codes(self, codes: Tensor, kept: Tensor | None = None) -> Codes:
        return Codes(
            codes.to(torch.uint8).cpu(),
            self.bits,
            self.scales.cpu(),
            None if self.zeros is None else self.zeros.to(torch.uint8).cpu(),
            0 if self.zeros is not None else self.zero,
            kept=None if kept is None else kept.cpu(),
        )


def fit_grid(
    weights: Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    search: bool,
    kept: Tensor | None = None,
) -> Grid:
    """A grid for each group of columns: its range, or a smaller one if that loses less (`search`).

    Symmetric is -2^(b-1)..2^(b-1)-1 over twice the largest magnitude, as GPTQ's code has it.
    """
    rows, columns = weights.shape
    missing = -columns % group_size
    windows = torch.nn.functional.pad(weights, (0, missing)).reshape(rows, -1, group_size)
    count = torch.ones_like(weights) if kept is None else kept.float()
    count = torch.nn.functional.pad(count, (0, missing)).reshape(windows.shape)
    windows = windows * count
    top = 2**bits - 1
    low, high = windows.amin(dim=2).clamp(max=0), windows.amax(dim=2).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best = torch.full_like(low, torch.inf)
    scales, zeros = torch.zeros_like(low), torch.zeros_like(low)
    for shrink in torch.linspace(1.0, 0.3, _NUM_SHRINKS if search else 1).tolist():
        scale = (shrink * (high - low) / top).half().float()
        safe = scale.clamp(min=1e-30)
        zero = torch.full_like(low, (top + 1) / 2) if symmetric else (-shrink * low / safe).round()
        zero.clamp_(0, top)
        rounded = (windows / safe[..., None]).round_().add_(zero[..., None]).clamp_(0, top)
        lost = (((rounded - zero[..., None]) * scale[..., None] - windows) * count).square()
        lost = lost.sum(dim=2)
        better = lost < best
        best = torch.where(better, lost, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return Grid(scales.half(), None if symmetric else zeros, bits)


def nearest(weights: Tensor, scales: Tensor, zeros: Tensor, top: Tensor | int) -> Tensor:
    """Codes in float32."""
    codes = (weights / scales.clamp(min=1e-30)).round().add_(zeros).clamp_(min=0)
    return codes.clamp_(max=top)


def two_of_four(scores: Tensor) -> Tensor:
    """[rows, columns] bool: the larger two of each four neighbours."""
    fours = scores.reshape(scores.shape[0], -1, 4)
    kept = torch.zeros(fours.shape, dtype=torch.bool, device=scores.device)
    kept.scatter_(2, fours.topk(2, dim=2).indices, True)
    return kept.reshape(scores.shape)


def largest(scores: Tensor, keep: float) -> Tensor:
    """[rows, columns] bool: the share `keep` of largest scores of the whole matrix."""
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.reshape(-1).topk(max(1, round(keep * scores.numel()))).indices] = True
    return kept.reshape(scores.shape)


# ---- Error feedback: GPTQ's and SparseGPT's sweep over the columns


def sweep(
    weights: Tensor,
    upper: Tensor,
    grid: tuple[Tensor, Tensor, Tensor | int] | None,
    *,
    prune: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Column after column is rounded, pruned, or both; later columns make up for what it loses.

    Args:
        weights: [rows, columns].
        upper: the Cholesky factor U of the inverse Hessian, U^T U, [columns, columns].
        grid: scales and zeros [rows, columns], and the highest code of all or of each column; None
            leaves kept weights as they are, in fp16.
        prune: 2:4, by w^2 / U_jj^2 at the time a group of four is reached.

    Returns:
        Codes (zero without a grid), values and what is kept, [rows, columns].

    Source: Frantar et al., GPTQ (2022), algorithm 1; Frantar & Alistarh, SparseGPT (2023), sections
    3.3 to 3.5.
    """
    work = weights.clone()
    columns = weights.shape[1]
    done: list[tuple[Tensor, ...]] = []
    for begin in range(0, columns, _BLOCK_COLUMNS):
        here = slice(begin, min(begin + _BLOCK_COLUMNS, columns))
        levels: tuple[Tensor, ...] = ()
        if grid is not None:
            tops = torch.as_tensor(grid[2], device=weights.device).expand(columns)
            levels = (grid[0][:, here], grid[1][:, here], tops[here])
        block = (work[:, here], upper[here, here], *levels)
        *chosen, errors = _sweep_block(prune, *block)
        done.append(tuple(chosen))
        work[:, here.stop :] -= errors @ upper[here, here.stop :]
    codes, values, kept = (torch.cat(parts, dim=1) for parts in zip(*done, strict=True))
    return codes, values, kept


def _sweep_block(
    prune: bool, block: Tensor, upper: Tensor, *levels: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of some neighbouring columns: codes, values, what is kept, errors for the columns after."""
    block, diagonal = block.clone(), upper.diagonal()
    codes, values, errors = (torch.zeros_like(block) for _ in range(3))
    kept = torch.ones(block.shape, dtype=torch.bool, device=block.device)
    for column in range(block.shape[1]):
        if prune and column % 4 == 0:
            four = slice(column, column + 4)
            kept[:, four] = two_of_four(block[:, four].square() / diagonal[four].square())
        current = block[:, column]
        value = current.half().float()
        if levels:
            scale, zero, top = levels[0][:, column], levels[1][:, column], levels[2][column]
            codes[:, column] = nearest(current, scale, zero, top)
            value = (codes[:, column] - zero) * scale
        values[:, column] = value * kept[:, column]
        error = (current - values[:, column]) / diagonal[column]
        errors[:, column] = error
        block[:, column + 1 :] -= error[:, None] * upper[column, column + 1 :]
    return codes, values, kept, errors


def _upper(hessian: Tensor, damping: float) -> Tensor:
    if hessian.shape[0] % 4:
        raise ValueError(f"expected a multiple of 4 columns, got {hessian.shape[0]}")
    return Factor(hessian, damping).upper


def _heights(weights: Sequence[Tensor]) -> list[int]:
    return [weight.shape[0] for weight in weights]


# ---- Methods


def rtn(weights: Sequence[Tensor], context: Context, *, bits: int) -> list[Codes]:
    """2:4 by magnitude, then the nearest of 2^bits levels, ranges searched."""
    out = []
    for weight in weights:
        kept = two_of_four(weight.abs())
        grid = fit_grid(weight, bits, GROUP_SIZE, symmetric=True, search=True, kept=kept)
        codes = nearest(weight, *grid.expanded(GROUP_SIZE, weight.shape[1]), 2**bits - 1)
        out.append(grid.codes(codes * kept, kept))
    return out


def sparse_gpt(
    weights: Sequence[Tensor],
    context: Context,
    *,
    bits: int | None,
    group_size: int | None,
    search: bool,
) -> Sequence[Coded]:
    """2:4 and, with `bits`, rounding in the same sweep. No group size: one scale for a row."""
    stacked = torch.cat(list(weights))
    columns = stacked.shape[1]
    upper = _upper(context.hessian, context.damping)
    if bits is None:
        _, values, kept = sweep(stacked, upper, None, prune=True)
        heights = _heights(weights)
        parts = (torch.split(part.cpu(), heights) for part in (values.half(), kept))
        return [Sparse(value, mask) for value, mask in zip(*parts, strict=True)]
    group = group_size or columns
    grid = fit_grid(stacked, bits, group, symmetric=True, search=search)
    levels = (*grid.expanded(group, columns), 2**bits - 1)
    codes, _, kept = sweep(stacked, upper, levels, prune=True)
    return grid.codes(codes * kept, kept).split(_heights(weights))


def gptq(weights: Sequence[Tensor], context: Context, *, bits: int) -> list[Codes]:
    """Dense, a searched range for each group, columns of large inputs first."""
    stacked = torch.cat(list(weights))
    order = context.hessian.diagonal().argsort(descending=True, stable=True)
    upper = _upper(context.hessian[order][:, order], context.damping)
    grid = fit_grid(stacked, bits, GROUP_SIZE, symmetric=False, search=True)
    scales, zeros = grid.expanded(GROUP_SIZE, stacked.shape[1])
    levels = (scales[:, order], zeros[:, order], 2**bits - 1)
    codes, _, _ = sweep(stacked[:, order], upper, levels, prune=False)
    return grid.codes(codes[:, order.argsort()]).split(_heights(weights))


def awq(weights: Sequence[Tensor], context: Context, *, bits: int) -> list[Codes]:
    """Columns of large inputs are scaled up before rounding to nearest; the power is searched."""
    stacked = torch.cat(list(weights))
    size = context.hessian.diagonal().clamp(min=1e-12).sqrt()

    def lost(codes: Codes) -> float:
        difference = codes.dense().to(stacked.device) - stacked
        return float(((difference @ context.hessian) * difference).sum())

    powers = (size ** (step / _AWQ_STEPS) for step in range(_AWQ_STEPS))
    factors = [(p / (p.max() * p.min()).sqrt()).half().float() for p in powers]
    best = min(factors, key=lambda f: lost(_awq_codes(stacked, f, bits)))
    # Narrower ranges, as AWQ's clipping, where they help: they are costly to search at each power.
    last = [(best, False), (best, True), (factors[0], True)]
    codes = min((_awq_codes(stacked, f, bits, search) for f, search in last), key=lost)
    return codes.split(_heights(weights))


def _awq_codes(weights: Tensor, factors: Tensor, bits: int, search: bool = False) -> Codes:
    scaled = weights * factors
    grid = fit_grid(scaled, bits, GROUP_SIZE, symmetric=False, search=search)
    codes = nearest(scaled, *grid.expanded(GROUP_SIZE, weights.shape[1]), 2**bits - 1)
    return dataclasses.replace(grid.codes(codes), columns=(1.0 / factors).half().cpu())


def bit_delta(weights: Sequence[Tensor], context: Context) -> list[Codes]:
    """Signs, and the one scale that is nearest to the delta in L2: its mean magnitude."""
    return [
        Codes((w >= 0).to(torch.uint8).cpu(), 1, w.abs().mean().reshape(1, 1).cpu(), zero=1, step=2)
        for w in weights
    ]


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """L [k, rows] and R [k, columns] with matrix = L^T R, R orthonormal, largest first; k = min."""
    rows, columns = matrix.shape
    if rows < columns:
        right, left = thin_svd(matrix.mT)
        sizes = right.square().sum(dim=1, keepdim=True).sqrt()
        return left * sizes, right / sizes.clamp(min=1e-30)
    double = matrix.double()
    _, vectors = torch.linalg.eigh(double.mT @ double)
    vectors = vectors.flip(1)
    return (double @ vectors).mT.float(), vectors.mT.float()


def svd(weights: Sequence[Tensor], context: Context, *, rank: int) -> list[LowRank]:
    """The best approximation of that rank, factors of equal size in fp16."""
    out = []
    for weight in weights:
        left, right = (factor[:rank] for factor in thin_svd(weight))
        balance = left.square().sum(dim=1, keepdim=True).sqrt().sqrt().clamp(min=1e-30)
        pair = Plain((left / balance).half().cpu()), Plain((right * balance).half().cpu())
        out.append(LowRank((pair,)))
    return out


# Delta-CoMe's triple precision: bits, and singular vectors at most; the last fill the budget.
_MIX = ((8, 2), (3, 32), (2, 1 << 30))


def delta_come(weights: Sequence[Tensor], context: Context, *, bits: float) -> list[LowRank]:
    """Singular vectors at 8, 3 and 2 bits by rank, rounded with error feedback, right first."""
    upper = _upper(context.hessian, context.damping)
    return [_mixed_rank(weight, upper, context, bits) for weight in weights]


def mixed_ranks(rows: int, columns: int, bits: float) -> list[tuple[int, int]]:
    """(bits, vectors) of each class within a budget of so many bits a weight, scales counted."""
    left, out, most = bits * rows * columns, list[tuple[int, int]](), min(rows, columns)
    for width, limit in _MIX:
        groups = -(-rows // GROUP_SIZE) + -(-columns // GROUP_SIZE)
        cost = width * (rows + columns) + (16 + width) * groups
        count = min(limit, int(left // cost), most)
        if count:
            out.append((width, count))
            left, most = left - count * cost, most - count
    if not out:
        raise ValueError(f"no singular vector of a [{rows}, {columns}] matrix fits {bits} bits")
    return out


def _mixed_rank(weight: Tensor, upper: Tensor, context: Context, bits: float) -> LowRank:
    rows, columns = weight.shape
    classes = mixed_ranks(rows, columns, bits)
    rank = sum(count for _, count in classes)
    left, right = (factor[:rank] for factor in thin_svd(weight))
    counts = [count for _, count in classes]
    rights: list[Codes] = []
    for (width, _), part in zip(classes, torch.split(right, counts), strict=True):
        grid = fit_grid(part, width, GROUP_SIZE, symmetric=False, search=True)
        levels = (*grid.expanded(GROUP_SIZE, columns), 2**width - 1)
        rights.append(grid.codes(sweep(part, upper, levels, prune=False)[0]))
    seen = torch.cat([part.dense() for part in rights]).to(weight.device)
    inner = seen @ context.hessian @ seen.mT
    inner = torch.nn.functional.pad(inner, (0, -rank % 4, 0, -rank % 4))
    upper_inner = Factor(inner, context.damping).upper[:rank, :rank]
    grids = [
        fit_grid(part, width, GROUP_SIZE, symmetric=False, search=True)
        for (width, _), part in zip(classes, torch.split(left, counts), strict=True)
    ]
    expanded = [grid.expanded(GROUP_SIZE, rows) for grid in grids]
    scales, zeros = (torch.cat([pair[i] for pair in expanded]).mT for i in range(2))
    top = torch.cat([torch.full((n,), 2.0**w - 1, device=weight.device) for w, n in classes])
    codes, _, _ = sweep(left.mT.contiguous(), upper_inner, (scales, zeros, top), prune=False)
    lefts = [
        grid.codes(part) for grid, part in zip(grids, torch.split(codes.mT, counts), strict=True)
    ]
    return LowRank(tuple(zip(lefts, rights, strict=True)))


def dare(weights: Sequence[Tensor], context: Context, *, keep: float) -> list[Sparse]:
    """Each weight stays with probability `keep`, divided by it: the same on average."""
    out = []
    for weight in weights:
        kept = torch.rand(weight.shape, generator=context.generator) < keep
        out.append(Sparse((weight.cpu() * kept / keep).half(), kept))
    return out


def magnitude(weights: Sequence[Tensor], context: Context, *, keep: float) -> list[Sparse]:
    """The largest of each matrix stay as they are."""
    kept = [largest(weight.abs(), keep) for weight in weights]
    return [Sparse((w * k).half().cpu(), k.cpu()) for w, k in zip(weights, kept, strict=True)]
