"""Packed integers in the layout of AWQ (the "gemm" order): transposed, packed along the outputs, interleaved;
zeros likewise.

Scales are float16; inputs are grouped as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats.codec import Parts, Shapes, codec
from moespresso.formats.integer import QuantizedWeights
from moespresso.formats.integer_layout import (
    WORD_BITS,
    IntegerLayout,
    check_words,
    half,
    left_alone,
    words_of,
    zeros_as_said,
)
from moespresso.formats.packing import pack_interleaved, plain, unpack_interleaved


@codec
class AwqLayout(IntegerLayout):
    """Transposed, words along the outputs, eight values of a word interleaved."""

    layout: ClassVar[str] = "awq"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    scaled: ClassVar[str] = "scales"
    small: ClassVar[frozenset[str]] = frozenset({"qzeros"})
    first: ClassVar[bool] = False
    engine: ClassVar[str] = "awq"
    tried: ClassVar[str] = (
        "GPTQModel 7.7 read this layout right for DeepSeek-V2 and Qwen3-MoE; with others it was not tried"
    )
    one_format: ClassVar[bool] = True
    computes_in: ClassVar[str] = "float16"
    bits: ClassVar[tuple[int, ...]] = (4,)

    def check(self, format: Format, shape: tuple[int, ...], name: str, beside: Iterable[int] = ()) -> None:
        """Raise `UserError` where its words cannot hold the matrix, or inputs have an order of their own."""
        if format.ordered:
            raise UserError(
                "awq counts groups off and cannot store inputs in an order of their own (act-order): use the layout gptq"
            )
        super().check(format, shape, name, beside)
        check_words(self.layout, format, shape, {"outputs": shape[0]})

    def shapes(self, format: Format, out: int, width: int, dtype: str) -> Shapes:
        """Words, zeros and scales."""
        _ = dtype
        self.check(format, (out, width), f"a matrix of {out} x {width}")
        words, groups = words_of(out, format.bits), width // (format.group_size or width)
        return {
            "qweight": ((width, words), "I32"),
            "qzeros": ((groups, words), "I32"),
            "scales": ((groups, out), "F16"),
        }

    def size(
        self, parts: Mapping[str, TensorRef], format: Format, read: Callable[[TensorRef], list[int]]
    ) -> tuple[int, int]:
        """By its words."""
        _ = read
        (width, words), (_, _) = parts["qweight"].shape, parts["scales"].shape
        return words * WORD_BITS // format.bits, width

    def pack(self, codes: QuantizedWeights) -> dict[str, Tensor]:
        """The parts of codes; raises `UserError` for scales that float16 does not hold."""
        return {
            "qweight": pack_interleaved(codes.values),
            "qzeros": pack_interleaved(codes.zero),
            "scales": plain(half(codes.scale, self.layout).mT),
        }

    def unpack(self, parts: Parts, format: Format, shape: tuple[int, int]) -> QuantizedWeights:
        """The codes that parts of the right shapes hold."""
        _ = shape
        values, zero = unpack_interleaved(parts["qweight"]), _zeros(parts["qzeros"], format)
        return QuantizedWeights(format, values, plain(parts["scales"].mT), zero)

    def check_small(self, parts: Parts, format: Format, shape: tuple[int, int]) -> None:
        """Raise `UserError` where zeros contradict the format."""
        _ = shape
        _zeros(parts["qzeros"], format)

    def section(self, format: Format, packed: Collection[str], plain: list[str]) -> dict[str, Any]:
        """The section of the config in AutoAWQ's and GPTQModel's words."""
        _ = packed
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": format.bits,
            "group_size": format.group_size or -1,
            "zero_point": True,
            "modules_to_not_convert": plain,
            "dynamic": left_alone(plain),
        }


def _zeros(packed: Tensor, format: Format) -> Tensor:
    """Zeros uint8 [N, out, G] of stored ones."""
    return zeros_as_said(unpack_interleaved(packed), format, "zero_point is false", "zero_point to true")
