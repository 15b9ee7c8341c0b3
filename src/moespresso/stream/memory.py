"""How much memory a run takes, as the kernel counts it, and what it may take.

Anonymous resident memory (`RssAnon`) is what a run really holds: read-only maps of shards do not count, the
kernel takes them back at will. It has no high-water mark of its own, so a thread looks every few
milliseconds.
"""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")
_INTERVAL = 0.01


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process now, in bytes (0 where the kernel does not tell)."""
    if not _STATUS.exists():
        return 0
    for line in _STATUS.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def peak_rss_bytes() -> int:
    """Largest resident memory this process ever had, in bytes, file maps included."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """Context manager: `peak` is the largest anonymous memory above what there was on entry, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._base = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self.peak = max(self.peak, anonymous_bytes() - self._base)
