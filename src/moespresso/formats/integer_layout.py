"""What the three layouts of packed integers share: values, scales and zeros by group, and the order of
inputs.

They store the same numbers (`QuantizedWeights`) in different tensors; each is a file of its own:
`compressed_tensors`, `gptq` and `awq`. Scales that a layout rounds make the stored matrix differ from
`decode(codes)`: give such codes the layout's dtype from the start, and what was measured is what is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats.codec import Codec, Parts
from moespresso.formats.integer import QuantizedWeights, decode, levels
from moespresso.formats.pattern import check_group
from moespresso.formats.rounding import round_nearest

WORD_BITS = 32
KEEP = "use the layout compressed-tensors"


class IntegerLayout(Codec):
    """A layout of integers of so many `bits`, with scales by group or channel."""

    kinds: ClassVar[frozenset[str]] = frozenset({"integer"})
    rounds: ClassVar[bool] = True
    said_by: ClassVar[str] = "bits and group_size"
    bits: ClassVar[tuple[int, ...]]

    def check(self, format: Format, shape: tuple[int, ...], name: str, beside: Iterable[int] = ()) -> None:
        """Raise `UserError` where it holds no such numbers, or its words no matrix of that shape."""
        if format.kind not in self.kinds:
            raise UserError(
                f"{self.layout} stores integers, not matrices that are pruned, cut or of low rank: round them first"
            )
        if format.bits not in self.bits:
            raise UserError(self.wrong_bits(format, name))
        check_group(shape[-1], format, name, beside)

    def wrong_bits(self, format: Format, name: str) -> str:
        """Why values of so many bits cannot be stored."""
        _ = name
        choice = " or ".join(f"bits={bits}" for bits in self.bits)
        return f"{self.layout} cannot store values of {format.bits} bits: use {choice}, or the layout compressed-tensors"

    def encode(self, numbers: QuantizedWeights, format: Format) -> dict[str, Tensor]:
        """The parts of codes; raises `UserError` where the layout cannot hold one of their values."""
        _, out, width = numbers.values.shape
        self.check(format, (out, width), f"a matrix of {out} x {width}")
        middle = levels(format) // 2
        assert not format.symmetric or bool((numbers.zero == middle).all()), "symmetric: zero in the middle"
        assert format.ordered or numbers.groups is None, "groups are stored where they are ordered"
        return self.pack(numbers)

    def pack(self, codes: QuantizedWeights) -> dict[str, Tensor]:
        """The parts of codes that can be stored."""
        raise NotImplementedError

    def unpack(self, parts: Parts, format: Format, shape: tuple[int, int]) -> QuantizedWeights:
        """The codes that parts of the right shapes hold."""
        raise NotImplementedError

    def numbers(self, parts: Parts, format: Format, shape: tuple[int, int]) -> QuantizedWeights:
        """The codes that parts hold; raises `UserError` where they do not fit."""
        self.check_parts(parts, format, shape)
        return self.unpack(parts, format, shape)

    def decode(self, parts: Parts, format: Format, shape: tuple[int, int]) -> Tensor:
        """The weights, in the scales' dtype."""
        return decode(self.numbers(parts, format, shape))

    def nearest(self, weights: Tensor, format: Format, dtype: torch.dtype) -> QuantizedWeights:
        """Weights rounded to the nearest level."""
        return round_nearest(weights.float(), format, dtype)

    def values(self, numbers: QuantizedWeights, format: Format) -> Tensor:
        """The weights, in the scales' dtype."""
        _ = format
        return decode(numbers)

    def cut(self, numbers: QuantizedWeights, expert: int, rows: slice, columns: int) -> QuantizedWeights:
        """The codes of one expert: some of its rows, and its first columns; groups must not be cut."""
        return numbers.cut(slice(expert, expert + 1), rows, columns)

    def words(self, format: Format, ranks: str) -> str:
        """Bits, groups and zeros."""
        _ = ranks
        groups = f"groups of {format.group_size}" if format.group_size else "one scale a channel"
        order = " in an order of their own" if format.ordered else ""
        return f"{format.bits} bits, {groups}{order}, {'symmetric' if format.symmetric else 'with zeros'}"

    def label(self, format: Format) -> str:
        """Its bits."""
        return f"{format.bits} bits"

    def rescale(self, parts: Parts, factor: float) -> dict[str, Tensor]:
        """The parts with scales times a factor; raises `UserError` where one leaves the range of its
        dtype."""
        scaled = super().rescale(parts, factor)
        after = scaled[self.scaled]
        if not bool(((after != 0) & after.isfinite()).all()):
            raise UserError(
                f"a scale times {factor:.3g} is outside {after.dtype}, the dtype of its layout: scale by less, or export to plain first"
            )
        return scaled


