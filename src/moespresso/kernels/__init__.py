"""Pure functions on tensors: the mathematics of the methods, batched over experts. Sees no file, no model and no plan."""

from moespresso.kernels.attention_rank import query_key, value_output
from moespresso.kernels.autoround import Learned, Offsets, routed_sum, slopes
from moespresso.kernels.channels import (
    activity,
    ascending,
    energy,
    last,
    peaked,
    refitted,
    removed,
    rows_of,
    size,
)
from moespresso.kernels.gptq import Trouble
from moespresso.kernels.hessians import factored, ridged, shrunk, usable
from moespresso.kernels.hqq import half_quadratic
from moespresso.kernels.joint_refit import TO_ORIGINAL, damped, made_up, refitted_layer, thin, whole
from moespresso.kernels.low_rank import entropy_allocation, leverage, truncated
from moespresso.kernels.masks import kept, kept_by_share
from moespresso.kernels.removal import removal, taken
from moespresso.kernels.routed import RoutedExperts
from moespresso.kernels.shared_bases import shared_bases
from moespresso.kernels.sparsegpt import solve
from moespresso.kernels.widths import Key, Points, allocated

__all__ = [
    "TO_ORIGINAL",
    "Key",
    "Learned",
    "Offsets",
    "Points",
    "RoutedExperts",
    "Trouble",
    "activity",
    "allocated",
    "ascending",
    "damped",
    "energy",
    "entropy_allocation",
    "factored",
    "half_quadratic",
    "kept",
    "kept_by_share",
    "last",
    "leverage",
    "made_up",
    "peaked",
    "query_key",
    "refitted",
    "refitted_layer",
    "removal",
    "removed",
    "ridged",
    "routed_sum",
    "rows_of",
    "shared_bases",
    "shrunk",
    "size",
    "slopes",
    "solve",
    "taken",
    "thin",
    "truncated",
    "usable",
    "value_output",
    "whole",
]
