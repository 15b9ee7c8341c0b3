"""What came of a run, as plain data: what was asked, what was decided, what it cost before and after.

`to_dict` is the JSON that `press --json` and `build --json` print; the renderers read that same dictionary,
so a report can be shown again from a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moespresso.core.cost import Cost
from moespresso.core.plan import Plan
from moespresso.core.unit import Unit


@dataclass(frozen=True, slots=True)
class LayerScores:
    """What became of one layer's routed experts, in the source's numbers.

    `values` is the score of every expert (empty when none was taken) under the score's `name`; `protected`
    are the super experts that were kept whatever their score; `merged` says of dropped ones whose average
    they went into.
    """

    kept: tuple[int, ...]
    dropped: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    name: str = ""
    protected: tuple[int, ...] = ()
    merged: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What came of a run. `scores` by layer index; `gone` the blocks and parts of layers that were dropped,
    each with its score where it has one; `seconds` by phase; peaks in bytes; `out` the folder written, and
    whether only moespresso's `plugin` loads it; who reads its packed matrices (`packing`: `stock`, `own`,
    `gptq`, `awq`, or empty); the `auto_class` of transformers that loads it.

    `warnings` is what went wrong and was survived, `notes` what a reader should know; both are whole
    sentences.
    """

    recipe: Mapping[str, Any]
    plan: Plan
    before: Cost
    after: Cost
    scores: Mapping[int, LayerScores] = field(default_factory=dict)
    gone: Mapping[Unit, float | None] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    out: str | Path = ""
    plugin: bool = False
    packing: str = ""
    auto_class: str = "AutoModelForCausalLM"
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    peak_rss_bytes: int = 0
    peak_anonymous_bytes: int = 0

    @property
    def total_seconds(self) -> float:
        """Wall time of the run: the phase `total`, or the sum of the phases where that was not taken."""
        return self.seconds.get("total", sum(self.seconds.values()))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data; `seconds` is the whole run, `phases` its parts."""
        before, after = asdict(self.before), asdict(self.after)
        both = {name: {"before": before[name], "after": after[name]} for name in before}
        return {
            "out": str(self.out),
            "plugin": self.plugin,
            "packing": self.packing,
            **both,
            "seconds": self.total_seconds,
            "phases": {name: value for name, value in self.seconds.items() if name != "total"},
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_anonymous_bytes": self.peak_anonymous_bytes,
            "plan": self.plan.as_dict(),
            "scores": {f"L{layer}": asdict(scores) for layer, scores in sorted(self.scores.items())},
            "gone": {str(unit): score for unit, score in self.gone.items()},
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "recipe": dict(self.recipe),
            "machine": dict(self.machine),
            "versions": dict(self.versions),
        }


def to_json(value: Any) -> str:
    """Strict JSON of a result: a number that is not finite becomes null, a path text, a report its
    dictionary."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Report):
        return _plain(value.to_dict())
    return value if isinstance(value, str | int | None) else str(value)
