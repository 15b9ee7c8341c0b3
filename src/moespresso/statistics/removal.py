"""What a layer would lose if its experts were narrower and the channels that stay made up for the others, for
every width at once.

    removal@W    the error that is left with W channels, over the energy of the stream behind the layer
                 (`kernels.obs`)

An expert adds g D a to the residual stream, g the gate, a what its channels hold, D its down projection.
Channels go in turns, each time those whose loss the others can best make up for. It is measured at the same
widths as `channels`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moespresso.core.layer import Call, Fed, Layer
from moespresso.core.stats import indexed
from moespresso.core.unit import Unit
from moespresso.kernels import RoutedExperts, conditioning, obs
from moespresso.statistics.base import LayerSums, Measurement, OfExperts, Rows
from moespresso.statistics.channels import energy_of, fed_of, grid
from moespresso.statistics.registry import statistic

# Tokens of a layer that are held at once, about.
MOST = 1 << 16
# Share of the mean second moment that is added to every one; more for experts with fewer tokens than channels.
DAMPING = 0.003


@statistic
@dataclass(frozen=True)
class Removal(OfExperts):
    """The error that every expert would leave with fewer channels."""

    name = "removal"
    measures = ("removal",)

    def begin(self, layer: Layer, measurement: Measurement) -> RemovalSums:
        """What reaches the experts of one layer."""
        _ = measurement
        return RemovalSums(layer)


class RemovalSums(LayerSums):
    """Holds what reaches the experts of one MoE layer (the first tokens, where there are many), and then
    takes channels out of them one after another."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._fed: list[Fed] = []
        self._tokens, self._stream = 0, 0.0

    def add(self, call: Call) -> None:
        """Take in one batch."""
        if self._tokens < MOST:
            self._fed.append(fed_of(call))
            self._tokens += len(self._fed[-1].hidden)
            self._stream += energy_of(call)

    def values(self) -> Rows:
        """`removal@W` of every expert."""
        experts = RoutedExperts.of(self._layer.experts, self._fed)
        width = experts.down.shape[2]
        points = grid(width)[::-1]
        ends = [width, *points]
        portions = [before - after for before, after in zip(ends, points, strict=False)]
        rows: Rows = {}
        for some in experts.groups():
            losses = _losses(experts, some, portions) / max(self._stream, 1e-30)
            rows |= {
                Unit(self._layer.spec.index, "experts", expert): {
                    indexed("removal", kept): loss for kept, loss in zip(points, row.tolist(), strict=True)
                }
                for expert, row in zip(some, losses, strict=True)
            }
        return rows


def _losses(experts: RoutedExperts, some: range, portions: list[int]) -> Tensor:
    """What `some` experts lose [N, turns], summed over their tokens."""
    part = slice(some.start, some.stop)
    hessians, _ = conditioning.finite_or_identity(
        experts.hessians_inner(some, experts.up[part], by_gate=True)
    )
    tokens = experts.tokens[part].clamp(min=1).float()
    shares = DAMPING * (hessians.shape[1] / tokens).clamp(min=1)
    ridge = (shares - DAMPING) * hessians.diagonal(dim1=1, dim2=2).mean(1)
    _, losses, _ = obs.remove(experts.down[part], conditioning.add_ridge(hessians, ridge), DAMPING, portions)
    weight = [experts.rows(expert)[1].float().square().sum() for expert in some]
    return losses.double() * losses.new_tensor(weight).double()[:, None]
