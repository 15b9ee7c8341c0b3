"""The number of experts: where a config says it, and which tensors of the model follow it.

Nothing is guessed from shapes, where a hidden size may happen to equal the number of experts: the model is built on
`meta` a second time with twice as many experts, and what has doubled is what counts them. A tensor that grew in any
other way (router rows for shared or skipped experts, say) cannot be cut, and is a reason to refuse the family.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moespresso.core.errors import UserError
from moespresso.model import quirks
from moespresso.model.experts import is_experts
from moespresso.model.skeleton import build_meta, read_config


def with_count(config: Mapping[str, Any], family: str, count: int) -> dict[str, Any]:
    """`config` (a config.json) with `count` experts wherever it says their number."""
    edited = copy.deepcopy(dict(config))
    # A composite model keeps the keys of its language model one level down.
    parts = [part for part in (edited, edited.get("text_config")) if isinstance(part, dict)]
    if not any(_present(part) for part in parts):
        # Left to the default of its config class.
        default = CONFIG_MAPPING[parts[-1].get("model_type", family)]().to_dict()
        parts[-1].update({key: default[key] for key in _present(default)})
    for part in parts:
        _set_count(part, family, count)
    return edited


def _present(config: Mapping[str, Any]) -> set[str]:
    return {key for key in quirks.COUNT_KEYS if config.get(key) is not None}


def _set_count(config: dict[str, Any], family: str, count: int) -> None:
    present = _present(config)
    aliases = quirks.COUNT_ALIASES.get(config.get("model_type", family), ()) if present else ()
    for key in sorted(present | set(aliases)):
        config[key] = [count] * len(config[key]) if isinstance(config.get(key), list) else count


def expert_axes(raw: Mapping[str, Any], model: PreTrainedModel, place: str) -> dict[str, int]:
    """Axis that counts experts of every in-memory tensor that has one; raises `UserError` where it is not that simple."""
    stacks = {name: module for name, module in model.named_modules() if is_experts(module)}
    counts = {int(module.num_experts) for module in stacks.values()}  # pyright: ignore[reportArgumentType]
    if not counts:
        return {}
    family = str(raw["model_type"])
    if len(counts) > 1:
        raise _refused(place, family, "its layers have different numbers of experts")
    count = counts.pop()
    try:
        double = build_meta(
            read_config(with_count(raw, family, 2 * count), place), torch.bfloat16, place
        ).state_dict()
    except UserError as error:
        raise _refused(place, family, f"its number of experts cannot be changed: {error}") from error
    axes: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        changed = _changed_axes(tensor.shape, double[name].shape) if name in double else [-1]
        if changed and (len(changed) > 1 or changed[0] < 0 or tensor.shape[changed[0]] != count
                        or double[name].shape[changed[0]] != 2 * count):  # fmt: skip
            raise _refused(place, family, f"{name} does not follow the number of experts as one entry each")
        if changed:
            axes[name] = changed[0]
    for stack, module in stacks.items():
        for name, _ in module.named_parameters(recurse=False):
            if axes.get(f"{stack}.{name}") != 0:
                raise _refused(place, family, "no known key of its config sets the number of experts")
    return axes


def _changed_axes(before: torch.Size, after: torch.Size) -> list[int]:
    if len(before) != len(after):
        return [-1]
    return [axis for axis, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]


def _refused(place: str, family: str, reason: str) -> UserError:
    return UserError(f"{place}: model_type {family!r} is not supported by this version ({reason})")
