"""What a step that rounds on text is shown of a layer, and what it answers.

`LayerContext.experts` are the routed experts with their tokens (`kernels.routed`), `linears` single matrices
with the second moments of their inputs. The answer is codes by name, tensors that are replaced as a whole,
and what went wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moespresso.core.blueprint import Heads
from moespresso.core.format import Format
from moespresso.core.method import Refits
from moespresso.formats import QuantizedWeights
from moespresso.kernels import RoutedExperts


@dataclass(frozen=True, slots=True)
class LayerContext:
    """One layer: `formats` of `up` and `down` of its experts and of every linear; `dtypes` that their scales
    (or what is left of them) are stored in; `channels` that each of its experts keeps, where some go or they
    differ; `curvature` [E, I] of the model's loss along the output of every channel, for steps that go by
    gradients (`statistics.GradientMoments`); `missing` [T, H], what the layer's answer to each token that
    reaches its experts lacks of the original layer's, where that may be something.

    `linears` maps a module's name to its weight [out, in] and the mean of x x^T [in, in] of its inputs,
    `means` to the mean of x [in]. `module` is the layer itself, `layer` its number, `heads` those of its
    attention. `stored` gives its parameters as they are stored: those of `module` may be in the precision of
    the run.
    """

    layer: int
    module: nn.Module
    formats: Mapping[str, Format]
    dtypes: Mapping[str, torch.dtype]
    experts: RoutedExperts | None = None
    linears: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    channels: tuple[int, ...] | None = None
    curvature: Tensor | None = None
    missing: Tensor | None = None
    means: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    heads: Heads | None = None
    stored: Callable[[str], Tensor] | None = None

    def parameter(self, name: str) -> Tensor:
        """A parameter of the layer by its name, to the last bit as it is stored."""
        return self.module.get_parameter(name) if self.stored is None else self.stored(name)


@dataclass(slots=True)
class LayerResult:
    """What a step found, of all experts in order or of a linear by its module's name.

    `numbers` are what the codec of a matrix's format stores: of `up` (gate and up, one above the other) and
    `down`, or of `gate`, `up` and `down` apart; of a linear as a stack of one. `weights` are the matrices
    that stay plain, or what those come to: `up` [E, R, H], `down` [E, H, I], a linear [out, in]. `replaced`
    are tensors by their name in the layer; `warnings` stands in sentences, `remedies` by expert for those
    that could not be treated as the others.
    """

    numbers: dict[str, Any] = field(default_factory=dict[str, Any])
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    replaced: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    warnings: list[str] = field(default_factory=list[str])
    remedies: dict[int, str] = field(default_factory=dict[int, str])

    def rows(self, name: str) -> int:
        """Rows of each expert's matrix."""
        found = self.weights[name] if name in self.weights else self.numbers[name].values
        return found.shape[1]


class OnText(Refits[LayerContext, LayerResult]):
    """What every step extends that treats a layer on text."""

    __slots__ = ()


def joined(parts: Sequence[QuantizedWeights]) -> QuantizedWeights:
    """Codes of several runs of matrices as one."""
    values, scale, zero = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("values", "scale", "zero")
    )
    return QuantizedWeights(parts[0].format, values, scale, zero)


def patched(codes: QuantizedWeights, places: Sequence[int], others: QuantizedWeights) -> QuantizedWeights:
    """`codes` with the matrices at `places` replaced by `others`."""
    index = torch.tensor(places, device=codes.values.device)
    made = {
        name: getattr(codes, name).index_copy(0, index, getattr(others, name))
        for name in ("values", "scale", "zero")
    }
    return QuantizedWeights(codes.format, **made)
