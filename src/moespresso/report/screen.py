"""What people see while the work goes on, all of it on standard error: progress and the package's log.

A terminal gets bars with the time left, and log lines above them; a pipe or a log file gets one line when a
stage opens, one every ten seconds and one when it is done.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moespresso.report.words import duration

INTERVAL = 10.0


@contextmanager
def screen() -> Iterator[Bars]:
    """Show progress and the `moespresso` log on standard error for the time of a command."""
    console = Console(file=sys.stderr)
    logger, handler = logging.getLogger("moespresso"), _Words(console)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with Bars(console) as bars:
            yield bars
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class Bars:
    """Watches a run (`core.progress.Progress`); use as a context, so that the terminal is left tidy."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._watcher = _Drawn(console) if console.is_terminal else _Lines(console, clock)

    def stage(self, label: str, total: int) -> None:
        """Open a row of `total` steps."""
        self._watcher.stage(label, total)

    def advance(self, amount: int = 1) -> None:
        """Move the open row on."""
        self._watcher.advance(amount)

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.close()


class _Words(logging.Handler):
    """Prints log lines through the console that draws the bars, so that neither tears the other."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


class _Drawn:
    """Bars on a terminal, drawn from the first stage on: a verb without stages leaves no trace."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True))  # fmt: skip
        self._bars = Progress(*columns, console=console)
        self._row: TaskID | None = None

    def stage(self, label: str, total: int) -> None:
        self._bars.start()
        self._row = self._bars.add_task(label, total=total)

    def advance(self, amount: int) -> None:
        assert self._row is not None, "advance before stage"
        self._bars.advance(self._row, amount)

    def close(self) -> None:
        self._bars.stop()


class _Lines:
    """Plain lines for pipes and log files."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._label, self._total, self._done = "", 0, 0
        self._began = self._spoke = 0.0

    def stage(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._began = self._spoke = self._clock()
        self._say(f"0/{total}")

    def advance(self, amount: int) -> None:
        self._done += amount
        now = self._clock()
        if self._done >= self._total:
            self._say(f"{self._done}/{self._total} in {duration(now - self._began)}")
        elif now - self._spoke >= INTERVAL:
            self._spoke = now
            left = (now - self._began) / max(self._done, 1) * (self._total - self._done)
            self._say(f"{self._done}/{self._total}, {duration(left)} left")

    def close(self) -> None:
        pass

    def _say(self, words: str) -> None:
        self._console.print(f"{self._label}: {words}", markup=False, highlight=False, soft_wrap=True)
