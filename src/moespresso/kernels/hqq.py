"""Half-Quadratic Quantization: grids of least |w - decoded|^p, p < 1, without any text.

With such a p few large errors weigh little, and most weights are met well. The problem is split in two that have closed
solutions, which take turns (Badri and Shaji 2023, mobiusml.github.io/hqq_blog):

    e     <-  shrink_p(w - decoded, beta)       what is given up: sign(x) max(|x| - |x|^(p-1) / beta, 0)
    grid  <-  the best for w - e                zero = mean(value - (w - e) / scale), and beta grows by kappa

Our grids have whole zeros, so zero is rounded and the scale is fitted as well (alone, in symmetric formats). Errors are
measured in steps of the grid, so that beta means the same for weights of any size.
"""

from __future__ import annotations

import torch
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


def half_quadratic(
    weights: Tensor,
    format: Format,
    dtype: torch.dtype,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
    unbiased: bool = True,
    signed: bool = True,
) -> QuantizedWeights:
    """Codes of `weights` [N, out, in] with scales stored as `dtype`.

    Before they are `unbiased`, the sum of |w - decoded|^p of no group is above that of rounding with `minmax`.
    """
    scale, zero = minmax(weights, format, dtype, signed=signed)
    betas = [beta * kappa**turn for turn in range(iterations)]
    for part in slabs(weights.shape):
        grouped = in_groups(weights[part].float(), format)
        scale[part], zero[part] = _fitted(grouped, (scale[part], zero[part]), format, p, betas)
    codes = encode(weights, scale, zero, format)
    return unbias(weights, codes) if unbiased else codes


def _fitted(grouped: Tensor, grid: Grid, format: Format, p: float, betas: list[float]) -> Grid:
    """Grids of one slab [n, rows, G, g], from a first one on. A group rests as soon as its error no longer falls."""
    shape = grid[0].shape
    scale, zero = (each.flatten().clone() for each in grid)
    left = torch.arange(len(scale), device=scale.device)
    grouped, grid = grouped.flatten(0, -2), (scale, zero)
    lowest = loss(grouped, grid, format, p)
    for beta in betas:
        grid = _turn(grouped, grid, format, p, beta)
        found = loss(grouped, grid, format, p)
        better = (found < lowest).nonzero().squeeze(1)
        left, grid, lowest = left[better], (grid[0][better], grid[1][better]), found[better]
        scale[left], zero[left] = grid
        if len(better) < len(grouped):
            grouped = grouped[better]  # most rest after a few turns: what is left is looked at alone
        if not len(left):
            break
    return scale.view(shape), zero.view(shape)


def _turn(grouped: Tensor, grid: Grid, format: Format, p: float, beta: float) -> Grid:
    """The next grid: large errors are given up, the rest is fitted by least squares."""
    step, zero = grid[0].float().unsqueeze(-1), grid[1].float().unsqueeze(-1)
    steps = grouped / step
    values = (steps + zero).round_().clamp_(0, levels(format) - 1)
    steps -= shrink(steps - (values - zero), p, beta)
    if not format.symmetric:
        zero = (values - steps).mean(-1, keepdim=True).round_().clamp_(0, levels(format) - 1)
    fitted = _slope(values - zero, steps) * step.squeeze(-1)
    return stored(fitted, grid[0].dtype), zero.squeeze(-1).to(torch.uint8)


def _slope(x: Tensor, y: Tensor) -> Tensor:
    """The positive factor on `x` that meets `y` best over the last dimension; 1 where there is none."""
    slope = (x * y).sum(-1) / (x * x).sum(-1)
    return torch.where(slope > 0, slope, torch.ones_like(slope))


def shrink(x: Tensor, p: float, beta: float) -> Tensor:
    """The generalized soft threshold: sign(x) max(|x| - |x|^(p-1) / beta, 0)."""
    size = x.abs()
    return (size - raised(size.clamp(min=1e-8), p - 1).div_(beta)).clamp_(min=0).mul_(x.sign())
