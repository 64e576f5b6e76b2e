"""A compressed delta is as long as the delta, whatever the direction of its inputs."""

from __future__ import annotations

import pytest
import torch
from deltazip.compress.pack import DeltaType
from deltazip.compress.solve.factor import Factor
from deltazip.compress.solve.lengthening import factors, lengthened, resolvent, trial_rows
from deltazip.compress.solve.solver import Spec, solve, solve_all
from torch import Tensor

COLUMNS = 128


def hessian_of_tokens(seed: int) -> Tensor:
    """Of inputs with a few strong directions, as layers have them."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) * torch.logspace(0, -2, COLUMNS)
    inputs = torch.randn(600, COLUMNS, generator=generator) @ mix.mT
    inputs += 0.05 * torch.randn(600, COLUMNS, generator=generator)
    return 2.0 / 600 * inputs.mT @ inputs


def lacking(delta: Tensor, given: Tensor, metric: Tensor) -> float:
    """The share of the delta's length that is missing from `given` along it."""
    return 1.0 - float(((given @ metric) * delta).sum() / ((delta @ metric) * delta).sum())


@pytest.mark.parametrize(
    "type_", [DeltaType.SPARSE24_INT4, DeltaType.SPARSE24_INT2, DeltaType.SPARSE24_TERNARY]
)
def test_nothing_is_lacking_along_any_direction(type_: DeltaType) -> None:
    hessian = hessian_of_tokens(5)
    factor, small = Factor(hessian), torch.eye(COLUMNS)
    delta = torch.randn(300, COLUMNS, generator=torch.Generator().manual_seed(6))
    short = solve(delta, factor, Spec(type_, 64))
    long = solve(delta, factor, Spec(type_, 64, lengthening=1.0))
    assert lacking(delta, short.compressed, small) > 0.05
    assert abs(lacking(delta, long.compressed, small)) < 0.3 * lacking(
        delta, short.compressed, small
    )
    assert abs(lacking(delta, long.compressed, hessian)) < 0.3 * lacking(
        delta, short.compressed, hessian
    )
    # The price is noise, and little of it.
    assert short.error < long.error < 1.5 * short.error


def test_factors_find_what_was_taken_away() -> None:
    hessian = hessian_of_tokens(7)
    resolvents = (resolvent(hessian, 0.03), resolvent(hessian, 0.5))
    delta = torch.randn(200, COLUMNS, generator=torch.Generator().manual_seed(8))
    lack = torch.tensor([0.02, 0.2, 0.1], dtype=torch.float64)
    given = 2.0 * delta - lengthened(delta, lack, resolvents)
    torch.testing.assert_close(factors(delta, given, hessian, resolvents), lack, atol=2e-3, rtol=0)


def test_inputs_of_one_size_and_deltas_of_nothing() -> None:
    factor = Factor(torch.eye(COLUMNS))
    delta = torch.randn(50, COLUMNS, generator=torch.Generator().manual_seed(9))
    solved = solve(delta, factor, Spec(DeltaType.SPARSE24_INT2, 64, 1.0))
    assert abs(lacking(delta, solved.compressed, torch.eye(COLUMNS))) < 0.06
    for hessian in (torch.eye(COLUMNS), torch.zeros(COLUMNS, COLUMNS)):
        nothing = solve(
            torch.zeros(8, COLUMNS), Factor(hessian), Spec(DeltaType.DENSE_INT4, 64, 1.0)
        )
        assert not nothing.compressed.any()
        assert nothing.error == 0.0


def test_matrices_solved_together_are_as_if_apart() -> None:
    factor = Factor(hessian_of_tokens(10))
    generator = torch.Generator().manual_seed(11)
    deltas = [torch.randn(rows, COLUMNS, generator=generator) for rows in (64, 20, 300)]
    spec = Spec(DeltaType.SPARSE24_INT2, 64, 1.0)
    for delta, together in zip(deltas, solve_all(deltas, factor, spec), strict=True):
        apart = solve(delta, factor, spec)
        assert together.compressed.shape == delta.shape
        assert together.error == pytest.approx(apart.error, rel=0.02)
        same = (together.compressed == apart.compressed).float().mean()
        assert float(same) > 0.95  # sums of other orders may turn single codes
        torch.testing.assert_close(
            together.compressed, torch.from_numpy(together.matrix.dequantize())
        )


def test_a_trial_is_of_rows_all_over_the_matrix() -> None:
    rows = torch.arange(5000.0)[:, None]
    picked = trial_rows(rows)[:, 0]
    assert 256 <= len(picked) < 512
    assert float(picked[-1]) > 4900
    assert len(trial_rows(rows[:40])) == 40
