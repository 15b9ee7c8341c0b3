"""Narrower attention heads in closed form, after MoDeGPT (arXiv 2408.09632): fewer query and key dims, fewer values.

With C the second moments of the layer's inputs:

    queries, keys     keep the dims i of highest |C_Q^(1/2) e_i| |C_K^(1/2) e_i|, with C_Q = W_q C W_q^T  (column-row)
    values, outputs   the r directions that hold most of W_o W_v C^(1/2), of each head's two matrices as one

Heads that share a key share its dims, and so with values: their output blocks are decomposed on top of each other. A bias
is the column of one more input that is always 1.

Dims that a rotary embedding turns together stay together, in their places, so that they keep their frequencies and scores
their scale. Norms on queries or keys are not handled here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moespresso.kernels.low_rank import DAMPING, truncated


def query_key(
    q: Tensor, k: Tensor, moments: Tensor, keep: int, heads: int, units: Sequence[Sequence[int]]
) -> Tensor:
    """Which dims of each key head stay: bool [Hkv, d], `keep` in each row.

    `q` [heads d, hidden] and `k` [Hkv d, hidden] read inputs of `moments` [hidden, hidden]. `units` are the dims that stay or
    go together; those stay whose dims score most in the mean, and smaller ones where a larger one does not fit any more.
    """
    width = sum(map(len, units))
    kv_heads = len(k) // width
    scores = _sizes(q, moments, heads).unflatten(0, (kv_heads, -1)).sum(1) * _sizes(k, moments, kv_heads)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for stay, own in zip(kept, scores.tolist(), strict=True):
        left = keep
        for unit in sorted(units, key=lambda unit: -sum(own[dim] for dim in unit) / len(unit)):
            if len(unit) <= left:
                stay[list(unit)] = True
                left -= len(unit)
        assert not left, f"no {keep} dims in units of {units}"
    return kept


def value_output(
    v: Tensor,
    o: Tensor,
    moments: Tensor | None,
    rank: int,
    heads: int,
    kv_heads: int,
    damping: float = DAMPING,
) -> tuple[Tensor, Tensor]:
    """`v` [kv_heads d, hidden] and `o` [hidden, heads d] with `rank` dims a head, the most important first.

    Each value head V and the output blocks of its group, O [group hidden, d] = Q T, become U^T T V and Q U, where U U^T T V
    is the best of its rank for T V.
    """
    blocks = o.double().unflatten(1, (kv_heads, heads // kv_heads, -1)).permute(1, 2, 0, 3)
    frame, core = torch.linalg.qr(blocks.flatten(1, 2))
    values = core @ v.double().unflatten(0, (kv_heads, -1))
    left, right = truncated(values, None if moments is None else moments[None], rank, damping)
    outputs = (frame @ left.double()).float().unflatten(1, blocks.shape[1:3])
    return right.flatten(0, 1), outputs.permute(2, 0, 1, 3).flatten(1)


def _sizes(weight: Tensor, moments: Tensor, heads: int) -> Tensor:
    """Root mean square [heads, d] of each output of `weight`."""
    weight = weight.double()
    # Moments that are singular may give a hair less than zero.
    energy = ((weight @ moments.double()) * weight).sum(1).clamp(min=0)
    return energy.sqrt().unflatten(0, (heads, -1))
