"""The visitor of a measuring sweep: at every layer all statistics that were asked for see the same
batches, once each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moespresso.core.layer import Layer, Taps
from moespresso.core.unit import Unit
from moespresso.statistics.base import Measurement, OfText, Rows
from moespresso.statistics.registry import statistics_of


class Measurer:
    """Visits the layers of a sweep and keeps `values[unit][name]` and `warnings`; statistics of weights
    alone are not its matter."""

    def __init__(self, needs: Iterable[str], num_tokens: int) -> None:
        self._statistics = [each for each in statistics_of(needs) if isinstance(each, OfText)]
        self._measurement = Measurement(num_tokens)
        self.values: Rows = {}
        self.warnings: list[str] = []

    @property
    def resumable(self) -> bool:
        """Whether `notes` are all that a measurement needs to go on."""
        return all(each.resumable for each in self._statistics)

    def __call__(self, layer: Layer, taps: Taps) -> None:
        """Measure one layer."""
        begun = [each.begin(layer, self._measurement) for each in self._statistics if each.applies(layer)]
        if not begun:
            return
        for call in taps:
            for sums in begun:
                sums.add(call)
        for sums in begun:
            for unit, row in sums.values().items():
                self.values.setdefault(unit, {}).update(row)
            self.warnings += sums.warnings()

    def notes(self) -> dict[str, Any]:
        """What has been measured so far, as plain data."""
        return {"values": {str(unit): row for unit, row in self.values.items()}, "warnings": self.warnings}

    def recall(self, notes: dict[str, Any]) -> None:
        """Take up what `notes` gave."""
        self.values = {Unit.parse(unit): row for unit, row in notes["values"].items()}
        self.warnings = list(notes["warnings"])
