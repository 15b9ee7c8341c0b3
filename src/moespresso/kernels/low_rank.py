"""Narrower matrices in closed form: low rank, fewer channels, and how much of which layer.

With C the second moments of a projection's inputs, W' in the place of W costs tr((W - W') C (W - W')^T) of output error:

    rank r     W' = U U^T W, with U the r leading eigenvectors of W C W^T (C^-1/2 is not needed)
    channels   those of the highest ridge leverage [C (C + lambda I)^-1]_ii, and layers by entropy, both as in MoDeGPT
               (arXiv 2408.09632); the refit of what stays is in `_channels.py`

Tensors come and go in float32; in between all is float64, about four times the size of what was given: give it fewer
matrices at once where that is too much.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from moespresso.kernels.hessians import factored, ridged, usable

# Relative damping that only settles what the data leave open: of two answers alike on them, the one nearer to the weights.
DAMPING = 1e-6
# The largest share that is removed of a layer.
CAP = 0.95


def truncated(
    weights: Tensor, moments: Tensor | None, rank: int, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Factors [N, out, r] and [N, r, in] of the best `weights` [N, out, in] of a rank under `moments` [N or 1, in, in].

    The left ones have orthonormal columns, the most important first: a lower rank is a prefix. No rank is above that of the
    full matrix, min(out, in).
    """
    frame, core = _framed(weights.double())
    moved = core if moments is None else core @ _damped(moments, damping)
    left = _leading(moved @ core.mT, rank)
    return (frame @ left).float(), (left.mT @ core).float()


def leverage(moments: Tensor, damping: float) -> Tensor:
    """Ridge leverage [N, I] of every channel: near 1 where no others tell what it holds.

    The ridge is `damping` times the mean diagonal of each of `moments` [N, I, I]. Near 0 every channel that is no exact sum
    of others scores 1; with a large one the order is that of the diagonal.
    """
    return _leverage(_sound(moments), damping)


def entropy_allocation(
    importance: Sequence[float], ratio: float, epsilon: float | None = None
) -> list[float]:
    """The share to remove of each layer: phi of mean `ratio` that maximises sum_l s_l (1 - phi_l) + epsilon H(phi).

    It is in proportion to exp(-s_l / epsilon) and at most CAP (or `ratio`, where that is more); what the cap cuts off goes to
    the others in the same proportion, which is again the maximum. By default epsilon is the scores' standard deviation.
    """
    epsilon = epsilon or statistics.pstdev(importance) or 1.0
    cap, left = max(CAP, ratio), ratio * len(importance)
    shares = [0.0] * len(importance)
    order = sorted(range(len(importance)), key=importance.__getitem__)
    for place, layer in enumerate(order):
        # The largest share comes first: once one is below the cap, all that follow are.
        rest = sum(math.exp((importance[layer] - importance[other]) / epsilon) for other in order[place:])
        shares[layer] = min(cap, left / rest)
        left -= shares[layer]
    return shares


# Moments


def _sound(moments: Tensor) -> Tensor:
    """`moments` [N, in, in] in float64, identity where nothing was seen."""
    return usable(moments)[0].double()


def _damped(moments: Tensor, damping: float) -> Tensor:
    moments = _sound(moments)
    return ridged(moments, damping * moments.diagonal(dim1=1, dim2=2).mean(1))


def _leverage(moments: Tensor, damping: float) -> Tensor:
    """[C (C + ridge I)^-1]_ii = 1 - ridge [(C + ridge I)^-1]_ii."""
    factors, ridge, _ = factored(moments, damping)
    inverse = torch.linalg.solve_triangular(factors, torch.eye(factors.shape[-1]).to(factors), upper=True)
    return 1 - ridge[:, None] * inverse.square().sum(1)


# Factors


def _framed(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Q with orthonormal columns and T with W = Q T, T not taller than wide: what is decomposed has the smaller side."""
    if weights.shape[1] > weights.shape[2]:
        return tuple(torch.linalg.qr(weights))
    return torch.eye(weights.shape[1]).to(weights), weights


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The first eigenvectors, as columns."""
    return torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :rank]
