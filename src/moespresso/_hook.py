"""How transformers is taught about layers that differ, and to save what it decoded, without being imported
for it.

`import moespresso` stays light: `watch` puts a finder in front of the import system that waits for the one
module that is changed, lets the real finders find it, and calls `install` right after it has run. Whoever
imported transformers first gets `install` at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

WATCHED = "transformers.modeling_utils"


def watch() -> None:
    """See to it that `install` has been called before anyone can use transformers' models."""
    if WATCHED in sys.modules:
        _install()
    elif not any(isinstance(finder, Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, Watcher())


def _install() -> None:
    from moespresso.runtime import saving, unequal

    unequal.install()
    saving.install()


class Watcher(MetaPathFinder):
    """Finds one module, by asking all other finders, and has `install` called once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the module that is waited for; None, without a look, for every other."""
        if fullname != WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Loader) -> None:
        execute: Callable[[ModuleType], None] = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            # Only now: should the module fail to run, its next import is waited for too.
            sys.meta_path.remove(self)
            _install()

        loader.exec_module = exec_module
