"""Narrower attention heads in closed form, after MoDeGPT (arXiv 2408.09632): fewer query and key dims, fewer
values.

With C the Hessian of the layer's inputs, the mean of x x^T:

    queries, keys     keep the dims i of highest |C_Q^(1/2) e_i| |C_K^(1/2) e_i|, with C_Q = W_q C W_q^T
                      (column-row)
    values, outputs   the r directions that hold most of W_o W_v C^(1/2), of each head's two matrices as one

Heads that share a key share its dims, and so with values: their output blocks are decomposed on top of each
other. A bias is the column of one more input that is always 1. Dims that a rotary embedding turns together
stay together, in their places, so that they keep their frequencies and scores their scale. Norms on queries
or keys are not handled here.

Shapes: `hidden` inputs, Hq query heads and Hkv heads of keys and values, d dims each, r of which are kept;
    Hqd = Hq x d rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moespresso.kernels.low_rank import DAMPING, truncate


def select_query_key(
    q: Float[Tensor, "Hqd hidden"],
    k: Float[Tensor, "Hkvd hidden"],
    hessian: Float[Tensor, "hidden hidden"],
    keep: int,
    heads: int,
    units: Sequence[Sequence[int]],
) -> Bool[Tensor, "Hkv d"]:
    """Which dims of each key head stay, `keep` in each row, of so many query `heads`.

    `units` are the dims that stay or go together; those stay whose dims score most in the mean, and smaller
    ones where a larger one does not fit any more.
    """
    width = sum(map(len, units))
    kv_heads = len(k) // width
    scores = _sizes(q, hessian, heads).unflatten(0, (kv_heads, -1)).sum(1) * _sizes(k, hessian, kv_heads)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for row, row_scores in zip(kept, scores.tolist(), strict=True):
        room = keep
        for unit in sorted(units, key=lambda unit: -sum(row_scores[dim] for dim in unit) / len(unit)):
            if len(unit) <= room:
                row[list(unit)] = True
                room -= len(unit)
        assert not room, f"no {keep} dims in units of {units}"
    return kept


def decompose_value_output(
    v: Float[Tensor, "Hkvd hidden"],
    o: Float[Tensor, "out Hqd"],
    hessian: Float[Tensor, "hidden hidden"] | None,
    rank: int,
    heads: int,
    damping: float = DAMPING,
) -> tuple[Float[Tensor, "Hkvr hidden"], Float[Tensor, "out Hqr"]]:
    """`v` and `o` with `rank` dims for each of so many query `heads` and their values, the most important
    first.

    Each value head V and the output blocks of its group, O [group out, d] = Q T, become U^T T V and Q U,
    where U U^T T V is the best of its rank for T V.
    """
    kv_heads = len(v) // (o.shape[1] // heads)
    blocks = o.double().unflatten(1, (kv_heads, heads // kv_heads, -1)).permute(1, 2, 0, 3)
    frame, core = torch.linalg.qr(blocks.flatten(1, 2))
    values = core @ v.double().unflatten(0, (kv_heads, -1))
    left, right = truncate(values, None if hessian is None else hessian[None], rank, damping)
    outputs = (frame @ left.double()).float().unflatten(1, blocks.shape[1:3])
    return right.flatten(0, 1), outputs.permute(2, 0, 1, 3).flatten(1)


def _sizes(
    weight: Float[Tensor, "rows hidden"], hessian: Float[Tensor, "hidden hidden"], heads: int
) -> Float[Tensor, "heads d"]:
    """Root mean square of each output of `weight`."""
    weight = weight.double()
    # A Hessian that is singular may give a hair less than zero.
    energy = ((weight @ hessian.double()) * weight).sum(1).clamp(min=0)
    return energy.sqrt().unflatten(0, (heads, -1))
