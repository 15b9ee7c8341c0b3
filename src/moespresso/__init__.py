"""Press a Mixture-of-Experts language model into a smaller cup.

`moespresso.press(model, out=..., steps=[...])` takes a Hugging Face checkpoint, trims it one layer at a time and writes
a folder that stock engines load; the other verbs (`inspect`, `measure`, `plan`, `build`, `verify`, `evaluate`,
`methods`, `demo`) are functions of the same names. See docs/architecture.md for the rooms behind this door.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moespresso._versions import VERSION as __version__
from moespresso._versions import check_versions

if TYPE_CHECKING:
    from moespresso.api import build, demo, evaluate, inspect, load, measure, methods, plan, press, verify

__all__ = [
    "__version__",
    "build",
    "demo",
    "evaluate",
    "inspect",
    "load",
    "measure",
    "methods",
    "plan",
    "press",
    "verify",
]

check_versions()


def __getattr__(name: str) -> Any:
    """Open `moespresso.api` (and with it torch) only when a verb is used."""
    if name not in __all__:
        raise AttributeError(f"module 'moespresso' has no attribute {name!r}")
    from moespresso import api

    return getattr(api, name)
