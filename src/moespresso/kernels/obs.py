"""In which order the neurons of an expert can be spared, and what is lost on the way: Optimal Brain Surgeon
for whole columns.

An expert answers g W a, with a [I] the activations of its neurons for a token and g the gate. With C the mean
of g^2 a a^T, the neurons R of W that cost the least are those whose loss, after all others K have made up for
it as well as they can, is smallest:

    tr(W_R [(C + lambda I)^-1]_RR^-1 W_R^T)

which for a single one is sum_i W_ik^2 / [(C + lambda I)^-1]_kk. A few go at a time, the others take over, and
so on: the losses add up, so one walk from the full width says what every narrower one would lose.

Shapes: N experts of a group, H hidden values, I neurons, m of them removed in a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moespresso.kernels.conditioning import damped_factors
from moespresso.kernels.neurons import select

# Turns in which neurons are removed: each looks again at what is left.
TURNS = 64


def removal_order(
    down: Float[Tensor, "N H I"], hessians: Float[Tensor, "N I I"], keep: int, damping: float
) -> tuple[Int[Tensor, "N I"], dict[int, float]]:
    """The order in which all neurons but `keep` are removed, then those; and whose damping was raised."""
    order, _, raised = remove(down, hessians, damping, portions(down.shape[2] - keep, TURNS))
    return order, raised


def remove(
    down: Float[Tensor, "N H I"], hessians: Float[Tensor, "N I I"], damping: float, counts: Sequence[int]
) -> tuple[Int[Tensor, "N I"], Float[Tensor, "N turns"], dict[int, float]]:
    """The neurons of `down` in the order in which they go, those that stay at the end; what is lost by the
    end of each turn, which takes so many of them as `counts` says; and whose damping was raised."""
    weights_NHI, (count, _, width) = down.float().clone(), down.shape
    upper, _, raised = damped_factors(hessians.flip(1, 2), damping)
    inverse_NII = torch.cholesky_inverse(upper.flip(1, 2))
    is_left = torch.ones(count, width, dtype=torch.bool, device=down.device)
    order, losses, loss_N = list[Tensor](), list[Tensor](), weights_NHI.new_zeros(count)
    for some in counts:
        costs_NI = weights_NHI.square().sum(1) / inverse_NII.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
        removed_Nm = costs_NI.masked_fill(~is_left, torch.inf).topk(some, dim=1, largest=False).indices
        is_left.scatter_(1, removed_Nm, False)
        loss_N = loss_N + _take_over(weights_NHI, inverse_NII, removed_Nm)
        order.append(removed_Nm)
        losses.append(loss_N)
    order.append(is_left.nonzero()[:, 1].view(count, -1))
    return torch.cat(order, 1), torch.stack(losses, 1) if losses else loss_N.new_zeros(count, 0), raised


def portions(total: int, turns: int) -> list[int]:
    """`total` in at most `turns` portions that are as equal as can be."""
    turns = max(1, min(turns, total))
    edges = [total * turn // turns for turn in range(turns + 1)]
    return [end - start for start, end in pairwise(edges) if end > start]


def _take_over(
    weights: Float[Tensor, "N H I"], inverse: Float[Tensor, "N I I"], removed: Int[Tensor, "N m"]
) -> Float[Tensor, " N"]:
    """Set the neurons `removed` to zero and let the others make up for it, in place; the inverse becomes
    that of the others. What that costs."""
    rows_NmI, columns_NHm = select(inverse, removed, 1), select(weights, removed, 2)
    solved = torch.linalg.solve(select(rows_NmI, removed, 2), torch.cat([rows_NmI, columns_NHm.mT], 2))
    gain_NmI, price_NmH = solved.split([rows_NmI.shape[2], weights.shape[1]], 2)
    weights.baddbmm_(columns_NHm, gain_NmI, alpha=-1)
    weights.scatter_(2, removed.unsqueeze(1).expand(-1, weights.shape[1], -1), 0.0)
    inverse.baddbmm_(rows_NmI.mT, gain_NmI, alpha=-1)
    return (columns_NHm.mT * price_NmH).sum((1, 2))
