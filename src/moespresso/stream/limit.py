"""What a run may hold, and whether its hidden states must go to disk for that.

A layer in the compute precision, what passes through it, and the hidden states of all batches twice (before
and after a layer) are what measuring holds; `--max-memory` is compared with that before any work.
"""

from __future__ import annotations

import torch

from moespresso.build import View, pick_device, pick_dtype
from moespresso.core.errors import UserError
from moespresso.core.runtime import Runtime
from moespresso.data import Batches
from moespresso.stream.sweep import ANSWER_BYTES

# Memory beside the layer and its hidden states: a few copies of what all selected experts answer to one batch, and more.
_OVERHEAD = 4 * ANSWER_BYTES


def must_spill(view: View, batches: Batches | None, runtime: Runtime) -> bool:
    """Whether hidden states go to disk between layers; raises `UserError` when not even one layer fits the
    limit."""
    if runtime.max_memory is None or batches is None:
        return False
    dtype = pick_dtype(runtime.dtype, view, pick_device(runtime.device))
    needed = layer_bytes(view, dtype)
    if needed > runtime.max_memory:
        raise UserError(
            f"--max-memory {runtime.max_memory >> 20} MiB is too little to measure: one layer takes about "
            f"{needed >> 20} MiB in {dtype}; give that much, try --dtype bfloat16, or steps that see no text (score=aimer, rtn, hqq)"
        )
    return needed + 2 * batches.ids.numel() * view.blueprint.hidden * dtype.itemsize > runtime.max_memory


def layer_bytes(view: View, dtype: torch.dtype) -> int:
    """Bytes of the largest layer and of what passes through it."""
    layers = view.blueprint.by_layer
    largest = max(sum(entry.ref.numel for entry in layers[spec.index]) for spec in view.blueprint.layers)
    return largest * dtype.itemsize + _OVERHEAD
