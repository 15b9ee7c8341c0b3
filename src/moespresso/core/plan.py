"""The decision, as plain data that a person can read, edit, diff, cost without a GPU and share.

A `Plan` is an ordered list of `Stage`s; a stage gives some units a `Treatment` by one method with its
settings. Units are numbered as in the source checkpoint in every stage, so `L3.E17` is the same expert all
the way down; what is kept after all stages is the intersection of what each keeps.
`moespresso.effect.rewrite` says what a plan does to each tensor; an empty plan is the identity.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal, get_args

from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.format import Format
from moespresso.core.method import Refits, Step
from moespresso.core.registry import parse_step
from moespresso.core.stats import MALFORMED, at_least, described, each, given, of_kind, read_object, units_of
from moespresso.core.unit import Unit


@dataclass(frozen=True, slots=True)
class Treatment:
    """What happens to one unit. Default: nothing.

    `keep` holds kept expert numbers (ascending) of a layer's experts. `drop` lets a whole block (`L3`) go, or
    its attention (`L3.attention`) or feed-forward part (`L3.experts`, `L3.dense`), norm included. `scale`
    multiplies the layer's routed part (folded into the down projections). An expert that merges `into`
    another has a `share` of the average, and so has that one itself. `repair` says what stands in for what
    goes, or how members of a merge are put in line (see `moespresso.effect.cuts`). `channels`, `format` are
    for slimming; `channels` counts those that each expert of the layer keeps (`L3.experts`), or one of them
    (`L3.E5`); which ones is found on text or weights, like all fitted values.
    """

    keep: tuple[int, ...] | None = None
    drop: bool = False
    scale: float = 1.0
    into: int | None = None
    share: float = 1.0
    channels: int | None = None
    format: Format | None = None
    repair: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that differ from nothing."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Treatment:
        """Read what `as_dict` wrote; raises `ValueError` for anything else, since plans are edited by
        hand."""
        names = [f.name for f in fields(cls)]
        strangers = [name for name in data if name not in names]
        if strangers:
            raise ValueError(f"{strangers[0]!r} is unknown{did_you_mean(strangers[0], names)}")
        # Null says what leaving it out says, where nothing is a choice.
        said = {name for name, value in data.items() if value is not None or name not in _MAY_BE_NULL}
        values: dict[str, Any] = {name: data[name] for name in said}
        for name, kind in _KINDS.items():
            if name in values:
                values[name] = kind(of_kind(values[name], kind, name))
        if "keep" in values:
            values["keep"] = _ascending(values["keep"], "keep")
        if "format" in values:
            values["format"] = _format(values["format"])
        read = cls(**values)
        read._check_amounts()
        return read

    def _check_amounts(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale {self.scale} is not a positive number")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share {self.share} is not between 0 and 1")
        beside = [name for name in self.as_dict() if name not in ("drop", "repair")]
        if self.drop and beside:
            raise ValueError(
                f"{beside[0]} stands beside drop, which leaves nothing to treat: say one of the two"
            )


_KINDS: Mapping[str, type[Any]] = {"keep": list, "channels": int, "drop": bool, "scale": float, "into": int,
                                   "share": float, "format": dict, "repair": str}  # fmt: skip
_MAY_BE_NULL = frozenset({"keep", "channels", "into", "format", "repair"})


_FORMAT_KINDS: Mapping[str, type[Any]] = {
    "kind": str,
    "bits": int,
    "group_size": int,
    "symmetric": bool,
    "density": float,
    "rank": int,
    "bases": int,
}


def _format(data: Mapping[str, Any]) -> Format:
    """Read a treatment's format; raises `ValueError` for what is none."""
    strangers = [name for name in data if name not in _FORMAT_KINDS]
    if strangers:
        raise ValueError(f"format: {strangers[0]!r} is unknown{did_you_mean(strangers[0], _FORMAT_KINDS)}")
    values: dict[str, Any] = {
        name: of_kind(value, _FORMAT_KINDS[name], f"format: {name}") for name, value in data.items()
    }
    at_least(0, values.get("group_size", 0), "format: group_size")
    return Format(**values)


def _ascending(numbers: list[Any], place: str) -> tuple[int, ...]:
    """Numbers in the order that everything else counts on; raises `ValueError` for others."""
    found = each(numbers, int, place)
    if any(later <= earlier for earlier, later in pairwise(found)):
        raise ValueError(f"{place} {short(found)} does not ascend: give each number once, in ascending order")
    return tuple(found)


Wish = Literal["keep", "like_trunk", "drop"]


