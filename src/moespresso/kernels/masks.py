"""Which weights stay when others are set to zero: those with the largest scores, in exact numbers.

What competes with what is the format's matter. In an n:m pattern the m neighbouring inputs of a row do; else a row does
(Wanda compares within each output, arXiv 2306.11695), or the whole matrix. Of equal scores the first input's goes first.

Wanda's variant gives rows different numbers. With a row's scores s_1 <= s_2 <= .. in rising order, it drops those with

    (s_1 + .. + s_i) / (s_1 + .. + s_in)  <=  alpha

so that every row gives up the same share of its sum. Its code finds alpha by bisection until the number dropped is about
right; as that number only grows with alpha, the exact one is reached by dropping the smallest shares of the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moespresso.core.format import Format
from moespresso.formats import SLAB, slabs, staying


def kept(scores: Tensor, format: Format, *, whole: bool = False) -> Tensor:
    """True for the largest `scores` [N, out, in]: n of m in each group of a pattern, else equally many in each row.

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


def kept_by_share(scores: Tensor, format: Format) -> Tensor:
    """True for those of `scores` [N, out, in] (none negative) that stay when rows give up equal shares of their sums.

    As many as with `kept` in each matrix, but not in each row. For formats without a pattern.
    """
    shares = torch.empty_like(scores, dtype=torch.float32)
    for part in slabs(scores.shape):
        shares[part] = _shares(scores[part].float())
    return kept(shares, format, whole=True)


def largest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` largest of each row of `scores` [rows, n], the first of equals; NaN is lowest."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if count:
        tall = max(1, SLAB // scores.shape[1])
        for some, found in zip(scores.split(tall), mask.split(tall), strict=True):
            found.copy_(_largest(some, count))
    return mask


def _largest(scores: Tensor, count: int) -> Tensor:
    """`largest` of one slab: all above the last that stays, and of its equals the first that there is room for."""
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    border = scores.kthvalue(scores.shape[1] - count + 1, dim=1, keepdim=True).values
    above, equal = scores > border, scores == border
    room = count - above.sum(1, keepdim=True, dtype=torch.int32)
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))


def _shares(scores: Tensor) -> Tensor:
    """The share of its row's sum [..., in] that is given up when a score and all below it are; the last of equals first.

    A row of zeros has NaN everywhere, which counts as lowest: dropping it costs nothing.
    """
    scores = scores.masked_fill(scores.isnan(), 0.0)
    order = scores.argsort(dim=-1, descending=True, stable=True).flip(-1)
    given = scores.gather(-1, order).cumsum(-1)
    return torch.empty_like(scores).scatter_(-1, order, given / given[..., -1:])
