"""Matrices that are stored as something smaller than they are, without being rounded: pruned ones, and products of two.

Two layouts that only moespresso reads: `bitmask` (`sparse.py`), and `factors`, `weight_left` [out, r] and `weight_right` [r, in],
whose product in float32, brought to their dtype, is the matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.format import Format, Layout
from moespresso.formats.sparse import decode_sparse, encode_sparse, mask_of


def decode_plain(
    layout: Layout, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]
) -> Tensor:
    """The matrices [N, out, in] of `shape` that the parts [N, ...] stand for; raises `UserError` where they do not fit."""
    if layout == "bitmask":
        return decode_sparse(parts, format, shape)
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


def encode_plain(weights: Tensor, format: Format) -> dict[str, Tensor]:
    """The parts [N, ...] of pruned matrices [N, out, in], zeros where nothing stays."""
    return encode_sparse(weights, mask_of(weights, format), format)
