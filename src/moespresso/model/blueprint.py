"""Config and headers to a `Blueprint`: what every tensor is, found by asking the model itself.

The family's model is built on `meta`; each on-disk key is renamed into it; the module it lands in says what
it is: inside the experts module an expert, elsewhere in the MoE block the router or a shared expert, and so
on. Whatever the model wants and the files lack, or have in another shape, is said here, before any work.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from moespresso.checkpoint import Checkpoint
from moespresso.core.blueprint import Blueprint, Branch, Entry, Heads, LayerSpec, TensorRef
from moespresso.core.errors import UserError
from moespresso.core.unit import Part, Unit
from moespresso.effect import SILENT_KV
from moespresso.model import quirks
from moespresso.model.ahead import Outside
from moespresso.model.axes import axes_of_expert, matrix_of_expert
from moespresso.model.depth import period
from moespresso.model.heads import find_heads
from moespresso.model.lacking import not_whole
from moespresso.model.meta_model import (
    find_router,
    layer_config,
    layer_number,
    moe_block,
    scores_groups_by_two,
)
from moespresso.model.opaque import expert_axes_or_why
from moespresso.model.skeleton import Skeleton, skeleton
from moespresso.runtime import MIXERS, Anatomy, BranchParts, Silent, SilentMixer

_EXPERT = re.compile(r"experts\.(\d+)\.")


def read_blueprint(checkpoint: Checkpoint) -> Blueprint:
    """Describe a checkpoint; raises `UserError` when it is not supported or not complete."""
    place = str(checkpoint.folder)
    made = skeleton(checkpoint.config, place)
    config, model, layers = made.config, made.model, made.layers
    axes, opaque = expert_axes_or_why(made, checkpoint.config, place)
    try:
        specs = tuple(
            _layer_spec(index, layer, config, model, opaque=bool(opaque))
            for index, layer in enumerate(layers)
        )
    except AttributeError as error:  # a config or a router without what every family so far has
        raise UserError(f"{place}: model_type {config.model_type!r} is not supported ({error})") from error
    classify = _Classifier(made, axes, opaque=bool(opaque))
    indivisible = next((anatomy for anatomy in made.anatomies if isinstance(anatomy, str)), "")
    entries = tuple(classify(ref) for ref in checkpoint.tensors.values())
    classify.check_complete(place)
    tables = {entry.unit.part for entry in entries if _is_table(entry)}
    text = config.get_text_config()
    return Blueprint(
        family=config.model_type,
        place=place,
        digest=checkpoint.digest,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        tied=len(tables) < 2,
        layers=specs if indivisible else tuple(map(_with_bodies, specs, made.anatomies, layers)),
        entries=entries,
        layers_name=made.layers_name,
        indivisible=indivisible,
        opaque=opaque,
        period=_period(text, specs),
        both_stored=len(tables) == 2 and bool(model.all_tied_weights_keys),
    )


def _is_table(entry: Entry) -> bool:
    """Whether an entry holds the embedding's rows or the head's, of which tied models store one."""
    return entry.unit.part in ("embedding", "head") and entry.ref.name.endswith("weight")


def _period(text: PreTrainedConfig, specs: Sequence[LayerSpec]) -> int:
    holds = {
        "experts": [spec.index for spec in specs if spec.experts],
        "attention": [spec.index for spec in specs if spec.mixer == "attention"],
    }
    return period(text.to_dict(), holds, len(specs))


def _with_bodies(spec: LayerSpec, anatomy: Anatomy | str, layer: nn.Module) -> LayerSpec:
    """The spec with the names of the bodies of its branches; what only stands where one was is none."""
    silent = {name for name, child in layer.named_children() if isinstance(child, Silent)}
    assert not isinstance(anatomy, str)
    bodies: dict[Branch, str] = {}
    if anatomy.attention is not None:
        bodies["attention"] = anatomy.attention.body
    if anatomy.mlp is not None:
        bodies["mlp"] = anatomy.mlp.body
    return replace(spec, bodies={name: body for name, body in bodies.items() if body not in silent})


def check_tensors(raw: Mapping[str, Any], refs: Iterable[TensorRef], place: str) -> None:
    """Raise `UserError` when `refs` are not what the model of the config `raw` asks for."""
    made = skeleton(raw, place)
    axes, opaque = expert_axes_or_why(made, raw, place)
    classify = _Classifier(made, axes, opaque=bool(opaque))
    for ref in refs:
        classify(ref)
    classify.check_complete(place)


def _layer_spec(
    index: int, layer: nn.Module, config: PreTrainedConfig, model: PreTrainedModel, *, opaque: bool
) -> LayerSpec:
    mixer = _mixer(index, layer, config)
    widths = _attention_widths(layer_config(config, index)) if mixer == "attention" else (0, 0, 0)
    if any(isinstance(child, SilentMixer) for child in layer.children()):
        mixer, widths = "none", (0, 0, SILENT_KV)
    heads = _heads(layer, layer_config(config, index), model) if mixer == "attention" else None
    block_of_layer = None if opaque else moe_block(layer)
    if block_of_layer is None:
        return LayerSpec(
            index, mixer, width=_dense_width(layer), qk_width=widths[0], v_width=widths[1], kv_width=widths[2],
            heads=heads,
        )  # fmt: skip
    block = block_of_layer[1]
    experts: Any = block.get_submodule("experts")
    found_router = find_router(block)
    assert found_router is not None
    router = found_router[1]
    count, top_k = _as_int(experts.num_experts), _as_int(router.top_k)
    groups = _groups(router)
    return LayerSpec(
        index, mixer, count, _shared_experts(block, config), top_k, groups, _floor(router, groups, top_k, config),
        experts.down_proj.shape[1 if experts.is_transposed else 2], *widths,
        skipped=len(getattr(experts, "places", ())) and len(experts.places) - count,
        widths=getattr(experts, "widths", ()),
        heads=heads,
    )  # fmt: skip


def _heads(layer: nn.Module, config: PreTrainedConfig, model: PreTrainedModel) -> Heads | None:
    """The heads of a layer's attention."""
    module = next((child for name, child in layer.named_children() if MIXERS.get(name) == "attention"), None)
    return None if module is None else find_heads(module, config, model)


