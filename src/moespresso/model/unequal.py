"""The config.json of what remains after a plan, layers that differ included.

Where all layers stay alike it is an ordinary config with other numbers. Where they do not, transformers' own
key `per_layer_config` says what each has of its own, in the words that `moespresso.runtime.unequal`
understands: another count of experts, branches and experts to skip. Where nothing else would stop an engine
that does not know moespresso, a zero beside it does, and `architectures` names a class that no engine has
(`moespresso.runtime.guard`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moespresso.core.blueprint import Blueprint, Branch, LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan
from moespresso.effect import Remains, biased_stubs, most_common, pressed_layers
from moespresso.model import quirks
from moespresso.model.ahead import without_ahead
from moespresso.model.classes import class_name
from moespresso.model.counts import evened, with_count
from moespresso.model.depth import with_layers
from moespresso.model.widths import width_key, with_width
from moespresso.runtime import OWN_WIDTHS, guarded, is_own, stock, zero_means_nothing

Config = dict[str, Any]


def pressed_config(
    raw: Mapping[str, Any], source: Blueprint, plan: Plan, left: Remains, *, stock: bool = False
) -> Config:
    """What `raw` (a config.json) becomes; raises `UserError` where no config can say which blocks are left.
    In the `stock` form shared experts may be said to be wider than they are."""
    all_layers = len(left.layers) == len(source.layers)
    raw = evened(raw)  # what `left` knows of widths is said anew
    config = copy.deepcopy(dict(raw)) if all_layers else with_layers(raw, left.layers, source.place)
    config.pop("auto_map", None)  # custom code is not copied; the family is transformers' own
    specs = {layer.index: layer for layer in source.layers}
    if plan.mtp.wish == "drop":
        config = without_ahead(config, CONFIG_MAPPING[source.family]().get_text_config().to_dict())
    layers, biased = pressed_layers(source, left), biased_stubs(source, plan)
    rows = {layer.index: layer.experts + layer.skipped for layer in layers if layer.experts}
    before = [layer.experts + layer.skipped for layer in source.moe_layers]
    config, by_layer = _with_widths(config, source, layers, left, stock)
    common = most_common(rows.values() or before) if before else None
    if common is not None and (set(before) != {common} or len(set(rows.values())) > 1):
        config = with_count(config, source.family, common)
    for position, layer in enumerate(left.layers):
        entry = by_layer.setdefault(position, {})
        if position in rows:
            _set(entry, _count_key(raw), rows[position], common)
        skip_before = entry.get("skip", ())
        if (layer, "mlp") in left.cut:  # experts that were gone are removed with the rest
            skip_before = [word for word in skip_before if not word.startswith("expert.")]
        skip = [*skip_before, *_skip_words(specs[layer], left, biased)]
        if skip:
            entry |= {"skip": sorted(set(skip))} | _zeros(specs[layer], left, raw)
    return _with_guard(
        config, {position: entry for position, entry in by_layer.items() if entry}, source.family
    )


def _with_guard(config: Config, by_layer: Mapping[int, Config], family: str) -> Config:
    """The config with the entries of single layers, `by_layer`, and what makes other engines stop at it."""
    text = _text(config)
    if not any(map(is_own, by_layer.values())):
        return _with_class_names(_with_theirs(config, by_layer), stock)
    text.pop("per_layer_config", None)
    for entry in by_layer.values():
        if zero_means_nothing(entry) and not any(
            key != OWN_WIDTHS and _stops(text, key, entry[key]) for key in entry
        ):
            entry[_count_key(config)] = 0
    text["per_layer_config"] = {str(position): entry for position, entry in by_layer.items()}
    return _with_class_names({"architectures": [class_name(family)]} | config, guarded)


def _with_theirs(config: Config, by_layer: Mapping[int, Config]) -> Config:
    """The config with what its family's own code reads of single layers; that this is nothing is kept too,
    since defaults would come back."""
    text = _text(config)
    if any(map(is_own, _per_layer(config).values())) and not by_layer:
        text.pop("per_layer_config")
    elif text.get("per_layer_config") is not None:
        text["per_layer_config"] = {str(position): entry for position, entry in by_layer.items()}
    return config


def _stops(text: Config, key: str, value: Any) -> bool:
    """Whether transformers stops at a key, as it does where one layer says another number than all."""
    return isinstance(value, int) and (value == 0 or text.get(key, value) != value)


def _with_class_names(config: Config, names: Callable[[list[str]], list[str]]) -> Config:
    """The config with other `names` of classes, wherever it has any."""
    for part in (config, _text(config)):
        if part.get("architectures"):
            part["architectures"] = names(part["architectures"])
    return config


def _with_widths(
    config: Config, source: Blueprint, layers: Sequence[LayerSpec], left: Remains, stock: bool
) -> tuple[Config, dict[int, Config]]:
    """The config with the widths of experts that are left, and what single layers have of their own."""
    by_layer = _per_layer(config)
    positions = [left.position(layer) for layer in left.widths]
    widths = {at: layers[at].width for at in positions}
    if any(width != source.layers[left.layers[at]].width for at, width in widths.items()):
        same = len(widths) == len(left.experts) and len(set(widths.values())) == 1
        same = same and not any(map(is_own, by_layer.values()))
        edited = with_width(config, widths[positions[0]], source.place, grow=stock) if same else None
        key = width_key(config)
        if edited is None and key is None:
            raise UserError(
                f"{source.place} ({source.family}): no known key of its config sets the width of its experts"
            )
        if edited is None:
            for at, width in widths.items():
                by_layer.setdefault(at, {})[key or ""] = width
        config = edited or config
    for at in positions:
        if layers[at].widths:
            by_layer.setdefault(at, {})[OWN_WIDTHS] = list(layers[at].widths)
            _text(config)[OWN_WIDTHS] = []  # what single layers say must have a value for all
    return config, by_layer


def _text(config: Mapping[str, Any]) -> Any:
    """The language model's part of a config."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def _per_layer(config: Mapping[str, Any]) -> dict[int, Config]:
    entries: Mapping[str, Config] = _text(config).get("per_layer_config") or {}
    return {int(layer): copy.deepcopy(values) for layer, values in entries.items()}


