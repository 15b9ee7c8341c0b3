"""The one loop, and the memory it may take. Never sees a method."""

from moespresso.stream.back import gradient_moments, sweep_back
from moespresso.stream.limit import layer_bytes, must_spill
from moespresso.stream.memory import PeakMemory, peak_rss_bytes
from moespresso.stream.sweep import SweepOptions, SweepState, Watch, sweep
from moespresso.stream.variants import Load, Variant, lanes_at_once, state_bytes, sweep_variants

__all__ = [
    "Load",
    "PeakMemory",
    "SweepOptions",
    "SweepState",
    "Variant",
    "Watch",
    "gradient_moments",
    "lanes_at_once",
    "layer_bytes",
    "must_spill",
    "peak_rss_bytes",
    "state_bytes",
    "sweep",
    "sweep_back",
    "sweep_variants",
]
