"""A target longer than what is wanted, so that the solver's answer is not shorter than that.

The best approximation in least squares is shorter than what it approximates, since what is lost is
at right angles to what is kept: on each input the compressed delta gives too little. Along the few
directions in which calibration inputs are large that is a percent; along those in which they are
small, where one fact learnt by heart is told from the next, up to a third. All linears of all
layers err to the same side, towards the base, and that adds up where noise of the same size
cancels. So some rows are solved on trial, what they lack is measured by direction, and the target
of the real solution is made longer by it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Shares of the Hessian's mean diagonal: inputs much smaller, and somewhat smaller, than the mean.
RESOLVENT_SHARES = (0.03, 0.5)
# A longer target comes out longer by a little less than it was made, which a second trial tells.
TRIALS = 2
# Of a trial; what is lacking is a property of the matrix, told well by some of its rows.
_TRIAL_ROWS = 256
# What is told by fewer inputs or rows than there are unknowns is noise: no factor goes beyond.
_MOST = 1.0


def resolvent(hessian: Tensor, share: float) -> Tensor:
    """m (H + m I)^-1, m the share of H's mean diagonal: near one where inputs are small, else zero.

    hessian: [columns, columns].
    """
    size = share * float(hessian.diagonal().mean())
    if size <= 0.0:
        return torch.eye(hessian.shape[0], device=hessian.device)
    damped = hessian.double()
    damped.diagonal().add_(size)
    lower = torch.linalg.cholesky(damped)
    return (size * torch.cholesky_inverse(lower)).float()


def trial_rows(delta: Tensor) -> Tensor:
    """Every so many-th row of [rows, columns], about 256."""
    return delta[:: max(1, delta.shape[0] // _TRIAL_ROWS)]


def factors(
    wanted: Tensor, given: Tensor, hessian: Tensor, resolvents: tuple[Tensor, ...]
) -> Tensor:
    """What `given` lacks of `wanted`, as factors of: wanted itself, wanted times each resolvent.

    Where inputs are large, small, and in between, given plus what the factors make of it is as long
    as wanted: the lack's product with wanted, weighted to tell these apart, is zero.

    Args:
        wanted, given: [rows, columns].
        hessian, resolvents: [columns, columns].

    Returns:
        [1 + number of resolvents], float64, on the CPU.
    """
    smoothed = [wanted @ part for part in resolvents]
    basis = [wanted, *smoothed]
    tests = [wanted @ hessian, *smoothed]
    lack = wanted - given
    pairs = [[(test * part).sum() for part in (*basis, lack)] for test in tests]
    table = torch.stack([torch.stack(row) for row in pairs]).double().cpu().numpy()
    whole = table[:, 0]
    if not (whole > 0.0).all():
        return torch.zeros(len(basis), dtype=torch.float64)
    table = table / whole[:, None]
    # Inputs all of one size make the rows alike: the least factors are taken then.
    found, *_ = np.linalg.lstsq(table[:, :-1], table[:, -1], rcond=1e-4)
    bounded: Tensor = torch.tensor(found.tolist(), dtype=torch.float64).clamp(-_MOST, _MOST)
    return bounded


def lengthened(wanted: Tensor, by: Tensor, resolvents: tuple[Tensor, ...]) -> Tensor:
    """wanted [rows, columns] with the factors' share of it added."""
    first, *rest = by.tolist()
    target: Tensor = wanted * (1.0 + first)
    for factor, part in zip(rest, resolvents, strict=True):
        target += factor * (wanted @ part)
    return target
