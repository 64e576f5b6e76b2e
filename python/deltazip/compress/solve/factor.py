"""A Hessian, damped and factored: what all the matrices that share its inputs are solved with."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from deltazip.compress.solve.lengthening import RESOLVENT_SHARES, resolvent


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

    @functools.cached_property
    def resolvents(self) -> tuple[Tensor, ...]:
        """Of the Hessian as it came, [columns, columns] each; see lengthening.py."""
        hessian = self.hessian[: self.num_columns, : self.num_columns]
        return tuple(resolvent(hessian, share) for share in RESOLVENT_SHARES)

    def weights_for(self, outputs: Tensor) -> Tensor:
        """Weights [rows, columns] whose outputs come close, by least squares, strongly damped.

        What is to be made up for is known from calibration tokens alone. Where these say little,
        a fit to them is a fit to their noise: damped as lightly as the solver is, it makes facts
        that calibration did not see worse.

        outputs: [rows, columns], 2/n * sum(y x^T) of the outputs y that are wanted.
        """
        hessian = self.hessian[: self.num_columns, : self.num_columns]
        size = RESOLVENT_SHARES[-1] * float(hessian.diagonal().mean())
        return (outputs @ self.resolvents[-1]) / max(size, 1e-30)


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
