"""What a layer would lose if its experts were narrower, for every width at once.

A channel of an expert adds g a_k w_k to the residual stream, g the gate, a_k what it holds, w_k its column of down. Of every
expert the channels of the least energy |w_k|^2 sum_t (g a_k)^2 go first (CAMERA, arXiv 2508.02322); what goes, over the energy of the
stream behind the layer, says how much narrower experts would turn it: a number that layers can be compared by.
"""

from __future__ import annotations

from torch import Tensor

from moespresso.core.layer import Call, Fed, Layer, valid_tokens
from moespresso.core.unit import Unit
from moespresso.measure.routed import RoutedExperts

# Widths that are told, in channels.
STEP = 8


class ChannelSums:
    """Accumulates the energies of one MoE layer."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._stream = 0.0

    def add(self, layer: Layer, call: Call) -> None:
        """Take in one batch."""
        routed, tokens = call.routed, valid_tokens(call)
        assert routed is not None
        fed = Fed(routed.hidden[tokens], routed.index[tokens], routed.weights[tokens].float())
        experts = RoutedExperts.of(layer.experts, [fed])
        sums, _ = experts.sums_and_peaks(range(experts.count), experts.up)
        sums = sums * experts.down.float().square().sum(1)
        self._sums = sums if self._sums is None else self._sums + sums
        self._stream += float(call.output[call.valid].float().square().sum())

    def values(self, layer: Layer) -> dict[Unit, dict[str, float]]:
        """`channels@W`: the share of the stream's energy that experts of W channels no longer add."""
        assert self._sums is not None
        lost = self._sums.sort(dim=1).values.sum(0).double().cumsum(0) / max(self._stream, 1e-30)
        width = len(lost)
        row = {f"channels@{kept}": float(lost[width - kept - 1]) for kept in range(STEP, width, STEP)}
        return {Unit(layer.spec.index, "experts"): row}
