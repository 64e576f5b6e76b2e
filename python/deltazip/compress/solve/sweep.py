"""The solver's pass over the columns, a block of them at a time, and the refit of scales after it.

The unit of work is a group of four neighbouring columns, for all rows at once. With U the upper
Cholesky factor of the inverse Hessian and B the four columns, fixing their values v leaves the
error e = (w - v) inv(U_BB), costs |e|^2 once every later column has made up for it as well as it
can, and the later columns become w - e U_B,later.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from deltazip.compress.solve.choosers import Chooser, Table, fp16_scales
from deltazip.compress.solve.factor import Factor

# Columns whose errors reach all later ones at once: small for the cache, large for the product.
_BLOCK_COLUMNS = 128
_REFIT_SWEEPS = 2


def expand(scales: Tensor, group_size: int, columns: int) -> Tensor:
    return scales.repeat_interleave(group_size, dim=1)[:, :columns]


def _blocks(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Runs of columns that hold whole scale groups, or that a long scale group is made of."""
    if group_size <= _BLOCK_COLUMNS:
        size = _BLOCK_COLUMNS // group_size * group_size
    else:
        size = max(n for n in range(32, _BLOCK_COLUMNS + 1, 32) if group_size % n == 0)
    for begin in range(0, columns, size):
        yield begin, min(begin + size, columns)


class _Block(NamedTuple):
    """Some neighbouring columns and what their values are chosen by."""

    weights: Tensor  # [rows, columns]
    upper: Tensor  # [columns, columns], of the factor
    inverse: Tensor  # [groups of four, 4, 4], of the factor
    saliency: Tensor  # [columns]
    scales: Tensor  # [rows, 1] of the scale group the block lies in; [rows, 0]: to be searched
    table: Table  # [groups of four, ...] each


class _Chosen(NamedTuple):
    values: Tensor  # [rows, columns]
    kept: Tensor  # [rows, groups of four]
    scales: Tensor  # [rows, scale groups]
    errors: Tensor  # [rows, columns], for the columns after the block


def _choose_block(block: _Block, group_size: int, chooser: Chooser) -> _Chosen:
    weights, upper = block.weights.clone(), block.upper
    rows, columns = weights.shape
    values, errors = torch.zeros_like(weights), torch.zeros_like(weights)
    kept = torch.zeros((rows, columns // 4), dtype=torch.uint8, device=weights.device)
    searches = block.scales.shape[1] == 0
    found = [] if searches else [block.scales]
    for at in range(0, columns, 4):
        if searches and at % group_size == 0:
            window = slice(at, min(at + group_size, columns))
            scale = chooser.search_scale(weights[:, window], block.saliency[window])
            found.append(scale[:, None])
        here, group, scale = slice(at, at + 4), at // 4, found[-1]
        current = weights[:, here]
        table = tuple(part[group] for part in block.table)
        chosen, kept[:, group] = chooser.choose(current, scale, table)
        values[:, here] = chosen
        error = (current - chosen * scale) @ block.inverse[group]
        errors[:, here] = error
        weights[:, at + 4 :] -= error @ upper[here, at + 4 :]
    return _Chosen(values, kept, torch.cat(found, dim=1), errors)


def sweep(
    target: Tensor, factor: Factor, group_size: int, chooser: Chooser
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the columns of target [rows, columns].

    Returns values, kept pairs and scales, exact in fp16.
    """
    rows, columns = target.shape
    tables = chooser.tables(factor.cost)
    saliency = factor.cost.diagonal(dim1=1, dim2=2).reshape(-1)
    weights = target.clone()
    values = torch.zeros_like(weights)
    kept = torch.zeros((rows, columns // 4), dtype=torch.uint8, device=target.device)
    found = torch.zeros((rows, -(-columns // group_size)), device=target.device)
    for begin, end in _blocks(columns, group_size):
        here, groups = slice(begin, end), slice(begin // 4, end // 4)
        numbers = slice(begin // group_size, -(-end // group_size))
        scales = found[:, :0]
        if group_size > _BLOCK_COLUMNS:  # the block is a part of a scale group
            if begin % group_size == 0:
                window = slice(begin, min(begin + group_size, columns))
                searched = chooser.search_scale(weights[:, window], saliency[window])
                found[:, numbers] = searched[:, None]
            scales = found[:, numbers]
        block = _Block(
            weights[:, here],
            factor.upper[here, here],
            factor.inverse[groups],
            saliency[here],
            scales,
            tuple(part[groups] for part in tables),
        )
        chosen = _choose_block(block, group_size, chooser)
        values[:, here], kept[:, groups] = chosen.values, chosen.kept
        found[:, numbers] = chosen.scales
        weights[:, end:] -= chosen.errors @ factor.upper[here, end:]
    return values, kept, found


def refit_scales(
    target: Tensor,
    values: Tensor,
    scales: Tensor,
    factor: Factor,
    group_size: int,
    scale_bits: int,
) -> Tensor:
    """Scales that lose least on the calibration inputs given the values, group after group."""
    hessian, columns = factor.hessian, target.shape[1]
    scales = scales.clone()
    difference = target - expand(scales, group_size, columns) * values
    for _ in range(_REFIT_SWEEPS):
        gradient = difference @ hessian
        for number in range(scales.shape[1]):
            part = slice(number * group_size, min((number + 1) * group_size, columns))
            ours = values[:, part]
            reach = ours @ hessian[part]  # [rows, columns]
            curvature = (reach[:, part] * ours).sum(dim=1)
            step = (gradient[:, part] * ours).sum(dim=1) / curvature.clamp(min=1e-30)
            wanted = fp16_scales(scales[:, number] + step, scale_bits)
            # A scale that would vanish or turn its sign stays: the values were chosen for it.
            better = (wanted > 0) & (curvature > 0)
            wanted = torch.where(better, wanted, scales[:, number])
            moved = (wanted - scales[:, number])[:, None]
            gradient -= moved * reach
            scales[:, number] = wanted
        difference = target - expand(scales, group_size, columns) * values
    return scales