def _count_key(raw: Mapping[str, Any]) -> str:
    """What the config class of the language model itself calls the number of experts."""
    inner = _text(raw).get("model_type")
    known = (
        CONFIG_MAPPING[inner if inner in CONFIG_MAPPING else raw["model_type"]]().get_text_config().to_dict()
    )
    return next(key for key in quirks.COUNT_KEYS if key in known)


def _set(entry: Config, key: str, value: int, common: int | None) -> None:
    entry.pop(key, None)
    if value != common:
        entry[key] = value


def _skip_words(layer: LayerSpec, left: Remains, biased: Collection[tuple[int, Branch]]) -> list[str]:
    """The words for what the plan takes out of a layer while its place stays."""
    cut = [(layer.index, branch) for branch in layer.bodies if (layer.index, branch) in left.cut]
    words = [f"{at[1]}+bias" if at in biased else at[1] for at in cut]
    gone = left.gone.get(layer.index, ())
    rows = left.rows(layer.index) if gone else ()
    end = "+novice" if layer.index in left.novices else ""
    return [*words, *(f"expert.{rows.index(expert)}{end}" for expert in gone)]


def _zeros(layer: LayerSpec, left: Remains, raw: Mapping[str, Any]) -> Config:
    """Numbers that transformers on its own cannot build a model with."""
    zeros: Config = {}
    if (layer.index, "attention") in left.cut:
        zeros["num_key_value_heads"] = 0
    if (layer.index, "mlp") in left.cut:
        zeros[_count_key(raw) if layer.experts else "intermediate_size"] = 0
    return zeros
