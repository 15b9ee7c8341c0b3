"""The model without its weights: built on `meta` from a config, filled one layer at a time.

`MetaModel` holds transformers' own model with every parameter on `meta`. `outer()` loads what lies outside
the decoder layers, `layer(i)` one decoder layer; both take it away again. Buffers that no checkpoint stores
(rotary tables) are made by the family's own initialiser.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moespresso.checkpoint import SECTION, check_readable
from moespresso.core.blueprint import LayerSpec
from moespresso.core.errors import UserError, reason
from moespresso.core.layer import Layer
from moespresso.model import experts as experts_function
from moespresso.model import quirks
from moespresso.model.classes import maker
from moespresso.model.names import Names
from moespresso.runtime import Anatomy, NotResidual, find_anatomy, stacked


def read_config(raw: Mapping[str, Any], place: str) -> PreTrainedConfig:
    """The family's config object; raises `UserError` for what this version does not support."""
    family = raw.get("model_type")
    if not family:
        raise UserError(f"{place}/config.json has no model_type: it is not a Hugging Face model")
    if family in quirks.REFUSED:
        raise UserError(f"{place}: model_type {family!r} is not supported ({quirks.REFUSED[family]})")
    check_readable(raw, place)
    # Packed matrices are decoded by us, so the model is built as if there were none.
    raw = {key: value for key, value in raw.items() if key != SECTION}
    if family not in CONFIG_MAPPING:
        custom = ", and custom code (auto_map) is never run" if raw.get("auto_map") else ""
        cure = quirks.ELSEWHERE.get(family) or _meant(family) or "choose a model of a family that it has"
        raise UserError(
            f"{place}: model_type {family!r} is unknown to transformers {transformers.__version__}{custom}; {cure}"
        )
    _check_dtype(raw, place)
    try:
        # JSON has no infinity; transformers writes it as a tagged object and undoes that only when reading files.
        plain = PreTrainedConfig._decode_special_floats(dict(raw))  # pyright: ignore[reportPrivateUsage]
        return CONFIG_MAPPING[family].from_dict(plain)
    except Exception as error:  # the family's own validation, whatever it raises
        raise UserError(f"{place}/config.json is not a valid {family} config ({reason(error)})") from error


def _meant(family: str) -> str:
    """The family that a misspelt name means; one with another number in it is another family."""
    close = difflib.get_close_matches(family, CONFIG_MAPPING, 1, 0.9)
    alike = [name for name in close if re.findall(r"\d+", name) == re.findall(r"\d+", family)]
    return f"did you mean {alike[0]!r}?" if alike else ""


def _check_dtype(raw: Mapping[str, Any], place: str) -> None:
    named = raw.get("torch_dtype") if raw.get("dtype") is None else raw["dtype"]
    # One of several, by the names of inner models, is left to the family.
    if named is None or isinstance(named, dict) or isinstance(getattr(torch, str(named), None), torch.dtype):
        return
    raise UserError(
        f"{place}/config.json names dtype {named!r}, which torch does not have: write bfloat16, float16 or float32 there"
    )


def build_meta(config: PreTrainedConfig, dtype: torch.dtype, place: str) -> PreTrainedModel:
    """The language model of `config`, in what it is wrapped in, every parameter and buffer on `meta`, experts
    observable."""
    kind = maker(config, place)
    try:
        with torch.device("meta"), no_init_weights(), stacked():
            model = cast("PreTrainedModel", kind.from_config(config, dtype=dtype))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{place}: no language model can be built from its config ({reason(error)})"
        ) from error
    if any(experts_function.is_experts(module) for module in model.modules()):
        model.set_experts_implementation(experts_function.NAME)
    return model.eval()


def decoder_layers(model: PreTrainedModel, place: str) -> tuple[str, nn.ModuleList]:
    """Name and list of the language model's decoder layers: those of the module that has its config."""
    wanted = model.config.get_text_config().model_type
    for name, module in model.named_modules():
        owner, _, last = name.rpartition(".")
        if last in ("layers", "blocks") and isinstance(module, nn.ModuleList):
            config = getattr(model.get_submodule(owner), "config", None)
            if getattr(config, "model_type", None) == wanted:
                return name, module
    raise UserError(
        f"{place}: the decoder layers of {type(model).__name__} are not where this version looks for them"
    )


