"""Half-Quadratic Quantization: grids of least |w - decoded|^p, p < 1, without any text.

With such a p few large errors weigh little, and most weights are met well. The problem is split in two that
have closed solutions, which take turns (Badri and Shaji 2023, mobiusml.github.io/hqq_blog):

    e     <-  shrink_p(w - decoded, beta)       what is given up: sign(x) max(|x| - |x|^(p-1) / beta, 0)
    grid  <-  the best for w - e                zero = mean(value - (w - e) / scale), and beta grows by kappa

Our grids have whole zeros, so zero is rounded and the scale is fitted as well (alone, in symmetric formats).
Errors are measured in steps of the grid, so that beta means the same for weights of any size.

Shapes: N matrices of `out` x `in`, whose rows are G groups of g inputs; M groups of a slab that still move.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moespresso.core.format import Format
from moespresso.formats import (
    Grid,
    QuantizedWeights,
    encode,
    in_groups,
    levels,
    loss,
    minmax,
    raised,
    slabs,
    stored,
    unbias,
)


@dataclass(frozen=True, slots=True)
class Settings:
    """The norm `p`; how strictly errors are given up, `beta`, and by how much that grows in a turn,
    `kappa`; turns at most; whether rows are freed of their shrinkage at last, and whether scales of
    symmetric formats may be negative."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20
    unbiased: bool = True
    signed: bool = True

    @property
    def betas(self) -> list[float]:
        """Beta of every turn."""
        return [self.beta * self.kappa**turn for turn in range(self.iterations)]


DEFAULT = Settings()


def quantize(
    weights: Float[Tensor, "N out in"], format: Format, dtype: torch.dtype, settings: Settings = DEFAULT
) -> QuantizedWeights:
    """Codes of `weights` with scales stored as `dtype`.

    Before they are `unbiased`, the sum of |w - decoded|^p of no group is above that of rounding with
    `minmax`.
    """
    scale, zero = minmax(weights, format, dtype, signed=settings.signed)
    for part in slabs(weights.shape):
        grouped = in_groups(weights[part].float(), format)
        scale[part], zero[part] = _fitted(grouped, (scale[part], zero[part]), format, settings)
    codes = encode(weights, scale, zero, format)
    return unbias(weights, codes) if settings.unbiased else codes


def _fitted(grouped: Float[Tensor, "n rows G g"], grid: Grid, format: Format, settings: Settings) -> Grid:
    """Grids of one slab, from a first one on. A group rests as soon as its error no longer falls."""
    shape = grid[0].shape
    scale, zero = (each.flatten().clone() for each in grid)
    moving_M = torch.arange(len(scale), device=scale.device)
    grouped_Mg, grid_M = grouped.flatten(0, -2), (scale, zero)
    lowest_M = loss(grouped_Mg, grid_M, format, settings.p)
    for beta in settings.betas:
        grid_M = _turn(grouped_Mg, grid_M, format, settings.p, beta)
        errors_M = loss(grouped_Mg, grid_M, format, settings.p)
        better = (errors_M < lowest_M).nonzero().squeeze(1)
        moving_M, grid_M, lowest_M = (
            moving_M[better],
            (grid_M[0][better], grid_M[1][better]),
            errors_M[better],
        )
        scale[moving_M], zero[moving_M] = grid_M
        if len(better) < len(grouped_Mg):
            grouped_Mg = grouped_Mg[better]  # most rest after a few turns: the others are looked at alone
        if not len(moving_M):
            break
    return scale.view(shape), zero.view(shape)


def _turn(grouped: Float[Tensor, "M g"], grid: Grid, format: Format, p: float, beta: float) -> Grid:
    """The next grid: large errors are given up, the rest is fitted by least squares."""
    step, zero = grid[0].float().unsqueeze(-1), grid[1].float().unsqueeze(-1)
    steps = grouped / step
    values = (steps + zero).round_().clamp_(0, levels(format) - 1)
    steps -= soft_threshold(steps - (values - zero), p, beta)
    if not format.symmetric:
        zero = (values - steps).mean(-1, keepdim=True).round_().clamp_(0, levels(format) - 1)
    fitted = _slope(values - zero, steps) * step.squeeze(-1)
    return stored(fitted, grid[0].dtype), zero.squeeze(-1).to(torch.uint8)


def _slope(x: Float[Tensor, "M g"], y: Float[Tensor, "M g"]) -> Float[Tensor, " M"]:
    """The positive factor on `x` that meets `y` best over the last dimension; 1 where there is none."""
    slope = (x * y).sum(-1) / (x * x).sum(-1)
    return torch.where(slope > 0, slope, torch.ones_like(slope))


def soft_threshold(x: Float[Tensor, "*shape"], p: float, beta: float) -> Float[Tensor, "*shape"]:
    """The generalized soft threshold: sign(x) max(|x| - |x|^(p-1) / beta, 0)."""
    size = x.abs()
    return (size - raised(size.clamp(min=1e-8), p - 1).div_(beta)).clamp_(min=0).mul_(x.sign())
