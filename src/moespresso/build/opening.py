"""From a folder to a view, and from a view to a model that can be run: which family, which device, which
precision."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from moespresso.build.tensors import Tensors
from moespresso.build.view import View
from moespresso.checkpoint import SECTION, TORCH_DTYPES, Checkpoint, hoisted, open_checkpoint
from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError, reason
from moespresso.core.plan import Plan
from moespresso.core.runtime import Runtime
from moespresso.model import (
    MetaModel,
    adopt,
    converted,
    equivalents_of,
    is_unequal,
    obstacle,
    read_blueprint,
    read_config,
    skeleton,
    stock_dtype,
    unstacked,
)

# What models are computed in: torch multiplies the matrices of experts together in these only.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_SOME = "bfloat16, float16 or float32"


def open_view(folder: Path) -> View:
    """The checkpoint in `folder`, as it is; a family that transformers has under another name only, under
    that name."""
    return _view(adopt(open_checkpoint(folder)))


def config_view(path: Path) -> View:
    """The model that a config.json alone describes, for pricing: its tensors are named as in memory and
    stored nowhere.

    Raises `UserError` when the file is not a config of a supported family.
    """
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a config.json that can be read ({error})") from error
    if hoisted(raw, str(path)).get(SECTION):
        raise UserError(
            f"{path} is the config of a packed model, whose price stands in its tensors: give the folder"
        )
    bare = adopt(Checkpoint(path, raw, {}))
    made = skeleton(bare.config, str(path))
    stored = made.config.dtype
    dtype = next((name for name, kind in TORCH_DTYPES.items() if kind == stored), "BF16")
    tied = set(made.model.all_tied_weights_keys)
    refs = {name: TensorRef(name, tuple(tensor.shape), dtype, "")
            for name, tensor in made.names.state.items() if name not in tied}  # fmt: skip
    return _view(Checkpoint(path, bare.config, refs))


def equivalent_views(view: View) -> list[View]:
    """The same checkpoint as one of every other family whose code computes the same."""
    config = view.checkpoint.config
    if is_unequal(config):  # a equivalent knows the family's ordinary config only
        return []
    equivalents = [
        equivalent
        for equivalent in equivalents_of(view.source.family)
        if obstacle(equivalent, config) is None
    ]
    return [
        replace(_view(converted(view.checkpoint, equivalent)), origin=view.source)
        for equivalent in equivalents
    ]


def apart_view(view: View) -> View | None:
    """The same checkpoint with experts apart that it has in stacks, as its family's own layout has them; None
    where that has none, or the checkpoint none to take apart."""
    stacks = any(len(entry.ref.shape) == 3 and entry.unit.part == "experts" for entry in view.source.entries)
    checkpoint = unstacked(view.checkpoint) if stacks else None
    return None if checkpoint is None else _view(checkpoint)


def _view(checkpoint: Checkpoint) -> View:
    blueprint = read_blueprint(checkpoint)
    return View(checkpoint, blueprint, Plan(blueprint.digest))


def make_meta_model(view: View, tensors: Tensors, runtime: Runtime) -> MetaModel:
    """The view's model on `meta`, for the runtime's device and precision."""
    device = pick_device(runtime.device)
    return view.meta_model(tensors, pick_dtype(runtime.dtype, view, device), device)


def precision(view: View, runtime: Runtime) -> str:
    """What the model is computed in, for the names of files that keep what was found: what was begun in one
    precision (by `auto`, on a machine with another device) must not be gone on with in another."""
    return str(pick_dtype(runtime.dtype, view, pick_device(runtime.device)))


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tried = torch.ones(1, device=name)
        tried.tolist()  # `meta` takes everything and gives nothing back
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        cause = reason(RuntimeError((str(error).splitlines() or [""])[0]))
        raise UserError(f"device {name!r} is not to be had here ({cause}): use cpu, cuda or auto") from error
    return tried.device


def own_dtype(view: View) -> torch.dtype:
    """The dtype that stock loaders give the checkpoint in its folder; raises `UserError` where no model
    computes in that."""
    checkpoint = view.checkpoint
    files = [str(checkpoint.folder / file) for file in checkpoint.files]
    metadata = checkpoint.metadata if isinstance(checkpoint.metadata, dict) else {}
    config = read_config(checkpoint.config, view.source.place)
    named = config.dtype
    try:
        dtype = stock_dtype(config, files, metadata)
    except AttributeError:  # torch has none of this name
        dtype = metadata.get("dtype", named)
    if dtype in FLOATS:
        return dtype
    name = str(dtype).removeprefix("torch.")
    what = f"names dtype {name!r}" if named else f"names no dtype, and that of its files is {name}"
    raise UserError(
        f"{checkpoint.folder}/config.json {what}, which no model is computed in: write {_SOME} there, or ask for one of these"
    )


def pick_dtype(name: str, view: View, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU (statistics should not carry rounding) and the checkpoint's own
    elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else own_dtype(view)
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"dtype {name!r} is unknown: use float32, bfloat16 or float16")
    return dtype