def head_of(model: PreTrainedModel, layers_name: str) -> nn.Module | None:
    """What makes logits of last hidden states: the model's own head, or that of a language model inside."""
    path = layers_name
    while path:
        path = path.rpartition(".")[0]
        head = getattr(model.get_submodule(path), "lm_head", None)
        if isinstance(head, nn.Module):
            return head
    return cast("nn.Module | None", model.get_output_embeddings())


def language_parts(model: PreTrainedModel, layers_name: str) -> tuple[str, ...]:
    """What the in-memory names of the language model begin with: in a wrapper all of its own, and its
    head."""
    if model.config.get_text_config() is model.config:
        return ("",)
    head = head_of(model, layers_name)
    heads = [f"{name}." for name, module in model.named_modules() if module is head and name]
    return (f"{layers_name.rpartition('.')[0]}.".removeprefix("."), *heads)


def moe_block(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of a layer's MoE block (the parent of its routed experts), or None in a dense layer."""
    for name, module in layer.named_modules():
        if experts_function.is_experts(module):
            parent = name.rpartition(".")[0]
            return parent, layer.get_submodule(parent)
    return None


def find_router(block: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the router in a MoE block."""
    children = dict(block.named_children())
    return next(((name, children[name]) for name in ("gate", "router") if name in children), None)


def scores_by_sigmoid(router: nn.Module, config: PreTrainedConfig) -> bool:
    """Whether a router scores with a sigmoid instead of a softmax, which only its code says."""
    chosen = getattr(config.get_text_config(), "expert_selection_fn", None)
    return chosen == "sigmoid" if chosen else "sigmoid(" in _code(type(router))


def scores_groups_by_two(router: nn.Module) -> bool:
    """Whether a router scores a group of experts by the sum of its two best, so that two must remain in
    each."""
    return re.search(r"topk\(\s*2\b", _code(type(router))) is not None


@cache
def _code(kind: type[nn.Module]) -> str:
    return inspect.getsource(kind)


def layer_config(config: PreTrainedConfig, index: int) -> PreTrainedConfig:
    """The language model's config as layer `index` has it (a few families let layers differ)."""
    text = config.get_text_config()
    return text.per_layer_config[index] if getattr(text, "per_layer_config", None) else text


class MetaModel:
    """One model, on `meta` but for what is being used.

    `tensors` maps on-disk names to anything that answers `[...]` with a tensor (see
    `build.tensors.Lazy`); `specs` are the layers as the blueprint has them.
    """

    def __init__(
        self,
        raw_config: Mapping[str, Any],
        tensors: Mapping[str, Any],
        specs: tuple[LayerSpec, ...],
        *,
        place: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = read_config(raw_config, place)
        self.model = build_meta(self.config, dtype, place)
        self.layers_name, self.layers = decoder_layers(self.model, place)
        self.specs, self.place, self.dtype, self.device = specs, place, dtype, device
        self._names = Names(self.model)
        self._parts = language_parts(self.model, self.layers_name)
        self._tensors = self._by_layer(tensors)
        stored = {self.in_memory(key) for by_key in self._tensors.values() for key in by_key}
        self._absent = self._names.state.keys() - stored
        self._anatomies: dict[int, Anatomy | None] = {}
        self._materialise_buffers()

    @property
    def base(self) -> PreTrainedModel:
        """The language model without its head, and without what it is wrapped in."""
        return cast("PreTrainedModel", self.model.get_submodule(self.layers_name.rpartition(".")[0]))

    def speaks(self, name: str) -> bool:
        """Whether an in-memory name is of the language model, and not of what it is wrapped in."""
        return name.startswith(self._parts)

    def _by_layer(self, tensors: Mapping[str, Any]) -> dict[int | None, dict[str, Any]]:
        grouped: dict[int | None, dict[str, Any]] = {None: {}}
        for key, tensor in tensors.items():
            name, _ = self._names.in_memory(key)
            if name in self._names.state and self.speaks(name):
                grouped.setdefault(layer_number(name, self.layers_name), {})[key] = tensor
        return grouped

    def _materialise_buffers(self) -> None:
        """Make the buffers that no checkpoint stores, by the family's own initialiser."""
        for module in self.base.modules():
            names = [
                name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None
            ]
            if names and any(module._buffers[name].is_meta for name in names):  # pyright: ignore[reportOptionalMemberAccess]
                for name in names:
                    module._buffers[name] = torch.empty_like(
                        cast("Tensor", module._buffers[name]), device=self.device
                    )
                self.model._init_weights(module)  # pyright: ignore[reportPrivateUsage]

    @contextmanager
    def layer(self, index: int) -> Iterator[Layer]:
        """Decoder layer `index` with its weights in memory."""
        module = self.layers[index]
        self._load(index, module)
        try:
            yield self._handle(index, module)
        finally:
            _to_meta(module)

    def _handle(self, index: int, module: nn.Module) -> Layer:
        moe = moe_block(module) if self.specs[index].experts else None
        multiplier, anatomy = float(getattr(module, "residual_multiplier", 1.0)), self._anatomy(index)
        if moe is None:
            return Layer(self.specs[index], module, residual_multiplier=multiplier, anatomy=anatomy)
        block = moe[1]
        router = find_router(block)
        assert router is not None
        return Layer(
            self.specs[index],
            module,
            block.get_submodule("experts"),
            router[1],
            scores_by_sigmoid(router[1], self.config),
            multiplier,
            anatomy,
        )

    def _anatomy(self, index: int) -> Anatomy | None:
        """The layer's branches; None where they cannot be told apart."""
        if index not in self._anatomies:
            try:
                self._anatomies[index] = find_anatomy(self.layers[index])
            except NotResidual:
                self._anatomies[index] = None
        return self._anatomies[index]

    @contextmanager
    def outer(self) -> Iterator[None]:
        """Everything outside the decoder layers in memory; embedding and head go again, the small last norm
        stays."""
        self._load(None, self.model)
        self._tie()
        try:
            yield
        finally:
            for module in (self.base.get_input_embeddings(), head_of(self.model, self.layers_name)):
                _to_meta(cast("nn.Module", module))

    def _load(self, index: int | None, module: nn.Module) -> None:
        self._names.load(self._tensors.get(index, {}), self.dtype, self.device)
        assert index is None or not any(p.is_meta for p in module.parameters()), (
            f"layer {index} is incomplete"
        )

    def _tie(self) -> None:
        """Tie what the loader ties: of a pair that the config ties, the one that no file holds is the other;
        where files hold both, and they differ, each keeps its own."""
        self.model.tie_weights(missing_keys=set(self._absent), recompute_mapping=False)

    def layer_state(self, index: int) -> dict[str, Tensor]:
        """In-memory names and tensors of a loaded layer."""
        prefix = f"{self.layers_name}.{index}."
        return {prefix + name: tensor for name, tensor in self.layers[index].state_dict().items()}

    def in_memory(self, key: str) -> str:
        """In-memory name of an on-disk key (also of keys that the model does not know)."""
        return self._names.in_memory(key)[0]

    def to_disk(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On-disk names of (part of) an in-memory state."""
        return self._names.to_disk(state)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of last hidden states [N, H], by the family's own head (its scaling and capping
        included).

        Needs `outer()`. The whole model runs with its base replaced by one that answers `hidden`.
        """
        base, path = self.base, self.layers_name.rpartition(".")[0]
        self.model.set_submodule(path, _Answer(hidden.unsqueeze(0)))
        try:
            return self.model(inputs_embeds=hidden.unsqueeze(0), use_cache=False).logits.squeeze(0)
        finally:
            self.model.set_submodule(path, base)


class _Output(MoeModelOutputWithPast):
    """Last hidden states, and nothing of what a family says beside them."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class _Answer(nn.Module):
    """A base model that has already answered."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._output = _Output(last_hidden_state=hidden)

    def forward(self, *_: Any, **__: Any) -> MoeModelOutputWithPast:
        """The last hidden states it was made with."""
        return self._output


def layer_number(name: str, layers_name: str) -> int | None:
    """Index of the decoder layer an in-memory name lies in, or None."""
    if not name.startswith(layers_name + "."):
        return None
    return int(name[len(layers_name) + 1 :].split(".", 1)[0])


def _to_meta(module: nn.Module) -> None:
    """Let go of parameters and persistent buffers; tables that no checkpoint stores stay."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.is_meta:
                part._parameters[name] = nn.Parameter(
                    torch.empty_like(parameter, device="meta"), requires_grad=False
                )
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                part._buffers[name] = torch.empty_like(buffer, device="meta")


def quiet_transformers() -> None:
    """Keep the library's loading reports off the user's screen; what matters is raised by us."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