def _mixer(index: int, layer: nn.Module, config: PreTrainedConfig) -> str:
    """What mixes tokens in a layer: by the name of the submodule, and by the config where one name serves
    several."""
    named = next((MIXERS[name] for name, _ in layer.named_children() if name in MIXERS), None)
    types = getattr(config.get_text_config(), "layer_types", None) or ()
    layer_type = types[index] if index < len(types) else getattr(layer, "block_type", "")
    if named is None and not hasattr(layer, "block_type"):
        return "none"
    if layer_type == "linear_attention":
        return named if named not in (None, "attention") else "linear_attention"
    return named or ("attention" if layer_type.endswith("attention") else "none")


def _as_int(value: Any) -> int:
    return int(value)


def _groups(router: nn.Module) -> int:
    grouped = getattr(router, "topk_method", "group_limited_greedy") == "group_limited_greedy"
    count = getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1
    return _as_int(count) if grouped else 1


def _floor(router: nn.Module, groups: int, top_k: int, config: PreTrainedConfig) -> int:
    fewest = quirks.FEWEST_EXPERTS.get(config.get_text_config().model_type, 1)
    per_group = math.ceil(top_k / _as_int(getattr(router, "topk_group", None) or 1)) if groups > 1 else 1
    if scores_groups_by_two(router):
        per_group = max(per_group, 2)
    return max(top_k, fewest, groups * per_group)


def _shared_experts(block: nn.Module, config: PreTrainedConfig) -> int:
    if not any(
        "shared" in name and "gate" not in name for name, child in block.named_children() if child is not None
    ):
        return 0
    text = config.get_text_config()
    for key in ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"):
        if isinstance(getattr(text, key, None), int):
            return getattr(text, key)
    return 1


def _dense_width(layer: nn.Module) -> int:
    for name, module in layer.named_modules():
        if name.endswith("down_proj") and isinstance(module, nn.Linear):
            return module.in_features
    return 0


