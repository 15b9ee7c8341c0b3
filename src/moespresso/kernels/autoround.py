"""Rounding that is learned: by how much each weight is pushed up or down before it goes to the nearest level.

    decoded = s (clip(round(W / s + V) + z) - z),     V in [-1/2, 1/2],     s, z from the range [a low, b high]

Rounding has no slope, so it is passed through as if it were none (straight-through). With G the slope of the loss in the
decoded weights, and `inside` where nothing was clipped, that leaves for V: G s inside; for s: G (steps - inside W / s), summed
over the group; for z: G s (inside - 1). (Scales of symmetric grids may be negative.) Only signs are followed, all parameters by the same amount. Slopes are written out
by hand: autograd would keep half a dozen copies of every matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moespresso.core.format import Format
from moespresso.formats import Grid, QuantizedWeights, in_groups, levels, stored
from moespresso.kernels.routed import RoutedExperts

# How far a range may shrink and grow.
NARROWEST, WIDEST = 0.5, 1.5


@dataclass(slots=True, eq=False)
class Offsets:
    """What is learned of N matrices: `push` V [N, out, in], and `low` and `high` [N, out, G], the shares a and b of the
    range. (Symmetric grids know `high` only.)"""

    push: Tensor
    low: Tensor
    high: Tensor

    def copy(self) -> Offsets:
        """As it is now."""
        return Offsets(self.push.clone(), self.low.clone(), self.high.clone())


class Learned:
    """N matrices `weights` [N, out, in] that learn how to be rounded, from a grid of scales [N, out, G] and zeros."""

    def __init__(self, weights: Tensor, grid: Grid, format: Format) -> None:
        self._grouped = in_groups(weights.float(), format)
        self._format, self._dtype = format, grid[0].dtype
        scale, zero = grid[0].float(), grid[1].float()
        self._range = -zero * scale, (levels(format) - 1 - zero) * scale
        self._first = scale, zero
        ones = torch.ones_like(scale)
        self._length = torch.ones_like(scale[:1])
        self.offsets = Offsets(torch.zeros_like(self._grouped), ones, ones.clone())

    def decoded(self) -> Tensor:
        """The weights [N, out, in] as they would be read back, in float32."""
        scale, zero = self._grid()
        steps, _ = self._rounded(scale, zero)
        scale = self._lengthened(scale)
        return (steps.to(self._dtype) * scale.unsqueeze(-1)).float().flatten(-2)

    def codes(self) -> QuantizedWeights:
        """What is stored."""
        scale, zero = self._grid()
        steps, _ = self._rounded(scale, zero)
        scale = self._lengthened(scale)
        values = (steps + zero.unsqueeze(-1)).to(torch.uint8).flatten(-2)
        return QuantizedWeights(self._format, values, scale, zero.to(torch.uint8))

    def lengthen(self, factors: Tensor) -> None:
        """Multiply the scales of each row [out] of all matrices, where the factor is between 1/2 and 2."""
        factors = torch.where((factors > 0.5) & (factors < 2), factors, 1.0)
        self._length = self._length * factors[:, None]

    def step(self, slopes: Tensor, push: float, span: float) -> None:
        """Follow the signs of the `slopes` [N, out, in] of the loss in the decoded weights: V by `push`, ranges by `span`."""
        slopes = in_groups(slopes, self._format)
        scale, zero = self._grid()
        steps, inside = self._rounded(scale, zero)
        offsets, scale = self.offsets, scale.float()
        if span:
            by_scale = (slopes * (steps - self._grouped / scale.unsqueeze(-1) * inside)).sum(-1)
            by_zero = (slopes * ~inside).sum(-1) * -scale
            self._move_range(by_scale, by_zero, scale, span)
        by_push = slopes * inside * scale.unsqueeze(-1)
        offsets.push.sub_(by_push.sign_(), alpha=push).clamp_(-0.5, 0.5)

    def _lengthened(self, scale: Tensor) -> Tensor:
        """Scales as they are read back at last; rounding knows nothing of it."""
        return stored(scale.float() * self._length, self._dtype)

    def _grid(self) -> Grid:
        """Scales as stored, and zeros as float."""
        scale, zero = self._first
        if self._format.symmetric:
            return stored(scale * self.offsets.high, self._dtype), zero
        low, high = self._range[0] * self.offsets.low, self._range[1] * self.offsets.high
        scale = stored((high - low) / (levels(self._format) - 1), self._dtype)
        return scale, (-low / scale.float()).round_().clamp_(0, levels(self._format) - 1)

    def _rounded(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Values less zeros [N, out, G, g], and where they were not clipped."""
        zero = zero.unsqueeze(-1)
        free = self._grouped.div(scale.float().unsqueeze(-1)).add_(zero).add_(self.offsets.push).round_()
        values = free.clamp(0, levels(self._format) - 1)
        return values - zero, free == values

    def _move_range(self, by_scale: Tensor, by_zero: Tensor, scale: Tensor, rate: float) -> None:
        offsets = self.offsets
        if self._format.symmetric:
            by_high = by_scale * self._first[0]
            offsets.high.sub_(by_high.sign_(), alpha=rate).clamp_(NARROWEST, WIDEST)
            return
        (low, high), last = self._range, levels(self._format) - 1
        # z = -a low / s, so s moves it as well; s = (b high - a low) / (levels - 1).
        by_scale = by_scale + by_zero * low * offsets.low / scale.square()
        by_low = -low / last * by_scale - low / scale * by_zero
        offsets.low.sub_(by_low.sign_(), alpha=rate).clamp_(NARROWEST, WIDEST)
        offsets.high.sub_((high / last * by_scale).sign_(), alpha=rate).clamp_(NARROWEST, WIDEST)


def routed_sum(
    experts: RoutedExperts, up: Sequence[Tensor], down: Sequence[Tensor], tokens: Tensor
) -> Tensor:
    """What the experts [R, H] and [H, I] each answer to `tokens` [B] together, weighted by the gates: [B, H] in float32."""
    hidden, index, gates = (getattr(experts, name)[tokens] for name in ("hidden", "index", "weights"))
    hidden, gates = hidden.float(), gates.float().flatten()
    slots = index.flatten()
    order = slots.argsort(stable=True)
    counts = torch.bincount(slots, minlength=experts.count)[: experts.count].tolist()
    answers = [hidden[:0]]
    for expert, places in enumerate(order[: sum(counts)].split(counts)):
        if len(places):
            inner = experts.inner(expert, hidden[places // index.shape[1]], up[expert])
            answers.append(inner @ down[expert].T * gates[places, None])
    rows = order[: sum(counts)] // index.shape[1]
    return torch.zeros_like(hidden).index_add(0, rows, torch.cat(answers))


def slopes(
    experts: RoutedExperts, up: Tensor, down: Tensor, tokens: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Slopes, in `up` and `down`, of the squared error of the routed sum of `tokens` [B] against `wanted` [B, H]."""
    leaves = [matrix.detach().requires_grad_() for matrix in (up, down)]
    error = routed_sum(experts, leaves[0].unbind(), leaves[1].unbind(), tokens) - wanted
    return torch.autograd.grad(error.square().mean(), leaves)  # pyright: ignore[reportReturnType]
