"""The one loop, and the memory it may take. Never sees a method."""

from moespresso.stream.back import BackVisitor, stiffness, sweep_back
from moespresso.stream.limit import layer_bytes, must_spill
from moespresso.stream.memory import PeakMemory, anonymous_bytes, peak_rss_bytes
from moespresso.stream.sweep import Memento, Visitor, sweep
from moespresso.stream.variants import lanes_at_once, state_bytes, sweep_variants

__all__ = [
    "BackVisitor", "Memento", "PeakMemory", "Visitor", "anonymous_bytes", "lanes_at_once", "layer_bytes", "must_spill", "peak_rss_bytes", "state_bytes", "stiffness", "sweep", "sweep_back", "sweep_variants",
]  # fmt: skip