def words_of(count: int, bits: int) -> int:
    """Words of 32 bits that `count` values fill when they are laid end to end, across the borders of
    words."""
    return -(-count * bits // WORD_BITS)


def counted_off(format: Format, width: int) -> Tensor:
    """The group of every input, int32 [in], counted from the left."""
    return torch.arange(width, dtype=torch.int32) // (format.group_size or width)


def stored_order(codes: QuantizedWeights) -> Tensor:
    """The group of every input of every matrix, int32 [N, in]: counted off too where values were rounded
    anew."""
    count, _, width = codes.values.shape
    return counted_off(codes.format, width).repeat(count, 1) if codes.groups is None else codes.groups.int()


def order_of(stored: Tensor | None, format: Format) -> Tensor | None:
    """The stored group of every input [N, in]; None where groups are counted off. Raises `UserError` where
    that contradicts the format."""
    if stored is None:
        return None
    counted = counted_off(format, stored.shape[-1]).expand_as(stored)
    if not format.ordered:
        if not torch.equal(stored, counted):
            raise UserError(
                "g_idx does not count groups from left to right, which is act-order: set desc_act to true in its config.json"
            )
        return None
    if bool((stored == -1).any()):  # never filled in: readers count off then
        return counted
    if not bool(((stored >= 0) & (stored <= counted[..., -1:])).all()):
        raise UserError("g_idx names groups that there are not: download the checkpoint again")
    return stored


def zeros_as_said(zero: Tensor, format: Format, said: str, cure: str) -> Tensor:
    """The zeros; raises `UserError` where they are not in the middle though the format is said to be
    symmetric: some engines then read them, and some do not."""
    if format.symmetric and not bool((zero == levels(format) // 2).all()):
        raise UserError(
            f"qzeros hold other zeros than the middle, but {said}, so engines do not agree on its values: set {cure} in its "
            "config.json where its zeros are right, or take the unquantized checkpoint"
        )
    return zero


def half(scale: Tensor, layout: str) -> Tensor:
    """Scales as float16; `UserError` where one leaves its range."""
    narrow = scale.to(torch.float16)
    lost = ~narrow.isfinite() | ((narrow == 0) & (scale != 0))
    if bool(lost.any()):
        worst = float(scale[lost][0])
        raise UserError(f"a scale of {worst:.3g} is outside float16, the dtype of {layout}'s scales: {KEEP}")
    return narrow


def check_words(layout: str, format: Format, shape: tuple[int, ...], sides: dict[str, int]) -> None:
    """Raise `UserError` where values do not fill whole words along the sides of a matrix."""
    whole = WORD_BITS // math.gcd(WORD_BITS, format.bits)
    for side, count in sides.items():
        if count % whole:
            raise UserError(
                f"{layout} packs {format.bits}-bit values by {whole}, which do not divide the {count} {side} of a "
                f"matrix of {shape[0]} x {shape[1]}: {KEEP}"
            )


def left_alone(plain: list[str]) -> dict[str, Any]:
    """GPTQModel's own way to leave modules alone, in both of its layouts: a pattern with a minus in front."""
    return {f"-:^{re.escape(name)}$": {} for name in plain}
