"""What a layer would lose if its experts were narrower, for every width at once.

A channel of an expert adds g a_k w_k to the residual stream, g the gate, a_k what it holds, w_k its column of down. Two ways to
count what goes, both over the energy of the stream behind the layer, so that layers can be compared:

    channels@W   the energy of its channels but the W strongest, sum_k |w_k|^2 sum_t (g a_k)^2 (CAMERA, arXiv 2508.02322)
    removal@W    the error that is left when the W that stay have made up for the others (`removal`)

They are told for some widths (`grid`); between them the loss can be taken as a line.
"""

from __future__ import annotations

from torch import Tensor

from moespresso.core.layer import Call, Fed, Layer, valid_tokens
from moespresso.core.unit import Unit
from moespresso.kernels import RoutedExperts, removal, ridged, usable

# Widths are told in steps of channels that are a multiple of this, so many at most.
STEP, POINTS = 8, 32
# Tokens of a layer that are held at once, about.
MOST = 1 << 16
# Share of the mean second moment that is added to every one; more for experts with fewer tokens than channels.
DAMPING = 0.003


def grid(width: int) -> list[int]:
    """The widths below `width` that are told, narrowest first."""
    step = -(-width // (STEP * POINTS)) * STEP
    return [*range(width - step, 0, -step)][::-1]


class ChannelSums:
    """Accumulates the energies of one MoE layer."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._stream = 0.0

    def add(self, layer: Layer, call: Call) -> None:
        """Take in one batch."""
        experts = RoutedExperts.of(layer.experts, [fed_of(call)])
        sums, _ = experts.sums_and_peaks(range(experts.count), experts.up)
        sums = sums * experts.column_squares
        self._sums = sums if self._sums is None else self._sums + sums
        self._stream += _energy(call)

    def values(self, layer: Layer) -> dict[Unit, dict[str, float]]:
        """`channels@W` of every expert."""
        assert self._sums is not None
        lost = self._sums.sort(dim=1).values.double().cumsum(1) / max(self._stream, 1e-30)
        width = lost.shape[1]
        return {
            Unit(layer.spec.index, "experts", expert): {
                f"channels@{kept}": float(lost[expert, width - kept - 1]) for kept in grid(width)
            }
            for expert in range(len(lost))
        }


class Removals:
    """Holds what reaches the experts of one MoE layer (the first tokens, where there are many), and then takes channels out
    of them one after another."""

    def __init__(self) -> None:
        self._fed: list[Fed] = []
        self._tokens, self._stream = 0, 0.0

    def add(self, call: Call) -> None:
        """Take in one batch."""
        if self._tokens < MOST:
            self._fed.append(fed_of(call))
            self._tokens += len(self._fed[-1].hidden)
            self._stream += _energy(call)

    def values(self, layer: Layer) -> dict[Unit, dict[str, float]]:
        """`removal@W` of every expert."""
        experts = RoutedExperts.of(layer.experts, self._fed)
        width = experts.down.shape[2]
        points = grid(width)[::-1]
        ends = [width, *points]
        portions = [before - after for before, after in zip(ends, points, strict=False)]
        found: dict[Unit, dict[str, float]] = {}
        for some in experts.groups():
            losses = _losses(experts, some, portions) / max(self._stream, 1e-30)
            found |= {
                Unit(layer.spec.index, "experts", expert): {
                    f"removal@{kept}": loss for kept, loss in zip(points, row.tolist(), strict=True)
                }
                for expert, row in zip(some, losses, strict=True)
            }
        return found


def _losses(experts: RoutedExperts, some: range, portions: list[int]) -> Tensor:
    """What `some` experts lose [N, turns], summed over their tokens."""
    here = slice(some.start, some.stop)
    moments, _ = usable(experts.moments_inner(some, experts.up[here], by_gate=True))
    tokens = experts.tokens[here].clamp(min=1).float()
    shares = DAMPING * (moments.shape[1] / tokens).clamp(min=1)
    moments = ridged(moments, (shares - DAMPING) * moments.diagonal(dim1=1, dim2=2).mean(1))
    _, losses, _ = removal(experts.down[here], moments, DAMPING, portions)
    weight = [experts.rows(expert)[1].float().square().sum() for expert in some]
    return losses.double() * losses.new_tensor(weight).double()[:, None]


def fed_of(call: Call) -> Fed:
    """What reached the experts in one batch, padding left out."""
    routed, tokens = call.routed, valid_tokens(call)
    assert routed is not None
    return Fed(routed.hidden[tokens], routed.index[tokens], routed.weights[tokens].float())


def _energy(call: Call) -> float:
    return float(call.output[call.valid].float().square().sum())