@dataclass(frozen=True, slots=True)
class Ahead:
    """What becomes of the layers that predict tokens further ahead: they stay as they are, have their experts
    cut like the trunk's, or go. `keep` holds the experts (ascending) of each that is cut, by its number."""

    wish: Wish = "like_trunk"
    keep: Mapping[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Ahead:
        """What JSON holds of it; raises `ValueError` for anything else."""
        wish, rows = given(body, "wish", str, "like_trunk"), given(body, "keep", dict[str, Any], {})
        if wish not in get_args(Wish):
            raise ValueError(f"mtp: wish {wish!r} is unknown{did_you_mean(wish, get_args(Wish))}")
        keep = {int(layer): _ascending(given(rows, layer, list[Any]), f"mtp: keep {layer}") for layer in rows}
        return cls(wish, keep)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Stage:
    """One step of the recipe as decided: the method with its settings, and the treatments it chose."""

    method: Mapping[str, Any]
    treatments: Mapping[Unit, Treatment]

    @cached_property
    def step(self) -> Step:
        """The step, read once; raises `UserError` where the method is none that is known."""
        return parse_step(self.method)

    @property
    def on_text(self) -> bool:
        """Whether its step treats whole layers on the text that reaches them; raises `UserError` as `step`
        does."""
        return isinstance(self.step, Refits)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a method decides about the model it is shown: treatments, and what a reader wants to know of the
    reasons.

    `scores` per expert (higher is more needed), `protected` units that were kept whatever their score;
    `settled` are settings that its step left open, as they were used.
    """

    treatments: dict[Unit, Treatment]
    notes: tuple[str, ...] = ()
    scores: dict[Unit, float] = field(default_factory=dict[Unit, float])
    protected: frozenset[Unit] = frozenset()
    settled: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Plan:
    """Enough to build from, with nothing hidden."""

    blueprint: str
    stages: tuple[Stage, ...] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])
    made_by: str = ""
    seed: int = 0
    mtp: Ahead = field(default_factory=Ahead)

    def kept_experts(self, layer: int, experts: int) -> tuple[int, ...]:
        """Source numbers of the experts of `layer` that survive all stages (a layer that goes as a whole
        aside)."""
        kept = set(range(experts))
        for treatment in self._on_experts(layer):
            if treatment.keep is not None:
                kept &= set(treatment.keep)
        return tuple(sorted(kept))

    def routed_scale(self, layer: int) -> float:
        """The product of the scales put on the routed part of `layer`."""
        scale = 1.0
        for treatment in self._on_experts(layer):
            scale *= treatment.scale
        return scale

    def _on_experts(self, layer: int) -> list[Treatment]:
        unit = Unit(layer, "experts")
        return [stage.treatments[unit] for stage in self.stages if unit in stage.treatments]

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def digest_of_stages(self) -> str:
        """SHA-256 of checkpoint and treatments alone: what is done, whoever made the plan and from what."""
        return replace(self, calibration={}, made_by="", seed=0).digest

    def to_json(self) -> str:
        """The plan as stable, readable JSON."""
        stages = [{"method": dict(stage.method),
                   "treatments": {str(unit): stage.treatments[unit].as_dict() for unit in sorted(stage.treatments)}}
                  for stage in self.stages]  # fmt: skip
        body = {"blueprint": self.blueprint, "made_by": self.made_by, "seed": self.seed,
                "calibration": dict(self.calibration), "stages": stages}  # fmt: skip
        if self.mtp != Ahead():
            body["mtp"] = asdict(self.mtp)
        return json.dumps(body, indent=1, default=_plain)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for what holds a plan beside other things."""
        return json.loads(self.to_json())

    @classmethod
    def from_json(cls, text: str, name: str = "this") -> Plan:
        """Read a plan, called `name` in messages; raises `UserError` when the text is not one."""
        try:
            return cls.read(read_object(text))
        except MALFORMED as error:
            raise _no_plan(name, error) from error

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Plan:
        """What `as_dict` gave; raises `ValueError` for anything else."""
        rows = each(given(body, "stages", list[Any]), dict[str, Any], "stages")
        stages = tuple(_read_stage(row, f"stage {number}") for number, row in enumerate(rows))
        calibration = described(given(body, "calibration", dict[str, Any], {}))
        return cls(given(body, "blueprint", str), stages, calibration, given(body, "made_by", str, ""),
                   given(body, "seed", int, 0), Ahead.read(given(body, "mtp", dict[str, Any], {})))  # fmt: skip

    def save(self, path: Path) -> None:
        """Write the plan's JSON."""
        path.write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file."""
        if not path.is_file():
            raise UserError(f"plan {path} does not exist as a file: write one with `moespresso plan`")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise _no_plan(str(path), error) from error
        return cls.from_json(text, str(path))


def _no_plan(name: str, error: Exception) -> UserError:
    return UserError(
        f"{name} is not a moespresso plan ({error}): mend it, or write one with `moespresso plan`"
    )


def _read_stage(row: Mapping[str, Any], place: str) -> Stage:
    """One stage; raises `ValueError` naming stage and unit for what is none."""
    try:
        rows = given(row, "treatments", dict[str, Any])
        units = units_of(rows)
        method = given(row, "method", dict[str, Any])
    except (ValueError, UserError) as error:
        raise ValueError(f"{place}: {error}") from error
    treatments: dict[Unit, Treatment] = {}
    for name, unit in units.items():
        try:
            treatments[unit] = Treatment.from_dict(given(rows, name, dict[str, Any]))
        except MALFORMED as error:
            raise ValueError(f"{place}, {name}: {error}") from error
    return Stage(method, treatments)


def _plain(value: Any) -> Any:
    if isinstance(value, Format):  # without what only sources have
        return {name: getattr(value, name) for name in _FORMAT_KINDS}
    return asdict(value) if hasattr(value, "__dataclass_fields__") else str(value)
