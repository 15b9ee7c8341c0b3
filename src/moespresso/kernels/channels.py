"""Which intermediate channels of experts stay, and how the others' work is taken over.

An expert answers g W a, with a [I] what its channels hold for a token and g the gate. With C = sum g^2 a a^T over its tokens,
leaving out the channels R costs the least, |W_R a_R|^2 and all that the channels K that stay cannot make up for, when

    W'_K  =  W_K + W_R C_RK (C_KK + lambda I)^-1

(the least squares of MoDeGPT, arXiv 2408.09632, drawn towards W instead of towards zero: nothing gone, nothing changed).
`surgeon` chooses and refits at once, a few channels at a time: of all that are left, those go whose loss is smallest after the
rest has made up for it, sum_i W_ik^2 / [(C + lambda I)^-1]_kk (Optimal Brain Surgeon, for whole columns). Other scores rank once.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moespresso.kernels.hessians import factored
from moespresso.kernels.removal import removal, taken

# Turns in which the surgeon takes what is to go: each looks again at what is left.
TURNS = 64


def energy(down: Tensor, squares: Tensor) -> Tensor:
    """What each channel adds to the output [N, I]: |w_k|^2 E[(g a_k)^2], for `down` [N, H, I] and the means `squares` [N, I]."""
    return down.float().square().sum(1) * squares


def peaked(down: Tensor, squares: Tensor, peaks: Tensor, alpha: float) -> Tensor:
    """CAMERA's energy [N, I] (arXiv 2508.02322): |w_k|^2 ((1 - alpha) sum_t (g a_k)^2 + alpha max_t (g a_k)^2), with sums
    `squares` and `peaks` [N, I]."""
    return down.float().square().sum(1) * ((1 - alpha) * squares + alpha * peaks)


def activity(down: Tensor, squares: Tensor) -> Tensor:
    """Wanda's metric for a whole column [N, I]: sum_i |W_ik| |a_k|, with `squares` the means of a_k^2."""
    return down.float().abs().sum(1) * squares.sqrt()


def size(up: Tensor, down: Tensor) -> Tensor:
    """What the weights alone say [N, I]: the product of the norms that lead into a channel and out of it; `up` [N, R, H]."""
    into = up.float().square().sum(2).unflatten(1, (-1, down.shape[2])).sqrt().prod(1)
    return into * down.float().square().sum(1).sqrt()


def ascending(scores: Tensor) -> Tensor:
    """The channels [N, I] from the lowest score [N, I] to the highest; the first of equals comes last."""
    return scores.argsort(dim=1, descending=True, stable=True).flip(1)


def last(order: Tensor, keep: int) -> Tensor:
    """The `keep` channels that go last in `order` [N, I], ascending [N, keep]."""
    return order[:, order.shape[1] - keep :].sort(dim=1).values


def rows_of(up: Tensor, kept: Tensor, width: int) -> Tensor:
    """The rows of one expert's `up` [R, H] that lead to the channels `kept` [K] of `width` [1 or 2, K, H]: of gate and up."""
    return up.unflatten(0, (-1, width))[:, kept]


def refitted(down: Tensor, moments: Tensor, kept: Tensor, damping: float) -> tuple[Tensor, dict[int, float]]:
    """`down` [N, H, I] on the channels `kept` [N, K] alone, by the second moments C [N, I, I]; and whose damping had to be
    raised (see `factored`)."""
    down = down.float()
    gone = _others(kept, down.shape[2])
    rows = taken(moments, kept, 1)
    lower, ridge, raised = _lower(taken(rows, kept, 2), damping)
    _ = ridge
    pull = taken(rows, gone, 2) @ taken(down, gone, 2).mT  # [N, K, H]
    return taken(down, kept, 2) + torch.cholesky_solve(pull, lower).mT, raised


def removed(down: Tensor, moments: Tensor, keep: int, damping: float) -> tuple[Tensor, dict[int, float]]:
    """The order [N, I] in which the surgeon takes all channels but `keep`, and whose damping was raised."""
    order, _, raised = removal(down, moments, damping, portions(down.shape[2] - keep, TURNS))
    return order, raised


def _lower(moments: Tensor, damping: float) -> tuple[Tensor, Tensor, dict[int, float]]:
    """Lower Cholesky factors of the moments with a ridge, as `factored` finds it."""
    upper, ridge, raised = factored(moments.flip(1, 2), damping)
    return upper.flip(1, 2), ridge, raised


def _others(kept: Tensor, width: int) -> Tensor:
    """The channels [N, width - K] that are not `kept` [N, K]."""
    there = torch.ones(len(kept), width, dtype=torch.bool, device=kept.device).scatter_(1, kept, False)
    return there.nonzero()[:, 1].view(len(kept), -1)


def portions(total: int, turns: int) -> list[int]:
    """`total` in at most `turns` portions that are as equal as can be."""
    turns = max(1, min(turns, total))
    edges = [total * turn // turns for turn in range(turns + 1)]
    return [end - start for start, end in pairwise(edges) if end > start]
