"""What the design names and this version does not have yet: refused as such, and not as misspelt.

The one list of it, for the command line's verbs and options, the fields of a recipe and the layouts of
`export`. What gets built is taken out here, and nowhere else.
"""

from __future__ import annotations

from typing import Literal

Kind = Literal["verb", "option", "field", "layout"]

LATER: dict[Kind, tuple[str, ...]] = {
    "verb": ("slice", "heal", "bench", "report", "study"),
    "option": ("--export", "--tasks", "--memory", "--context", "--batch", "--quality"),
    "field": ("heal", "export", "evaluate", "budget.memory", "budget.context", "budget.batch", "budget.quality"),
    "layout": ("gguf",),
}  # fmt: skip


def not_yet(kind: Kind, name: str, said: str = "") -> str:
    """``"heal is not available in this version"`` where it is to come, else nothing; `said` is how it is
    called."""
    return f"{said or name} is not available in this version" if name in LATER[kind] else ""
