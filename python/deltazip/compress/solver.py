"""Joint pruning and quantisation of one delta matrix, with error feedback.

The unit of work is a group of four neighbouring columns, for all rows at once. With U the upper
Cholesky factor of the inverse Hessian and B the four columns, fixing their values v leaves the
error e = (w - v) inv(U_BB), costs |e|^2 once every later column has made up for it as well as it
can, and the later columns become w - e U_B,later. So a group's mask and values are chosen together
by that cost: of the 8 of one sign, the 32 ternary, the 96 of two bits, of four bits' six masks.

Source: Frantar & Alistarh, SparseGPT (2023), section 3; Frantar et al., GPTQ (2022); Yao et al.,
DeltaZip (2025), Delta-Compress. Choosing a group jointly and refitting its scales are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from deltazip.compress.choosers import (
    FULL_SCALE_BITS,
    SCALE_BITS,
    Chooser,
    chooser_for,
    fp16_scales,
)
from deltazip.compress.pack import DeltaType, QuantizedMatrix, check_group_size

# Columns whose errors reach all later ones at once: small for the cache, large for the product.
_BLOCK_COLUMNS = 128
# Rows solved together: they are independent, and this bounds memory at a large output layer.
_BLOCK_ROWS = 8192
_REFIT_SWEEPS = 2


@dataclasses.dataclass(frozen=True)
class Spec:
    """How to compress a matrix.

    Attributes:
        type: any matrix type of the format.
        group_size: columns that share a scale, a multiple of 32.
    """

    type: DeltaType
    group_size: int

    @property
    def scale_bits(self) -> int:
        """Mantissa bits of a refitted scale."""
        return FULL_SCALE_BITS if self.type is DeltaType.DENSE_INT8 else SCALE_BITS


@dataclasses.dataclass(frozen=True)
class Solved:
    """A compressed matrix and how well it stands in for the delta.

    Attributes:
        error: |(delta - compressed) x|^2 over |delta x|^2 on the calibration inputs.
        weight_error: |delta - compressed|^2 over |delta|^2.
    """

    matrix: QuantizedMatrix
    error: float
    weight_error: float


class Factor:
    """A damped Hessian and what follows from it for all the matrices that share its inputs.

    Args:
        hessian: [columns, columns] float32, 2/n * sum(x x^T) over calibration tokens.
        damping: share of the mean of the diagonal that is added to the diagonal.

    Raises:
        ValueError: the Hessian is not square or not finite.
    """

    def __init__(self, hessian: Tensor, damping: float = 0.01) -> None:
        if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
            raise ValueError(f"the Hessian must be square, got {list(hessian.shape)}")
        if not bool(torch.isfinite(hessian).all()):
            raise ValueError("the Hessian is not finite: an activation overflowed")
        self.num_columns = hessian.shape[0]
        missing = -self.num_columns % 4
        self.hessian = torch.nn.functional.pad(hessian.float(), (0, missing, 0, missing))
        self.upper = _inverse_factor(self.hessian, damping)
        groups = self.hessian.shape[0] // 4
        index = torch.arange(groups, device=hessian.device)
        corner = self.upper.reshape(groups, 4, groups, 4)[index, :, index, :]
        eye = torch.eye(4, device=hessian.device).expand_as(corner)
        self.inverse = torch.linalg.solve_triangular(corner, eye, upper=True)  # [groups, 4, 4]
        self.cost = self.inverse @ self.inverse.mT

    def weights_for(self, outputs: Tensor) -> Tensor:
        """Weights [rows, columns] whose outputs come closest, by damped least squares.

        outputs: [rows, columns], 2/n * sum(y x^T) of the outputs y that are wanted.
        """
        upper = self.upper[: self.num_columns, : self.num_columns]
        return (outputs @ upper.mT) @ upper


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U^T U the inverse of the damped Hessian."""
    mean = float(hessian.diagonal().mean())
    if mean <= 0.0:
        return torch.eye(hessian.shape[0], device=hessian.device)
    for attempt in range(6):
        damped = hessian.double()
        damped.diagonal().add_(mean * max(damping, 1e-6) * 10.0**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed):
            factor: Tensor = upper.float()
            return factor
    raise ValueError("the Hessian has no inverse at any damping: are calibration inputs all alike?")


