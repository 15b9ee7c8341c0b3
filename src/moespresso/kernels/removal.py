"""In which order the channels of an expert can be spared, and what is lost on the way.

An expert answers g W a, with a [I] what its channels hold for a token and g the gate. With C the mean of g^2 a a^T, the channels
R of W that cost the least are those whose loss, after all others K have made up for it as well as they can, is smallest:

    tr(W_R [(C + lambda I)^-1]_RR^-1 W_R^T)

(Optimal Brain Surgeon, for whole columns). A few go at a time, the others take over, and so on: the losses add up, so one
walk from the full width says what every narrower one would lose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moespresso.kernels.hessians import factored


def removal(
    down: Tensor, moments: Tensor, damping: float, portions: list[int]
) -> tuple[Tensor, Tensor, dict[int, float]]:
    """The channels [N, I] of `down` [N, H, I] in the order in which they go, those that stay at the end; what is lost [N, turns]
    by the end of each turn, which takes so many of them as `portions` says; and whose damping was raised."""
    weights, (count, _, width) = down.float().clone(), down.shape
    upper, _, raised = factored(moments.flip(1, 2), damping)
    inverse = torch.cholesky_inverse(upper.flip(1, 2))
    there = torch.ones(count, width, dtype=torch.bool, device=down.device)
    order, losses, lost = list[Tensor](), list[Tensor](), weights.new_zeros(count)
    for some in portions:
        each = weights.square().sum(1) / inverse.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
        gone = each.masked_fill(~there, torch.inf).topk(some, dim=1, largest=False).indices
        there.scatter_(1, gone, False)
        lost = lost + _remove(weights, inverse, gone)
        order.append(gone)
        losses.append(lost)
    order.append(there.nonzero()[:, 1].view(count, -1))
    return torch.cat(order, 1), torch.stack(losses, 1) if losses else lost.new_zeros(count, 0), raised


def _remove(weights: Tensor, inverse: Tensor, gone: Tensor) -> Tensor:
    """Set the channels `gone` [N, m] to zero and let the others make up for it; the inverse becomes that of the others. What
    that costs [N]."""
    rows, own = taken(inverse, gone, 1), taken(weights, gone, 2)
    solved = torch.linalg.solve(taken(rows, gone, 2), torch.cat([rows, own.mT], 2))
    gain, price = solved.split([rows.shape[2], weights.shape[1]], 2)  # [N, m, I], [N, m, H]
    weights.baddbmm_(own, gain, alpha=-1)
    weights.scatter_(2, gone.unsqueeze(1).expand(-1, weights.shape[1], -1), 0.0)
    inverse.baddbmm_(rows.mT, gain, alpha=-1)
    return (own.mT * price).sum((1, 2))


def taken(weights: Tensor, kept: Tensor, dim: int) -> Tensor:
    """`weights` [N, ...] with the channels `kept` [N, K] along `dim`."""
    shape = [1] * weights.ndim
    shape[0], shape[dim] = kept.shape
    sizes = list(weights.shape)
    sizes[dim] = kept.shape[1]
    return weights.gather(dim, kept.view(shape).expand(sizes))
