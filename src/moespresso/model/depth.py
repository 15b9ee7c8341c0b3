"""Depth: what a config.json must say when decoder layers are removed, or when mixtures among them become
dense.

Configs say what each layer is in many ways: a list with one entry a layer, numbers of layers, a dense prefix,
"every second layer". `quirks` names the fields of each kind. Lists are cut, numbers are counted anew, and for
a rule that no longer fits other values are searched (`_RULES`). None of this is trusted: the model of the new
config is built on `meta`, and each of its layers must equal the layer of the source that it stands for, in
submodules, shapes and plain attributes (windows, scales, rope or none). What no config can say is refused
with the nearest thing that one can.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, cast

import torch
from torch import nn

from moespresso.core.errors import UserError
from moespresso.model import quirks
from moespresso.model.meta_model import moe_block, read_config
from moespresso.model.skeleton import skeleton

Config = dict[str, Any]

# The width of the dense MLP that stands for a dropped MoE where nothing else sets the width.
STUB_WIDTH = 8
# How many other choices are looked at to name one that works.
_NEAREST = 12
_PLAIN = (int, float, str, bool, type(None), tuple, list)
_MISSING = "absent"


def with_layers(raw: Mapping[str, Any], kept: Sequence[int], place: str) -> Config:
    """The config.json of the model that has only the layers `kept` (ascending numbers), renumbered.

    Raises `UserError` when no config of the family says that.
    """
    source = _model(raw, place)
    count = len(source.layers)
    if not kept or list(kept) != sorted(set(kept) & set(range(count))):
        raise UserError(
            f"{place}: layers {list(kept)} cannot be kept: name some of 0 to {count - 1} in ascending order"
        )
    if len(kept) == count:
        return copy.deepcopy(dict(raw))
    try:
        return _cut_to(raw, source, kept, place)
    except UserError as error:
        raise UserError(f"{error}: {_other_layers(raw, source, kept, place)}") from error


def with_dense(raw: Mapping[str, Any], dense: Collection[int], place: str) -> tuple[Config, int]:
    """The config.json in which the MoE layers `dense` (numbers of `raw`'s) are dense, and the width of their
    MLP.

    The width is `STUB_WIDTH` unless other layers are dense already: all share one width. Raises `UserError`
    when the family cannot say that.
    """
    assert dense, "no layer to make dense"
    source = _model(raw, place)
    for layer in sorted(set(dense) - source.holds["experts"]):
        raise UserError(f"{place}: L{layer} holds no experts, so it cannot become dense: leave it out")
    edited = _write_dense(raw, source, dense, place)
    if edited is None:
        raise _cannot_say_dense(raw, dense, place, _other_dense(raw, source, dense, place))
    difference = None
    for candidate in (*_narrow(edited, source), edited):
        built = _model(candidate, place)
        difference = _dense_difference(source, built, dense)
        if difference is None:
            return candidate, _dense_width(source, built, dense)
    raise _cannot_say_dense(raw, dense, place, f"drop whole layers instead ({difference})")


# What a config makes


@dataclass(frozen=True)
class _Model:
    """What a config makes: its fields with all defaults, and the parts of each layer and of the rest."""

    fields: Config
    layers: tuple[dict[str, Any], ...]
    blocks: tuple[str | None, ...]  # name of the MoE block in each layer
    outside: dict[str, torch.Size]
    holds: dict[str, frozenset[int]]  # which layers hold experts, and which attention


def _model(raw: Mapping[str, Any], place: str) -> _Model:
    return _built(json.dumps(raw), place)


# Plans are tried out one after the other on the same source.
@lru_cache(maxsize=8)
def _built(text: str, place: str) -> _Model:
    made = skeleton(json.loads(text), place)
    name, layers = made.layers_name, made.layers
    fields = made.config.get_text_config().to_dict()
    by_layer = {int(layer): values for layer, values in fields.get("per_layer_config", {}).items()}
    blocks = [moe_block(layer) for layer in layers]
    return _Model(
        fields,
        tuple(
            _parts(layer) | {"per_layer_config": by_layer.get(index)} for index, layer in enumerate(layers)
        ),
        tuple(block and block[0] for block in blocks),
        {key: tensor.shape for key, tensor in made.names.state.items() if not key.startswith(f"{name}.")},
        {
            "experts": frozenset(index for index, block in enumerate(blocks) if block),
            "attention": frozenset(
                index for index, layer in enumerate(layers) if hasattr(layer, "self_attn")
            ),
        },
    )


def _parts(layer: nn.Module) -> dict[str, Any]:
    """What can be compared of a layer: class of every submodule, shape of every tensor, plain attributes."""
    parts: dict[str, Any] = {}
    for name, module in layer.named_modules():
        parts[name] = type(module).__name__
        dot = f"{name}." if name else "."
        for key, value in vars(module).items():
            if isinstance(value, _PLAIN) and key not in quirks.NUMBERING:
                parts[dot + key] = value
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            parts[dot + key] = tensor if tensor is None else tuple(tensor.shape)
    return parts


def _fields(raw: Mapping[str, Any], place: str) -> Config:
    return read_config(raw, place).get_text_config().to_dict()


# Layers that are removed


def _cut_to(raw: Mapping[str, Any], source: _Model, kept: Sequence[int], place: str) -> Config:
    """`raw` for the layers `kept`; raises `UserError` with the reason (without a cure) where nothing fits."""
    gone, family = _names(set(range(len(source.layers))) - set(kept)), raw["model_type"]
    for key, word in quirks.TAKEN_FROM_EARLIER.items():
        if key in source.fields and source.fields[key][kept[0]] == word:
            raise UserError(
                f"{place}: without {gone} the first layer would be L{kept[0]}, which takes {key} from an earlier one"
            )
    targets = {kind: _renumber(layers, kept) for kind, layers in source.holds.items()}
    reasons: list[str] = []
    for edited in _drafts(raw, source, kept):
        try:
            _, unsettled = _settle(edited, source, targets, place)
        except UserError as error:  # lists that are too short or too long, as the family's own check says
            reasons.append(str(error).removeprefix(f"{place}/").removeprefix(f"{place}: "))
            continue
        for rule in unsettled:
            raise UserError(
                f"{place}: {_enumeration(rule.keys)} of {family} cannot say which layers hold {rule.kind} without {gone}"
            )
        difference = _layers_difference(edited, source, kept, place)
        if difference is None:
            return edited
        reasons.append(difference)
    raise UserError(f"{place}: no config of {family} describes the layers without {gone} ({reasons[-1]})")


def _renumber(layers: Iterable[int], kept: Sequence[int]) -> frozenset[int]:
    return frozenset(kept.index(layer) for layer in layers if layer in kept)


def _drafts(raw: Mapping[str, Any], source: _Model, kept: Sequence[int]) -> Iterator[Config]:
    """`raw` with all its fields cut; then, where that differs, with the lists that it left to its class."""
    count = len(source.layers)
    edited = copy.deepcopy(dict(raw))
    for part in _language_parts(edited):
        for key in part:
            part[key] = _cut(key, part[key], kept, count)
    _home(edited)["num_hidden_layers"] = len(kept)
    yield edited
    unwritten = {
        key: _cut(key, entries, kept, count)
        for key, entries in _layer_lists(source.fields, count).items()
        if key not in _home(raw)
    }
    if unwritten:
        edited = copy.deepcopy(edited)
        _home(edited).update(unwritten)
        yield edited


def _layer_lists(fields: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    lists = {key: fields.get(key) for key in quirks.LAYER_LISTS}
    return {key: value for key, value in lists.items() if isinstance(value, list) and len(value) >= count}


def _home(raw: Mapping[str, Any]) -> Config:
    """Where the language model's fields are: in a composite model one level down."""
    inner = raw.get("text_config")
    return inner if isinstance(inner, dict) else cast("Config", raw)


def _language_parts(raw: Config) -> list[Config]:
    parts = [raw] if _home(raw) is raw else [raw, _home(raw)]
    inside = [part[key] for part in parts for key in quirks.LAYERS_INSIDE if isinstance(part.get(key), dict)]
    return parts + inside


def _cut(key: str, value: Any, kept: Sequence[int], count: int) -> Any:
    """What a field says for the layers `kept` of `count`."""
    if key == "per_layer_config" and value:
        return {str(kept.index(int(layer))): entry for layer, entry in value.items() if int(layer) in kept}
    if key in quirks.LAYER_LISTS and isinstance(value, list | str) and len(value) >= count:
        entries = [*(value[layer] for layer in kept), *value[count:]]
        return "".join(entries) if isinstance(value, str) else entries
    if key in quirks.LAYER_NUMBERS and isinstance(value, list):
        first = quirks.LAYER_NUMBERS[key]
        return [kept.index(number - first) + first for number in value if number - first in kept]
    if key == "num_hidden_layers" and value is not None:
        return len(kept)
    return _cut_border(key, value, kept, count) if type(value) is int and 0 <= value <= count else value


def _cut_border(key: str, value: int, kept: Sequence[int], count: int) -> int:
    if key in quirks.LAYERS_BEFORE:
        return sum(layer < value for layer in kept)
    if key in quirks.LAST_LAYER:
        return sum(layer <= value for layer in kept) - 1
    return sum(layer >= count - value for layer in kept) if key in quirks.LAYERS_BEHIND else value


def _layers_difference(edited: Config, source: _Model, kept: Sequence[int], place: str) -> str | None:
    """How the layers of `edited` differ from the source's layers `kept`, or None."""
    fields, count = _fields(edited, place), len(source.layers)
    for key, entries in _layer_lists(source.fields, count).items():
        wanted = _cut(key, entries, kept, count)
        if fields.get(key) != wanted:
            return f"{key} would be {fields.get(key)} instead of {wanted}"
    built = _model(edited, place)
    if built.outside != source.outside:
        return "tensors outside the layers change their shape"
    if len(built.layers) != len(kept):
        return f"it has {len(built.layers)} layers"
    pairs = zip(kept, built.layers, strict=True)
    return next(filter(None, (_difference(old, source.layers[old], new) for old, new in pairs)), None)


def _difference(number: int, old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    if old == new:
        return None
    key = next(key for key in {**old, **new} if old.get(key, _MISSING) != new.get(key, _MISSING))
    what = f"L{number}" if key in ("", ".") else f"{key.removeprefix('.')} of L{number}"
    return f"{what} would be {new.get(key, _MISSING)} instead of {old.get(key, _MISSING)}"


def _other_layers(raw: Mapping[str, Any], source: _Model, kept: Sequence[int], place: str) -> str:
    """A cure: the nearest layers that can go instead of all but `kept`."""
    everything = range(len(source.layers))
    for gone in islice(_near(sorted(set(everything) - set(kept)), len(everything)), _NEAREST):
        with suppress(UserError):
            _cut_to(raw, source, [layer for layer in everything if layer not in gone], place)
            return f"drop {_names(gone)} instead"
    return "keep them, or drop others"


def _near(gone: list[int], count: int) -> Iterator[set[int]]:
    """Choices of layers near `gone`: with one neighbour, one layer moved by one, as many of the last."""
    moves = [(layer, layer + step) for step in (-1, 1) for layer in gone]
    moves = [(layer, other) for layer, other in moves if 0 <= other < count and other not in gone]
    if len(gone) + 1 < count:
        yield from ({*gone, other} for _, other in moves)
    yield from ({*gone, other} - {layer} for layer, other in moves)
    yield set(range(count - len(gone), count))


def _names(layers: Iterable[int]) -> str:
    return _enumeration([f"L{layer}" for layer in sorted(layers)])


def _enumeration(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


# Rules


@dataclass(frozen=True)
class _Rule:
    """Fields that together say which layers hold experts, or attention.

    `says(layer, *values)` is whether a layer does; `tries(count, target, *values)` are other values worth a
    look when the layers `target` of `count` shall.
    """

    kind: str
    keys: tuple[str, ...]
    says: Callable[..., bool]
    tries: Callable[..., Iterator[tuple[Any, ...]]]

    def values(self, fields: Mapping[str, Any]) -> tuple[Any, ...] | None:
        values = tuple(fields.get(key) for key in self.keys)
        return None if None in values else values

    def governs(self, source: _Model) -> bool:
        """Whether the source follows this rule: fields left over from another family say nothing."""
        values = self.values(source.fields)
        return values is not None and self.fits(values, len(source.layers), source.holds[self.kind])

    def fits(self, values: Sequence[Any], count: int, target: Collection[int]) -> bool:
        return all(self.says(layer, *values) == (layer in target) for layer in range(count))

    def solve(self, values: Sequence[Any], count: int, target: Collection[int]) -> tuple[Any, ...] | None:
        """Values by which just the layers `target` of `count` hold it: `values` themselves if they do."""
        options = (tuple(values), *self.tries(count, target, *values))
        return next((option for option in options if self.fits(option, count, target)), None)


def _prefixes(count: int, target: Collection[int], _: int) -> Iterator[tuple[int]]:
    yield (count - len(target),)


def _steps(count: int, target: Collection[int], step: int, _: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """With a step of one, the list of dense layers alone can say anything."""
    for every in (step, 1):
        yield every, [layer for layer in range(count) if (layer + 1) % every == 0 and layer not in target]


def _windows(
    count: int, target: Collection[int], start: int, end: int, step: int
) -> Iterator[tuple[int, ...]]:
    tight = min(target, default=count), max(target, default=count)
    for every in (step, *range(1, count + 1)):
        yield start, end, every
        yield *tight, every


def _periods(count: int, _: Collection[int], __: int, ___: int) -> Iterator[tuple[int, ...]]:
    # A period longer than the model says "none" by an offset that no layer has.
    yield from ((every, first) for every in range(1, count + 2) for first in range(every))


_RULES = (
    *(
        _Rule("experts", (key,), lambda layer, dense: layer >= dense, _prefixes)
        for key in ("first_k_dense_replace", "num_dense_layers")
    ),
    _Rule(
        "experts",
        ("decoder_sparse_step", "mlp_only_layers"),
        lambda layer, step, dense: (layer + 1) % step == 0 and layer not in dense,
        _steps,
    ),
    _Rule(
        "experts",
        ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        lambda layer, start, end, step: (layer + 1) % step == 0 and start <= layer <= end,
        _windows,
    ),
    *(
        _Rule(kind, keys, lambda layer, period, offset: layer % period == offset, _periods)
        for kind, keys in (
            ("experts", ("expert_layer_period", "expert_layer_offset")),
            ("attention", ("attn_layer_period", "attn_layer_offset")),
        )
    ),
)


def period(fields: Mapping[str, Any], holds: Mapping[str, Collection[int]], count: int) -> int:
    """The number of blocks after which the pattern of `count` layers repeats, where a config with these
    `fields` can say which of them hold experts or attention by a period alone; 1 where any choice of blocks
    can be said."""
    periods = [
        values[0]
        for rule in _RULES
        # A single layer is said by a period longer than the model.
        if rule.tries is _periods and 1 < len(holds[rule.kind]) < count
        and (values := rule.values(fields)) is not None and rule.fits(values, count, holds[rule.kind])
    ]  # fmt: skip
    return math.lcm(*periods)


def _settle(
    edited: Config, source: _Model, targets: Mapping[str, Collection[int]], place: str
) -> tuple[list[_Rule], list[_Rule]]:
    """Set, in `edited`, the fields of the rules that the source goes by: those that now say `targets`, and
    the others."""
    fields, settled, unsettled = _fields(edited, place), [], []
    count = _home(edited).get("num_hidden_layers") or len(source.layers)
    for rule in _RULES:
        now = rule.values(fields)
        if now is None or not rule.governs(source):
            continue
        values = rule.solve(now, count, targets[rule.kind])
        (unsettled if values is None else settled).append(rule)
        changes = zip(rule.keys, values or now, now, strict=True)
        _write(edited, {key: new for key, new, old in changes if new != old})
    return settled, unsettled


def _write(edited: Config, fields: Mapping[str, Any]) -> None:
    """Set fields where the language model's are, and beside them where they stand a second time."""
    _home(edited).update(fields)
    edited.update({key: value for key, value in fields.items() if key in edited})


# Mixtures that become dense


def _write_dense(raw: Mapping[str, Any], source: _Model, dense: Collection[int], place: str) -> Config | None:
    """`raw` with the layers `dense` dense, or None where none of its fields can say that."""
    edited = copy.deepcopy(dict(raw))
    listed = _list_dense(edited, source, dense)
    targets = {**source.holds, "experts": source.holds["experts"] - set(dense)}
    settled, unsettled = _settle(edited, source, targets, place)
    return edited if listed or ("experts" in {rule.kind for rule in settled} and not unsettled) else None


def _list_dense(edited: Config, source: _Model, dense: Collection[int]) -> bool:
    """Write `dense` into every list that tells mixtures from dense layers; whether there is one."""
    written = False
    for key, (moe, plain) in quirks.DENSE_WORDS.items():
        entries = _home(edited).get(key) or source.fields.get(key)
        if not isinstance(entries, list | str):
            continue
        layers = range(len(source.layers))
        if {layer for layer in layers if entries[layer] == moe} == source.holds["experts"]:
            words = [plain if layer in dense else entry for layer, entry in enumerate(entries)]
            _write(edited, {key: "".join(map(str, words)) if isinstance(entries, str) else words})
            written = True
    return written


def _narrow(edited: Config, source: _Model) -> Iterator[Config]:
    """`edited` with dense layers of `STUB_WIDTH`, by each field that may be their width."""
    for key in quirks.DENSE_WIDTHS:
        if key in source.fields:
            narrow = copy.deepcopy(edited)
            _write(narrow, {key: STUB_WIDTH})
            yield narrow


def _dense_difference(source: _Model, built: _Model, dense: Collection[int]) -> str | None:
    """How the layers of `built` differ from the source's beside the MLP of the layers `dense`, or None."""
    for number, (old, new) in enumerate(zip(source.layers, built.layers, strict=True)):
        if number in dense:
            block = cast("str", source.blocks[number])
            old, new = _beside(old, block), _beside(new, block)
        difference = _difference(number, old, new)
        if difference:
            return difference
    left = built.holds["experts"] & set(dense)
    return f"{_names(left)} would still hold experts" if left else None


def _beside(parts: Mapping[str, Any], block: str) -> dict[str, Any]:
    """The parts of a layer beside one block; the layer's own attributes may name its kind, and are left out
    too."""
    return {
        key: value
        for key, value in parts.items()
        if not key.startswith(".") and key != block and not key.startswith(f"{block}.")
    }


def _dense_width(source: _Model, built: _Model, dense: Collection[int]) -> int:
    """Width of the MLP of the layers `dense`: what its last matrix [hidden, width] sums over."""
    number = min(dense)
    hidden, block = built.fields["hidden_size"], f"{source.blocks[number]}."
    shapes = [
        value
        for key, value in built.layers[number].items()
        if key.startswith(block) and key.endswith(".weight") and len(value) == 2
    ]
    # A matrix that joins gate and up may happen to have `hidden` rows as well; it is the wider one.
    return min(shape[1] for shape in shapes if shape[0] == hidden)


def _cannot_say_dense(raw: Mapping[str, Any], dense: Collection[int], place: str, cure: str) -> UserError:
    return UserError(
        f"{place}: the config of {raw['model_type']} cannot say that {_names(dense)} "
        f"{'is' if len(dense) == 1 else 'are'} dense and all else stays what it is: {cure}"
    )


def _other_dense(raw: Mapping[str, Any], source: _Model, dense: Collection[int], place: str) -> str:
    """A cure: as many of the first MoE layers, where the family can say that."""
    first = sorted(source.holds["experts"])[: len(dense)]
    sayable = _write_dense(raw, source, first, place) is not None
    return f"take {_names(first)}, or drop whole layers instead" if sayable else "drop whole layers instead"
