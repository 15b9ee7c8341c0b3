"""What was measured on real text, and what went wrong.

`values[unit][name]` are plain numbers, so a stats file is JSON that can be cached, shared and reused for other
ratios. `key` is the digest of model, data and needs: two equal keys mean the same measurement.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moespresso.core.errors import UserError
from moespresso.core.unit import Unit

Values = Mapping[Unit, Mapping[str, float]]


@dataclass(frozen=True)
class Stats:
    """Measured values per unit; `calibration` describes the text, `trouble` counts what went wrong."""

    key: str
    blueprint: str
    tokens: int = 0
    values: Values = field(default_factory=dict[Unit, dict[str, float]])
    trouble: tuple[str, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])
    needs: tuple[str, ...] = ()

    def of(self, layer: int, experts: int, name: str) -> list[float]:
        """The value `name` of every expert of a layer, in order; raises `UserError` when it was not measured."""
        try:
            return [self.values[Unit(layer, "experts", expert)][name] for expert in range(experts)]
        except KeyError as missing:
            raise _not_measured(Unit(layer, "experts"), name) from missing

    def layer(self, layer: int, name: str) -> float:
        """The value `name` of the layer's experts taken together; raises `UserError` when it was not measured."""
        return self.at(Unit(layer, "experts"), name)

    def at(self, unit: Unit, name: str) -> float:
        """The value `name` of one unit; raises `UserError` when it was not measured."""
        row = self.values.get(unit, {})
        if name not in row:
            raise _not_measured(unit, name)
        return row[name]

    def to_json(self) -> str:
        """The stats as JSON."""
        body = {"key": self.key, "blueprint": self.blueprint, "tokens": self.tokens, "trouble": list(self.trouble),
                "calibration": dict(self.calibration), "needs": list(self.needs),
                "values": {str(unit): dict(self.values[unit]) for unit in sorted(self.values)}}  # fmt: skip
        return json.dumps(body, indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> Stats:
        """Read a stats file; raises `UserError` when it is missing or not one."""
        if not path.is_file():
            raise UserError(f"stats {path} do not exist: write them with `moespresso measure`")
        try:
            body = json.loads(path.read_text())
            values = {Unit.parse(unit): row for unit, row in body["values"].items()}
            return cls(body["key"], body["blueprint"], body["tokens"], values, tuple(body["trouble"]),
                       body["calibration"], tuple(body["needs"]))  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is not a moespresso stats file: write one with `moespresso measure`"
            ) from error


def _not_measured(unit: Unit, name: str) -> UserError:
    return UserError(f"the stats hold no {name!r} for {unit}: measure again with a step that needs it")


def stats_key(*parts: str) -> str:
    """Digest of what a measurement depends on."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
