"""Narrower matrices in closed form: low rank, ridge leverage, and how much of which layer.

With C the Hessian of a projection's inputs, W' in the place of W costs tr((W - W') C (W - W')^T) of output
error:

    rank r     W' = U U^T W, with U the r leading eigenvectors of W C W^T  (C^-1/2 is not needed)
    neurons    those of the highest ridge leverage [C (C + lambda I)^-1]_ii, and layers by entropy, both as in
               MoDeGPT
               (arXiv 2408.09632); the refit of what stays is in `neurons.py`

Tensors come and go in float32; in between all is float64, about four times the size of what was given: give
it fewer matrices at once where that is too much.

Shapes: N matrices of `out` x `in`, r the rank, I neurons.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moespresso.kernels.conditioning import add_ridge, damped_factors, finite_or_identity

# Relative damping that only settles what the data leave open: of two answers alike on them, the one nearer to the weights.
DAMPING = 1e-6
# The largest share that is removed of a layer.
CAP = 0.95


def truncate(
    weights: Float[Tensor, "N out in"],
    hessians: Float[Tensor, "#N in in"] | None,
    rank: int,
    damping: float = DAMPING,
) -> tuple[Float[Tensor, "N out r"], Float[Tensor, "N r in"]]:
    """Two factors of the best approximation of `weights` of a rank under `hessians`.

    The left ones have orthonormal columns, the most important first: a lower rank is a prefix. No rank is
    above that of the full matrix, min(out, in).
    """
    frame, core = _framed(weights.double())
    moved = core if hessians is None else core @ _damped(hessians, damping)
    left = _leading(moved @ core.mT, rank)
    return (frame @ left).float(), (left.mT @ core).float()


def leverage(hessians: Float[Tensor, "N I I"], damping: float) -> Float[Tensor, "N I"]:
    """Ridge leverage of every neuron: near 1 where no others tell what it holds.

    The ridge is `damping` times the mean diagonal of each Hessian. Near 0 every neuron that is no exact sum
    of others scores 1; with a large one the order is that of the diagonal. [C (C + ridge I)^-1]_ii = 1 -
    ridge [(C + ridge I)^-1]_ii.
    """
    factors, ridge, _ = damped_factors(_in_float64(hessians), damping)
    inverse = torch.linalg.solve_triangular(factors, torch.eye(factors.shape[-1]).to(factors), upper=True)
    return 1 - ridge[:, None] * inverse.square().sum(1)


def entropy_allocation(
    importance: Sequence[float], ratio: float, epsilon: float | None = None
) -> list[float]:
    """The share to remove of each layer: phi of mean `ratio` that maximises sum_l s_l (1 - phi_l) + epsilon
    H(phi).

    It is in proportion to exp(-s_l / epsilon) and at most CAP (or `ratio`, where that is more); what the cap
    cuts off goes to the others in the same proportion, which is again the maximum. By default epsilon is the
    scores' standard deviation.
    """
    epsilon = epsilon or statistics.pstdev(importance) or 1.0
    cap, rest = max(CAP, ratio), ratio * len(importance)
    shares = [0.0] * len(importance)
    order = sorted(range(len(importance)), key=importance.__getitem__)
    for place, layer in enumerate(order):
        # The largest share comes first: once one is below the cap, all that follow are.
        weight = sum(math.exp((importance[layer] - importance[other]) / epsilon) for other in order[place:])
        shares[layer] = min(cap, rest / weight)
        rest -= shares[layer]
    return shares


def _in_float64(hessians: Float[Tensor, "N in in"]) -> Float[Tensor, "N in in"]:
    """`hessians` in float64, identity where nothing was seen."""
    return finite_or_identity(hessians)[0].double()


def _damped(hessians: Float[Tensor, "N in in"], damping: float) -> Float[Tensor, "N in in"]:
    hessians = _in_float64(hessians)
    return add_ridge(hessians, damping * hessians.diagonal(dim1=1, dim2=2).mean(1))


def _framed(weights: Float[Tensor, "N out in"]) -> tuple[Float[Tensor, "... out s"], Float[Tensor, "N s in"]]:
    """Q with orthonormal columns and T with W = Q T, T not taller than wide: what is decomposed has the
    smaller side s."""
    if weights.shape[1] > weights.shape[2]:
        return tuple(torch.linalg.qr(weights))
    return torch.eye(weights.shape[1]).to(weights), weights


def _leading(grams: Float[Tensor, "N s s"], rank: int) -> Float[Tensor, "N s r"]:
    """The first eigenvectors, as columns."""
    return torch.linalg.eigh(grams).eigenvectors.flip(-1)[..., :rank]
