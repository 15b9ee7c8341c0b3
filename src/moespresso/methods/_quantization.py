"""What all steps that round weights share: how many bits where, and what of a layer they are shown.

Bits are one number, or differ by projection and part (`gate_up:3+down:4+attention:8`) and by layer
(`layers=0:8+31:8`). Routed experts alone are rounded by default; routers, norms and embeddings never are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from moespresso.core.blueprint import Blueprint, Entry
from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.format import Format
from moespresso.core.method import MATRIX_PARTS
from moespresso.methods._matrices import OnMatrices

# Words for what bits can be said of: projections of experts, and parts.
PLACES = ("gate_up", "down", *(part for part in MATRIX_PARTS if part != "experts"))
BITS = (8, 4, 3, 2)
# Tried in this order where no group size is given.
GROUPS = (128, 64, 32)


class _Table(str):
    """A table written as `KEY:VALUE+KEY:VALUE`; text, a number or a mapping makes one, and it is read at
    once.

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


FOUR, NO_LAYERS = Bits(4), LayerBits("")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization(OnMatrices):
    """Settings of every step that rounds weights.

    bits: 2, 3, 4 or 8; or by projection and part, such as gate_up:3+down:4.
    group_size: inputs that share a scale; 0 for one scale per output channel (default: 128, or 64 or 32 where
        that is needed).
    symmetric: a fixed zero in the middle; stock engines load experts in this form only.
    layers: bits of single layers instead, such as 0:8+28-31:4.
    """

    bits: Bits = FOUR
    group_size: int | None = None
    symmetric: bool = True
    layers: LayerBits = NO_LAYERS

    def __post_init__(self) -> None:
        """Read what was given in other forms; refuse what cannot be."""
        for name, form in (("bits", Bits), ("layers", LayerBits)):
            object.__setattr__(self, name, form(getattr(self, name)))
        if self.group_size is not None and (self.group_size < 0 or self.group_size % 8):
            raise UserError(
                f"{self.kind}: group_size={self.group_size} must be 0 or a multiple of 8, such as 32 or 128"
            )
        OnMatrices.__post_init__(self)
        beside = self.bits.table.keys() - {"", "gate_up", "down", *self.parts.each()}
        experts = (
            self.bits.table.keys() & {"gate_up", "down"} if "experts" not in self.parts.each() else set()
        )
        for place in sorted(beside | experts):
            part = "experts" if place in experts else place
            raise UserError(
                f"{self.kind}: bits={self.bits} names {place}, but parts={self.parts} leaves it alone: add {part} to parts"
            )

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        beyond = [layer for layer in self.layers.table if layer >= len(blueprint.layers)]
        if beyond:
            raise UserError(
                f"{self.kind}: layers names L{beyond[0]}, but {blueprint.place} has {len(blueprint.layers)} layers"
            )
        OnMatrices.check(self, blueprint)

    def amounts(self, blueprint: Blueprint) -> list[Any]:
        """This step with every number of bits, most first (for a byte budget)."""
        return [replace(self, bits=Bits(bits)) for bits in BITS]

    def _told(self, blueprint: Blueprint) -> tuple[str, ...]:
        sizes = sorted({format.group_size for _, format in self._formats(blueprint)})
        note = f"{self.kind}: groups of {' and '.join(map(str, sizes))} inputs share a scale, since larger ones do not divide all widths"
        return (note,) if self.group_size is None and sizes != [GROUPS[0]] else ()

    def form(self, chosen: list[Entry]) -> Callable[[Entry, int | None], Format]:
        """Integers of the bits and groups asked for."""
        sizes = {part: self._group(part, chosen) for part in {entry.unit.part for entry in chosen}}
        return lambda entry, layer: Format(
            "integer", self._bits(entry, layer), sizes[entry.unit.part], self.symmetric
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
