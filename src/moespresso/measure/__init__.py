"""Running statistics that never keep activations.

`Measurer` is the visitor of a measuring sweep: it gathers, per MoE layer, what the given needs ask for, and can be
saved and recalled between layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moespresso.core.layer import Layer, Taps
from moespresso.core.unit import Unit
from moespresso.measure.reconstruction import Reconstruction
from moespresso.measure.routing import SUMS, RoutingSums
from moespresso.measure.weights import weight_sums

__all__ = ["NEEDS", "SUMS", "Measurer", "Reconstruction", "RoutingSums", "weight_sums"]

# What a method may ask for: sums over routed tokens, the search by reconstruction, sums over weights (no text).
NEEDS = ("routing", "reconstruction", "weights")


class Measurer:
    """Visits the layers of a sweep and keeps `values[unit][name]` and `trouble`."""

    def __init__(self, needs: Iterable[str], tokens: int) -> None:
        self._needs, self._tokens = set(needs), tokens
        self.values: dict[Unit, dict[str, float]] = {}
        self.trouble: list[str] = []

    def __call__(self, layer: Layer, taps: Taps) -> None:
        """Measure one layer."""
        spec = layer.spec
        if not spec.experts or not self._needs & {"routing", "reconstruction"}:
            return
        sums = RoutingSums(spec.experts)
        search = Reconstruction(spec.experts, next(iter(layer.router.parameters())).shape[-1]) if "reconstruction" in self._needs and layer.router is not None else None  # fmt: skip
        for call in taps:
            sums.add(layer, call)
            if search is not None:
                search.add(call, self._tokens)
        per_expert = sums.values() | (search.search(layer) if search is not None else {})
        for name, values in per_expert.items():
            for expert, value in enumerate(values):
                self.values.setdefault(Unit(spec.index, "experts", expert), {})[name] = value
        self.values[Unit(spec.index, "experts")] = sums.of_layer(layer)
        self._note_trouble(spec.index, sums)

    def _note_trouble(self, layer: int, sums: RoutingSums) -> None:
        silent = [expert for expert, count in enumerate(sums.values()["tokens"]) if count == 0]
        if silent:
            names = ", ".join(str(Unit(layer, "experts", expert)) for expert in silent)
            self.trouble.append(
                f"no calibration token reached {names}: every score but routing puts them last"
            )
        if sums.nonfinite:
            self.trouble.append(f"L{layer}: {sums.nonfinite} answers of experts were not finite")

    def notes(self) -> dict[str, Any]:
        """What has been measured so far, as plain data."""
        return {"values": {str(unit): row for unit, row in self.values.items()}, "trouble": self.trouble}

    def recall(self, notes: dict[str, Any]) -> None:
        """Take up what `notes` gave."""
        self.values = {Unit.parse(unit): row for unit, row in notes["values"].items()}
        self.trouble = list(notes["trouble"])
