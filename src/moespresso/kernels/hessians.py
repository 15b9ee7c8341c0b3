"""Second moments of inputs, H = mean of x x^T, made fit for solving.

Quantizing a row w to q costs (w - q) H (w - q)^T of output error, so H says which errors matter and which cancel. It is
positive semi-definite; inputs that never fired leave zeros, too few tokens leave it singular. Damping adds a share of the
mean of the diagonal, tenfold more for a matrix whose factorization fails.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative damping that is tried next where none was asked for and that did not do.
SMALLEST = 1e-4


def shrunk(hessians: Tensor, tokens: Tensor, pooled: Tensor, kappa: float) -> Tensor:
    """Means over few tokens, pulled to the mean over all: (n H + kappa P) / (n + kappa).

    `hessians` [N, in, in] are means over `tokens` [N] each, `pooled` [in, in] is the mean over all tokens.
    """
    own = (tokens / (tokens + kappa)).to(hessians)[:, None, None] if kappa else hessians.new_ones(())
    return pooled.to(hessians).lerp(hessians, own)


def usable(hessians: Tensor) -> tuple[Tensor, list[int]]:
    """`hessians` [N, in, in] in float32, identity where one is all zero or not finite; and the numbers of the latter."""
    hessians = hessians.float()
    finite = hessians.isfinite().flatten(1).all(1)
    sound = finite & (hessians.diagonal(dim1=1, dim2=2).sum(1) > 0)
    eye = torch.eye(hessians.shape[-1], device=hessians.device)
    return torch.where(sound[:, None, None], hessians, eye), (~finite).nonzero().flatten().tolist()


def factored(hessians: Tensor, damping: float) -> tuple[Tensor, Tensor, dict[int, float]]:
    """Upper factors R [N, in, in], R R^T = H + ridge I, the ridges [N], and who took more relative damping than asked.

    A ridge is a share of the mean of the diagonal: `damping`, or tenfold more for those matrices whose factorization meets a
    pivot that is not positive, as often as it takes. All must be finite (`usable`).
    """
    mean = hessians.diagonal(dim1=1, dim2=2).mean(1)
    mean = torch.where(mean > 0, mean, 1.0)  # all zero: any ridge will do
    factors, ridge = torch.empty_like(hessians), torch.empty_like(mean)
    raised: dict[int, float] = {}
    left, share = torch.arange(len(hessians), device=hessians.device), damping
    while len(left):
        assert share < 1e9, "second moments must be finite"
        ridge[left] = share * mean[left]
        # The usual factor is lower triangular; that of the reversed order, read backwards, is upper.
        lower, failed = torch.linalg.cholesky_ex(ridged(hessians[left], ridge[left]).flip(1, 2))
        factors[left] = lower.flip(1, 2)
        left, share = left[failed > 0], max(10 * share, SMALLEST)
        raised |= dict.fromkeys(left.tolist(), share)
    return factors, ridge, raised


def ridged(hessians: Tensor, ridge: Tensor) -> Tensor:
    """`hessians` [N, in, in] with `ridge` [N] added to their diagonals."""
    hessians = hessians.clone()
    hessians.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return hessians
