"""Rounding that is learned: by how much each weight is pushed up or down before it goes to the nearest level.

    decoded = s (clip(round(W / s + V) + z) - z),     V in [-1/2, 1/2],     s, z from the range [a low, b
                                                      high]

Rounding has no slope, so it is passed through as if it were none (straight-through; SignRound, arXiv
2309.05516). With D the gradient of the loss in the decoded weights, and `inside` where nothing was clipped,
that leaves for V: D s inside; for s: D (steps - inside W / s), summed over the group; for z: D s (inside -
1). (Scales of symmetric grids may be negative.) Only signs are followed, all parameters by the same amount.
Gradients are written out by hand: autograd would keep half a dozen copies of every matrix.

Shapes: N matrices of `out` x `in`, whose rows are G groups of g inputs; E experts with R rows of gate and up,
    I neurons and H hidden values; T tokens, k experts each, of which B are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moespresso.core.format import Format
from moespresso.formats import Grid, QuantizedWeights, in_groups, levels, stored
from moespresso.kernels.routed import RoutedExperts

# How far a range may shrink and grow.
MIN_RANGE, MAX_RANGE = 0.5, 1.5


@dataclass(slots=True, eq=False)
class Offsets:
    """What is learned: `push` V, and `low` and `high`, the shares a and b of the range. (Symmetric grids
    know `high` only.)"""

    push: Float[Tensor, "N out G g"]
    low: Float[Tensor, "N out G"]
    high: Float[Tensor, "N out G"]

    def copy(self) -> Offsets:
        """As it is now."""
        return Offsets(self.push.clone(), self.low.clone(), self.high.clone())


class LearnedRounding:
    """N matrices that learn how to be rounded, from a first grid on."""

    def __init__(self, weights: Float[Tensor, "N out in"], grid: Grid, format: Format) -> None:
        self._grouped = in_groups(weights.float(), format)
        self._format, self._dtype = format, grid[0].dtype
        scale, zero = grid[0].float(), grid[1].float()
        self._range = -zero * scale, (levels(format) - 1 - zero) * scale
        self._first = scale, zero
        ones = torch.ones_like(scale)
        self._length = torch.ones_like(scale[:1])
        self.offsets = Offsets(torch.zeros_like(self._grouped), ones, ones.clone())

    def decoded(self) -> Float[Tensor, "N out in"]:
        """The weights as they would be read back, in float32."""
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

    def lengthen(self, factors: Float[Tensor, " out"]) -> None:
        """Multiply the scales of each row of all matrices, where the factor is between 1/2 and 2."""
        factors = torch.where((factors > 0.5) & (factors < 2), factors, 1.0)
        self._length = self._length * factors[:, None]

    def step(self, gradient: Float[Tensor, "N out in"], push: float, span: float) -> None:
        """Follow the signs of the gradient of the loss in the decoded weights: V by `push`, ranges by
        `span`."""
        gradient_NOGg = in_groups(gradient, self._format)
        scale, zero = self._grid()
        steps_NOGg, inside_NOGg = self._rounded(scale, zero)
        offsets, scale = self.offsets, scale.float()
        if span:
            by_scale = (gradient_NOGg * (steps_NOGg - self._grouped / scale.unsqueeze(-1) * inside_NOGg)).sum(
                -1
            )
            by_zero = (gradient_NOGg * ~inside_NOGg).sum(-1) * -scale
            self._move_range(by_scale, by_zero, scale, span)
        by_push = gradient_NOGg * inside_NOGg * scale.unsqueeze(-1)
        offsets.push.sub_(by_push.sign_(), alpha=push).clamp_(-0.5, 0.5)

    def _lengthened(self, scale: Float[Tensor, "N out G"]) -> Float[Tensor, "N out G"]:
        """Scales as they are read back at last; rounding knows nothing of it."""
        return stored(scale.float() * self._length, self._dtype)

    def _grid(self) -> tuple[Float[Tensor, "N out G"], Float[Tensor, "N out G"]]:
        """Scales as stored, and zeros as float."""
        scale, zero = self._first
        if self._format.symmetric:
            return stored(scale * self.offsets.high, self._dtype), zero
        low, high = self._range[0] * self.offsets.low, self._range[1] * self.offsets.high
        scale = stored((high - low) / (levels(self._format) - 1), self._dtype)
        return scale, (-low / scale.float()).round_().clamp_(0, levels(self._format) - 1)

    def _rounded(
        self, scale: Float[Tensor, "N out G"], zero: Float[Tensor, "N out G"]
    ) -> tuple[Float[Tensor, "N out G g"], Bool[Tensor, "N out G g"]]:
        """Values less zeros, and where they were not clipped."""
        zero = zero.unsqueeze(-1)
        free = self._grouped.div(scale.float().unsqueeze(-1)).add_(zero).add_(self.offsets.push).round_()
        values = free.clamp(0, levels(self._format) - 1)
        return values - zero, free == values

    def _move_range(
        self,
        by_scale: Float[Tensor, "N out G"],
        by_zero: Float[Tensor, "N out G"],
        scale: Float[Tensor, "N out G"],
        rate: float,
    ) -> None:
        offsets = self.offsets
        if self._format.symmetric:
            by_high = by_scale * self._first[0]
            offsets.high.sub_(by_high.sign_(), alpha=rate).clamp_(MIN_RANGE, MAX_RANGE)
            return
        (low, high), last = self._range, levels(self._format) - 1
        # z = -a low / s, so s moves it as well; s = (b high - a low) / (levels - 1).
        by_scale = by_scale + by_zero * low * offsets.low / scale.square()
        by_low = -low / last * by_scale - low / scale * by_zero
        offsets.low.sub_(by_low.sign_(), alpha=rate).clamp_(MIN_RANGE, MAX_RANGE)
        offsets.high.sub_((high / last * by_scale).sign_(), alpha=rate).clamp_(MIN_RANGE, MAX_RANGE)


def routed_sum(
    experts: RoutedExperts,
    up: Sequence[Float[Tensor, "R H"]],
    down: Sequence[Float[Tensor, "H I"]],
    tokens: Int[Tensor, " B"],
) -> Float[Tensor, "B H"]:
    """What the experts each answer to `tokens` together, weighted by the gates, in float32."""
    hidden, index, gates = (getattr(experts, name)[tokens] for name in ("hidden", "index", "weights"))
    hidden_BH, gates_Bk = hidden.float(), gates.float().flatten()
    slots_Bk = index.flatten()
    order = slots_Bk.argsort(stable=True)
    counts = torch.bincount(slots_Bk, minlength=experts.count)[: experts.count].tolist()
    outputs = [hidden_BH[:0]]
    for expert, places in enumerate(order[: sum(counts)].split(counts)):
        if len(places):
            inner = experts.inner(expert, hidden_BH[places // index.shape[1]], up[expert])
            outputs.append(inner @ down[expert].T * gates_Bk[places, None])
    rows = order[: sum(counts)] // index.shape[1]
    return torch.zeros_like(hidden_BH).index_add(0, rows, torch.cat(outputs))


def gradients(
    experts: RoutedExperts,
    up: Float[Tensor, "E R H"],
    down: Float[Tensor, "E H I"],
    tokens: Int[Tensor, " B"],
    target: Float[Tensor, "B H"],
) -> tuple[Float[Tensor, "E R H"], Float[Tensor, "E H I"]]:
    """Gradients, in `up` and `down`, of the squared error of the routed sum of `tokens` against `target`."""
    leaves = [matrix.detach().requires_grad_() for matrix in (up, down)]
    error = routed_sum(experts, leaves[0].unbind(), leaves[1].unbind(), tokens) - target
    return torch.autograd.grad(error.square().mean(), leaves)  # pyright: ignore[reportReturnType]
