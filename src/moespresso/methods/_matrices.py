"""What all steps share that treat single matrices: which parts of a model they take, and which they leave
alone.

Routed experts are taken by default; routers, norms and embeddings never are. A step says with which format
each matrix is left; on text, it also answers for the layers it is shown (`_on_text.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from typing import ClassVar

from moespresso.core.blueprint import Blueprint, Entry
from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.format import Format
from moespresso.core.method import MATRIX_PARTS, Refits, Treats
from moespresso.core.plan import Decision, Plan, Stage, Treatment
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.effect import check_all_storable, is_matrix, is_stack, remains
from moespresso.formats import codec_of


class Words(str):
    """Words joined by `+`; text or a list makes one."""

    written: ClassVar[str] = "WORD+..."

    def __new__(cls, value: object) -> Words:
        """Join a list."""
        return super().__new__(
            cls, "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        )

    def each(self) -> list[str]:
        """The words, each once."""
        return list(dict.fromkeys(word.strip() for word in str(self).split("+") if word.strip()))


# What else can be done where a layer has one tensor of all experts.
_OTHERWISE = "drop experts"
# Sizes of groups that are tried there for attention.
_GROUPS = (128, 64, 32, 16, 8, 0)
EXPERTS, NOTHING = Words("experts"), Words("")


@dataclass(frozen=True, slots=True, kw_only=True)
class OnMatrices(Treats):
    """Settings of every step that treats single matrices.

    parts: what is treated, joined by +: experts, shared, attention, dense, head.
    exclude: parts or projections of layers to leave alone, joined by + (patterns on addresses: L0.*,
        L3.experts.down).
    """

    kind: ClassVar[str] = ""
    # What the step does to a matrix, and what that then is.
    verb: ClassVar[tuple[str, str]] = ("round", "rounded")
    # Parts that the method can treat.
    able: ClassVar[tuple[str, ...]] = MATRIX_PARTS

    parts: Words = EXPERTS
    exclude: Words = NOTHING

    def __post_init__(self) -> None:
        """Read what was given in other forms; refuse parts that cannot be."""
        for name in ("parts", "exclude"):
            object.__setattr__(self, name, Words(getattr(self, name)))
        for part in self.parts.each():
            if part not in MATRIX_PARTS:
                raise UserError(f"{self.kind}: parts={part!r} is unknown{did_you_mean(part, MATRIX_PARTS)}")
            if part not in self.able:
                raise UserError(
                    f"{self.kind} {self.verb[0]}s {' and '.join(self.able)} only, not {part}: use {self.without_text} for it"
                )
        if not self.parts.each():
            raise UserError(f"{self.kind}: parts is empty: say what is to be {self.verb[1]}, such as experts")

    @property
    def without_text(self) -> str:
        """Steps that see weights alone."""
        return "rtn or hqq"

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of formats that it makes."""
        return frozenset({"integer"})

    @property
    def instead_of_stacks(self) -> str:
        """What to do where a layer has one tensor of all experts; nothing where that can be treated, since
        it stays plain."""
        return _OTHERWISE

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        fused = [
            e
            for e in blueprint.entries
            if e.unit.part == "experts"
            and e.unit.expert is None
            and len(e.ref.shape) == 3
            and not self._is_able(e)
        ]
        if fused and "experts" in self.parts.each():
            raise UserError(
                f"{self.kind}: {blueprint.place} ({blueprint.family}) stores all experts of a layer in one tensor "
                f"({fused[0].ref.name}), which this version cannot {self.verb[0]}: {self._instead(fused[0], blueprint)}"
            )
        if blueprint.opaque and "experts" in self.parts.each():
            raise UserError(f"{self.kind}: {blueprint.place} ({blueprint.family}) {blueprint.no_experts}")
        self._check_exclude(blueprint)
        chosen = [entry for entry, _ in self._formats(blueprint)]
        for part in self.parts.each():
            if part not in {entry.unit.part for entry in chosen}:
                why = (
                    f"exclude={self.exclude} leaves nothing of"
                    if self.exclude
                    else f"{blueprint.place} has no matrices in"
                )
                raise UserError(f"{self.kind}: {why} its {part} to {self.verb[0]}: change parts")
        check_all_storable([(entry, format, entry.ref.shape) for entry, format in self._formats(blueprint)])
        if isinstance(self, Refits):
            self._check_whole(chosen, blueprint)

    def _instead(self, fused: Entry, blueprint: Blueprint) -> str:
        """What this step can do on a model that has its experts of a layer in one tensor: as another of
        its forms, or to attention where it takes that, with settings that hold there."""
        if is_stack(fused) and self.instead_of_stacks != _OTHERWISE:
            return self.instead_of_stacks
        grouped = "group_size" in {each.name for each in fields(self)}
        for settings in ({}, *({"group_size": size} for size in _GROUPS if grouped)):
            with suppress(UserError):
                other = replace(self, parts=Words("attention"), **settings)
                other.check(blueprint)
                own = any(codec_of(format).own for _, format in other._formats(blueprint))
                words = ",".join(
                    f"{name}={value}" for name, value in ({"parts": "attention"} | settings).items()
                )
                return f"use {words}{' with --target plugin' if own else ''}, or {_OTHERWISE}"
        return _OTHERWISE

    def _check_exclude(self, blueprint: Blueprint) -> None:
        """Every pattern must leave something alone: a misspelt one would otherwise round it without a
        word."""
        addresses = {
            address
            for entry in blueprint.entries
            if entry.unit.part in self.parts.each()
            for address in _addresses(entry)
        }
        for pattern in self.exclude.each():
            if not any(fnmatch(address, pattern) for address in addresses):
                raise UserError(
                    f"{self.kind}: exclude={pattern!r} matches no part of {blueprint.place} that is {self.verb[1]}: name parts or "
                    "projections of layers, such as L0.* or L3.experts.down (single experts share their layer's format)"
                )

    def _check_whole(self, chosen: Sequence[Entry], blueprint: Blueprint) -> None:
        """On text the projections of an expert are solved one after the other, so all of a layer are
        rounded or none."""
        there = [
            entry for entry in blueprint.entries if entry.unit.part == "experts" and self._is_able(entry)
        ]
        rounded = Counter(entry.unit.layer for entry in chosen if entry.unit.part == "experts")
        for layer, count in Counter(entry.unit.layer for entry in there).items():
            if 0 < rounded[layer] < count:
                raise UserError(
                    f"{self.kind} treats gate, up and down of a layer's experts together, but exclude={self.exclude} leaves some "
                    f"of L{layer} alone: exclude L{layer}.experts, or use {self.without_text}"
                )

    def outline(self, source: Blueprint, before: Plan) -> Stage:
        """A stage of the right size, before anything is measured."""
        left = remains(before, source)
        stays = [layer for layer in source.layers if layer.index in left.layers]
        gone = {
            layer.unit(branch)
            for layer in stays
            for branch in layer.bodies
            if (layer.index, branch) in left.cut
        }
        made = {
            unit: treatment
            for unit, treatment in self._treatments(
                source, {layer: at for at, layer in enumerate(left.layers)}
            ).items()
            if (unit.layer is None or unit.layer in left.layers) and replace(unit, matrix=None) not in gone
        }
        return Stage(self.describe(), made)

    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Give every part its format."""
        _ = stats
        return Decision(self._treatments(blueprint), self._told(blueprint))

    def _told(self, blueprint: Blueprint) -> tuple[str, ...]:
        """What a reader wants to know of the formats."""
        _ = blueprint
        return ()

    def _treatments(
        self, blueprint: Blueprint, positions: Mapping[int, int] | None = None
    ) -> dict[Unit, Treatment]:
        """One treatment a part where its matrices agree, else one a projection."""
        wanted: dict[Unit, dict[Unit, Format]] = {}
        for entry, format in self._formats(blueprint, positions):
            unit = Unit(entry.unit.layer, entry.unit.part)
            wanted.setdefault(unit, {})[replace(unit, matrix=entry.unit.matrix)] = format
        made: dict[Unit, Treatment] = {}
        for unit, single in wanted.items():
            same = len(set(single.values())) == 1
            made |= {unit: Treatment(format=next(iter(single.values())))} if same else {
                each: Treatment(format=format) for each, format in single.items()
            }  # fmt: skip
        return made

    def _formats(
        self, blueprint: Blueprint, positions: Mapping[int, int] | None = None
    ) -> Iterator[tuple[Entry, Format]]:
        """Every matrix to treat with its format; `positions` are the layers' numbers where they differ
        from the blueprint's."""
        # Other mixers (Mamba, linear attention) read their weights in their own ways.
        others = {layer.index for layer in blueprint.layers if layer.mixer != "attention"}
        chosen = [
            entry for entry in blueprint.entries
            if self._is_able(entry) and self._is_meant(entry)
            and not (entry.unit.part == "attention" and entry.unit.layer in others)
        ]  # fmt: skip
        form = self.form(chosen)
        for entry in chosen:
            layer = entry.unit.layer
            yield entry, form(entry, layer if positions is None or layer is None else positions.get(layer))

    def form(self, chosen: list[Entry]) -> Callable[[Entry, int | None], Format]:
        """What says the format of each of the `chosen` matrices, in a layer of some number."""
        raise NotImplementedError

    def _is_able(self, entry: Entry) -> bool:
        """Whether an entry is a matrix, or so many as this step can treat as one tensor."""
        return is_matrix(entry) or (is_stack(entry) and not self.instead_of_stacks)

    def _is_meant(self, entry: Entry) -> bool:
        if entry.unit.part not in self.parts.each():
            return False
        return not any(
            fnmatch(address, pattern) for pattern in self.exclude.each() for address in _addresses(entry)
        )


def _addresses(entry: Entry) -> set[str]:
    """What an entry can be excluded by: its projection (of all experts), its part, and its layer."""
    unit = replace(entry.unit, expert=None)
    return {str(unit), str(Unit(unit.layer, unit.part)), str(Unit(unit.layer))}
