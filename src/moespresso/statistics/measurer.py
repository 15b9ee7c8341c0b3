"""What is measured, by name, and the visitor of a measuring sweep that gathers it layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from moespresso.core.layer import Call, Layer, Taps
from moespresso.core.unit import Unit
from moespresso.statistics.channels import ChannelSums, Removals
from moespresso.statistics.pairs import pair_values
from moespresso.statistics.reconstruction import Reconstruction
from moespresso.statistics.routing import RoutingSums
from moespresso.statistics.sample import Sample
from moespresso.statistics.similarity import CosineSums, Runs

# What a method may ask for: sums over routed tokens, the search by reconstruction, how alike experts are, how much a
# layer turns the stream, what narrower experts would lose as they are and refitted, sums over weights (no text); `run@N`, how
# much N blocks turn the stream; and `text`, for steps that take text but no stats.
NEEDS = ("routing", "reconstruction", "pairs", "similarity", "channels", "removal", "weights", "text")


def is_need(name: str) -> bool:
    """Whether something is measured under this name."""
    return name in NEEDS or (name.startswith("run@") and name[4:].isdigit())


class Measurer:
    """Visits the layers of a sweep and keeps `values[unit][name]` and `trouble`."""

    def __init__(self, needs: Iterable[str], tokens: int) -> None:
        self._needs, self._tokens = set(needs), tokens
        lengths = sorted(int(need[4:]) for need in self._needs if need.startswith("run@"))
        self._runs = [Runs(length, tokens) for length in lengths]
        self.values: dict[Unit, dict[str, float]] = {}
        self.trouble: list[str] = []

    def __call__(self, layer: Layer, taps: Taps) -> None:
        """Measure one layer."""
        of_experts = bool(layer.spec.experts) and bool(self._needs & {"routing", "reconstruction", "pairs"})
        turns = "similarity" in self._needs
        energies = ChannelSums() if layer.spec.experts and "channels" in self._needs else None
        removals = Removals() if layer.spec.experts and "removal" in self._needs else None
        if not (of_experts or turns or energies or removals or self._runs):
            return
        experts = _Experts(layer, self._needs, self._tokens) if of_experts else None
        cosine = CosineSums()
        sampled: list[list[Any]] = [[] for _ in self._runs]
        for call in taps:
            if experts is not None:
                experts.add(call)
            if turns:
                cosine.add(call)
            if energies is not None:
                energies.add(layer, call)
            if removals is not None:
                removals.add(call)
            for held, run in zip(sampled, self._runs, strict=True):
                held.append(run.sample(call))
        if experts is not None:
            self._keep(experts.values())
            self.trouble += experts.trouble()
        self._keep(cosine.values(layer).items())
        if energies is not None:
            self._keep(energies.values(layer).items())
        if removals is not None:
            self._keep(removals.values(layer).items())
        for held, run in zip(sampled, self._runs, strict=True):
            self._keep(run.add(layer.spec.index, held).items())

    def _keep(self, rows: Iterable[tuple[Unit, dict[str, float]]]) -> None:
        for unit, row in rows:
            self.values.setdefault(unit, {}).update(row)

    def notes(self) -> dict[str, Any]:
        """What has been measured so far, as plain data."""
        return {"values": {str(unit): row for unit, row in self.values.items()}, "trouble": self.trouble}

    def recall(self, notes: dict[str, Any]) -> None:
        """Take up what `notes` gave."""
        self.values = {Unit.parse(unit): row for unit, row in notes["values"].items()}
        self.trouble = list(notes["trouble"])


class _Experts:
    """What is measured of the experts of one layer."""

    def __init__(self, layer: Layer, needs: set[str], tokens: int) -> None:
        assert layer.router is not None
        spec, self._layer, self._needs = layer.spec, layer, needs
        self._sums = RoutingSums(spec.experts)
        width = next(iter(layer.router.parameters())).shape[-1]
        self._sample = Sample(spec.experts, width, tokens) if needs & {"reconstruction", "pairs"} else None

    def add(self, call: Call) -> None:
        self._sums.add(self._layer, call)
        if self._sample is not None:
            self._sample.add(call)

    def values(self) -> Iterator[tuple[Unit, dict[str, float]]]:
        """Rows of every expert, and of the layer's experts together."""
        columns = self._sums.values()
        if self._sample is not None and "reconstruction" in self._needs:
            columns |= Reconstruction(self._sample).search(self._layer)
        if self._sample is not None and "pairs" in self._needs:
            columns |= pair_values(self._layer, self._sample)
        index = self._layer.spec.index
        for expert in range(self._layer.spec.experts):
            yield Unit(index, "experts", expert), {name: column[expert] for name, column in columns.items()}
        yield Unit(index, "experts"), self._sums.of_layer(self._layer)

    def trouble(self) -> Iterator[str]:
        """What went wrong, in sentences."""
        layer = self._layer.spec.index
        silent = [expert for expert, count in enumerate(self._sums.values()["tokens"]) if count == 0]
        if silent:
            names = ", ".join(str(Unit(layer, "experts", expert)) for expert in silent)
            yield f"no calibration token reached {names}: every score but routing puts them last"
        if self._sums.nonfinite:
            yield f"L{layer}: {self._sums.nonfinite} answers of experts were not finite"
