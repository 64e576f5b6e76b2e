"""Joint pruning and quantisation of delta matrices, with error feedback.

A group of four neighbouring columns gets its mask and values together, by what leaving an error in
it costs once every later column has made up for it as well as it can (sweep.py): the best of the 8
states of one sign, of the 32 ternary, of the 96 of two bits, of the six masks of four bits.

Source: Frantar & Alistarh, SparseGPT (2023), section 3; Frantar et al., GPTQ (2022); Yao et al.,
DeltaZip (2025), Delta-Compress. Choosing a group jointly, refitting its scales and the longer
target are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltazip.compress.pack import DeltaType, QuantizedMatrix, check_group_size
from deltazip.compress.solve.choosers import FULL_SCALE_BITS, SCALE_BITS, chooser_for, fp16_scales
from deltazip.compress.solve.factor import Factor
from deltazip.compress.solve.lengthening import TRIALS, factors, lengthened, trial_rows
from deltazip.compress.solve.sweep import expand, refit_scales, sweep

# Rows solved together: they are independent, and this bounds memory at a large output layer. A GPU
# takes about as long for a few as for many.
_BLOCK_ROWS = {"cpu": 8192, "cuda": 32768}


@dataclasses.dataclass(frozen=True)
class Spec:
    """How to compress a matrix.

    Attributes:
        type: any matrix type of the format.
        group_size: columns that share a scale, a multiple of 32.
        lengthening: share of what a solution lacks in length that its target is given beforehand.
    """

    type: DeltaType
    group_size: int
    lengthening: float = 0.0

    @property
    def scale_bits(self) -> int:
        """Mantissa bits of a refitted scale."""
        return FULL_SCALE_BITS if self.type is DeltaType.DENSE_INT8 else SCALE_BITS


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A compressed matrix and how well it stands in for the delta.

    Attributes:
        error: |(delta - compressed) x|^2 over |delta x|^2 on the calibration inputs.
        weight_error: |delta - compressed|^2 over |delta|^2.
    """

    matrix: QuantizedMatrix
    error: float
    weight_error: float


@dataclasses.dataclass(frozen=True)
class Solved(Rounded):
    """The same, and what `matrix` stands for: [rows, columns] float32, on the solver's device."""

    compressed: Tensor


def solve(delta: Tensor, factor: Factor, spec: Spec) -> Solved:
    """Compresses one delta matrix; see `solve_all`."""
    return solve_all([delta], factor, spec)[0]


def solve_all(deltas: Sequence[Tensor], factor: Factor, spec: Spec) -> list[Solved]:
    """Compresses the delta matrices that share their inputs, side by side.

    Args:
        deltas: [rows, columns] each, fine-tuned minus base, on the factor's device.
        factor: of the Hessian of their inputs.
        spec: type, group size and settings.

    Raises:
        ValueError: shapes do not match or a delta is not finite.
    """
    check_group_size(spec.group_size)
    for delta in deltas:
        if delta.ndim != 2 or delta.shape[1] != factor.num_columns:
            raise ValueError(
                f"delta is {list(delta.shape)}, its Hessian has {factor.num_columns} columns"
            )
        if not bool(torch.isfinite(delta).all()):
            raise ValueError("the delta is not finite")
    wanted = [delta.float() for delta in deltas]
    target = _lengthened(wanted, factor, spec) if spec.lengthening else wanted
    most = _BLOCK_ROWS[wanted[0].device.type]
    parts = [
        _solve_rows(rows, goal, factor, spec)
        for rows, goal in zip(
            torch.split(torch.cat(wanted), most), torch.split(torch.cat(target), most), strict=True
        )
    ]
    heights = [delta.shape[0] for delta in deltas]
    columns = (
        None if column[0] is None else torch.split(torch.cat(column), heights)
        for column in zip(*parts, strict=True)
    )
    rows = (column or [None] * len(deltas) for column in columns)
    return [_solved(_Rows(*row), spec) for row in zip(*rows, strict=True)]


