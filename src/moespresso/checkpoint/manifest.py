"""The manifest `moespresso.json`: what a finished folder is and how it came about, with the digest of every
file.

It is written last, and its existence means done. It holds no clock and no path, so the same recipe gives the
same bytes. A report can be made from it again, and `verify` holds the folder against it. The fields stand
here in the order in which the file has them; those without a default are in every manifest that was ever
written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from moespresso.core.cost import Cost
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan
from moespresso.core.stats import MALFORMED, of_kind, units_of
from moespresso.core.unit import Unit

MANIFEST = "moespresso.json"
# The folder that only an unfinished run has.
WORK = ".moespresso"


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that a result was made from."""

    name: str
    family: str
    digest: str


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Size and digest of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder is. `identity` is the digest of all that it depends on; `recipe` what was asked for,
    `plan` what was decided, with the `scores` of all units and those that were `protected`.

    `experts` are counted by layer, `layers` described (`LayerSpec.facts`); `stock`, `layout`, `packing`,
    `plugin` and `apart` say in what form it is written and who loads it; `fitted` names the values found on
    text or weights, `coverage` the tokens that experts saw; `nonfinite` counts NaN and infinities by tensor.
    """

    moespresso: str = ""
    identity: str
    source: Origin
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    plan: Plan
    cost: Cost
    experts: Mapping[int, int] = field(default_factory=dict[int, int])
    family: str = ""
    target: str = ""
    stock: bool
    layout: str | None = None
    packing: str = ""
    plugin: bool = False
    layers: tuple[Mapping[str, Any], ...]
    fitted: tuple[str, ...] = ()
    coverage: Mapping[str, Any] = field(default_factory=dict[str, Any])
    scores: Mapping[Unit, float] = field(default_factory=dict[Unit, float])
    protected: frozenset[Unit] = frozenset()
    files: Mapping[str, FileFacts]
    nonfinite: Mapping[str, int]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    apart: bool = False

    def to_json(self) -> str:
        """The manifest as it is written; that experts lie apart is said only where it is so."""
        body = {each.name: getattr(self, each.name) for each in fields(self)} | {
            "source": asdict(self.source),
            "plan": self.plan.as_dict(),
            "cost": asdict(self.cost),
            "scores": {str(unit): self.scores[unit] for unit in sorted(self.scores)},
            "protected": [str(unit) for unit in sorted(self.protected)],
            "files": {name: asdict(facts) for name, facts in self.files.items()},
        }
        if not self.apart:
            del body["apart"]
        return json.dumps(body, indent=1) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of a finished folder; raises `UserError` when there is none, or it is not what was
        written."""
        path = folder / MANIFEST
        if not path.is_file():
            unfinished = " (its run was not finished: repeat the command)" if (folder / WORK).is_dir() else ""
            raise UserError(f"{folder} has no {MANIFEST}{unfinished}: it is not a finished moespresso result")
        try:
            body = of_kind(json.loads(path.read_text()), dict[str, Any], "it:")
            lacking = [name for name in _REQUIRED if name not in body]
            if not lacking:
                return cls._read(body)
        except (*MALFORMED, AttributeError, UserError) as error:
            raise UserError(f"{path} is damaged ({error}): press the model again with --no-resume") from error
        raise UserError(f"{path} lacks {', '.join(lacking)}: it was changed after it was written")

    @classmethod
    def _read(cls, body: Mapping[str, Any]) -> Manifest:
        """What `to_json` wrote; what a later version may have added is passed over."""
        return cls(**{each.name: _READERS.get(each.name, _same)(body[each.name]) for each in fields(cls)
                      if each.name in body})  # fmt: skip


def _same(value: Any) -> Any:
    return value


def _units(names: Any) -> frozenset[Unit]:
    return frozenset(units_of(names).values())


def _scores(rows: Mapping[str, float]) -> dict[Unit, float]:
    return {unit: rows[name] for name, unit in units_of(rows).items()}


_REQUIRED = sorted(
    each.name for each in fields(Manifest) if each.default is MISSING and each.default_factory is MISSING
)
# How fields are read that JSON does not hold as they are.
_READERS: Mapping[str, Callable[[Any], Any]] = {
    "source": lambda row: Origin(**row),
    "plan": Plan.read,
    "cost": lambda row: Cost(**row),
    "experts": lambda rows: {int(layer): count for layer, count in rows.items()},
    "layers": tuple,
    "fitted": tuple,
    "scores": _scores,
    "protected": _units,
    "files": lambda rows: {name: FileFacts(**row) for name, row in rows.items()},
    "warnings": tuple,
    "notes": tuple,
}
