"""Layers that predict tokens further ahead (multi-token prediction), which the model's own class passes over.

DeepSeek and GLM number them behind the last decoder layer, others call them `mtp.*`. Each is a decoder layer
of the family with a little around it, so a tensor in one is what the trunk's tensor of the same name is:
names are put in the place of a trunk layer's and looked up there. One config counts experts for both.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from moespresso.core.blueprint import Blueprint, Entry, TensorRef
from moespresso.core.unit import Unit
from moespresso.effect import ExpertsSize
from moespresso.model import quirks
from moespresso.model.axes import axes_of_expert, matrix_of_expert
from moespresso.model.counts import is_unequal
from moespresso.model.meta_model import moe_block
from moespresso.model.skeleton import Skeleton
from moespresso.model.widths import width_key

_EXPERT = re.compile(r"experts\.(\d+)\.")
_ROUTED = re.compile(r"(?<![a-z_])experts(?![a-z])")


class Outside:
    """Says what a tensor is that the model's class does not know."""

    def __init__(self, made: Skeleton, axes: Mapping[str, int]) -> None:
        self._names, self._layers_name, self._axes = made.names, made.layers_name, axes
        self._count = len(made.layers)
        blocks = {number: block for number, layer in enumerate(made.layers) if (block := moe_block(layer))}
        self._like = max(blocks, default=-1)  # the trunk's layer that they are compared with
        self._block: tuple[str, nn.Module] | None = blocks.get(self._like)

    def __call__(self, ref: TensorRef) -> Entry:
        """The entry of `ref`, with its address in the prediction layers where it is in one."""
        layer = self._number(ref.name)
        entry = Entry(ref, Unit(layer), in_graph=False)
        if layer is not None:
            inner = ref.name.partition(f".{layer}.")[2]
            return entry if layer < self._count else self._placed(entry, layer - self._count, inner)
        own = re.search(quirks.AHEAD_NAMES, ref.name)
        return entry if own is None else self._placed(entry, int(own[1] or 0), own[2])

    def _number(self, name: str) -> int | None:
        """The number of a tensor that is called like one of a decoder layer, on disk or in memory."""
        called = (name, self._names.in_memory(name)[0])
        found = (re.match(rf"{re.escape(self._layers_name)}\.(\d+)\.", each) for each in called)
        return next((int(each[1]) for each in found if each), None)

    def _placed(self, entry: Entry, ahead: int, inner: str) -> Entry:
        """The entry with its address in prediction layer `ahead`; `inner` is its name in there."""
        looked_up = f"{self._layers_name}.{self._like}.{inner}"
        name, pattern = self._names.in_memory(looked_up)
        odd = bool(_ROUTED.search(inner))
        if self._block is None or name not in self._names.state:
            return replace(entry, ahead=Unit(ahead, "experts" if odd else "other"))
        inside = name.removeprefix(f"{self._layers_name}.{self._like}.{self._block[0]}.")
        axis = self._axes.get(name)
        if not inside.startswith("experts."):
            return replace(entry, expert_axis=axis, ahead=Unit(ahead, "other" if axis is None else "router"))
        if pattern is not None and not self._names.only_stacks(pattern):
            return replace(entry, ahead=Unit(ahead, "experts"))
        number, matrix = _EXPERT.search(inner), matrix_of_expert(inside, pattern)
        found = axes_of_expert(matrix, self._block[1].get_submodule("experts")) | {"out_axis": None}
        unit = Unit(ahead, "experts", int(number[1]) if number else None, matrix)
        return replace(entry, expert_axis=None if number else axis, ahead=unit, **found)


def without_ahead(config: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """`config` (a config.json) with no prediction layers: every number of them, also one that stands in the
    class's `default` only, becomes 0."""
    edited = copy.deepcopy(dict(config))
    parts = [part for part in (edited, edited.get("text_config")) if isinstance(part, dict)]
    for part in parts:
        part |= {key: 0 for key in quirks.AHEAD_KEYS if isinstance(part.get(key), int)}
    said = any(key in part for part in parts for key in quirks.AHEAD_KEYS)
    if not said and any(default.get(key) for key in quirks.AHEAD_KEYS):
        parts[-1][quirks.AHEAD_KEYS[0]] = 0
    return edited


def size_in_config(config: Mapping[str, Any], blueprint: Blueprint) -> ExpertsSize | None:
    """How many experts, and how wide, the config of a checkpoint says that every layer has which does not
    say otherwise; None where it has no single number."""
    layers = blueprint.moe_layers
    if layers and not is_unequal(config):
        return ExpertsSize(layers[-1].experts + layers[-1].skipped, layers[-1].width)
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    count = next((text[key] for key in quirks.COUNT_KEYS if isinstance(text.get(key), int)), None)  # pyright: ignore[reportOptionalMemberAccess, reportOptionalSubscript]
    width = text.get(width_key(config) or "")  # pyright: ignore[reportOptionalMemberAccess]
    return ExpertsSize(count, width) if isinstance(count, int) and isinstance(width, int) else None
