"""Narrower attention heads in closed form, after MoDeGPT (arXiv 2408.09632): fewer query and key dims, fewer values.

With C the second moments of the layer's inputs:

    queries, keys     keep the dims i of highest |C_Q^(1/2) e_i| |C_K^(1/2) e_i|, with C_Q = W_q C W_q^T  (column-row)
    values, outputs   the r directions that hold most of W_o W_v C^(1/2), of each head's two matrices as one

Heads that share a key share its dims, and so with values: their output blocks are decomposed on top of each other. A bias
is the column of one more input that is always 1.

Dims that a rotary embedding turns together stay together and in order. They keep their frequencies, and scores their scale:
an engine must take the former per layer and key head, and the latter from the old width. Norms on queries or keys, and
embeddings that leave part of a head alone, are not handled here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moespresso.methods._low_rank import truncated

# How a rotary embedding pairs the dims of a head: (i, i + d/2), or (2i, 2i + 1); None where there is none.
Rotary = Literal["halves", "interleaved"] | None


def query_key(
    q: Tensor, k: Tensor, moments: Tensor, keep_pairs: int, heads: int, kv_heads: int, rotary: Rotary
) -> Tensor:
    """The 2 `keep_pairs` dims that stay of each key head [Hkv, n], ascending, which is the layout of a narrower head.

    `q` [heads d, hidden] and `k` [kv_heads d, hidden] read inputs of `moments` [hidden, hidden]. With a rotary embedding
    dims stay by pairs, whose score is the sum of both.
    """
    queries = _sizes(q, moments, heads).unflatten(0, (kv_heads, -1)).sum(1)
    scores = queries * _sizes(k, moments, kv_heads)
    units = _units(scores.shape[1], rotary).to(scores.device)
    order = scores[:, units].sum(-1).argsort(dim=1, descending=True, stable=True)
    best = order[:, : 2 * keep_pairs // units.shape[1]]
    return units[best].flatten(1).sort(dim=1).values


def sliced(weight: Tensor, kept: Tensor, heads: int) -> Tensor:
    """The rows `kept` [Hkv, n] of a query's or key's `weight` [heads d, ...] or bias; [heads n, ...]."""
    rows = kept.repeat_interleave(heads // len(kept), 0)
    every = torch.arange(heads, device=kept.device)[:, None]
    return weight.unflatten(0, (heads, -1))[every, rows].flatten(0, 1)


def value_output(
    v: Tensor, o: Tensor, moments: Tensor | None, rank: int, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """`v` [kv_heads d, hidden] and `o` [hidden, heads d] with `rank` dims a head, the most important first.

    Each value head V and the output blocks of its group, O [group hidden, d] = Q T, become U^T T V and Q U, where U U^T T V
    is the best of its rank for T V.
    """
    blocks = o.double().unflatten(1, (kv_heads, heads // kv_heads, -1)).permute(1, 2, 0, 3)
    frame, core = torch.linalg.qr(blocks.flatten(1, 2))
    values = core @ v.double().unflatten(0, (kv_heads, -1))
    left, right = truncated(values, None if moments is None else moments[None], rank)
    outputs = (frame @ left.double()).float().unflatten(1, blocks.shape[1:3])
    return right.flatten(0, 1), outputs.permute(2, 0, 1, 3).flatten(1)


def _sizes(weight: Tensor, moments: Tensor, heads: int) -> Tensor:
    """Root mean square [heads, d] of each output of `weight`."""
    weight = weight.double()
    # Moments that are singular may give a hair less than zero.
    energy = ((weight @ moments.double()) * weight).sum(1).clamp(min=0)
    return energy.sqrt().unflatten(0, (heads, -1))


def _units(width: int, rotary: Rotary) -> Tensor:
    """The dims of a head that stay or go together, [count, 2 or 1]."""
    dims = torch.arange(width)
    if rotary is None:
        return dims[:, None]
    return dims.view(2, -1).T if rotary == "halves" else dims.view(-1, 2)
