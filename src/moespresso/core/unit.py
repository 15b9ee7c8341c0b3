"""The address of anything that can be dropped, merged, shrunk or rounded.

`L12.E37.down` is the down projection of expert 37 in layer 12; `L12.router`, `L3.attention` and plain `L3`
are addresses too. Every log line, plan row and plot axis prints units this way, and `Unit.parse` reads them
back. Layers and experts are counted as in the source checkpoint, whatever has been dropped since.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from moespresso.core.errors import UserError

Part = Literal["attention", "router", "experts", "shared", "dense", "norm", "embedding", "head", "other"]
PARTS: tuple[str, ...] = get_args(Part)
_ADDRESS = re.compile(r"^L(?P<layer>\d+)(?:\.(?:E(?P<expert>\d+)|(?P<part>[a-z]+)))?(?:\.(?P<matrix>\w+))?$")


@dataclass(frozen=True, slots=True)
class Unit:
    """One address; `layer` is None for what lies outside the decoder layers."""

    layer: int | None
    part: Part = "other"
    expert: int | None = None
    matrix: str | None = None

    def __str__(self) -> str:
        pieces = [] if self.layer is None else [f"L{self.layer}"]
        if self.expert is not None:
            pieces.append(f"E{self.expert}")
        elif self.part != "other" or self.layer is None:
            pieces.append(self.part)
        if self.matrix is not None:
            pieces.append(self.matrix)
        return ".".join(pieces)

    def __lt__(self, other: Unit) -> bool:
        return self._sort_key() < other._sort_key()

    def _sort_key(self) -> tuple[int, int, int, str]:
        layer = -1 if self.layer is None else self.layer
        return layer, PARTS.index(self.part), -1 if self.expert is None else self.expert, self.matrix or ""

    @classmethod
    def parse(cls, text: str) -> Unit:
        """Read an address as `str(unit)` prints it; raises `UserError` naming the text otherwise."""
        if text in PARTS:
            return cls(None, cast("Part", text))
        found = _ADDRESS.match(text)
        if found is None or (found["part"] is not None and found["part"] not in PARTS):
            raise UserError(
                f"{text!r} is not a unit address such as L12.E37.down, L12.router or L3.attention"
            )
        if found["expert"] is not None:
            return cls(int(found["layer"]), "experts", int(found["expert"]), found["matrix"])
        return cls(int(found["layer"]), cast("Part", found["part"] or "other"), None, found["matrix"])
