"""Packed integers in the layout of GPTQ (the first version of the format, which all its readers know).

The matrix lies transposed, packed along the inputs; zeros are always stored, less one, packed along the
outputs; `g_idx` names the group of every input. Scales are float16.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats.codec import Parts, Shapes, codec
from moespresso.formats.integer import QuantizedWeights, levels
from moespresso.formats.integer_layout import (
    KEEP,
    WORD_BITS,
    IntegerLayout,
    check_words,
    half,
    left_alone,
    order_of,
    stored_order,
    words_of,
    zeros_as_said,
)
from moespresso.formats.packing import pack_words, plain, unpack_words


@codec
class GptqLayout(IntegerLayout):
    """Transposed, words along the inputs."""

    layout: ClassVar[str] = "gptq"
    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    scaled: ClassVar[str] = "scales"
    small: ClassVar[frozenset[str]] = frozenset({"g_idx", "qzeros"})
    first: ClassVar[bool] = False
    engine: ClassVar[str] = "gptq"
    tried: ClassVar[str] = (
        "GPTQModel 7.7 read this layout right for DeepSeek-V2 and Qwen3-MoE; with others it was not tried"
    )
    one_format: ClassVar[bool] = True
    computes_in: ClassVar[str] = "float16"
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)

    def check(self, format: Format, shape: tuple[int, ...], name: str, beside: Iterable[int] = ()) -> None:
        """Raise `UserError` where its words cannot hold the matrix: both sides are packed."""
        super().check(format, shape, name, beside)
        check_words(self.layout, format, shape, {"outputs": shape[0], "inputs": shape[1]})

    def shapes(self, format: Format, out: int, width: int, dtype: str) -> Shapes:
        """Words, zeros, scales and the order of inputs."""
        _ = dtype
        self.check(format, (out, width), f"a matrix of {out} x {width}")
        groups = width // (format.group_size or width)
        return {
            "qweight": ((words_of(width, format.bits), out), "I32"),
            "qzeros": ((groups, words_of(out, format.bits)), "I32"),
            "scales": ((groups, out), "F16"),
            "g_idx": ((width,), "I32"),
        }

    def size(
        self, parts: Mapping[str, TensorRef], format: Format, read: Callable[[TensorRef], list[int]]
    ) -> tuple[int, int]:
        """By its words."""
        _ = read
        (words, out), (_, _) = parts["qweight"].shape, parts["scales"].shape
        return out, words * WORD_BITS // format.bits

    def pack(self, codes: QuantizedWeights) -> dict[str, Tensor]:
        """The parts of codes; raises `UserError` for a zero of 0, and for scales that float16 does not
        hold."""
        bits = codes.format.bits
        if bool((codes.zero == 0).any()):
            # Less one it would be -1: some readers wrap it around, some do not, and some spoil its neighbours.
            raise UserError(
                f"gptq stores zeros less one and cannot store a zero of 0: {KEEP}, or symmetric=true"
            )
        return {
            "qweight": plain(pack_words(codes.values, bits).mT),
            "qzeros": pack_words((codes.zero - 1).mT, bits),
            "scales": plain(half(codes.scale, self.layout).mT),
            "g_idx": stored_order(codes),
        }

    def unpack(self, parts: Parts, format: Format, shape: tuple[int, int]) -> QuantizedWeights:
        """The codes that parts of the right shapes hold."""
        out, width = shape
        groups, zero = order_of(parts["g_idx"], format), _zeros(parts["qzeros"], format, out)
        values = unpack_words(parts["qweight"].mT, format.bits, width)
        return QuantizedWeights(format, values, plain(parts["scales"].mT), zero, groups)

    def check_small(self, parts: Parts, format: Format, shape: tuple[int, int]) -> None:
        """Raise `UserError` where groups or zeros contradict the format."""
        order_of(parts["g_idx"], format)
        _zeros(parts["qzeros"], format, shape[0])

    def section(self, format: Format, packed: Collection[str], plain: list[str]) -> dict[str, Any]:
        """The section of the config in GPTQModel's words."""
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "bits": format.bits,
            "group_size": format.group_size or -1,
            "sym": format.symmetric,
            "desc_act": format.ordered,
            "lm_head": "lm_head" in packed,
            "dynamic": left_alone(plain),
        }


def _zeros(packed: Tensor, format: Format, out: int) -> Tensor:
    """Zeros uint8 [N, out, G] of stored ones."""
    stored = plain(unpack_words(packed, format.bits, out).mT)
    if bool((stored == levels(format) - 1).any()):
        raise UserError(
            "qzeros hold a zero that readers of gptq do not agree on: take a source in another layout"
        )
    return zeros_as_said(stored + 1, format, "sym is true", "sym to false")
