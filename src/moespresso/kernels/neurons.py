"""Which intermediate neurons of experts stay, and how the others' work is taken over.

An expert answers g W a, with a [I] the activations of its neurons for a token and g the gate. With C = sum
g^2 a a^T over its tokens, leaving out the neurons R costs the least, |W_R a_R|^2 and all that the neurons K
that stay cannot make up for, when

    W'_K  =  W_K + W_R C_RK (C_KK + lambda I)^-1

(the least squares of MoDeGPT, arXiv 2408.09632, drawn towards W instead of towards zero: nothing gone,
nothing changed). Scores here rank neurons once; `obs.py` chooses and refits at once.

Shapes: N experts of a group, H hidden values, I neurons, K of them kept, R rows of gate and up (I or 2 I).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from moespresso.kernels.conditioning import damped_factors


def energy(down: Float[Tensor, "N H I"], squares: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
    """What each neuron adds to the output: |w_k|^2 E[(g a_k)^2], for the means `squares`."""
    return down.float().square().sum(1) * squares


def camera_energy(
    down: Float[Tensor, "N H I"], sums: Float[Tensor, "N I"], maxima: Float[Tensor, "N I"], alpha: float
) -> Float[Tensor, "N I"]:
    """CAMERA's energy (arXiv 2508.02322): |w_k|^2 ((1 - alpha) sum_t (g a_k)^2 + alpha max_t (g a_k)^2)."""
    return down.float().square().sum(1) * ((1 - alpha) * sums + alpha * maxima)


def wanda(down: Float[Tensor, "N H I"], squares: Float[Tensor, "N I"]) -> Float[Tensor, "N I"]:
    """Wanda's metric (arXiv 2306.11695) for a whole column: sum_i |W_ik| |a_k|, with `squares` the means
    of a_k^2."""
    return down.float().abs().sum(1) * squares.sqrt()


def weight_norms(up: Float[Tensor, "N R H"], down: Float[Tensor, "N H I"]) -> Float[Tensor, "N I"]:
    """What the weights alone say: the product of the norms that lead into a neuron and out of it."""
    into = up.float().square().sum(2).unflatten(1, (-1, down.shape[2])).sqrt().prod(1)
    return into * down.float().square().sum(1).sqrt()


def rank_ascending(scores: Float[Tensor, "N I"]) -> Int[Tensor, "N I"]:
    """The neurons from the lowest score to the highest; the first of equals comes last."""
    return scores.argsort(dim=1, descending=True, stable=True).flip(1)


def keep_last(order: Int[Tensor, "N I"], keep: int) -> Int[Tensor, "N K"]:
    """The `keep` neurons that go last in `order`, ascending."""
    return order[:, order.shape[1] - keep :].sort(dim=1).values


def select(tensor: Shaped[Tensor, "N ..."], kept: Int[Tensor, "N K"], dim: int) -> Shaped[Tensor, "N ..."]:
    """`tensor` with the neurons `kept` along `dim`."""
    shape = [1] * tensor.ndim
    shape[0], shape[dim] = kept.shape
    sizes = list(tensor.shape)
    sizes[dim] = kept.shape[1]
    return tensor.gather(dim, kept.view(shape).expand(sizes))


def select_rows(
    up: Shaped[Tensor, "R H"], kept: Int[Tensor, " K"], width: int
) -> Shaped[Tensor, "parts K H"]:
    """The rows of one expert's `up` that lead to the neurons `kept` of `width`: of gate and up, or of up
    alone."""
    return up.unflatten(0, (-1, width))[:, kept]


def refit(
    down: Float[Tensor, "N H I"], hessians: Float[Tensor, "N I I"], kept: Int[Tensor, "N K"], damping: float
) -> tuple[Float[Tensor, "N H K"], dict[int, float]]:
    """`down` on the neurons `kept` alone, by the Hessians C; and whose damping had to be raised (see
    `damped_factors`)."""
    down = down.float()
    removed = _others(kept, down.shape[2])
    rows = select(hessians, kept, 1)
    lower, raised = _lower(select(rows, kept, 2), damping)
    pull_NKH = select(rows, removed, 2) @ select(down, removed, 2).mT
    return select(down, kept, 2) + torch.cholesky_solve(pull_NKH, lower).mT, raised


def _lower(
    hessians: Float[Tensor, "N K K"], damping: float
) -> tuple[Float[Tensor, "N K K"], dict[int, float]]:
    """Lower Cholesky factors of the Hessians with a ridge, as `damped_factors` finds it."""
    upper, _, raised = damped_factors(hessians.flip(1, 2), damping)
    return upper.flip(1, 2), raised


def _others(kept: Int[Tensor, "N K"], width: int) -> Int[Tensor, "N others"]:
    """The neurons that are not `kept`, of `width`."""
    is_other = torch.ones(len(kept), width, dtype=torch.bool, device=kept.device).scatter_(1, kept, False)
    return is_other.nonzero()[:, 1].view(len(kept), -1)
