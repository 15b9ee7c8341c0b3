"""A checkpoint as a model to use: whole, in memory, decoded, and from then on like any other.

What is stored plainly is left to transformers. Packed matrices, of whatever layout, families that
transformers has under another name, and folders with an index or a config whose gaps it stumbles over are
handed to its own loader as tensors that are read, and decoded, when they are asked for. So what comes out is
a plain model of the family, in the dtype that was asked for: its config has no quantization section and
nothing quantizes it, so it can be cast, moved, trained and saved; what it is saved as is a plain checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from moespresso.build.opening import FLOATS, own_dtype, pick_device
from moespresso.build.tensors import Lazy, Tensors
from moespresso.build.view import View
from moespresso.checkpoint import SECTION
from moespresso.core.errors import UserError, did_you_mean, reason
from moespresso.effect import Piece
from moespresso.model import is_converted, own_class, read_config


def load_model(
    view: View, dtype: str | torch.dtype | None, device: str | torch.device | None
) -> PreTrainedModel:
    """The model of a checkpoint with all its weights, in `dtype` (`auto`: its own) on `device` (`auto`: a GPU
    where there is one).

    Raises `UserError` for a dtype that no model computes in, for a device that is not there, and for what
    transformers does not load.
    """
    chosen, place = _asked_dtype(dtype, view), pick_device(str(device or "cpu"))
    try:
        model: Any = _as_it_is(view, chosen) if _plain_to_transformers(view) else _decode_all(view, chosen)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever a family or a file makes it raise
        raise UserError(
            f"{view.checkpoint.folder} cannot be loaded by transformers ({_first_line(error)}): mend what that names, or "
            "download the checkpoint again"
        ) from error
    return model.to(place)


def _asked_dtype(dtype: str | torch.dtype | None, view: View) -> torch.dtype:
    """Names are torch's, short ones (`half`) too."""
    name = str(dtype or "auto").removeprefix("torch.")
    if name == "auto":
        return own_dtype(view)
    asked = getattr(torch, name, None)
    if asked not in FLOATS:
        known = [str(known_dtype).removeprefix("torch.") for known_dtype in FLOATS]
        raise UserError(
            f"dtype {name!r} is none that a model computes in{did_you_mean(name, [*known, 'auto'])}"
        )
    return asked


def _plain_to_transformers(view: View) -> bool:
    """Whether transformers reads the folder on its own. It does not where an index says nothing of the shards
    as a whole, and where the section of packed matrices is there and empty."""
    checkpoint = view.checkpoint
    if view.formats or is_converted(checkpoint) or checkpoint.config.get(SECTION) is not None:
        return False
    return isinstance(checkpoint.metadata, dict)


def _as_it_is(view: View, dtype: torch.dtype) -> PreTrainedModel:
    return own_class(view.checkpoint.config).from_pretrained(view.checkpoint.folder, dtype=dtype)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return reason(Exception(lines[0]))


def _decode_all(view: View, dtype: torch.dtype) -> PreTrainedModel:
    config = read_config(view.config, view.source.place)
    folder, kind = view.checkpoint.folder, own_class(view.config)
    if kind.config_class is not type(config):  # the language model of a wrapper
        config = config.get_text_config()
    with Tensors(folder, allow_nonfinite=True) as tensors:
        lock = Lock()
        values = {piece.name: _Own(tensors, piece, lock) for piece in view.pieces}
        # Without a name the loader reads no files: all it loads is here.
        model = kind.from_pretrained(None, config=config, state_dict=values, dtype=dtype)
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate():
        model.generation_config = _generation(folder)
    return model


def _generation(folder: Path) -> GenerationConfig:
    """As the loader does it: what is not there, or cannot be read, is made of the config."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_pretrained(folder, "config.json", _from_model_config=True)


class _Own(Lazy):
    """A tensor that is read when it is asked for, by one thread at a time, and is the model's own: never a
    view of a mapped file, which cannot be written to."""

    def __init__(self, tensors: Tensors, piece: Piece, lock: Lock) -> None:
        super().__init__(tensors, piece)
        self._lock = lock

    def __getitem__(self, index: object) -> Tensor:
        with self._lock:
            values = super().__getitem__(index)
            return values.clone() if self.piece.ref.packed is None else values
