"""What a checkpoint's names mean: config to blueprint, layers on and off, names both ways, lock-step
forward."""

from moespresso.model.ahead import size_in_config
from moespresso.model.blueprint import check_tensors, read_blueprint
from moespresso.model.classes import auto_class, own_class
from moespresso.model.counts import is_unequal, skipping
from moespresso.model.depth import with_dense
from moespresso.model.equivalent import (
    adopt,
    converted,
    equivalents_of,
    is_apart,
    is_converted,
    obstacle,
    tokenizer_config,
)
from moespresso.model.experts import expert_forward, observing
from moespresso.model.halves import without
from moespresso.model.joined import joined, packed_alone, unreadable
from moespresso.model.lockstep import PausedBatch, start
from moespresso.model.meta_model import MetaModel, quiet_transformers, read_config
from moespresso.model.names import Names, stock_dtype
from moespresso.model.skeleton import skeleton
from moespresso.model.unequal import pressed_config
from moespresso.model.unstack import unstacked

__all__ = [
    "MetaModel",
    "Names",
    "PausedBatch",
    "adopt",
    "auto_class",
    "check_tensors",
    "converted",
    "equivalents_of",
    "expert_forward",
    "is_apart",
    "is_converted",
    "is_unequal",
    "joined",
    "observing",
    "obstacle",
    "own_class",
    "packed_alone",
    "pressed_config",
    "quiet_transformers",
    "read_blueprint",
    "read_config",
    "size_in_config",
    "skeleton",
    "skipping",
    "start",
    "stock_dtype",
    "tokenizer_config",
    "unreadable",
    "unstacked",
    "with_dense",
    "without",
]
