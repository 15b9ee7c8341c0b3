"""Which weights stay when others are set to zero: those with the largest scores, in exact numbers.

What competes with what is the format's matter. In an n:m pattern the m neighbouring inputs of a row do; else
a row does (Wanda compares within each output, arXiv 2306.11695), or the whole matrix. Of equal scores the
first input's goes first.

Wanda's variant gives rows different numbers. With a row's scores s_1 <= s_2 <= .. in rising order, it drops
those with

    (s_1 + .. + s_i) / (s_1 + .. + s_in)  <=  alpha

so that every row gives up the same share of its sum. Its code finds alpha by bisection until the number
dropped is about right; as that number only grows with alpha, the exact one is reached by dropping the
smallest shares of the matrix.

Shapes: N matrices of `out` x `in`; `rows` of n that compete.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moespresso.core.format import Format
from moespresso.formats import SLAB, slabs, staying


def keep_largest(
    scores: Float[Tensor, "N out in"], format: Format, *, whole: bool = False
) -> Bool[Tensor, "N out in"]:
    """True for the largest `scores`: n of m in each group of a pattern, else equally many in each row.

    whole: without a pattern, let the whole matrix compete for the same total.
    """
    rows, width = scores.shape[1:]
    if format.group_size:
        size, count = format.group_size, staying(format.group_size, format)
    elif whole:
        size, count = rows * width, rows * staying(width, format)
    else:
        size, count = width, staying(width, format)
    return largest(scores.reshape(-1, size), count).view(scores.shape)


def keep_equal_shares(scores: Float[Tensor, "N out in"], format: Format) -> Bool[Tensor, "N out in"]:
    """True for those of `scores` (none negative) that stay when rows give up equal shares of their sums.

    As many as with `keep_largest` in each matrix, but not in each row. For formats without a pattern.
    """
    shares = torch.empty_like(scores, dtype=torch.float32)
    for part in slabs(scores.shape):
        shares[part] = _shares(scores[part].float())
    return keep_largest(shares, format, whole=True)


def largest(scores: Float[Tensor, "rows n"], count: int) -> Bool[Tensor, "rows n"]:
    """True for the `count` largest of each row of `scores`, the first of equals; NaN is lowest."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if count:
        tall = max(1, SLAB // scores.shape[1])
        for scores_slab, mask_slab in zip(scores.split(tall), mask.split(tall), strict=True):
            mask_slab.copy_(_largest(scores_slab, count))
    return mask


def _largest(scores: Float[Tensor, "rows n"], count: int) -> Bool[Tensor, "rows n"]:
    """`largest` of one slab: all above the last that stays, and of its equals the first that there is room
    for."""
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    border = scores.kthvalue(scores.shape[1] - count + 1, dim=1, keepdim=True).values
    above, equal = scores > border, scores == border
    room = count - above.sum(1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))


def _shares(scores: Float[Tensor, "... in"]) -> Float[Tensor, "... in"]:
    """The share of its row's sum that is given up when a score and all below it are; the last of equals
    first.

    A row of zeros has NaN everywhere, which counts as lowest: dropping it costs nothing.
    """
    scores = scores.masked_fill(scores.isnan(), 0.0)
    order = scores.argsort(dim=-1, descending=True, stable=True).flip(-1)
    sums = scores.gather(-1, order).cumsum(-1)
    return torch.empty_like(scores).scatter_(-1, order, sums / sums[..., -1:])
