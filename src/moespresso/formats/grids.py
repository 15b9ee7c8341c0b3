"""Where the levels of a grid lie: one scale and one zero per row and group of inputs.

`minmax` takes the finest grid that reaches every weight. `searched` shrinks that range step by step and keeps, for each
row and group, the one of least

    sum_i  m_i |w_i - decoded_i|^power

with m the importance of the inputs: few large weights are cut so that all others are rounded more finely. A power over 2
(2.4 in the code of the GPTQ paper, arXiv 2210.17323) keeps the largest weights from being cut too far. Scales are rounded
to the dtype they are stored in before anything is measured with them, and are always finite and never 0.

A symmetric grid has one level more on one side. With `signed` scales that side is the one of the largest weight: where it
is positive, the scale is negative (as in llama.cpp's Q4_0). Decoding is the same product, with up to a bit's worth less error.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moespresso.core.format import Format
from moespresso.formats.integer import in_groups, levels, slabs

Grid = tuple[Tensor, Tensor]
"""Scale in the dtype it is stored in and zero as uint8, both [N, out, G]."""


def minmax(weights: Tensor, format: Format, dtype: torch.dtype, *, signed: bool = True) -> Grid:
    """The finest grids of [N, out, in] on which no weight is farther than about half a step from a level."""
    low, high = in_groups(weights, format).aminmax(dim=-1)
    return spanned(low.float(), high.float(), format, dtype, signed)


def searched(
    weights: Tensor,
    format: Format,
    dtype: torch.dtype,
    *,
    importance: Tensor | None = None,
    power: float = 2.4,
    steps: int = 12,
    least: float = 0.5,
    signed: bool = True,
) -> Grid:
    """The grids of least error for `weights` [N, out, in], inputs counting by `importance` [N, in], among `steps` ranges.

    The ranges go from the whole one down to about `least` of it. The whole one is among them, so the error is never above
    that of `minmax`.
    """
    scale = weights.new_empty(in_groups(weights, format).shape[:-1], dtype=dtype)
    zero = torch.empty_like(scale, dtype=torch.uint8)
    shares = [1 - (1 - least) * step / steps for step in range(steps)]
    for part in slabs(weights.shape):
        counts = None if importance is None else in_groups(importance[part[0], None].float(), format)
        grouped = in_groups(weights[part].float(), format)
        low, high = grouped.aminmax(dim=-1)
        ranges = (spanned(low * share, high * share, format, dtype, signed) for share in shares)
        scale[part], zero[part] = _best(grouped, ranges, format, power, counts)
    return scale, zero


def _best(
    grouped: Tensor, grids: Iterator[Grid], format: Format, power: float, counts: Tensor | None
) -> Grid:
    """For each group of [..., G, g], the one of several grids that has the least loss; the first of equals."""
    best = next(grids)
    lowest = loss(grouped, best, format, power, counts)
    for grid in grids:
        found = loss(grouped, grid, format, power, counts)
        best, lowest = chosen(found < lowest, grid, best), torch.minimum(found, lowest)
    return best


def spanned(low: Tensor, high: Tensor, format: Format, dtype: torch.dtype, signed: bool = True) -> Grid:
    """The finest grids that reach from `low` to `high` [...], and 0; half a step beyond the last level is within reach."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if format.symmetric:
        return _symmetric(-low, high, format, dtype, signed)
    scale = stored(high / (levels(format) - 1) - low / (levels(format) - 1), dtype)
    zero = (-low / scale.float()).round_().clamp_(0, levels(format) - 1)
    return scale, zero.to(torch.uint8)


def _symmetric(down: Tensor, up: Tensor, format: Format, dtype: torch.dtype, signed: bool) -> Grid:
    """Grids that reach `down` and `up` from 0, where the level more lies below, or on the longer side if `signed`."""
    half = levels(format) // 2
    flip = (up > down) & signed
    longer, shorter = torch.where(flip, up, down), torch.where(flip, down, up)
    scale = torch.maximum(longer / (half + 0.5), shorter / (half - 0.5))
    scale = stored(torch.where(flip, -scale, scale), dtype)
    return scale, torch.full_like(scale, half, dtype=torch.uint8)


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as `dtype` holds them: finite, and 1 in place of 0, where every weight is (as good as) 0 anyway."""
    most = torch.finfo(dtype).max
    scale = scale.clamp(-most, most).to(dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def chosen(which: Tensor, grid: Grid, other: Grid) -> Grid:
    """`grid` where `which`, `other` elsewhere."""
    return torch.where(which, grid[0], other[0]), torch.where(which, grid[1], other[1])


def loss(grouped: Tensor, grid: Grid, format: Format, power: float, counts: Tensor | None = None) -> Tensor:
    """Sums of |w - decoded|^power over the groups of `grouped` [..., G, g], weights counting by `counts`."""
    step, zero = grid[0].unsqueeze(-1), grid[1].float().unsqueeze(-1)
    values = (grouped / step.float()).add_(zero).round_().clamp_(0, levels(format) - 1)
    decoded = values.sub_(zero).to(step.dtype).mul_(step)
    errors = raised(decoded.float().sub_(grouped).abs_(), power)
    return (errors if counts is None else errors.mul_(counts)).sum(-1)


def raised(sizes: Tensor, power: float) -> Tensor:
    """`sizes` (0 or more) to a power, in place; by logarithms, which take a CPU a third of the time of `pow`."""
    return sizes.log2_().mul_(power).exp2_()
