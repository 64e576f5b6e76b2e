"""The solver: never worse than what it promises, and its arithmetic against slow references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from deltazip.compress.pack import SIGN_STATES, TERNARY_STATES, DeltaType, pack, unpack
from deltazip.compress.solve.choosers import PairChooser, chooser_for, fp16_scales
from deltazip.compress.solve.factor import Factor
from deltazip.compress.solve.solver import Spec, round_to_nearest, solve

SPARSE = [
    DeltaType.SPARSE24_INT4, DeltaType.SPARSE24_INT2, DeltaType.SPARSE24_TERNARY,
    DeltaType.SPARSE14_SIGN,
]  # fmt: skip
DENSE = [DeltaType.DENSE_INT4, DeltaType.DENSE_INT8]


def correlated_inputs(columns: int, num_tokens: int, seed: int) -> torch.Tensor:
    """Inputs as layers have them: a few strong directions, and columns of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    noise = torch.randn(num_tokens, columns, generator=generator)
    return noise @ mix.mT + 0.05 * torch.randn(num_tokens, columns, generator=generator)


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    return 2.0 / inputs.shape[0] * inputs.mT @ inputs


def output_error(delta: torch.Tensor, compressed: np.ndarray, inputs: torch.Tensor) -> float:
    lost = inputs @ (delta - torch.from_numpy(compressed)).mT
    return float(lost.square().sum() / (inputs @ delta.mT).square().sum())


@pytest.mark.parametrize("type_", SPARSE + DENSE)
@pytest.mark.parametrize(
    ("rows", "columns", "group_size"), [(40, 96, 32), (17, 130, 64), (8, 576, 192)]
)
def test_error_feedback_beats_rounding(
    type_: DeltaType, rows: int, columns: int, group_size: int
) -> None:
    inputs = correlated_inputs(columns, 4 * columns, seed=columns)
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 1e-3
    spec = Spec(type_, group_size)
    solved = solve(delta, Factor(hessian_of(inputs)), spec)
    blind = solve(delta, Factor(torch.eye(columns)), spec)
    with_feedback = output_error(delta, solved.matrix.dequantize(), inputs)
    without = output_error(delta, blind.matrix.dequantize(), inputs)
    assert with_feedback < 0.9 * without
    # What the report says is the error on the calibration inputs, and what is packed is the same.
    assert solved.error == pytest.approx(with_feedback, rel=0.02, abs=1e-7)
    back = unpack(type_, (rows, columns), group_size, pack(solved.matrix))
    np.testing.assert_array_equal(back.dequantize(), solved.matrix.dequantize())


@pytest.mark.parametrize("type_", SPARSE)
def test_so_many_of_four_are_kept(type_: DeltaType) -> None:
    delta = torch.randn(30, 160, generator=torch.Generator().manual_seed(1))
    solved = solve(delta, Factor(hessian_of(correlated_inputs(160, 400, 2))), Spec(type_, 32))
    kept = np.count_nonzero(solved.matrix.values.reshape(30, -1, 4), axis=2)
    assert (kept <= 2).all()
    assert type_ is not DeltaType.SPARSE14_SIGN or (kept == 1).all()


@pytest.mark.parametrize(
    ("type_", "all_states"),
    [(DeltaType.SPARSE24_TERNARY, TERNARY_STATES), (DeltaType.SPARSE14_SIGN, SIGN_STATES)],
)
def test_without_correlation_the_best_state_of_each_group_is_taken(
    type_: DeltaType, all_states: np.ndarray
) -> None:
    """With a Hessian of one there is a closed answer per group: the nearest of all states."""
    delta = torch.randn(12, 64, generator=torch.Generator().manual_seed(5))
    matrix = solve(delta, Factor(torch.eye(64)), Spec(type_, 64)).matrix
    # The scale is refitted after the states were taken, so each is near the best, not the best.
    scale = torch.from_numpy(matrix.scales.astype(np.float32))
    groups = delta.reshape(12, 16, 1, 4)
    states = torch.from_numpy(all_states.astype(np.float32))
    cost = (groups - scale[:, :, None, None] * states).square().sum(dim=3)
    taken = torch.from_numpy(matrix.dequantize()).reshape(12, 16, 4)
    got = (delta.reshape(12, 16, 4) - taken).square().sum(dim=2)
    assert float((got - cost.min(dim=2).values).max()) < 0.05 * float(delta.square().mean())


