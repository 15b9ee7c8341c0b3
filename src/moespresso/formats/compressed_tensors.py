"""Packed integers as compressed-tensors stores them (`pack-quantized`): rows of values end to end.

Its library counts values from -2^(bits-1) and adds that offset when it packs, so the stored bits are the
unsigned values of `QuantizedWeights`. Zeros exist in asymmetric formats only, packed along the outputs.
Scales keep their dtype. Formats that are `ordered` store the group of every input (`weight_g_idx`; an entry
of -1 says that groups are counted off after all). (Versions before 0.18 put ten 3-bit values into a word and
never went over its border: they cannot read what is written here in 3 bits. 2, 4 and 8 bits are the same.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats.codec import Obstacle, Parts, Shapes, codec
from moespresso.formats.integer import QuantizedWeights, levels
from moespresso.formats.integer_layout import WORD_BITS, IntegerLayout, order_of, stored_order, words_of
from moespresso.formats.packing import pack_words, plain, unpack_words


@codec
class CompressedTensors(IntegerLayout):
    """Rows of values end to end, and the last word of a row padded."""

    layout: ClassVar[str] = "compressed-tensors"
    parts: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    )  # fmt: skip
    scaled: ClassVar[str] = "weight_scale"
    small: ClassVar[frozenset[str]] = frozenset({"weight_g_idx"})
    engine: ClassVar[str] = "compressed-tensors"
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)

    def wrong_bits(self, format: Format, name: str) -> str:
        """Why values of so many bits cannot be stored."""
        return f"{name}: format {format} is not known: integers of 2, 3, 4 or 8 bits are"

    def shapes(self, format: Format, out: int, width: int, dtype: str) -> Shapes:
        """Words, scales and the shape; zeros and the order of inputs where the format has them."""
        self.check(format, (out, width), f"a matrix of {out} x {width}")
        groups = width // (format.group_size or width)
        parts: Shapes = {
            "weight_packed": ((out, words_of(width, format.bits)), "I32"),
            "weight_scale": ((out, groups), dtype),
            "weight_shape": ((2,), "I64"),
        }
        if format.ordered:
            parts["weight_g_idx"] = ((width,), "I32")
        if not format.symmetric:
            parts["weight_zero_point"] = ((words_of(out, format.bits), groups), "I32")
        return parts

    def size(
        self, parts: Mapping[str, TensorRef], format: Format, read: Callable[[TensorRef], list[int]]
    ) -> tuple[int, int]:
        """By its groups; with one scale a channel its last word may be padded, so only its stored shape
        says it."""
        (out, groups), (_, words) = parts["weight_scale"].shape, parts["weight_packed"].shape
        if format.group_size:
            return out, groups * format.group_size
        most = words * WORD_BITS // format.bits
        if "weight_shape" not in parts:
            return out, most
        width = read(parts["weight_shape"])[1]
        if not most - WORD_BITS < width <= most:
            raise UserError(
                f"{parts['weight_shape'].name} says {width} inputs, its values hold {most}: download it again"
            )
        return out, width

    def pack(self, codes: QuantizedWeights) -> dict[str, Tensor]:
        """The parts of codes that can be stored."""
        count, *shape = codes.values.shape
        parts = {
            "weight_packed": pack_words(codes.values, codes.format.bits),
            "weight_scale": plain(codes.scale),
            "weight_shape": torch.tensor([shape] * count),
        }
        if not codes.format.symmetric:
            parts["weight_zero_point"] = plain(pack_words(codes.zero.mT, codes.format.bits).mT)
        if codes.format.ordered:
            parts["weight_g_idx"] = stored_order(codes)
        return parts

    def unpack(self, parts: Parts, format: Format, shape: tuple[int, int]) -> QuantizedWeights:
        """The codes that parts of the right shapes hold."""
        out, width = shape
        scale = parts["weight_scale"]
        if format.symmetric:
            zero = torch.full(scale.shape, levels(format) // 2, dtype=torch.uint8)
        else:
            zero = plain(unpack_words(parts["weight_zero_point"].mT, format.bits, out).mT)
        values = unpack_words(parts["weight_packed"], format.bits, width)
        return QuantizedWeights(format, values, scale, zero, order_of(parts.get("weight_g_idx"), format))

    def check_small(self, parts: Parts, format: Format, shape: tuple[int, int]) -> None:
        """Raise `UserError` where the order of inputs contradicts the format."""
        _ = shape
        order_of(parts.get("weight_g_idx"), format)

    def obstacle(self, format: Format) -> Obstacle:
        """Its library took orders of inputs out in 0.20; transformers 5.23 does not read zeros."""
        return "order" if format.ordered else "" if format.symmetric else "zeros"

    def say(self, format: Format) -> dict[str, Any]:
        """The format in the words of compressed-tensors."""
        return {
            "num_bits": format.bits,
            "type": "int",
            "symmetric": format.symmetric,
            "strategy": "group" if format.group_size else "channel",
            "group_size": format.group_size or None,
            "dynamic": False,
            "actorder": "group" if format.ordered else None,
            "observer": "minmax",
        }
