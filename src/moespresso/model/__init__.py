"""What a checkpoint's names mean: config to blueprint, layers on and off, names both ways, lock-step forward."""

from moespresso.model.blueprint import read_blueprint
from moespresso.model.counts import is_unequal, skipping
from moespresso.model.halves import without
from moespresso.model.loading import load_model
from moespresso.model.lockstep import Waiting, start
from moespresso.model.opening import (
    apart_view,
    config_view,
    make_skeleton,
    open_view,
    pick_device,
    pick_dtype,
    precision,
    rehoused_views,
)
from moespresso.model.reach import num_positions
from moespresso.model.rehouse import adopt, is_apart, is_rehoused, tokenizer_config
from moespresso.model.skeleton import Skeleton, quiet_transformers, read_config
from moespresso.model.view import (
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
    "Skeleton", "View", "Waiting", "adopt", "apart_view", "config_view", "half_packed", "in_order",
    "is_apart", "is_rehoused", "is_unequal", "load_model", "make_skeleton", "num_positions", "one_format",
    "open_view", "other_layout", "own_packing", "pick_device", "pick_dtype", "precision",
    "quiet_transformers", "read_blueprint", "read_config", "rehoused_views", "skipping", "start", "tied_head",
    "tokenizer_config", "without", "zeros_of",
]  # fmt: skip
