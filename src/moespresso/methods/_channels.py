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

from moespresso.methods._hessians import factored

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


def best(scores: Tensor, keep: int) -> Tensor:
    """The `keep` channels of the highest scores [N, I], ascending [N, keep]; the first of equals."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values


def taken(weights: Tensor, kept: Tensor, dim: int) -> Tensor:
    """`weights` [N, ...] with the channels `kept` [N, K] along `dim`."""
    shape = [1] * weights.ndim
    shape[0], shape[dim] = kept.shape
    sizes = list(weights.shape)
    sizes[dim] = kept.shape[1]
    return weights.gather(dim, kept.view(shape).expand(sizes))


def rows_of(up: Tensor, kept: Tensor, width: int) -> Tensor:
    """The rows of `up` [N, R, H] that lead to the channels `kept` [N, K] of `width`: of gate and up alike."""
    halves = up.shape[1] // width
    return torch.cat([taken(half, kept, 1) for half in up.chunk(halves, dim=1)], dim=1)


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


def surgeon(
    down: Tensor, moments: Tensor, keep: int, damping: float, turns: int = TURNS
) -> tuple[Tensor, Tensor, dict[int, float]]:
    """The channels to keep [N, keep], ascending, `down` [N, H, keep] refitted on them, and whose damping was raised."""
    weights, (count, _, width) = down.float().clone(), down.shape
    lower, _, raised = _lower(moments, damping)
    inverse = torch.cholesky_inverse(lower)
    there = torch.ones(count, width, dtype=torch.bool, device=down.device)
    for some in _portions(width - keep, turns):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        loss = weights.square().sum(1) / diagonal.clamp_min(1e-30)
        gone = loss.masked_fill(~there, torch.inf).topk(some, dim=1, largest=False).indices
        there.scatter_(1, gone, False)
        _remove(weights, inverse, gone)
    kept = there.nonzero()[:, 1].view(count, keep)
    return kept, taken(weights, kept, 2), raised


def _remove(weights: Tensor, inverse: Tensor, gone: Tensor) -> None:
    """Set the channels `gone` [N, m] to zero and let the others make up for it; the inverse becomes that of the others."""
    rows = taken(inverse, gone, 1)
    gain = torch.linalg.solve(taken(rows, gone, 2), rows)  # [N, m, I]
    weights.baddbmm_(taken(weights, gone, 2), gain, alpha=-1)
    weights.scatter_(2, gone.unsqueeze(1).expand(-1, weights.shape[1], -1), 0.0)
    inverse.baddbmm_(rows.mT, gain, alpha=-1)


def _lower(moments: Tensor, damping: float) -> tuple[Tensor, Tensor, dict[int, float]]:
    """Lower Cholesky factors of the moments with a ridge, as `factored` finds it."""
    upper, ridge, raised = factored(moments.flip(1, 2), damping)
    return upper.flip(1, 2), ridge, raised


def _others(kept: Tensor, width: int) -> Tensor:
    """The channels [N, width - K] that are not `kept` [N, K]."""
    there = torch.ones(len(kept), width, dtype=torch.bool, device=kept.device).scatter_(1, kept, False)
    return there.nonzero()[:, 1].view(len(kept), -1)


def _portions(total: int, turns: int) -> list[int]:
    """`total` in at most `turns` portions that are as equal as can be."""
    turns = max(1, min(turns, total))
    edges = [total * turn // turns for turn in range(turns + 1)]
    return [end - start for start, end in pairwise(edges) if end > start]
