"""How far the work is: the loop reports, whoever watches draws."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Watches a run; `stage` opens a row of `total` steps (layers, shards), `advance` moves it on."""

    def stage(self, label: str, total: int) -> None: ...

    def advance(self, amount: int = 1) -> None: ...


class Silent:
    """Watches nothing."""

    def stage(self, label: str, total: int) -> None:
        """Ignore."""

    def advance(self, amount: int = 1) -> None:
        """Ignore."""
