"""What all steps that round weights share: how many bits where, and what of a layer they are shown.

Bits are one number, or differ by projection and part (`gate_up:3+down:4+attention:8`) and by layer (`layers=0:8+31:8`).
Routed experts alone are rounded by default; routers, norms and embeddings never are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from typing import Any, ClassVar, Self

from moespresso.core.blueprint import Blueprint, Entry
from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.format import Format
from moespresso.core.plan import Decision, Plan, Stage, Treatment
from moespresso.core.remains import remains
from moespresso.core.slim import SLIM_PARTS, check_storable, is_matrix
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit

# Words for what bits can be said of: projections of experts, and parts.
PLACES = ("gate_up", "down", *(part for part in SLIM_PARTS if part != "experts"))
BITS = (8, 4, 3, 2)
# Tried in this order where no group size is given.
GROUPS = (128, 64, 32)


class _Table(str):
    """A table written as `KEY:VALUE+KEY:VALUE`; text, a number or a mapping makes one, and it is read at once.

    `written` says how, for the manual.
    """

    written: ClassVar[str] = ""

    def __new__(cls, value: object) -> Self:
        """Raise `UserError` for what the kind of table does not know."""
        if isinstance(value, Mapping):
            value = "+".join(f"{key}:{bits}" for key, bits in value.items())
        made = super().__new__(cls, str(value))
        _ = made.table
        return made

    @property
    def table(self) -> Mapping[Any, int]:
        """What it says."""
        raise NotImplementedError


class Bits(_Table):
    """Bits of everything (`4`), or by place (`gate_up:3+down:4`)."""

    written = "BITS or PLACE:BITS+..."

    @property
    def table(self) -> dict[str, int]:
        """Bits by place; of everything under the empty name."""
        found: dict[str, int] = {}
        for word in str(self).split("+"):
            place, _, number = word.rpartition(":")
            place = place.strip()
            if number.strip() not in map(str, BITS):
                raise UserError(
                    f"bits {word!r} are unknown: use 2, 3, 4 or 8, or PLACE:BITS joined by +, such as gate_up:3+down:4"
                )
            if place and place not in PLACES:
                raise UserError(f"bits {word!r}: there is no place {place!r}{did_you_mean(place, PLACES)}")
            found[place] = int(number)
        return found


class LayerBits(_Table):
    """Bits of single layers or runs of them: `0:8+28-31:4`."""

    written = "LAYER:BITS+..."

    @property
    def table(self) -> dict[int, int]:
        """Bits by layer."""
        found: dict[int, int] = {}
        for word in filter(None, str(self).split("+")):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*:\s*(\d+)\s*", word)
            if match is None or int(match[3]) not in BITS:
                raise UserError(f"layers {word!r} are not LAYER:BITS or FIRST-LAST:BITS, such as 0:8+28-31:4")
            found |= dict.fromkeys(range(int(match[1]), int(match[2] or match[1]) + 1), int(match[3]))
        return found


class Words(str):
    """Words joined by `+`; text or a list makes one."""

    written: ClassVar[str] = "WORD+..."

    def __new__(cls, value: object) -> Words:
        """Join a list."""
        return super().__new__(
            cls, "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        )

    def each(self) -> list[str]:
        """The words."""
        return [word.strip() for word in str(self).split("+") if word.strip()]


FOUR, NO_LAYERS, EXPERTS, NOTHING = Bits(4), LayerBits(""), Words("experts"), Words("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slimming:
    """Settings of every step that rounds weights.

    bits: 2, 3, 4 or 8; or by projection and part, such as gate_up:3+down:4.
    group_size: inputs that share a scale; 0 for one scale per output channel (default: 128, or 64 or 32 where that is needed).
    symmetric: a fixed zero in the middle; stock engines load experts in this form only.
    parts: what is rounded, joined by +: experts, shared, attention, dense, head.
    layers: bits of single layers instead, such as 0:8+28-31:4.
    exclude: parts or projections of layers to leave alone, joined by + (patterns on addresses: L0.*, L3.experts.down).
    """

    kind: ClassVar[str] = ""
    on_text: ClassVar[bool] = False
    without_text: ClassVar[str] = "rtn or hqq"
    searches: ClassVar[bool] = False
    uneven: ClassVar[bool] = False
    # What is rounded is always what the steps before leave.
    rescore: ClassVar[bool] = True
    # Parts that the method can treat.
    able: ClassVar[tuple[str, ...]] = SLIM_PARTS

    bits: Bits = FOUR
    group_size: int | None = None
    symmetric: bool = True
    parts: Words = EXPERTS
    layers: LayerBits = NO_LAYERS
    exclude: Words = NOTHING

    def __post_init__(self) -> None:
        """Read what was given in other forms; refuse what cannot be."""
        for name, form in (("bits", Bits), ("layers", LayerBits), ("parts", Words), ("exclude", Words)):
            object.__setattr__(self, name, form(getattr(self, name)))
        if self.group_size is not None and (self.group_size < 0 or self.group_size % 8):
            raise UserError(
                f"{self.kind}: group_size={self.group_size} must be 0 or a multiple of 8, such as 32 or 128"
            )
        for part in self.parts.each():
            if part not in SLIM_PARTS:
                raise UserError(f"{self.kind}: parts={part!r} is unknown{did_you_mean(part, SLIM_PARTS)}")
            if part not in self.able:
                raise UserError(
                    f"{self.kind} rounds {' and '.join(self.able)} only, not {part}: use rtn for it"
                )
        if not self.parts.each():
            raise UserError(f"{self.kind}: parts is empty: say what is to be rounded, such as experts")
        beside = self.bits.table.keys() - {"", "gate_up", "down", *self.parts.each()}
        experts = (
            self.bits.table.keys() & {"gate_up", "down"} if "experts" not in self.parts.each() else set()
        )
        for place in sorted(beside | experts):
            part = "experts" if place in experts else place
            raise UserError(
                f"{self.kind}: bits={self.bits} names {place}, but parts={self.parts} leaves it alone: add {part} to parts"
            )

    def needs(self) -> frozenset[str]:
        """What must be measured for this step: nothing but text to see."""
        return frozenset({"text"} if self.on_text else ())

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        beyond = [layer for layer in self.layers.table if layer >= len(blueprint.layers)]
        if beyond:
            raise UserError(
                f"{self.kind}: layers names L{beyond[0]}, but {blueprint.source} has {len(blueprint.layers)} layers"
            )
        fused = [
            e
            for e in blueprint.entries
            if e.unit.part == "experts" and e.unit.expert is None and len(e.ref.shape) == 3
        ]
        if fused and "experts" in self.parts.each():
            raise UserError(
                f"{self.kind}: {blueprint.source} ({blueprint.family}) stores all experts of a layer in one tensor "
                f"({fused[0].ref.name}), for which no packed form is known to load: use parts=attention, or drop experts"
            )
        self._check_exclude(blueprint)
        chosen = [entry for entry, _ in self._formats(blueprint)]
        for part in self.parts.each():
            if part not in {entry.unit.part for entry in chosen}:
                why = (
                    f"exclude={self.exclude} leaves nothing of"
                    if self.exclude
                    else f"{blueprint.source} has no matrices in"
                )
                raise UserError(f"{self.kind}: {why} its {part} to round: change parts")
        for entry, format in self._formats(blueprint):
            check_storable(entry, format)
        if self.on_text:
            self._check_whole(chosen, blueprint)

    def _check_exclude(self, blueprint: Blueprint) -> None:
        """Every pattern must leave something alone: a misspelt one would otherwise round it without a word."""
        addresses = {
            address
            for entry in blueprint.entries
            if entry.unit.part in self.parts.each()
            for address in _addresses(entry)
        }
        for pattern in self.exclude.each():
            if not any(fnmatch(address, pattern) for address in addresses):
                raise UserError(
                    f"{self.kind}: exclude={pattern!r} matches no part of {blueprint.source} that is rounded: name parts or "
                    "projections of layers, such as L0.* or L3.experts.down (single experts share their layer's format)"
                )

    def _check_whole(self, chosen: Sequence[Entry], blueprint: Blueprint) -> None:
        """On text the projections of an expert are solved one after the other, so all of a layer are rounded or none."""
        there = [entry for entry in blueprint.entries if entry.unit.part == "experts" and is_matrix(entry)]
        rounded = Counter(entry.unit.layer for entry in chosen if entry.unit.part == "experts")
        for layer, count in Counter(entry.unit.layer for entry in there).items():
            if 0 < rounded[layer] < count:
                raise UserError(
                    f"{self.kind} rounds gate, up and down of a layer's experts together, but exclude={self.exclude} leaves some "
                    f"of L{layer} alone: exclude L{layer}.experts, or use rtn"
                )

    def amounts(self, blueprint: Blueprint) -> list[Any]:
        """This step with every number of bits, most first (for a byte budget)."""
        return [replace(self, bits=Bits(bits)) for bits in BITS]

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
        return Stage(
            {"kind": self.kind} | {each.name: getattr(self, each.name) for each in fields(self)}, made
        )

    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Give every part its format."""
        _ = stats
        sizes = sorted({format.group_size for _, format in self._formats(blueprint)})
        note = f"{self.kind}: groups of {' and '.join(map(str, sizes))} inputs share a scale, since larger ones do not divide all widths"
        told = (note,) if self.group_size is None and sizes != [GROUPS[0]] else ()
        return Decision(self._treatments(blueprint), told)

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
        """Every matrix to round with its format; `positions` are the layers' numbers where they differ from the blueprint's."""
        # Other mixers (Mamba, linear attention) read their weights in their own ways.
        others = {layer.index for layer in blueprint.layers if layer.mixer != "attention"}
        chosen = [
            entry for entry in blueprint.entries
            if is_matrix(entry) and self._is_meant(entry)
            and not (entry.unit.part == "attention" and entry.unit.layer in others)
        ]  # fmt: skip
        sizes = {part: self._group(part, chosen) for part in {entry.unit.part for entry in chosen}}
        for entry in chosen:
            layer = entry.unit.layer
            at = layer if positions is None or layer is None else positions.get(layer)
            yield entry, Format("integer", self._bits(entry, at), sizes[entry.unit.part], self.symmetric)

    def _is_meant(self, entry: Entry) -> bool:
        if entry.unit.part not in self.parts.each():
            return False
        return not any(
            fnmatch(address, pattern) for pattern in self.exclude.each() for address in _addresses(entry)
        )

    def _bits(self, entry: Entry, layer: int | None) -> int:
        table = self.bits.table
        if layer in self.layers.table:
            return self.layers.table[layer or 0]
        place = entry.unit.part
        if place == "experts":
            place = "down" if (entry.unit.matrix or "").startswith("down") else "gate_up"
        if place not in table and "" not in table:
            raise UserError(
                f"{self.kind}: bits={self.bits} says nothing of {place}: add {place}:4, or one number for all that is not named"
            )
        return table.get(place, table.get("", 4))

    def _group(self, part: str, chosen: list[Entry]) -> int:
        if self.group_size is not None:
            return self.group_size
        widths = {entry.ref.shape[1] for entry in chosen if entry.unit.part == part}
        return next((size for size in GROUPS if all(width % size == 0 for width in widths)), GROUPS[-1])


def _addresses(entry: Entry) -> set[str]:
    """What an entry can be excluded by: its projection (of all experts), its part, and its layer."""
    unit = replace(entry.unit, expert=None)
    return {str(unit), str(Unit(unit.layer, unit.part)), str(Unit(unit.layer))}
