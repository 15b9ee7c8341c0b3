"""A checkpoint as a plan leaves it: opened, presented tensor by tensor, and run."""

from moespresso.build.loading import load_model
from moespresso.build.opening import (
    apart_view,
    config_view,
    make_skeleton,
    open_view,
    pick_device,
    pick_dtype,
    precision,
    rehoused_views,
)
from moespresso.build.reach import num_positions
from moespresso.build.view import (
    View,
    half_packed,
    in_order,
    one_format,
    other_layout,
    own_packing,
    tied_head,
    zeros_of,
)

__all__ = [
    "View",
    "apart_view",
    "config_view",
    "half_packed",
    "in_order",
    "load_model",
    "make_skeleton",
    "num_positions",
    "one_format",
    "open_view",
    "other_layout",
    "own_packing",
    "pick_device",
    "pick_dtype",
    "precision",
    "rehoused_views",
    "tied_head",
    "zeros_of",
]
