"""Pruned matrices: one bit per weight says which weights stay, and the values of those follow end to end.

A `Format("sparse", density=d, group_size=m)` fixes how many stay. With m, round(d x m) of every m
neighbouring inputs of a row (n:m). Without, round(d x in) times the rows, of the matrix as a whole: a
threshold over a matrix leaves its rows unequal, so that nothing here counts on rows. Where d is not zero,
round(..) is at least one.

The parts of a stack of N matrices out x in: `weight_values` [N, kept], row by row, in the weights' dtype;
`weight_mask` uint8 [N, out, ceil(in / 8)], the first weight in the lowest bit, the bits past the row zero;
`weight_shape` int64 [N, 2]. What stays comes back bit for bit, -0.0 and NaN too; what was dropped comes back
as +0.0.

Shapes: N matrices of `out` x `in`; `*cells` are any axes of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor
from torch.nn.functional import pad

from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats.codec import Codec, Parts, Shapes, codec, codec_named
from moespresso.formats.integer import in_groups, slabs
from moespresso.formats.packing import pack_words, plain, unpack_words
from moespresso.formats.pattern import check_pattern, kept_in_row


@codec
class Bitmask(Codec):
    """A mask, and the weights that stay."""

    layout: ClassVar[str] = "bitmask"
    kinds: ClassVar[frozenset[str]] = frozenset({"sparse"})
    parts: ClassVar[tuple[str, ...]] = ("weight_values", "weight_mask", "weight_shape")
    scaled: ClassVar[str] = "weight_values"
    said_by: ClassVar[str] = "density and group_size"
    title: ClassVar[str] = "pruned matrices with a mask"

    def shapes(self, format: Format, out: int, width: int, dtype: str) -> Shapes:
        """Values, mask and shape."""
        return {
            "weight_values": ((kept_count(format, out, width),), dtype),
            "weight_mask": ((out, -(-width // 8)), "U8"),
            "weight_shape": ((2,), "I64"),
        }

    def check(self, format: Format, shape: tuple[int, ...], name: str, beside: Iterable[int] = ()) -> None:
        """Raise `UserError` where weights cannot be pruned in its pattern."""
        check_pattern(shape[-1], format, name, beside)

    def encode(self, numbers: Tensor, format: Format) -> dict[str, Tensor]:
        """Pruned weights, of which those that are zero went."""
        return encode_sparse(numbers, mask_of(numbers, format), format)

    def decode(self, parts: Parts, format: Format, shape: tuple[int, int]) -> Tensor:
        """The weights, zero where none is stored."""
        return decode_sparse(parts, format, shape)

    def size(
        self, parts: Mapping[str, TensorRef], format: Format, read: Callable[[TensorRef], list[int]]
    ) -> tuple[int, int]:
        """Outputs by the mask; inputs, which its last byte may leave open, by the stored shape."""
        _ = format, parts["weight_values"]
        (out, nbytes), width = parts["weight_mask"].shape, read(parts["weight_shape"])[1]
        if not 8 * nbytes - 32 < width <= 8 * nbytes:
            raise UserError(
                f"{parts['weight_shape'].name} says {width} inputs, its values hold {8 * nbytes}: download it again"
            )
        return out, width

    def unpacked(self, format: Format) -> Format:
        """Zeros where weights went."""
        return replace(format, kind="source")

    def words(self, format: Format, ranks: str) -> str:
        """The share that stays."""
        _ = ranks
        return f"{format.density:.0%} of the weights with a mask"


def kept_count(format: Format, out: int, width: int) -> int:
    """Number of weights that stay in a matrix of `out` x `width`."""
    return out * kept_in_row(format, width)


def encode_sparse(
    weights: Float[Tensor, "N out in"], mask: Bool[Tensor, "N out in"], format: Format
) -> dict[str, Shaped[Tensor, "N ..."]]:
    """Store the weights where `mask` is true: suffix -> tensor."""
    count, out, width = weights.shape
    kept = kept_count(format, out, width)
    assert bool((_totals(mask) == kept).all()), f"each matrix keeps {kept} weights"
    assert _is_even(mask, format), "each group keeps its share"
    words = pack_words(mask.view(torch.uint8), 1)
    return {
        "weight_values": _selected(weights, mask, count * kept).view(count, kept),
        "weight_mask": plain(words.view(torch.uint8)[..., : -(-width // 8)]),
        "weight_shape": torch.tensor([[out, width]] * count),
    }


def decode_sparse(
    parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]
) -> Float[Tensor, "N out in"]:
    """Undo `encode_sparse` for matrices of `shape` (out, in): the weights, zero where none is stored.

    Raises `UserError` where a part is missing or is not what the format and the shape say, or where the mask
    and the values do not fit together.
    """
    codec_named("bitmask").check_parts(parts, format, shape)
    values, packed = parts["weight_values"], parts["weight_mask"]
    words = plain(pad(packed, (0, -packed.shape[-1] % 4))).view(torch.int32)
    mask = unpack_words(words, 1, shape[1]).view(torch.bool)
    _check_mask(mask, packed, format)
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return dense.masked_scatter_(mask, values)


def mask_of(weights: Float[Tensor, "N out in"], format: Format) -> Bool[Tensor, "N out in"]:
    """The mask to store matrices with, whose dropped weights are zeros of either sign.

    It has every weight that is not zero, and the first zeros of each group (each matrix, where there are no
    groups) that are needed to keep as many as the format says. Raises `UserError` where more are not zero
    than that.
    """
    _, out, width = weights.shape
    size, kept = format.group_size, kept_count(format, out, width)
    mask = (weights != 0).contiguous()
    if size:
        kept = kept_in_row(format, size)
        for part in slabs(mask.shape):
            groups = in_groups(mask[part], format)
            _fill(groups, _lacking(groups.sum(-1), kept, f"group of {size}"))
        return mask
    lacking = _lacking(_totals(mask), kept, f"matrix of {out} x {width}")
    for matrices, rows in slabs(mask.shape):
        # The rows of a matrix come from the top, so each slab leaves the next one what it could not fill.
        slab = mask[matrices, rows]
        lacking[matrices] = _fill(slab.view(len(slab), -1), lacking[matrices])
    return mask


def _selected(
    weights: Float[Tensor, "N out in"], mask: Bool[Tensor, "N out in"], total: int
) -> Float[Tensor, " total"]:
    """The weights that `mask` marks, `total` in all, end to end: slabs go through them row by row.

    To select from all at once, torch would take two int64 for every weight; and to keep the pieces for
    `torch.cat` would leave such holes between them that the process grows nearly as much.
    """
    values = weights.new_empty(total)
    start = 0
    for part in slabs(weights.shape):
        piece = weights[part].masked_select(mask[part])
        values[start : start + len(piece)] = piece
        start += len(piece)
    return values


def _lacking(marked: Int[Tensor, "*cells"], kept: int, what: str) -> Int[Tensor, "*cells"]:
    """How many weights are to be marked besides those that are; `UserError` where there are too many
    already."""
    highest = int(marked.max())
    if highest > kept:
        raise UserError(
            f"{highest} weights of a {what} are not zero, of which the format keeps {kept}: "
            "prune to the density and group_size that it is stored with"
        )
    return kept - marked


def _fill(cells: Bool[Tensor, "*cells n"], lacking: Int[Tensor, "*cells"]) -> Int[Tensor, "*cells"]:
    """Mark the first `lacking` that are not marked of each of `cells`, in place.

    Returns how many are lacking still where a cell had too few.
    """
    if not bool(lacking.any()):
        return lacking  # as nearly always: few weights that stay are zero
    place = (~cells).cumsum(-1, dtype=torch.int32)
    cells |= place <= lacking.unsqueeze(-1)
    return (lacking - place[..., -1]).clamp(min=0)


def _totals(mask: Bool[Tensor, "N out in"]) -> Int[Tensor, " N"]:
    """How many weights of each matrix stay. (To sum up a bool, torch would widen all of it to int64.)"""
    return torch.stack([matrix.count_nonzero() for matrix in mask])


def _is_even(mask: Bool[Tensor, "N out in"], format: Format) -> bool:
    """Whether every group keeps its share, where there are groups."""
    if not format.group_size:
        return True
    kept = kept_in_row(format, format.group_size)
    groups = (in_groups(mask[part], format) for part in slabs(mask.shape))
    return all(bool((each.sum(-1) == kept).all()) for each in groups)


def _check_mask(mask: Bool[Tensor, "N out in"], packed: UInt8[Tensor, "N out bytes"], format: Format) -> None:
    """Raise `UserError` where the mask marks other weights than the values can be for."""
    out, width = mask.shape[1:]
    kept = kept_count(format, out, width)
    totals = _totals(mask)
    wrong = totals[totals != kept]
    if len(wrong):
        raise UserError(f"weight_mask marks {int(wrong[0])} weights for {kept} values: fetch the files again")
    if width % 8 and bool((packed[..., -1] >> width % 8).any()):
        raise UserError(f"weight_mask marks weights past the {width} of a row: fetch the files again")
    if not _is_even(mask, format):
        share = kept_in_row(format, format.group_size)
        raise UserError(
            f"weight_mask does not keep {share} of every {format.group_size} weights: fetch the files again"
        )
