"""Matrices that are stored as something smaller than they are, without being rounded: pruned ones, products of two, and
those of which whole rows or columns went.

Layouts that only moespresso reads: `bitmask` (`sparse.py`); `factors`, `weight_left` [out, r] and `weight_right` [r, in],
whose product in float32, brought to their dtype, is the matrix; `bases`, where the second factor is the sum of the bases
`weight_bases` [m, r, in], which a layer's experts share, each times its of the `weight_shares` float32 [m], and the first is
`weight_own` [out, r]; and `slices`, whose `weight_kept` [n, in] (`rows`) or [out, n]
(`columns`) stand at the ascending places `weight_index` int32 [n] of a matrix of `weight_shape` that is zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.format import Format, Layout, layout_of
from moespresso.formats.sparse import decode_sparse, encode_sparse, mask_of


def decode_plain(
    layout: Layout, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]
) -> Tensor:
    """The matrices [N, out, in] of `shape` that the parts [N, ...] stand for; raises `UserError` where they do not fit."""
    if layout == "bitmask":
        return decode_sparse(parts, format, shape)
    if layout == "slices":
        return _decode_slices(parts, format, shape)
    if layout == "bases":
        own, shares, bases = (parts.get(name) for name in ("weight_own", "weight_shares", "weight_bases"))
        if own is None or shares is None or bases is None or (own.shape[1], bases.shape[3]) != shape or bases.shape[:3] != (len(own), shares.shape[1], own.shape[2]):  # fmt: skip
            raise UserError(f"the bases of a matrix of {shape[0]} x {shape[1]} are missing or of other shapes: fetch the files again")  # fmt: skip
        return based(own, shares, bases)
    left, right = parts.get("weight_left"), parts.get("weight_right")
    if (
        left is None
        or right is None
        or (left.shape[1], right.shape[2]) != shape
        or left.shape[2] != right.shape[1]
    ):
        raise UserError(f"the factors of a matrix of {shape[0]} x {shape[1]} are missing or of other shapes: fetch the files again")  # fmt: skip
    return product(left, right)


def product(left: Tensor, right: Tensor) -> Tensor:
    """What two factors [N, out, r] and [N, r, in] stand for, in their dtype."""
    return (left.float() @ right.float()).to(left.dtype)


def based(own: Tensor, shares: Tensor, bases: Tensor) -> Tensor:
    """What factors [N, out, r] with `shares` [N, m] of `bases` [N or 1, m, r, in] stand for, in their dtype."""
    mixed = torch.einsum("nm,nmri->nri", shares, bases.float().expand(len(own), -1, -1, -1))
    return (own.float() @ mixed).to(own.dtype)


def encode_plain(weights: Tensor, format: Format) -> dict[str, Tensor]:
    """The parts [N, ...] of pruned or cut matrices [N, out, in], zeros where nothing stays."""
    if layout_of(format) == "slices":
        return _encode_slices(weights, format)
    return encode_sparse(weights, mask_of(weights, format), format)


def _encode_slices(weights: Tensor, format: Format) -> dict[str, Tensor]:
    """Those rows or columns that are not all zero, and the first others where these are fewer than the format says."""
    axis = _axis(format)
    alive = (weights != 0).any(3 - axis)
    most = int(alive.sum(1).max())
    if most > format.rank:
        raise UserError(
            f"{most} {format.kind} of a matrix are not zero, of which the format keeps {format.rank}: cut it to that first"
        )
    order = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    index = order[:, : format.rank].sort(dim=1).values
    kept = torch.stack([one.index_select(axis - 1, own) for one, own in zip(weights, index, strict=True)])
    return {
        "weight_kept": kept,
        "weight_index": index.to(torch.int32),
        "weight_shape": torch.tensor([weights.shape[1:]] * len(weights)),
    }


def _decode_slices(parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Tensor:
    """The matrices [N, out, in], zero where nothing is stored."""
    kept, index, stated = (parts.get(name) for name in ("weight_kept", "weight_index", "weight_shape"))
    axis, size = _axis(format), list(shape)
    size[axis - 1] = format.rank
    if (
        kept is None
        or index is None
        or stated is None
        or list(kept.shape[1:]) != size
        or tuple(index.shape) != (len(kept), format.rank)
        or not bool((stated == stated.new_tensor(shape)).all())
    ):
        raise UserError(
            f"the {format.kind} of a matrix of {shape[0]} x {shape[1]} are missing or of other shapes: fetch the files again"
        )
    ascending = bool((index.diff(dim=1) > 0).all())
    if not ascending or int(index[:, 0].min()) < 0 or int(index[:, -1].max()) >= shape[axis - 1]:
        raise UserError(
            f"weight_index does not name {format.rank} {format.kind} of {shape[axis - 1]} in ascending order: fetch the files again"
        )
    dense = kept.new_zeros(len(kept), *shape)
    for whole, some, own in zip(dense, kept, index.long(), strict=True):
        whole.index_copy_(axis - 1, own, some)
    return dense


def _axis(format: Format) -> int:
    """The axis of matrices [N, out, in] that a format stores a part of."""
    return 1 if format.kind == "rows" else 2