def _attention_widths(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Summed widths of query heads and of value heads, and elements cached per token (latent for MLA)."""
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        qk = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        return qk, heads * config.v_head_dim, config.kv_lora_rank + config.qk_rope_head_dim
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads * head, heads * head, 2 * kv_heads * head


class _Classifier:
    """Turns tensor references into entries, and remembers what has been seen of each parameter."""

    def __init__(self, made: Skeleton, axes: Mapping[str, int], *, opaque: bool) -> None:
        model = made.model
        self._names, self._layers_name, self._anatomies = made.names, made.layers_name, made.anatomies
        self._blocks = [None if opaque else moe_block(layer) for layer in made.layers]
        self._tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        self._embedding = _module_name(model, made.base.get_input_embeddings())
        self._head = _module_name(model, made.head)
        self._parts = made.parts
        self._tied = _tied_pairs(model)
        self._seen: dict[str, list[TensorRef]] = defaultdict(list)
        self._transformed: dict[str, bool] = {}
        self._numbers: dict[tuple[int, str], list[int]] = defaultdict(list)
        self._axes = axes
        self._uncut: list[TensorRef] = []
        self._unknown: list[str] = []
        self._together: dict[str, tuple[str, ...]] = {}  # parameters of which several are made of one tensor
        self._outside = Outside(made, axes)

    def __call__(self, ref: TensorRef) -> Entry:
        """What a stored tensor is."""
        name, pattern = self._names.in_memory(ref.name)
        entry = self._entry(ref, name, pattern)
        if (
            name in self._axes
            and entry.expert_axis is None
            and entry.unit.expert is None
            and not self._skips(entry)
        ):
            self._uncut.append(ref)
        return entry

    def _skips(self, entry: Entry) -> bool:
        """Whether a layer's router selects from more experts than there are: its rows are no experts any
        more."""
        block = None if entry.unit.layer is None else self._blocks[entry.unit.layer]
        return block is not None and hasattr(block[1].get_submodule("experts"), "places")

    def _entry(self, ref: TensorRef, name: str, pattern: str | None) -> Entry:
        if name not in self._names.state or not name.startswith(self._parts):
            self._unknown.append(ref.name)
            return self._outside(ref)
        self._seen[name].append(ref)
        self._transformed[name] = pattern is not None and not self._names.only_stacks(pattern)
        if pattern is not None and (others := self._names.made_with(name, pattern)):
            self._make_together(ref, (name, *others))
        layer = layer_number(name, self._layers_name)
        if layer is None:
            return Entry(ref, Unit(None, self._outer_part(name)))
        inner = name[len(f"{self._layers_name}.{layer}.") :]
        entry = self._in_layer(ref, layer, inner, pattern, self._expert_axis(ref, name, layer))
        part = self._branch(layer, inner)
        branch = None if part is None else part[0]
        axes = self._axes_of(entry, layer, inner)
        if part is not None and "out_axis" in axes:
            # What a norm comes after is not what the branch ends with.
            axes |= {"out_axis": None} if part[1].post else {"multiplier": part[1].multiplier}
        return replace(entry, branch=branch, **axes)

    def _make_together(self, ref: TensorRef, made: tuple[str, ...]) -> None:
        """Remember that `ref` becomes all of `made`, of which the first has been seen."""
        self._together |= dict.fromkeys(made, made)
        for other in made[1:]:
            self._seen[other].append(ref)

    def _branch(self, layer: int, inner: str) -> tuple[Branch, BranchParts] | None:
        """The residual branch that a tensor of a layer goes with."""
        anatomy, child = self._anatomies[layer], inner.split(".", 1)[0]
        if isinstance(anatomy, str):
            return None
        parts: dict[Branch, BranchParts | None] = {"attention": anatomy.attention, "mlp": anatomy.mlp}
        for name, part in parts.items():
            if part is not None and child in (
                part.body,
                part.pre,
                part.post,
                *(body for body, _ in part.beside),
            ):
                return name, part
        return None

    def _axes_of(self, entry: Entry, layer: int, inner: str) -> dict[str, Any]:
        """Which axes of a stored tensor run along a branch's output, and along an expert's channels."""
        if self._transformed[self._names.in_memory(entry.ref.name)[0]]:
            return {}
        module, _, kind = inner.rpartition(".")
        if entry.unit.part != "experts":
            ends = module.rpartition(".")[2] in quirks.OUTPUTS and entry.unit.part != "router"
            return {"out_axis": 0} if ends and kind in ("weight", "bias") else {}
        block = self._blocks[layer]
        assert block is not None
        return axes_of_expert(entry.unit.matrix or "", block[1].get_submodule("experts"))

    def _expert_axis(self, ref: TensorRef, name: str, layer: int) -> int | None:
        """The axis of a stored tensor that counts experts, where it is laid out as in memory."""
        block, axis = self._blocks[layer], self._axes.get(name)
        if block is None or axis is None or axis >= len(ref.shape):
            return None
        return axis if ref.shape[axis] == _as_int(block[1].get_submodule("experts").num_experts) else None

    def _outer_part(self, name: str) -> Part:
        module = name.rpartition(".")[0]
        return "embedding" if module == self._embedding else "head" if module == self._head else "norm"

    def _in_layer(
        self, ref: TensorRef, layer: int, inner: str, pattern: str | None, axis: int | None
    ) -> Entry:
        block = self._blocks[layer]
        child = inner.split(".", 1)[0]
        if block is not None and inner.startswith(block[0] + "."):
            return self._in_block(ref, layer, inner[len(block[0]) + 1 :], pattern, axis)
        if f"{self._layers_name}.{layer}.{inner}".removesuffix(".weight") in self._tables:
            return Entry(ref, Unit(layer, "embedding"))
        if child in MIXERS:
            return Entry(
                ref,
                Unit(
                    layer, "attention", None, inner.split(".", 1)[1].removesuffix(".weight").replace(".", "_")
                ),
            )
        return Entry(ref, Unit(layer, "norm" if "norm" in child else "dense"))

    def _in_block(
        self, ref: TensorRef, layer: int, inner: str, pattern: str | None, axis: int | None
    ) -> Entry:
        if inner.startswith("experts."):
            number = _EXPERT.search(ref.name)
            matrix = matrix_of_expert(inner, pattern)
            if number is not None:
                self._numbers[layer, matrix].append(int(number[1]))
                return Entry(ref, Unit(layer, "experts", int(number[1]), matrix))
            return Entry(ref, Unit(layer, "experts", None, matrix), expert_axis=axis)
        if "shared" in inner:
            return Entry(ref, Unit(layer, "shared"))
        if axis is None and "norm" in inner.split(".", 1)[0]:
            return Entry(ref, Unit(layer, "norm"))
        return Entry(
            ref, Unit(layer, "router", None, "bias" if "bias" in inner else "weight"), expert_axis=axis
        )

    def check_complete(self, place: str) -> None:
        """Raise `UserError` when a parameter is missing, incomplete or of another shape."""
        for (layer, matrix), numbers in self._numbers.items():
            self._check_numbers(place, layer, matrix, numbers)
        for name, wanted in self._names.state.items():
            if not name.startswith(self._parts):
                continue
            refs = self._seen.get(name, [])
            if not refs and any(self._seen.get(other) for other in self._tied.get(name, ())):
                continue
            if not refs:
                raise not_whole(place, self._names, name, self._unknown)
            self._check_shapes(place, name, tuple(wanted.shape), refs)
        if self._uncut:
            raise UserError(
                f"{place}: {self._uncut[0].name} depends on the number of experts in a way this version does not "
                "understand, so the model is not supported"
            )

    def _check_numbers(self, place: str, layer: int, matrix: str, numbers: list[int]) -> None:
        """Experts must be numbered 0 to count - 1, each once: the loader goes by order and would not
        notice."""
        block = self._blocks[layer]
        assert block is not None
        count = _as_int(block[1].get_submodule("experts").num_experts)
        lacking = sorted(set(range(count)) - set(numbers))
        if lacking:
            raise UserError(
                f"{place} lacks the {matrix} projection of expert {lacking[0]} in L{layer}, which its config asks for and none of its "
                "files announces: take config.json and the files from one place, for one of the two was changed"
            )
        if len(numbers) != count:
            raise UserError(
                f"{place} has {len(numbers)} {matrix} projections in L{layer}, the config asks for {count}"
            )

    def _check_shapes(self, place: str, name: str, wanted: tuple[int, ...], refs: list[TensorRef]) -> None:
        """Each tensor must have the shape that the parameter's own says, unless the library transforms it."""
        if name in self._together:
            whole = sum(self._names.state[part].numel() for part in self._together[name])
            shapes = {ref.shape for ref in refs[:1] if sum(ref.numel for ref in refs) == whole}
            refs = refs[:1]
        elif self._transformed.get(name):
            shapes = {refs[0].shape} if sum(ref.numel for ref in refs) == math.prod(wanted) else set()
        elif len(refs) == 1:
            shapes = {wanted}
        else:  # stacked over experts, gate and up one after the other
            shapes = {(wanted[1] * wanted[0] // len(refs), *wanted[2:])}
        odd = [ref for ref in refs if shapes != {self._widest_shape(ref, name, len(refs))}]
        if odd:
            raise UserError(
                f"{place}: tensor {odd[0].name} has shape {list(odd[0].shape)}, which does not make "
                f"{name} {list(wanted)} as the config asks: the files or the config were changed"
            )

    def _widest_shape(self, ref: TensorRef, name: str, count: int) -> tuple[int, ...]:
        """The shape of one expert's tensor with as many channels as the widest of its layer, where it has
        those it should."""
        layer = layer_number(name, self._layers_name)
        block = None if layer is None or count == 1 else self._blocks[layer]
        number = _EXPERT.search(ref.name)
        if block is None or number is None:
            return ref.shape
        experts = block[1].get_submodule("experts")
        widths: tuple[int, ...] = getattr(experts, "widths", ())
        axis = axes_of_expert(name.rpartition(".")[2], experts).get("channel_axis")
        if not widths or axis is None or ref.shape[axis] != widths[int(number[1])]:
            return ref.shape
        shape = list(ref.shape)
        shape[axis] = max(widths)
        return tuple(shape)


def _tied_pairs(model: PreTrainedModel) -> dict[str, set[str]]:
    """The parameters that each is tied to by class and config, whichever of them are stored."""
    groups: dict[str, set[str]] = defaultdict(set)
    for one, other in model.all_tied_weights_keys.items():
        groups |= dict.fromkeys(group := {one, other} | groups[one] | groups[other], group)
    return groups


def _module_name(model: PreTrainedModel, wanted: nn.Module | None) -> str:
    return next((name for name, module in model.named_modules() if module is wanted and name), "")