def solve(delta: Tensor, factor: Factor, spec: Spec) -> Solved:
    """Compresses one delta matrix.

    Args:
        delta: [rows, columns], fine-tuned minus base, on the factor's device.
        factor: of the Hessian of this matrix's inputs.
        spec: type, group size and settings.

    Raises:
        ValueError: shapes do not match or the delta is not finite.
    """
    check_group_size(spec.group_size)
    if delta.ndim != 2 or delta.shape[1] != factor.num_columns:
        raise ValueError(
            f"delta is {list(delta.shape)}, its Hessian has {factor.num_columns} columns"
        )
    if not bool(torch.isfinite(delta).all()):
        raise ValueError("the delta is not finite")
    parts = [_solve_rows(rows, factor, spec) for rows in torch.split(delta.float(), _BLOCK_ROWS)]
    kept = [part.matrix.kept for part in parts if part.matrix.kept is not None]
    matrix = QuantizedMatrix(
        spec.type,
        np.concatenate([part.matrix.values for part in parts]),
        np.concatenate([part.matrix.scales for part in parts]),
        spec.group_size,
        np.concatenate(kept) if kept else None,
    )
    whole = sum(part.whole for part in parts)
    norm = sum(part.norm for part in parts)
    return Solved(
        matrix,
        sum(part.lost for part in parts) / whole if whole > 0.0 else 0.0,
        sum(part.difference for part in parts) / norm if norm > 0.0 else 0.0,
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    matrix: QuantizedMatrix
    lost: float
    whole: float
    difference: float
    norm: float


def _solve_rows(delta: Tensor, factor: Factor, spec: Spec) -> _Part:
    columns = delta.shape[1]
    target = torch.nn.functional.pad(delta, (0, factor.hessian.shape[0] - columns))
    chooser = chooser_for(spec.type, delta.device)
    values, kept, scales = _sweep(target, factor, spec, chooser)
    scales, lost = _refit_scales(target, values, scales, factor, spec)
    has_pairs = spec.type in (DeltaType.SPARSE24_INT4, DeltaType.SPARSE24_INT2)
    matrix = QuantizedMatrix(
        spec.type,
        values[:, :columns].to(torch.int8).cpu().numpy(),
        scales.half().cpu().numpy(),
        spec.group_size,
        kept.cpu().numpy() if has_pairs else None,
    )
    difference = target - _expand(scales, spec.group_size, target.shape[1]) * values
    return _Part(
        matrix,
        lost=lost,
        whole=float(((target @ factor.hessian) * target).sum()),
        difference=float(difference[:, :columns].square().sum()),
        norm=float(target.square().sum()),
    )


def _expand(scales: Tensor, group_size: int, columns: int) -> Tensor:
    return scales.repeat_interleave(group_size, dim=1)[:, :columns]


def _blocks(columns: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Runs of columns that hold whole scale groups, or that a long scale group is made of."""
    if group_size <= _BLOCK_COLUMNS:
        size = _BLOCK_COLUMNS // group_size * group_size
    else:
        size = max(n for n in range(32, _BLOCK_COLUMNS + 1, 32) if group_size % n == 0)
    for begin in range(0, columns, size):
        yield begin, min(begin + size, columns)


def _sweep(
    target: Tensor, factor: Factor, spec: Spec, chooser: Chooser
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass over the columns. Returns values, kept pairs and scales, exact in fp16."""
    rows, columns = target.shape
    upper, inverse, cost = factor.upper, factor.inverse, factor.cost
    weights = target.clone()
    values = torch.zeros_like(weights)
    kept = torch.zeros((rows, columns // 4), dtype=torch.uint8, device=target.device)
    found = torch.zeros((rows, -(-columns // spec.group_size)), device=target.device)
    for begin, end in _blocks(columns, spec.group_size):
        block = weights[:, begin:end].clone()
        errors = torch.zeros_like(block)
        for at in range(begin, end, 4):
            group, local, number = at // 4, at - begin, at // spec.group_size
            if at % spec.group_size == 0:
                last = min(at + spec.group_size, columns)
                window = torch.cat([block[:, local:], weights[:, end:last]], dim=1)
                saliency = cost[group : last // 4].diagonal(dim1=1, dim2=2).reshape(-1)
                found[:, number] = chooser.search_scale(window[:, : last - at], saliency)
            scale = found[:, number, None]
            current = block[:, local : local + 4]
            chosen, kept[:, group] = chooser.choose(current, scale, cost[group])
            values[:, at : at + 4] = chosen
            error = (current - chosen * scale) @ inverse[group]
            errors[:, local : local + 4] = error
            block[:, local + 4 :] -= error @ upper[at : at + 4, at + 4 : end]
        weights[:, end:] -= errors @ upper[begin:end, end:]
    return values, kept, found


def _refit_scales(
    target: Tensor, values: Tensor, scales: Tensor, factor: Factor, spec: Spec
) -> tuple[Tensor, float]:
    """Scales that lose least on the calibration inputs given the values, group after group.

    Returns the scales and what is lost, sum over rows of (delta - compressed) H (...)^T.
    """
    hessian, columns, group_size = factor.hessian, target.shape[1], spec.group_size
    scales = scales.clone()
    difference = target - _expand(scales, group_size, columns) * values
    for _ in range(_REFIT_SWEEPS):
        gradient = difference @ hessian
        for number in range(scales.shape[1]):
            part = slice(number * group_size, min((number + 1) * group_size, columns))
            ours = values[:, part]
            reach = ours @ hessian[part]  # [rows, columns]
            curvature = (reach[:, part] * ours).sum(dim=1)
            step = (gradient[:, part] * ours).sum(dim=1) / curvature.clamp(min=1e-30)
            wanted = fp16_scales(scales[:, number] + step, spec.scale_bits)
            # A scale that would vanish or turn its sign stays: the values were chosen for it.
            better = (wanted > 0) & (curvature > 0)
            wanted = torch.where(better, wanted, scales[:, number])
            moved = (wanted - scales[:, number])[:, None]
            gradient -= moved * reach
            scales[:, number] = wanted
        difference = target - _expand(scales, group_size, columns) * values
    return scales, max(float(((difference @ hessian) * difference).sum()), 0.0)


def round_to_nearest(deltas: Iterable[Tensor], spec: Spec, least_scale: float = 0.0) -> Solved:
    """Compresses a dense matrix whose rows are looked up rather than multiplied: no Hessian.

    Args:
        deltas: the matrix in runs of rows, each [rows, columns].
        spec: of a dense type.
        least_scale: no group is rounded finer. One that moved less becomes zeros, which a packed
            file holds in almost nothing: an error is as large anywhere, bits go to what moved.

    Raises:
        ValueError: the type is not dense.
    """
    if spec.type.is_sparse or not spec.type.is_matrix:
        raise ValueError(f"rounding to nearest is for dense types, got {spec.type.value}")
    values: list[Tensor] = []
    scales: list[Tensor] = []
    lost = norm = 0.0
    least = float(fp16_scales(torch.tensor(least_scale)))
    for delta in deltas:
        chooser = chooser_for(spec.type, delta.device)
        rows, columns = delta.shape
        rounded = torch.empty_like(delta)
        found = torch.empty((rows, -(-columns // spec.group_size)), device=delta.device)
        for number in range(found.shape[1]):
            part = slice(number * spec.group_size, min((number + 1) * spec.group_size, columns))
            window = delta[:, part]
            uniform = torch.ones(window.shape[1], device=delta.device)
            scale = chooser.search_scale(window, uniform)
            whole = chooser.nearest(window, scale[:, None])
            refit = (window * whole).sum(dim=1) / whole.square().sum(dim=1).clamp(min=1.0)
            refit = fp16_scales(refit, spec.scale_bits)
            scale = torch.where(refit > 0, refit, scale).clamp(min=least)
            found[:, number] = scale
            rounded[:, part] = chooser.nearest(window, scale[:, None])
        difference = delta - rounded * _expand(found, spec.group_size, columns)
        lost += float(difference.square().sum())
        norm += float(delta.square().sum())
        values.append(rounded.to(torch.int8).cpu())
        scales.append(found.half().cpu())
    matrix = QuantizedMatrix(
        spec.type, torch.cat(values).numpy(), torch.cat(scales).numpy(), spec.group_size
    )
    error = lost / norm if norm > 0.0 else 0.0
    return Solved(matrix, error, error)