@pytest.mark.parametrize("type_", SPARSE)
def test_a_group_of_four_is_chosen_by_its_full_cost(type_: DeltaType) -> None:
    """Against every pair and every value, one group at a time."""
    generator = torch.Generator().manual_seed(11)
    chooser = chooser_for(type_, torch.device("cpu"))
    levels = {
        DeltaType.SPARSE24_INT4: range(-8, 8),
        DeltaType.SPARSE24_INT2: (-3, -1, 1, 3),
        DeltaType.SPARSE24_TERNARY: (-1, 0, 1),
        DeltaType.SPARSE14_SIGN: (-1, 0, 1),
    }[type_]
    options = torch.tensor(
        [
            [a if c == i else b if c == j else 0 for c in range(4)]
            for i, j in itertools.combinations(range(4), 2)
            for a, b in itertools.product(levels, levels)
            if levels != (-1, 0, 1) or a or b
            if type_ is not DeltaType.SPARSE14_SIGN or not (a and b)
        ],
        dtype=torch.float32,
    )
    worst = total_best = total_got = 0.0
    for _ in range(20):
        root = torch.randn(4, 4, generator=generator)
        cost = root @ root.mT + 0.3 * torch.eye(4)
        weights = torch.randn(16, 4, generator=generator)
        scale = torch.rand(16, 1, generator=generator) * 0.4 + 0.2
        table = tuple(part[0] for part in chooser.tables(cost[None]))
        values, _ = chooser.choose(weights, scale, table)
        every = weights[:, None] - scale[:, :, None] * options
        best = ((every @ cost) * every).sum(dim=2).min(dim=1).values
        error = weights - scale * values
        got = ((error @ cost) * error).sum(dim=1)
        worst = max(worst, float((best - got).max()))
        total_best += float(best.sum())
        total_got += float(got.sum())
    assert worst < 1e-4  # nothing is better than the best: the enumeration above is right
    # Four bits round one value after the other, which is near the best; the others try all.
    limit = 1.1 if isinstance(chooser, PairChooser) else 1.0 + 1e-5
    assert total_got <= limit * total_best


def test_the_sweep_is_optimal_brain_surgery() -> None:
    """Column errors feed back as in SparseGPT: compared with the textbook, one column at a time."""
    columns, rows = 32, 5
    hessian = hessian_of(correlated_inputs(columns, 200, 3)).double()
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(4)).double()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    factor = Factor(hessian.float())
    solved = solve(delta.float(), factor, Spec(DeltaType.DENSE_INT8, 32))
    values = torch.from_numpy(solved.matrix.values.astype(np.float64))
    # Fix the same values one by one with the inverse updated by elimination each time: what is
    # left over must be what the sweep saw, so rounding what is left gives the same values.
    inverse = torch.linalg.inv(damped)
    left = delta.clone()
    scale = _sweep_scale(delta, factor)
    for column in range(columns):
        wanted = (left[:, column] / scale).round().clamp(-128, 127)
        assert float((wanted - values[:, column]).abs().max()) <= 1.0
        error = (left[:, column] - scale * values[:, column]) / inverse[column, column]
        left = left - error[:, None] * inverse[column]
        inverse = (
            inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        )
        inverse[column, column] = 1.0


def _sweep_scale(delta: torch.Tensor, factor: Factor) -> torch.Tensor:
    saliency = factor.cost.diagonal(dim1=1, dim2=2).reshape(-1)
    chooser = chooser_for(DeltaType.DENSE_INT8, torch.device("cpu"))
    return chooser.search_scale(delta.float(), saliency).double()


