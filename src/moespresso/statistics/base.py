"""What a statistic is: one class, one file, registered by `@statistic` (`registry.py`).

A statistic is a frozen description: the name that steps ask for it by, the names of its values, and what it
sees. One that sees text (`OfText`) begins anew at every layer: it answers with the sums of that layer
(`LayerSums`), which take in one batch after the other and then say their values. What it needs from one layer
to the next, it leaves in `Measurement.held`. One that sees weights alone (`OfWeights`) goes through the
checkpoint by itself. Activations are not kept beyond the layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from moespresso.build import Tensors, View
from moespresso.core.layer import Call, Layer
from moespresso.core.progress import Progress
from moespresso.core.stats import split_index
from moespresso.core.unit import Unit

# Values by name, for each unit.
Rows = dict[Unit, dict[str, float]]


@dataclass(frozen=True)
class Statistic(ABC):
    """What can be measured. `measures` are the names of its values, without their indices; one that is not
    `resumable` holds something from layer to layer that is not kept on disk, so a measurement with it
    starts afresh."""

    name: ClassVar[str]
    measures: ClassVar[tuple[str, ...]]
    sees: ClassVar[Literal["text", "weights"]]
    resumable: ClassVar[bool] = True

    @property
    def need(self) -> str:
        """What a step says to have it measured."""
        return self.name

    @classmethod
    def restrict(cls, row: Mapping[str, float], kept: Sequence[int]) -> dict[str, float]:
        """What its values of one unit still say when only the experts `kept` of the layer are left, by their
        new numbers.

        Values with an index speak of sets of experts, of widths or of runs of blocks, which are others by
        then.
        """
        _ = kept
        return {name: value for name, value in row.items() if split_index(name)[1] is None}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measurement under way, on so many tokens; `held` is what statistics hold from one layer to the
    next."""

    num_tokens: int
    held: dict[Statistic, Any] = field(default_factory=dict[Statistic, Any])


class LayerSums(ABC):
    """What a statistic gathers of one layer."""

    @abstractmethod
    def add(self, call: Call) -> None:
        """Take in one batch."""

    @abstractmethod
    def values(self) -> Rows:
        """What comes of all batches, by unit."""

    def warnings(self) -> list[str]:
        """What went wrong, in sentences."""
        return []


class OfText(Statistic):
    """A statistic of what flows through the layers."""

    sees = "text"

    def applies(self, layer: Layer) -> bool:
        """Whether the layer has what is measured."""
        _ = layer
        return True

    @abstractmethod
    def begin(self, layer: Layer, measurement: Measurement) -> LayerSums:
        """The sums of one layer, still empty."""


class OfExperts(OfText):
    """A statistic of routed experts."""

    def applies(self, layer: Layer) -> bool:
        """Whether the layer has routed experts."""
        return bool(layer.spec.experts)


class OfWeights(Statistic):
    """A statistic of the stored weights alone."""

    sees = "weights"

    @abstractmethod
    def measure(self, view: View, tensors: Tensors, progress: Progress) -> Rows:
        """Its values on all of the view, by position."""
