"""What a layer would lose if its experts were narrower, for every width at once.

A channel of an expert adds g a_k w_k to the residual stream, g the gate, a_k what it holds, w_k its column of
down. What goes, over the energy of the stream behind the layer, so that layers can be compared:

    channels@W   the energy of its channels but the W strongest, sum_k |w_k|^2 sum_t (g a_k)^2 (CAMERA, arXiv
                 2508.02322)

It is measured at some widths (`grid`); between them the loss can be taken as a line.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moespresso.core.layer import Call, Fed, Layer, valid_tokens
from moespresso.core.stats import indexed
from moespresso.core.unit import Unit
from moespresso.kernels import RoutedExperts
from moespresso.statistics.base import LayerSums, Measurement, OfExperts, Rows
from moespresso.statistics.registry import statistic

# Widths are measured in steps of channels that are a multiple of this, so many at most.
STEP, POINTS = 8, 32


def grid(width: int) -> list[int]:
    """The widths below `width` that are measured, narrowest first."""
    step = -(-width // (STEP * POINTS)) * STEP
    return [*range(width - step, 0, -step)][::-1]


@statistic
@dataclass(frozen=True)
class Channels(OfExperts):
    """The energy that every expert would lose with its weakest channels."""

    name = "channels"
    measures = ("channels",)

    def begin(self, layer: Layer, measurement: Measurement) -> ChannelSums:
        """The sums of one layer."""
        _ = measurement
        return ChannelSums(layer)


class ChannelSums(LayerSums):
    """Accumulates the energies of one MoE layer."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._sums: Tensor | None = None
        self._stream = 0.0

    def add(self, call: Call) -> None:
        """Take in one batch."""
        experts = RoutedExperts.of(self._layer.experts, [fed_of(call)])
        sums, _ = experts.sums_and_maxima(range(experts.count), experts.up)
        sums = sums * experts.column_squares
        self._sums = sums if self._sums is None else self._sums + sums
        self._stream += energy_of(call)

    def values(self) -> Rows:
        """`channels@W` of every expert."""
        assert self._sums is not None
        lost = self._sums.sort(dim=1).values.double().cumsum(1) / max(self._stream, 1e-30)
        width = lost.shape[1]
        return {
            Unit(self._layer.spec.index, "experts", expert): {
                indexed("channels", kept): float(lost[expert, width - kept - 1]) for kept in grid(width)
            }
            for expert in range(len(lost))
        }


def fed_of(call: Call) -> Fed:
    """What reached the experts in one batch, padding left out."""
    routed, tokens = call.routed, valid_tokens(call)
    assert routed is not None
    return Fed(routed.hidden[tokens], routed.index[tokens], routed.weights[tokens].float())


def energy_of(call: Call) -> float:
    """The energy of the stream behind the layer in one batch."""
    return float(call.output[call.valid].float().square().sum())
