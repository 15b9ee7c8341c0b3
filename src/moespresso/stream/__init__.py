"""The one loop, and the memory it may take. Never sees a method."""

from moespresso.stream.back import stiffness, sweep_back
from moespresso.stream.limit import layer_bytes, must_spill
from moespresso.stream.memory import PeakMemory, peak_rss_bytes
from moespresso.stream.sweep import Memento, sweep
from moespresso.stream.variants import lanes_at_once, state_bytes, sweep_variants

__all__ = [
    "Memento",
    "PeakMemory",
    "lanes_at_once",
    "layer_bytes",
    "must_spill",
    "peak_rss_bytes",
    "state_bytes",
    "stiffness",
    "sweep",
    "sweep_back",
    "sweep_variants",
]
