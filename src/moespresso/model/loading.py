"""A checkpoint as a model to use: whole, in memory, decoded, and from then on like any other.

What is stored plainly is left to transformers. Packed matrices, of whatever layout, and families that transformers has under
another name are handed to its own loader as tensors that decode when they are asked for. So what comes out is a plain model of
the family, in the dtype that was asked for: its config has no quantization section and nothing quantizes it, so it can be cast,
moved, trained and saved; what it is saved as is a plain checkpoint.
"""

from __future__ import annotations

from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moespresso.checkpoint import TORCH_DTYPES, Lazy, Reader
from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.piece import Piece
from moespresso.model.opening import pick_device
from moespresso.model.rehouse import is_rehoused
from moespresso.model.skeleton import read_config
from moespresso.model.view import View

# What a model can compute in.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}  # fmt: skip


def load_model(
    view: View, dtype: str | torch.dtype | None, device: str | torch.device | None
) -> PreTrainedModel:
    """The model of a checkpoint with all its weights, in `dtype` (`auto`: its own) on `device` (`auto`: a GPU where there is one).

    Raises `UserError` for a dtype that no model computes in and for a device that is not there.
    """
    chosen, place = _asked_dtype(dtype, view), _asked_device(device)
    if view.formats or is_rehoused(view.checkpoint):
        model: Any = _decoded(view, chosen)
    else:
        model = AutoModelForCausalLM.from_pretrained(view.checkpoint.folder, dtype=chosen)
    return model.to(place)


def _asked_dtype(dtype: str | torch.dtype | None, view: View) -> torch.dtype:
    """`auto` is what stock loaders take: the config's, else that of the first tensor of floats."""
    name = str(dtype or "auto").removeprefix("torch.")
    if name == "auto":
        said = view.config.get("dtype") or view.config.get("torch_dtype")
        name = str(said or next(kind for kind in _stored(view) if kind.is_floating_point)).removeprefix(
            "torch."
        )
    if name not in DTYPES:
        raise UserError(
            f"dtype {name!r} is none that a model computes in{did_you_mean(name, [*DTYPES, 'auto'])}"
        )
    return DTYPES[name]


def _stored(view: View) -> list[torch.dtype]:
    return [TORCH_DTYPES[piece.ref.dtype] for piece in view.pieces if piece.ref.dtype in TORCH_DTYPES]


def _asked_device(device: str | torch.device | None) -> torch.device:
    found = pick_device(str(device or "cpu"))
    if found.type == "meta":
        raise UserError("device 'meta' holds no values: use cpu, cuda or auto")
    return found


def _decoded(view: View, dtype: torch.dtype) -> PreTrainedModel:
    config = read_config(view.config, view.source.source)
    folder, kind = view.checkpoint.folder, cast("Any", MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    with Reader(folder, allow_nonfinite=True) as reader:
        lock = Lock()
        tensors = {piece.name: _Own(reader, piece, lock) for piece in view.pieces}
        # Without a name the loader reads no files: all it loads is here.
        model = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    model.name_or_path = model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


class _Own(Lazy):
    """A tensor that is read when it is asked for, by one thread at a time, and is the model's own: never a view of a mapped
    file, which cannot be written to."""

    def __init__(self, reader: Reader, piece: Piece, lock: Lock) -> None:
        super().__init__(reader, piece)
        self._lock = lock

    def __getitem__(self, index: object) -> Tensor:
        with self._lock:
            values = super().__getitem__(index)
            return values.clone() if self.piece.ref.packed is None else values