@pytest.mark.parametrize("type_", DENSE)
def test_rounding_is_close_and_row_blocks_do_not_matter(type_: DeltaType) -> None:
    delta = torch.randn(50, 100, generator=torch.Generator().manual_seed(2)) * 1e-3
    delta[7] = 0.0
    whole = round_to_nearest([delta], Spec(type_, 64))
    parts = round_to_nearest(delta.split(9), Spec(type_, 64))  # type: ignore[no-untyped-call]
    np.testing.assert_array_equal(whole.matrix.values, parts.matrix.values)
    np.testing.assert_array_equal(whole.matrix.scales, parts.matrix.scales)
    assert whole.error < (0.012 if type_ is DeltaType.DENSE_INT4 else 1e-4)
    assert not whole.matrix.dequantize()[7].any()


def test_dead_inputs_and_tiny_deltas_stay_finite() -> None:
    inputs = correlated_inputs(64, 100, 9)
    inputs[:, 10:20] = 0.0
    delta = torch.randn(6, 64, generator=torch.Generator().manual_seed(3)) * 1e-7
    delta[2] = 0.0
    for hessian in (hessian_of(inputs), torch.zeros(64, 64)):
        for type_ in SPARSE + DENSE:
            solved = solve(delta, Factor(hessian), Spec(type_, 32))
            dense = solved.matrix.dequantize()
            assert np.isfinite(dense).all()
            assert np.abs(dense).max() < 1e-5
            pack(solved.matrix)


def test_bad_input_is_named() -> None:
    factor = Factor(torch.eye(32))
    spec = Spec(DeltaType.SPARSE24_INT4, 32)
    with pytest.raises(ValueError, match=r"delta is \[4, 64\], its Hessian has 32 columns"):
        solve(torch.zeros(4, 64), factor, spec)
    with pytest.raises(ValueError, match="the delta is not finite"):
        solve(torch.full((4, 32), torch.nan), factor, spec)
    with pytest.raises(ValueError, match="the Hessian is not finite"):
        Factor(torch.full((32, 32), torch.inf))
    with pytest.raises(ValueError, match="must be square"):
        Factor(torch.zeros(32, 4))
    with pytest.raises(ValueError, match="multiple of 32, got 40"):
        solve(torch.zeros(4, 32), factor, Spec(DeltaType.SPARSE24_INT4, 40))
    with pytest.raises(ValueError, match="dense types"):
        round_to_nearest([torch.zeros(4, 32)], spec)


def test_what_hardly_moved_is_rounded_to_nothing() -> None:
    delta = torch.randn(40, 96, generator=torch.Generator().manual_seed(3))
    delta[:20] *= 1e-3
    spec = Spec(DeltaType.DENSE_INT4, 32)
    fine, coarse = round_to_nearest([delta], spec), round_to_nearest([delta], spec, 0.05)
    assert (coarse.matrix.values[:20] == 0).all()
    assert (fine.matrix.values[:20] != 0).any()
    np.testing.assert_array_equal(coarse.matrix.values[20:], fine.matrix.values[20:])
    least = float(coarse.matrix.scales.min())
    assert 0.049 < least < 0.0516
    assert coarse.error < 1.01 * fine.error + 1e-6


def test_scales_have_few_bits_of_mantissa_and_keep_their_size() -> None:
    sizes = torch.cat([torch.logspace(-7, 4.8, 500), torch.tensor([0.0, -1.0, 7e4])])
    rounded = fp16_scales(sizes)
    words = rounded[:-3].half().numpy().view(np.uint16)
    normal = rounded[:-3] >= 2.0**-14
    assert (words[normal.numpy()] & 0x3F == 0).all()
    error = (rounded[:-3] / sizes[:-3].clamp(max=65504.0) - 1.0).abs()
    assert float(error[normal].max()) < 0.034
    assert float((rounded[:-3] - sizes[:-3])[~normal].abs().max()) < 2e-6
    assert rounded[-3:].tolist() == [0.0, 0.0, 65504.0]
    full = fp16_scales(sizes, 10)[:-3]
    assert torch.equal(full[normal], sizes[:-3].half().float()[normal])
