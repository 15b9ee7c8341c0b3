"""Integers on a grid: weight = (value - zero) * scale, with one scale and one zero per group of neighbouring
inputs.

Values are unsigned, 0 .. 2^bits - 1, in symmetric formats too: their zero is 2^(bits-1) everywhere and is not
stored. Scales have the dtype that they are stored in, and decoding multiplies in that dtype, as the engines
do; so what a method sees is what a user will load.

Shapes: N matrices of `out` x `in`, whose rows are G groups of g inputs (G = 1: one scale per output channel).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from moespresso.core.format import Format

# Weights that are looked at in one go: a few temporaries of this many float32 stay in a CPU's cache.
SLAB = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeights:
    """Encoded matrices: their values, and the scales, as stored, and zeros of their groups.

    `groups` says which group each input is in, where that is not counted off from the left (None: it is).
    """

    format: Format
    values: UInt8[Tensor, "N out in"]
    scale: Float[Tensor, "N out G"]
    zero: UInt8[Tensor, "N out G"]
    groups: Int[Tensor, "N in"] | None = None

    def cut(self, which: slice, rows: slice, columns: int) -> QuantizedWeights:
        """The codes of some matrices: some of their rows, and their first columns; groups must not be cut."""
        assert self.groups is None, "groups are counted off"
        groups = max(1, columns * self.scale.shape[2] // self.values.shape[2])
        scale, zero = (grid[which, rows, :groups].contiguous() for grid in (self.scale, self.zero))
        return QuantizedWeights(self.format, self.values[which, rows, :columns].contiguous(), scale, zero)


def levels(format: Format) -> int:
    """Number of values of the grid."""
    return 1 << format.bits


def in_groups(weights: Shaped[Tensor, "*rows in"], format: Format) -> Shaped[Tensor, "*rows G g"]:
    """Rows as groups of inputs (a view)."""
    return weights.view(*weights.shape[:-1], -1, format.group_size or weights.shape[-1])


def spread(grid: Shaped[Tensor, "*rows G"], width: int) -> Shaped[Tensor, "*rows in"]:
    """Scales or zeros as one per weight, of so many inputs."""
    return grid.repeat_interleave(width // grid.shape[-1], -1)


def slabs(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Cut [N, out, in] into parts of about `SLAB` weights at most: whole rows, and whole matrices where
    they are small."""
    count, rows, width = shape
    tall = min(rows, max(1, SLAB // width))
    deep = max(1, SLAB // (tall * width))
    for first in range(0, count, deep):
        for row in range(0, rows, tall):
            yield slice(first, first + deep), slice(row, row + tall)


def encode(
    weights: Float[Tensor, "N out in"],
    scale: Float[Tensor, "N out G"],
    zero: UInt8[Tensor, "N out G"],
    format: Format,
) -> QuantizedWeights:
    """Round `weights` to the nearest value of the grid."""
    values = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    for part in slabs(weights.shape):
        steps = in_groups(weights[part].float(), format) / scale[part].float().unsqueeze(-1)
        steps.add_(zero[part].float().unsqueeze(-1)).round_().clamp_(0, levels(format) - 1)
        values[part] = steps.flatten(-2)
    return QuantizedWeights(format, values, scale, zero)


def decode(codes: QuantizedWeights) -> Float[Tensor, "N out in"]:
    """The weights that the codes stand for, in the scales' dtype."""
    if codes.groups is not None:
        at = codes.groups.long().unsqueeze(-2).expand(codes.values.shape)
        loose = codes.values.to(torch.int16) - codes.zero.gather(-1, at)
        return loose.to(codes.scale.dtype) * codes.scale.gather(-1, at)
    steps = in_groups(codes.values, codes.format).to(torch.int16) - codes.zero.unsqueeze(-1)
    return (steps.to(codes.scale.dtype) * codes.scale.unsqueeze(-1)).flatten(-2)
