"""What was measured on real text, and what went wrong.

`values[unit][name]` are plain numbers, so a stats file is JSON that can be cached, shared and reused for
other ratios. `key` is the digest of model, data and needs: two equal keys mean the same measurement. Where
there are several values of a kind (one for each width, or for each other expert), their number is part of the
name: how it is written, only `indexed` and `split_index` know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any, TypeVar, cast

from moespresso.core.errors import UserError
from moespresso.core.unit import Unit

Values = Mapping[Unit, Mapping[str, float]]
T = TypeVar("T")
_CALLED: dict[type[Any], str] = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number",
                                 bool: "true or false"}  # fmt: skip
# Between the name of a value and its index.
_INDEX = "@"
# What reading a file of somebody else's making can raise; the sentence is made where its kind is known.
MALFORMED = (ValueError, TypeError, OSError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Stats:
    """Measured values per unit; `calibration` describes the text, `warnings` counts what went wrong."""

    key: str
    blueprint: str
    tokens: int = 0
    values: Values = field(default_factory=dict[Unit, dict[str, float]])
    warnings: tuple[str, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])
    needs: tuple[str, ...] = ()

    def of(self, layer: int, experts: int, name: str) -> list[float]:
        """The value `name` of every expert of a layer, in order; raises `UserError` when it was not
        measured."""
        try:
            return [self.values[Unit(layer, "experts", expert)][name] for expert in range(experts)]
        except KeyError as missing:
            raise _not_measured(Unit(layer, "experts"), name) from missing

    def layer(self, layer: int, name: str) -> float:
        """The value `name` of the layer's experts taken together; raises `UserError` when it was not
        measured."""
        return self.at(Unit(layer, "experts"), name)

    def at(self, unit: Unit, name: str) -> float:
        """The value `name` of one unit; raises `UserError` when it was not measured."""
        row = self.values.get(unit, {})
        if name not in row:
            raise _not_measured(unit, name)
        return row[name]

    def series(self, unit: Unit, name: str) -> dict[int, float]:
        """The values of a unit that are indexed under `name`, by index; {} where there are none."""
        parts = {split_index(each): value for each, value in self.values.get(unit, {}).items()}
        return {index: value for (kind, index), value in parts.items() if kind == name and index is not None}

    def to_json(self) -> str:
        """The stats as JSON."""
        body = {"key": self.key, "blueprint": self.blueprint, "tokens": self.tokens, "warnings": list(self.warnings),
                "calibration": dict(self.calibration), "needs": list(self.needs),
                "values": {str(unit): dict(self.values[unit]) for unit in sorted(self.values)}}  # fmt: skip
        return json.dumps(body, indent=1) + "\n"

    @classmethod
    def load(cls, path: Path) -> Stats:
        """Read a stats file; raises `UserError` when it is missing or not one."""
        if not path.is_file():
            raise UserError(f"stats {path} do not exist as a file: write them with `moespresso measure`")
        try:
            return cls._read(read_object(path.read_text(encoding="utf-8")))
        except (*MALFORMED, UserError) as error:
            raise UserError(
                f"{path} is not a moespresso stats file ({error}): write one with `moespresso measure`"
            ) from error

    @classmethod
    def _read(cls, body: Mapping[str, Any]) -> Stats:
        """What `to_json` wrote; raises `ValueError` for anything else. A value may be NaN: so may a
        measurement."""
        rows = given(body, "values", dict[str, Any])
        values = {unit: {name: float(given(rows[text], name, float)) for name in given(rows, text, dict[str, Any])}
                  for text, unit in units_of(rows).items()}  # fmt: skip
        warnings, needs = (each(given(body, name, list[Any]), str, name) for name in ("warnings", "needs"))
        tokens = at_least(0, given(body, "tokens", int), "tokens")
        return cls(given(body, "key", str), given(body, "blueprint", str), tokens, values, tuple(warnings),
                   described(given(body, "calibration", dict[str, Any])), tuple(needs))  # fmt: skip


def _not_measured(unit: Unit, name: str) -> UserError:
    return UserError(f"the stats hold no {name!r} for {unit}: measure again with a step that needs it")


def indexed(name: str, index: int) -> str:
    """The name of one of several values of a kind."""
    return f"{name}{_INDEX}{index}"


def split_index(name: str) -> tuple[str, int | None]:
    """A name without its index, and the index; None where it has none."""
    kind, mark, index = name.partition(_INDEX)
    return (kind, int(index)) if mark and index.isdecimal() else (name, None)


def stats_key(*parts: str) -> str:
    """Digest of what a measurement depends on."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# Files that people edit and share: every fault is a `ValueError` that says what stands where


def read_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` holds; raises `ValueError` for anything else, or where a name stands
    twice."""
    body = json.loads(text, object_pairs_hook=_once)
    if not isinstance(body, dict):
        raise ValueError(f"{short(body)} is not an object")
    return cast("dict[str, Any]", body)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets the last of two win, so that the first would be lost without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def given(data: Mapping[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    """`data[name]`, or the default where it is missing; raises `ValueError` where it is of another kind.

    For a JSON reader true is no number, and 2 is one that need not be whole.
    """
    if name not in data and default is not None:
        return default
    if name not in data:
        raise ValueError(f"{name!r} is missing")
    return of_kind(data[name], kind, name)


def of_kind(value: Any, kind: type[T], place: str) -> T:
    """The value; raises `ValueError` naming its place where it is of another kind."""
    wanted: type[Any] = getattr(kind, "__origin__", kind)
    allowed = (int, float) if wanted is float else (wanted,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{place} {short(value)} is not {_CALLED[wanted]}")
    return cast("T", value)


def each(values: Sequence[Any], kind: type[T], place: str) -> list[T]:
    """The values; raises `ValueError` where one of them is of another kind."""
    return [of_kind(value, kind, f"{place}:") for value in values]


def at_least(least: int, value: int, place: str) -> int:
    """The value; raises `ValueError` where it is smaller."""
    if value < least:
        raise ValueError(f"{place} {value} is less than {least}")
    return value


def units_of(names: Iterable[str]) -> dict[str, Unit]:
    """The unit behind every name; raises `ValueError` where two names mean the same unit, as L1 and L01
    do."""
    found = {name: Unit.parse(name) for name in names}
    if len(set(found.values())) < len(found):
        raise ValueError(f"two of {short(list(found))} are the same unit")
    return found


def described(calibration: dict[str, Any]) -> dict[str, Any]:
    """What is said of a text, checked as far as it is read again: settings, digest, and its sources by name.

    Raises `ValueError` where one of them is of another kind. A text that is read in order has no seed.
    """
    for name in ("samples", "length", "seed"):
        if calibration.get(name) is not None:
            of_kind(calibration[name], int, f"calibration: {name}")
    for name in ("mode", "digest"):
        given(calibration, name, str, "")
    for source in each(given(calibration, "sources", list[Any], []), dict[str, Any], "sources"):
        given(source, "name", str)
    return calibration
