"""The one loop, and the memory it may take. Never sees a method."""

from moespresso.stream.memory import PeakMemory, anonymous_bytes, peak_rss_bytes
from moespresso.stream.sweep import ANSWER_BYTES, Memento, Visitor, sweep

__all__ = ["ANSWER_BYTES", "Memento", "PeakMemory", "Visitor", "anonymous_bytes", "peak_rss_bytes", "sweep"]
