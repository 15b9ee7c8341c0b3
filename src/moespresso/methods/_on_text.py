"""What a step that rounds on text is shown of a layer, and what it answers.

`LayerContext.experts` are the routed experts with their tokens (`measure.routed`), `linears` single matrices with the second
moments of their inputs. The answer is codes by name, tensors that are replaced as a whole, and what went wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moespresso.core.blueprint import Heads
from moespresso.core.format import Format
from moespresso.core.method import Refits
from moespresso.formats import Codes
from moespresso.kernels import RoutedExperts


@dataclass(frozen=True, slots=True)
class LayerContext:
    """One layer: `formats` of `up` and `down` of its experts and of every linear; `dtypes` that their scales (or what is left
    of them) are stored in; `channels` that each of its experts keeps, where some go or they differ; `curvature` [E, I] of the model's loss along the
    output of every channel, for steps that go by gradients (`statistics.GradientMoments`); `missing` [T, H], what the layer's answer to
    each token that reaches its experts lacks of the original layer's, where that may be something.

    `linears` maps a module's name to its weight [out, in] and the mean of x x^T [in, in] of its inputs, `means` to the mean of
    x [in]. `module` is the layer itself, `layer` its number, `heads` those of its attention. `stored` gives its parameters as they
    are stored: those of `module` may be in the precision of the run.
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
    """What a step found. `up` and `down` are codes of all experts, in order; `linears` by module.

    `weights` are matrices that stay plain, under the same names (`up` [E, R, H], `down` [E, H, I], a linear [out, in]); where
    they are products, `factors` holds those by the name of their stored form (`gate`, `up`, `down`), `based` the own factors
    [E, R, r], shares [E, m] and bases [m, r, H] of those that share bases. `replaced` are tensors by
    their name in the layer; `trouble` stands in sentences, `remedies` by expert for those that could not be treated as the others.
    """

    up: Codes | None = None
    down: Codes | None = None
    linears: dict[str, Codes] = field(default_factory=dict[str, Codes])
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])
    based: dict[str, tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict[str, tuple[Tensor, Tensor, Tensor]]
    )
    replaced: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    trouble: list[str] = field(default_factory=list[str])
    remedies: dict[int, str] = field(default_factory=dict[int, str])


class OnText(Refits[LayerContext, LayerResult]):
    """What every step extends that treats a layer on text."""

    __slots__ = ()


def joined(parts: Sequence[Codes]) -> Codes:
    """Codes of several runs of matrices as one."""
    values, scale, zero = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("values", "scale", "zero")
    )
    return Codes(parts[0].format, values, scale, zero)


def patched(codes: Codes, places: Sequence[int], others: Codes) -> Codes:
    """`codes` with the matrices at `places` replaced by `others`."""
    index = torch.tensor(places, device=codes.values.device)
    made = {
        name: getattr(codes, name).index_copy(0, index, getattr(others, name))
        for name in ("values", "scale", "zero")
    }
    return Codes(codes.format, **made)