def _lengthened(wanted: Sequence[Tensor], factor: Factor, spec: Spec) -> list[Tensor]:
    """The targets of a solution that is to be as long as `wanted`; see lengthening.py."""
    hessian = factor.hessian[: factor.num_columns, : factor.num_columns]
    rows = [trial_rows(delta) for delta in wanted]
    heights = [part.shape[0] for part in rows]
    stacked = torch.cat(rows)
    by = [torch.zeros(1 + len(factor.resolvents), dtype=torch.float64) for _ in rows]
    for _ in range(TRIALS):
        longer = [
            lengthened(part, own, factor.resolvents) for part, own in zip(rows, by, strict=True)
        ]
        given = _solve_rows(stacked, torch.cat(longer), factor, spec).compressed(spec)
        by = [
            own + factors(part, got, hessian, factor.resolvents)
            for own, part, got in zip(by, rows, torch.split(given, heights), strict=True)
        ]
    return [
        lengthened(delta, spec.lengthening * own, factor.resolvents)
        for delta, own in zip(wanted, by, strict=True)
    ]


class _Rows(NamedTuple):
    """Some rows, solved: codes, kept pairs, scales as stored; and sums over each row.

    lost and whole are of outputs on the calibration inputs, difference and norm of weights.
    """

    values: Tensor  # [rows, columns] int8
    kept: Tensor | None  # [rows, groups of four] uint8
    scales: Tensor  # [rows, scale groups] float16
    lost: Tensor
    whole: Tensor
    difference: Tensor
    norm: Tensor

    def compressed(self, spec: Spec) -> Tensor:
        """The difference these stand for, [rows, columns] float32."""
        return expand(self.scales.float(), spec.group_size, self.values.shape[1]) * self.values


def _solved(rows: _Rows, spec: Spec) -> Solved:
    matrix = QuantizedMatrix(
        spec.type,
        rows.values.cpu().numpy(),
        rows.scales.cpu().numpy(),
        spec.group_size,
        None if rows.kept is None else rows.kept.cpu().numpy(),
    )
    lost, whole, difference, norm = (
        float(part.sum(dtype=torch.float64))
        for part in (rows.lost, rows.whole, rows.difference, rows.norm)
    )
    return Solved(
        matrix,
        max(lost, 0.0) / whole if whole > 0.0 else 0.0,
        difference / norm if norm > 0.0 else 0.0,
        rows.compressed(spec),
    )


def _solve_rows(wanted: Tensor, goal: Tensor, factor: Factor, spec: Spec) -> _Rows:
    """wanted, goal: [rows, columns]. Values are chosen for `goal`, errors are from `wanted`."""
    columns = wanted.shape[1]
    missing = factor.hessian.shape[0] - columns
    target = torch.nn.functional.pad(goal, (0, missing))
    chooser = chooser_for(spec.type, wanted.device)
    values, kept, scales = sweep(target, factor, spec.group_size, chooser)
    scales = refit_scales(target, values, scales, factor, spec.group_size, spec.scale_bits)
    wanted = torch.nn.functional.pad(wanted, (0, missing))
    difference = wanted - expand(scales, spec.group_size, wanted.shape[1]) * values
    has_pairs = spec.type in (DeltaType.SPARSE24_INT4, DeltaType.SPARSE24_INT2)
    return _Rows(
        values[:, :columns].to(torch.int8),
        kept if has_pairs else None,
        scales.half(),
        lost=((difference @ factor.hessian) * difference).sum(dim=1),
        whole=((wanted @ factor.hessian) * wanted).sum(dim=1),
        difference=difference[:, :columns].square().sum(dim=1),
        norm=wanted.square().sum(dim=1),
    )


def round_to_nearest(deltas: Iterable[Tensor], spec: Spec, least_scale: float = 0.0) -> Rounded:
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
        difference = delta - rounded * expand(found, spec.group_size, columns)
        lost += float(difference.square().sum())
        norm += float(delta.square().sum())
        values.append(rounded.to(torch.int8).cpu())
        scales.append(found.half().cpu())
    matrix = QuantizedMatrix(
        spec.type, torch.cat(values).numpy(), torch.cat(scales).numpy(), spec.group_size
    )
    error = lost / norm if norm > 0.0 else 0.0
    return Rounded(matrix, error, error)
