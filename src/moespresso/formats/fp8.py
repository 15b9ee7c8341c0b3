"""Eight-bit floats with a scale for every square block, as DeepSeek-V3 came with them (`quant_method: fp8`).

`weight` float8_e4m3fn [out, in] and `weight_scale_inv` float32, one value for every block of `group_size`
rows and as many inputs (the last ones of a matrix may be cut short), stand for

    w[r, c] = weight[r, c] * weight_scale_inv[r // group_size, c // group_size]

in float32. Whatever only moves keeps both as they are; new values take the largest magnitude of each block
over 448, the largest of these floats, as its scale. Written plainly, such matrices are bfloat16, which is
what transformers makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Float8e4m3fn
from torch import Tensor
from torch.nn.functional import pad

from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats.codec import Codec, Parts, Shapes, codec

_LARGEST = float(torch.finfo(torch.float8_e4m3fn).max)
_BLOCK, _LEFT = "weight_block_size", "modules_to_not_convert"
# MiniMax's name for the modules that are left alone.
_ALIAS = "ignored_layers"
# What other keys must say to be read, or leave out: the first is what is meant without them.
_CHOICES: dict[str, tuple[object, ...]] = {
    "activation_scheme": ("dynamic",),
    "fmt": ("e4m3", "float8_e4m3fn"),
    "scale_fmt": ("float", "ue8m0"),
    "expert_dtype": ("fp8",),
    "dequantize": (False, True),
    "modules_to_convert": ([],),
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """Codes [N, out, in], and the scales [N, ceil(out / size), ceil(in / size)] of their blocks."""

    codes: Float8e4m3fn[Tensor, "N out in"]
    scale: Float[Tensor, "N rows columns"]


@codec
class Fp8Blocks(Codec):
    """The matrix in eight bits, and a small one of scales."""

    layout: ClassVar[str] = "fp8"
    kinds: ClassVar[frozenset[str]] = frozenset({"fp8"})
    parts: ClassVar[tuple[str, ...]] = ("weight_scale_inv", "weight")
    scaled: ClassVar[str] = "weight_scale_inv"
    small: ClassVar[frozenset[str]] = frozenset({"weight_scale_inv"})
    rounds: ClassVar[bool] = True
    zero_scales: ClassVar[bool] = True
    engine: ClassVar[str] = "fp8"
    one_format: ClassVar[bool] = True
    decoded: ClassVar[str] = "BF16"
    said_by: ClassVar[str] = _BLOCK
    title: ClassVar[str] = "matrices in FP8"

    def shapes(self, format: Format, out: int, width: int, dtype: str) -> Shapes:
        """Codes and scales, which are float32 whatever the model computes in."""
        _ = dtype
        self.check(format, (out, width), f"a matrix of {out} x {width}")
        size = format.group_size
        return {
            "weight_scale_inv": ((-(-out // size), -(-width // size)), "F32"),
            "weight": ((out, width), "F8_E4M3"),
        }

    def check(self, format: Format, shape: tuple[int, ...], name: str, beside: Iterable[int] = ()) -> None:
        """Raise `UserError` for numbers that are no such floats."""
        _ = shape, beside
        if format.kind not in self.kinds:
            raise UserError(f"{name}: fp8 stores floats of eight bits only: use --to plain")

    def check_anew(self, format: Format, shape: tuple[int, ...], name: str) -> None:
        """Raise `UserError` for cut blocks: transformers 5.23 takes rows over rows of scales for their
        size."""
        size = format.group_size
        if any(side > size and side % size for side in shape):
            raise UserError(
                f"{name} would have {shape[0]} x {shape[1]} new values, which FP8 blocks of {size} do not divide, so that transformers "
                "misreads them: moespresso export MODEL --to plain, and press that"
            )

    def encode(self, numbers: Blocks, format: Format) -> dict[str, Tensor]:
        """Codes and scales as they are."""
        _ = format
        return {"weight_scale_inv": numbers.scale, "weight": numbers.codes}

    def decode(self, parts: Parts, format: Format, shape: tuple[int, int]) -> Tensor:
        """The weights, in float32; raises `UserError` where parts do not fit or a scale is none."""
        return blockwise(self.numbers(parts, format, shape), format.group_size)

    def numbers(self, parts: Parts, format: Format, shape: tuple[int, int]) -> Blocks:
        """Codes and scales; raises `UserError` where they do not fit."""
        self.check_parts(parts, format, shape)
        self.check_small(parts, format, shape)
        return Blocks(parts["weight"], parts["weight_scale_inv"])

    def values(self, numbers: Blocks, format: Format) -> Tensor:
        """The weights, in float32."""
        return blockwise(numbers, format.group_size)

    def nearest(self, weights: Tensor, format: Format, dtype: torch.dtype) -> Blocks:
        """Weights rounded to the nearest float, with scales of their own."""
        _ = dtype
        return rounded(weights, format.group_size)

    def size(
        self, parts: Mapping[str, TensorRef], format: Format, read: Callable[[TensorRef], list[int]]
    ) -> tuple[int, int]:
        """By its codes."""
        _ = format, read
        out, width = parts["weight"].shape
        return out, width

    def check_small(self, parts: Parts, format: Format, shape: tuple[int, int]) -> None:
        """Raise `UserError` where a scale is negative, infinite or NaN."""
        _ = format, shape
        scale = parts["weight_scale_inv"]
        wrong = ~((scale >= 0) & scale.isfinite())
        if bool(wrong.any()):
            worst = float(scale[wrong][0])
            raise UserError(
                f"weight_scale_inv holds {worst:g}, which is no scale: download the checkpoint again"
            )

    def words(self, format: Format, ranks: str) -> str:
        """Its blocks."""
        _ = ranks
        return f"FP8 (e4m3), a scale for {format.group_size} x {format.group_size} weights"

    def section(self, format: Format, packed: Collection[str], plain: list[str]) -> dict[str, Any]:
        """The section in the words of transformers."""
        _ = packed
        return {
            "quant_method": self.engine,
            "activation_scheme": "dynamic",
            _BLOCK: [format.group_size] * 2,
            _LEFT: plain,
        }

    def carried(self, section: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """With what the source says besides; the modules that are left alone have numbers of their own in
        the result, so they are named anew."""
        return {key: value for key, value in before.items() if key != _ALIAS} | section

    def read_section(self, said: Mapping[str, Any]) -> Format:
        """The size of its blocks; raises `UserError` for keys and values that are not understood."""
        known = {"quant_method", _BLOCK, _LEFT, _ALIAS, *_CHOICES}
        for key, value in said.items():
            if key not in known or (value and key in _CHOICES and value not in _CHOICES[key]):
                raise UserError(
                    f"{key} = {short(value)} is not read by this version: give the unquantized checkpoint"
                )
        return Format("fp8", bits=8, group_size=_side(said.get(_BLOCK)))


def _side(block: object) -> int:
    """The side of square blocks; raises `UserError` where they are none."""
    sides = list(cast("Iterable[object]", block)) if isinstance(block, list | tuple) else []
    if len(sides) == 2 and isinstance(side := sides[0], int) and side > 0 and side == sides[1]:
        return side
    raise UserError(
        f"{_BLOCK} = {block} is not read by this version, which knows square blocks such as [128, 128]: give "
        "the unquantized checkpoint"
    )


def blockwise(blocks: Blocks, size: int) -> Float[Tensor, "N out in"]:
    """The weights that codes and their blocks' scales stand for, in float32."""
    weights = blocks.codes.float()
    return weights.mul_(_spread(blocks.scale, size, weights))


def rounded(weights: Float[Tensor, "N out in"], size: int) -> Blocks:
    """The nearest codes of weights, with the largest of each block over 448 as its scale (1 for zeros)."""
    count, out, width = weights.shape
    rows, columns = -(-out // size), -(-width // size)
    padded = pad(weights.float().abs(), (0, -width % size, 0, -out % size))
    largest = padded.reshape(count, rows, size, columns, size).amax((2, 4))
    scale = torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))
    codes = (weights.float() / _spread(scale, size, weights)).clamp(-_LARGEST, _LARGEST)
    return Blocks(codes.to(torch.float8_e4m3fn), scale)


def _spread(
    scale: Float[Tensor, "N rows columns"], size: int, weights: Float[Tensor, "N out in"]
) -> Float[Tensor, "N out in"]:
    """The scale of every weight."""
    _, out, width = weights.shape
    rows = scale.repeat_interleave(size, 1)[:, :out]
    return rows.repeat_interleave(size, 2)[..., :width]
