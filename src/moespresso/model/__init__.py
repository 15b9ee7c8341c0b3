"""What a checkpoint's names mean: config to blueprint, layers on and off, names both ways, lock-step forward."""

from moespresso.model.blueprint import read_blueprint
from moespresso.model.counts import is_unequal, skipping
from moespresso.model.halves import without
from moespresso.model.lockstep import Waiting, start
from moespresso.model.opening import (
    config_view,
    make_skeleton,
    open_view,
    pick_device,
    pick_dtype,
    precision,
    rehoused_views,
)
from moespresso.model.rehouse import adopt, is_rehoused, tokenizer_config
from moespresso.model.skeleton import Skeleton, quiet_transformers, read_config
from moespresso.model.view import View, half_packed, one_format, other_layout, own_packing

__all__ = [
    "Skeleton", "View", "Waiting", "adopt", "config_view", "half_packed", "is_rehoused", "is_unequal", "make_skeleton", "one_format",
    "open_view", "other_layout", "own_packing", "pick_device", "pick_dtype", "precision",
    "quiet_transformers", "read_blueprint", "read_config", "rehoused_views", "skipping", "start", "tokenizer_config", "without",
]  # fmt: skip
