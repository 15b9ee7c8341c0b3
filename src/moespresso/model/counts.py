"""The number of experts: where a config says it, and which tensors of the model follow it.

Nothing is guessed from shapes, where a hidden size may happen to equal the number of experts: the model is
built on `meta` a second time with twice as many experts, and what has doubled is what counts them. A tensor
that grew in any other way (router rows for shared or skipped experts, say) cannot be cut, and is a reason to
refuse the family.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moespresso.core.errors import UserError
from moespresso.model import quirks
from moespresso.model.experts import is_experts
from moespresso.model.skeleton import skeleton
from moespresso.runtime import OWN_WIDTHS, is_own

Config = dict[str, Any]


def with_count(config: Mapping[str, Any], family: str, count: int) -> dict[str, Any]:
    """`config` (a config.json) with `count` experts wherever it says their number for all layers."""
    return _with_counts(config, family, lambda _: count)


def _with_twice(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    """The config with twice as many experts in every layer."""
    edited = _with_counts(config, family, lambda count: 2 * count)
    for part in (edited, edited.get("text_config")):
        for entry in ((part or {}).get("per_layer_config") or {}).values():
            entry |= {key: 2 * entry[key] for key in quirks.COUNT_KEYS if key in entry}
    return edited


def _with_counts(config: Mapping[str, Any], family: str, change: Callable[[int], int]) -> dict[str, Any]:
    edited = copy.deepcopy(dict(config))
    # A composite model keeps the keys of its language model one level down.
    parts = [part for part in (edited, edited.get("text_config")) if isinstance(part, dict)]
    if not any(_present(part) for part in parts):
        # Left to the default of its config class.
        whole = CONFIG_MAPPING[parts[-1].get("model_type", family)]()
        text = whole.get_text_config()
        if text is not whole:
            parts.append(edited.setdefault("text_config", {}))
        default = text.to_dict()
        parts[-1].update({key: default[key] for key in _present(default)})
    for part in parts:
        _set_count(part, family, change)
    return edited


def evened(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in which all experts of a layer are as wide as the widest."""
    edited = copy.deepcopy(dict(config))
    for part in (edited, edited.get("text_config")):
        if isinstance(part, dict) and part.pop(OWN_WIDTHS, None) is not None:
            by_layer: dict[str, dict[str, Any]] = part.pop("per_layer_config", {})
            even = {at: _without_widths(entry) for at, entry in by_layer.items()}
            part |= (
                {"per_layer_config": rest}
                if (rest := {at: entry for at, entry in even.items() if entry})
                else {}
            )
    return edited


def _without_widths(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What else a layer says; a count of zero guards widths or what is skipped, and goes with the last of
    them."""
    guards = OWN_WIDTHS in entry and "skip" not in entry
    return {key: value for key, value in entry.items()
            if key != OWN_WIDTHS and not (guards and key in quirks.COUNT_KEYS and value == 0)}  # fmt: skip


def is_unequal(config: Mapping[str, Any]) -> bool:
    """Whether layers differ in a way that only moespresso's runtime can load; some families have a
    `per_layer_config` of their own."""
    return any(map(is_own, _by_layer(config).values()))


def skipping(config: Mapping[str, Any]) -> list[int]:
    """Numbers of the layers whose parts a config.json skips, which only moespresso's runtime understands."""
    return sorted(int(layer) for layer, entry in _by_layer(config).items() if entry.get("skip"))


def _by_layer(config: Mapping[str, Any]) -> dict[str, Config]:
    """What a config.json says of single layers."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    return {layer: entry for part in parts for layer, entry in (part.get("per_layer_config") or {}).items()}


def _present(config: Mapping[str, Any]) -> set[str]:
    return {key for key in quirks.COUNT_KEYS if config.get(key) is not None}


def _set_count(config: dict[str, Any], family: str, change: Callable[[int], int]) -> None:
    present = _present(config)
    aliases = quirks.COUNT_ALIASES.get(config.get("model_type", family), ()) if present else ()
    before = {key: config.get(key, config[min(present)]) for key in sorted(present | set(aliases))}
    for key, value in before.items():
        config[key] = [change(count) for count in value] if isinstance(value, list) else change(value)


def expert_axes(raw: Mapping[str, Any], model: PreTrainedModel, place: str) -> dict[str, int] | str:
    """Axis that counts experts of every in-memory tensor that has one; where it is not that simple, why."""
    stacks = {name: module for name, module in model.named_modules() if is_experts(module)}
    if not stacks:
        return {}
    # A router that may still select experts that are gone has more rows than there are experts.
    counts = {len(getattr(module, "places", range(int(module.num_experts)))) for module in stacks.values()}  # pyright: ignore[reportArgumentType]
    family = str(raw["model_type"])
    if len(counts) > 1 and not is_unequal(raw):
        return "its layers have different numbers of experts"
    try:
        double = skeleton(_with_twice(evened(raw), family), place).names.state
    except UserError as error:
        return f"its number of experts cannot be changed: {error}"
    axes: dict[str, int] = {}
    for name, tensor in model.state_dict().items():
        changed = _changed_axes(tensor.shape, double[name].shape) if name in double else [-1]
        if changed and not _follows(tensor.shape, double[name].shape, changed, counts):
            return f"{name} does not follow the number of experts as one entry each"
        if changed:
            axes[name] = changed[0]
    for stack, module in stacks.items():
        for name, _ in module.named_parameters(recurse=False):
            if axes.get(f"{stack}.{name}") != 0 and name != "novices":
                return "no known key of its config sets the number of experts"
    return axes


def _follows(before: torch.Size, after: torch.Size, changed: list[int], counts: set[int]) -> bool:
    """Whether a tensor has one entry per expert: twice the experts, that many entries more."""
    if len(changed) > 1 or changed[0] < 0:
        return False
    return after[changed[0]] - before[changed[0]] in counts and before[changed[0]] <= max(counts)


def _changed_axes(before: torch.Size, after: torch.Size) -> list[int]:
    if len(before) != len(after):
        return [-1]
    return [axis for axis, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
