"""Where the levels of a grid lie: one scale and one zero per row and group of inputs.

`minmax` takes the finest grid that reaches every weight. `searched` shrinks that range step by step and
keeps, for each row and group, the one of least

    sum_i  m_i |w_i - decoded_i|^power

with m the importance of the inputs: few large weights are cut so that all others are rounded more finely. A
power over 2 (2.4 in the code of the GPTQ paper, arXiv 2210.17323) keeps the largest weights from being cut
too far. Scales are rounded to the dtype they are stored in before anything is measured with them, and are
always finite and never 0.

A symmetric grid has one level more on one side. With `signed` scales that side is the one of the largest
weight: where it is positive, the scale is negative (as in llama.cpp's Q4_0). Decoding is the same product,
with up to a bit's worth less error.

Shapes: N matrices of `out` x `in`, whose rows are G groups of g inputs; `*groups` are any leading axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from moespresso.core.format import Format
from moespresso.formats.integer import in_groups, levels, slabs

Grid = tuple[Float[Tensor, "*groups"], UInt8[Tensor, "*groups"]]
"""Scale in the dtype it is stored in and zero, one of each per group."""


@dataclass(frozen=True, slots=True)
class Search:
    """How `searched` looks for grids: the power of the error, how many ranges it tries, down to which
    share of the whole one, and whether scales of symmetric formats may be negative."""

    power: float = 2.4
    steps: int = 12
    min_share: float = 0.5
    signed: bool = True

    @property
    def shares(self) -> list[float]:
        """The ranges it tries, as shares of the whole one, which is the first."""
        return [1 - (1 - self.min_share) * step / self.steps for step in range(self.steps)]


DEFAULT = Search()


def minmax(
    weights: Float[Tensor, "N out in"], format: Format, dtype: torch.dtype, *, signed: bool = True
) -> Grid:
    """The finest grids on which no weight is farther than about half a step from a level."""
    low, high = in_groups(weights, format).aminmax(dim=-1)
    return spanned(low.float(), high.float(), format, dtype, signed)


def searched(
    weights: Float[Tensor, "N out in"],
    format: Format,
    dtype: torch.dtype,
    importance: Float[Tensor, "N in"] | None = None,
    search: Search = DEFAULT,
) -> Grid:
    """The grids of least error for `weights`, inputs counting by `importance`, among the ranges of a
    `search`.

    The whole range is among them, so the error is never above that of `minmax`.
    """
    scale = weights.new_empty(in_groups(weights, format).shape[:-1], dtype=dtype)
    zero = torch.empty_like(scale, dtype=torch.uint8)
    for part in slabs(weights.shape):
        counts = None if importance is None else in_groups(importance[part[0], None].float(), format)
        grouped = in_groups(weights[part].float(), format)
        low, high = grouped.aminmax(dim=-1)
        ranges = (spanned(low * share, high * share, format, dtype, search.signed) for share in search.shares)
        scale[part], zero[part] = _best(grouped, ranges, format, search.power, counts)
    return scale, zero


def _best(
    grouped: Float[Tensor, "*groups g"],
    grids: Iterator[Grid],
    format: Format,
    power: float,
    counts: Float[Tensor, "n 1 G g"] | None,
) -> Grid:
    """For each group, the one of several grids that has the least loss; the first of equals."""
    best = next(grids)
    lowest = loss(grouped, best, format, power, counts)
    for grid in grids:
        errors = loss(grouped, grid, format, power, counts)
        best, lowest = chosen(errors < lowest, grid, best), torch.minimum(errors, lowest)
    return best


def spanned(
    low: Float[Tensor, "*groups"],
    high: Float[Tensor, "*groups"],
    format: Format,
    dtype: torch.dtype,
    signed: bool = True,
) -> Grid:
    """The finest grids that reach from `low` to `high`, and 0; half a step beyond the last level is within
    reach."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if format.symmetric:
        return _symmetric(-low, high, format, dtype, signed)
    scale = stored(high / (levels(format) - 1) - low / (levels(format) - 1), dtype)
    zero = (-low / scale.float()).round_().clamp_(0, levels(format) - 1)
    return scale, zero.to(torch.uint8)


def _symmetric(
    down: Float[Tensor, "*groups"],
    up: Float[Tensor, "*groups"],
    format: Format,
    dtype: torch.dtype,
    signed: bool,
) -> Grid:
    """Grids that reach `down` and `up` from 0, where the level more lies below, or on the longer side if
    `signed`."""
    half = levels(format) // 2
    flip = (up > down) & signed
    longer, shorter = torch.where(flip, up, down), torch.where(flip, down, up)
    scale = torch.maximum(longer / (half + 0.5), shorter / (half - 0.5))
    scale = stored(torch.where(flip, -scale, scale), dtype)
    return scale, torch.full_like(scale, half, dtype=torch.uint8)


def stored(scale: Float[Tensor, "*groups"], dtype: torch.dtype) -> Float[Tensor, "*groups"]:
    """Scales as `dtype` holds them: finite, and 1 in place of 0, where every weight is (as good as) 0
    anyway."""
    largest = torch.finfo(dtype).max
    scale = scale.clamp(-largest, largest).to(dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def chosen(which: Bool[Tensor, "*groups"], grid: Grid, other: Grid) -> Grid:
    """`grid` where `which`, `other` elsewhere."""
    return torch.where(which, grid[0], other[0]), torch.where(which, grid[1], other[1])


def loss(
    grouped: Float[Tensor, "*groups g"],
    grid: Grid,
    format: Format,
    power: float,
    counts: Float[Tensor, "n 1 G g"] | None = None,
) -> Float[Tensor, "*groups"]:
    """Sums of |w - decoded|^power over each group, weights counting by `counts`."""
    step, zero = grid[0].unsqueeze(-1), grid[1].float().unsqueeze(-1)
    values = (grouped / step.float()).add_(zero).round_().clamp_(0, levels(format) - 1)
    decoded = values.sub_(zero).to(step.dtype).mul_(step)
    errors = raised(decoded.float().sub_(grouped).abs_(), power)
    return (errors if counts is None else errors.mul_(counts)).sum(-1)


def raised(sizes: Float[Tensor, "*shape"], power: float) -> Float[Tensor, "*shape"]:
    """`sizes` (0 or more) to a power, in place; by logarithms, which take a CPU a third of the time of
    `pow`."""
    return sizes.log2_().mul_(power).exp2_()
