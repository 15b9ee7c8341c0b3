"""What a run goes by from its first measurement to its last byte: one bundle, handed on as it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from moespresso.build import Tensors, View
from moespresso.core.errors import text_missing
from moespresso.core.runtime import Runtime
from moespresso.data import Batches
from moespresso.stream import Watch, must_spill


@dataclass
class Clock:
    """Seconds spent per phase."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Job:
    """The original as a `view`, the text it is seen on (None: none was given), and the folder that keeps
    what is found, under the conditions of a run."""

    view: View
    work: Path
    batches: Batches | None = None
    runtime: Runtime = field(default_factory=Runtime)
    clock: Clock = field(default_factory=Clock)

    def text(self, what: str = "these steps see", more: str = "") -> Batches:
        """The text; raises `UserError`, saying `what` takes it, where none was given."""
        if self.batches is None:
            raise text_missing(what, more)
        return self.batches

    def tensors(self) -> Tensors:
        """The original's files, as the run reads them."""
        return Tensors(self.view.checkpoint.folder, allow_nonfinite=self.runtime.allow_nonfinite)

    def spill(self, view: View) -> Path | None:
        """Where hidden states wait that would not fit in memory; None where they do."""
        return self.work if must_spill(view, self.batches, self.runtime) else None

    def watch(self, label: str) -> Watch:
        """Who is told how far a sweep is."""
        return Watch(self.runtime.progress, label)

    def at(self, work: Path) -> Job:
        """The same with another folder."""
        return replace(self, work=work)
