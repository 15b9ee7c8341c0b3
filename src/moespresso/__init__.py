"""Press a Mixture-of-Experts language model into a smaller cup.

`moespresso.press(model, out=..., steps=[...])` takes a Hugging Face checkpoint, trims it one layer at a time
and writes a folder that stock engines load; the other verbs (`inspect`, `measure`, `plan`, `build`, `verify`,
`evaluate`, `export`, `methods`, `demo`) are functions of the same names. See docs/architecture.md for the
rooms behind this door.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from moespresso._hook import watch
from moespresso._versions import VERSION as __version__
from moespresso._versions import check_versions

if TYPE_CHECKING:
    from moespresso.api import (
        build,
        demo,
        evaluate,
        export,
        inspect,
        load,
        measure,
        methods,
        plan,
        press,
        verify,
    )

__all__ = [
    "__version__",
    "build",
    "demo",
    "evaluate",
    "export",
    "inspect",
    "load",
    "measure",
    "methods",
    "plan",
    "press",
    "verify",
]

check_versions()
watch()


class _Door(ModuleType):
    """Opens `moespresso.api` (and with it torch) only when a verb is used.

    Some verbs share their name with a room (`moespresso.quality`). Importing the room would put the module in
    the verb's place, so verbs are properties of the package's class, which win over whatever the import
    machinery sets.
    """


def _verb(name: str) -> property:
    return property(lambda _: getattr(import_module("moespresso.api"), name), lambda _, __: None)


for _name in __all__:
    if not _name.startswith("_"):
        setattr(_Door, _name, _verb(_name))
sys.modules[__name__].__class__ = _Door
