"""Hessians of layers, H = mean of x x^T over a layer's inputs, made fit for solving.

Quantizing a row w to q costs (w - q) H (w - q)^T of output error, so H says which errors matter and which
cancel. It is positive semi-definite; inputs that never fired leave zeros, too few tokens leave it singular.
Damping adds a share of the mean of the diagonal, tenfold more for a matrix whose factorization fails.

Shapes: N matrices, each of `in` inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

# Relative damping that is tried next where none was asked for and that did not do.
MIN_RAISED = 1e-4


@dataclass(frozen=True, slots=True)
class Warnings:
    """What a solver had to mend: relative damping that matrices took beyond what was asked, matrices with
    a Hessian that was not finite (the identity stood in), inputs that never fired, and scales that were
    cut to the range of their dtype."""

    damped: Mapping[int, float]
    nonfinite: tuple[int, ...]
    dead: int
    clipped: int


def shrink(
    hessians: Float[Tensor, "N in in"],
    tokens: Shaped[Tensor, " N"],
    pooled: Float[Tensor, "in in"],
    kappa: float,
) -> Float[Tensor, "N in in"]:
    """Means over few `tokens` each, pulled to the mean over all tokens, `pooled`: (n H + kappa P) / (n +
    kappa)."""
    share = (tokens / (tokens + kappa)).to(hessians)[:, None, None] if kappa else hessians.new_ones(())
    return pooled.to(hessians).lerp(hessians, share)


def finite_or_identity(hessians: Float[Tensor, "N in in"]) -> tuple[Float[Tensor, "N in in"], list[int]]:
    """The Hessians in float32, identity where one is all zero or not finite; and the numbers of the
    latter."""
    hessians = hessians.float()
    finite = hessians.isfinite().flatten(1).all(1)
    usable = finite & (hessians.diagonal(dim1=1, dim2=2).sum(1) > 0)
    eye = torch.eye(hessians.shape[-1], device=hessians.device)
    return torch.where(usable[:, None, None], hessians, eye), (~finite).nonzero().flatten().tolist()


def damped_factors(
    hessians: Float[Tensor, "N in in"], damping: float
) -> tuple[Float[Tensor, "N in in"], Float[Tensor, " N"], dict[int, float]]:
    """Upper factors R with R R^T = H + ridge I, the ridges, and which matrices took more relative damping
    than asked.

    A ridge is a share of the mean of the diagonal: `damping`, or tenfold more for those matrices whose
    factorization meets a pivot that is not positive, as often as it takes. All must be finite
    (`finite_or_identity`).
    """
    mean = hessians.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean > 0, mean, 1.0)  # all zero: any ridge will do
    factors, ridge = torch.empty_like(hessians), torch.empty_like(mean)
    raised: dict[int, float] = {}
    pending, share = torch.arange(len(hessians), device=hessians.device), damping
    while len(pending):
        assert share < 1e9, "Hessians must be finite"
        ridge[pending] = share * mean[pending]
        # The usual factor is lower triangular; that of the reversed order, read backwards, is upper.
        lower, failed = torch.linalg.cholesky_ex(add_ridge(hessians[pending], ridge[pending]).flip(1, 2))
        factors[pending] = lower.flip(1, 2)
        pending, share = pending[failed > 0], max(10 * share, MIN_RAISED)
        raised |= dict.fromkeys(pending.tolist(), share)
    return factors, ridge, raised


def add_ridge(hessians: Float[Tensor, "N in in"], ridge: Float[Tensor, " N"]) -> Float[Tensor, "N in in"]:
    """A copy of `hessians` with `ridge` added to their diagonals."""
    hessians = hessians.clone()
    hessians.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return hessians
