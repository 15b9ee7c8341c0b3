"""A checkpoint as a plan leaves it: opened, presented tensor by tensor, and run."""

from moespresso.build.loading import load_model
from moespresso.build.opening import (
    apart_view,
    config_view,
    equivalent_views,
    make_meta_model,
    open_view,
    pick_device,
    pick_dtype,
    precision,
)
from moespresso.build.packing import (
    engine_of,
    half_packed,
    in_order,
    needs_engine,
    one_format,
    other_layout,
    own_packing,
    tied_head,
    zeros_of,
)
from moespresso.build.reach import num_positions
from moespresso.build.tensors import Lazy, Tensors
from moespresso.build.view import View, misfit_ahead
from moespresso.build.write import write_folder

__all__ = [
    "Lazy",
    "Tensors",
    "View",
    "apart_view",
    "config_view",
    "engine_of",
    "equivalent_views",
    "half_packed",
    "in_order",
    "load_model",
    "make_meta_model",
    "misfit_ahead",
    "needs_engine",
    "num_positions",
    "one_format",
    "open_view",
    "other_layout",
    "own_packing",
    "pick_device",
    "pick_dtype",
    "precision",
    "tied_head",
    "write_folder",
    "zeros_of",
]
