"""Models whose layers differ, as `per_layer_config` in config.json declares them.

transformers reads, checks and saves this key for every family, but hardly any of its models act on it.
`install` makes them: when a model ends its construction, each layer that the config changes gets a smaller
mixture, loses a branch or loses single experts, by general code that knows no family. What a layer may say
(`{"3": {...}}`):

* a count of experts: `{"num_local_experts": 6}`, or what else the family calls it;
* the width of its experts: `{"moe_intermediate_size": 96}` (shared experts and dense layers keep theirs), and
  beside it that of each where they differ: `{"expert_widths": [96, 24, 64]}`;
* branches that add nothing, or one vector: `{"skip": ["mlp", "attention+bias"]}`;
* experts that are gone while the router still selects them: `{"skip": ["expert.1", "expert.5+novice"]}`,
  where a novice is a constant vector that answers in the expert's place.

A zero beside what is skipped, or beside widths (`"num_key_value_heads": 0`, `"num_local_experts": 0`), says
nothing more. It is there for engines that do not know moespresso, which then stop with an error instead of
filling what is missing with random weights (`moespresso.runtime.guard`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from moespresso.core.errors import UserError
from moespresso.runtime.anatomy import BranchParts, NotResidual, find_anatomy
from moespresso.runtime.guard import COUNT_KEYS, OWN_WIDTHS, WIDTH_KEYS, reads_the_key, zero_means_nothing
from moespresso.runtime.guard import install as install_guard
from moespresso.runtime.losses import balance_by_count
from moespresso.runtime.parts import NoNorm, Silent, SilentMixer, thin_out
from moespresso.runtime.widths import differ
from moespresso.runtime.widths import install as install_widths

_BRANCH = re.compile(r"(attention|mlp)(\+bias)?")
_EXPERT = re.compile(r"expert\.(\d+)(\+novice)?")
# Marks a model whose layers have been changed, and our method.
_DONE = "_moespresso"


@dataclass(frozen=True, slots=True)
class Change:
    """What one layer has of its own: a `count` of experts and their `width` (None: as all others), or the
    `widths` of each; `silent` branches and experts that are `gone`, each with whether it leaves a vector (a
    bias, a novice) in its place."""

    count: int | None
    silent: Mapping[str, bool]
    gone: Mapping[int, bool]
    width: int | None = None
    widths: tuple[int, ...] = ()


def install() -> None:
    """Teach transformers to honour `per_layer_config`; called again, it does nothing."""
    if not hasattr(PreTrainedModel.post_init, _DONE):
        PreTrainedModel.__init__ = _admitting(PreTrainedModel.__init__)
        PreTrainedModel.post_init = _reshaping(PreTrainedModel.post_init)
        install_widths()
        install_guard(_is_plugin)


def _admitting(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if _is_ours(self, config):
            _admit(config)
        original(self, config, *args, **kwargs)

    return __init__


def _reshaping(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        # The model under a head has been through this before the head; a subclass may come twice.
        if _is_ours(self, self.config) and not any(_DONE in part.__dict__ for part in self.modules()):
            _reshape(self)
        original(self)

    post_init.__dict__[_DONE] = True
    return post_init


def _is_ours(model: PreTrainedModel, config: PreTrainedConfig) -> bool:
    """Whether layers differ in a way that is ours, and the family's own code does not look after it."""
    return (
        getattr(config, "is_heterogeneous", False)
        and not any(map(reads_the_key, type(model).__mro__))
        and bool(changes(config))
    )


def _is_plugin(config: PreTrainedConfig) -> bool:
    """Whether a config says what only we act on."""
    if not config.is_heterogeneous or any(map(reads_the_key, type(config).__mro__)):
        return False
    try:
        return bool(changes(config))
    except UserError:  # somebody else's words, and no reason not to write them
        return False


def changes(config: PreTrainedConfig) -> dict[int, Change]:
    """What a heterogeneous config changes, by layer; raises `UserError` for words in `skip` that are not
    understood."""
    by_layer = {layer: _change(layer, override) for layer, override in _overrides(config).items()}
    return {layer: change for layer, change in by_layer.items() if change != Change(None, {}, {})}


def _overrides(config: PreTrainedConfig) -> Mapping[int, Mapping[str, Any]]:
    return config._heterogeneity_spec.per_layer_overrides  # pyright: ignore[reportAttributeAccessIssue]


def _change(layer: int, override: Mapping[str, Any]) -> Change:
    words = override.get("skip", [])
    branches = [match for match in map(_BRANCH.fullmatch, words) if match]
    experts = [match for match in map(_EXPERT.fullmatch, words) if match]
    if len(branches) + len(experts) < len(words):
        raise UserError(
            f"config.json: per_layer_config skips what moespresso does not know in layer {layer}: {words}"
        )
    silent = {match[1]: match[2] is not None for match in branches}
    count, width = (
        None if "mlp" in silent else next((override[key] for key in keys if key in override), None)
        for keys in (COUNT_KEYS, WIDTH_KEYS)
    )
    if count == 0 and zero_means_nothing(override):
        count = None
    gone = {int(match[1]): match[2] is not None for match in experts}
    return Change(count, silent, gone, width, () if "mlp" in silent else tuple(override.get(OWN_WIDTHS, ())))


def _admit(config: PreTrainedConfig) -> None:
    """Let constructors read the global value of keys that are set right afterwards.

    transformers forbids that for whatever differs between layers; for all that is not ours it goes on to.
    """
    live = {
        key
        for override in _overrides(config).values()
        for key, value in override.items()
        if key not in (*COUNT_KEYS, *WIDTH_KEYS, OWN_WIDTHS) and not (value == 0 and "skip" in override)
    }
    forbidden = config.per_layer_attributes
    assert forbidden is not None
    forbidden.intersection_update(live)


def _reshape(model: PreTrainedModel) -> None:
    """Change the decoder layers of a model under construction as its config says."""
    layers = _decoder_layers(model)
    for index, change in changes(model.config).items():
        try:
            _change_layer(layers[index], index, change, model.config)
        except (NotResidual, UserError) as error:
            raise UserError(
                f"{type(model).__name__}: layer {index} cannot be changed as per_layer_config says: {error}"
            ) from error
    balance_by_count(type(model))
    model.__dict__[_DONE] = True


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) == model.config.num_hidden_layers:
            return child
    raise UserError(
        f"{type(model).__name__} has no list of decoder layers that per_layer_config could change"
    )


def _change_layer(layer: nn.Module, index: int, change: Change, config: PreTrainedConfig) -> None:
    # Read before anything is changed.
    anatomy = find_anatomy(layer) if change.silent else None
    for kind, leaves_bias in change.silent.items():
        branch: BranchParts | None = getattr(anatomy, kind)
        if branch is None:
            raise UserError(f"it has no {kind}")
        _silence(
            layer, branch, config.hidden_size if leaves_bias else None, index if kind == "attention" else None
        )
    if change.count is not None:
        _resize(layer, index, change.count, config)
    if change.width is not None:
        _narrow(layer, index, change.width, config)
    if not change.gone and not change.widths:
        return
    experts: Any = _mixture(layer)[1].get_submodule("experts")
    if change.gone and not set(change.gone) < set(range(experts.num_experts)):
        raise UserError(f"experts {sorted(change.gone)} cannot go where there are {experts.num_experts}")
    if change.widths:
        differ(experts, change.widths, len(change.gone))
    if change.gone:
        thin_out(experts, change.gone)


def _silence(layer: nn.Module, branch: BranchParts, width: int | None, index: int | None) -> None:
    """Put what adds nothing, or a bias of `width`, in a branch's place; `index` is the layer's number if it
    mixes."""
    stub = Silent(branch.answers) if index is None else SilentMixer(branch.answers, index)
    if width is not None:
        stub.add_bias(width, branch.multiplier)
    bodies = {branch.body: stub} | {name: Silent(answers) for name, answers in branch.beside}
    norms = {norm: NoNorm() for norm in (branch.pre, branch.post) if norm is not None}
    for name, part in (bodies | norms).items():
        setattr(layer, name, part)


def _resize(layer: nn.Module, index: int, count: int, config: PreTrainedConfig) -> None:
    """Build the layer's mixture anew for `count` experts, on the device and with the dtype the model is built
    with."""
    name, block = _mixture(layer)
    resized = _rebuild(block, index, config)
    experts: Any = resized.get_submodule("experts")
    if experts.num_experts != count:
        raise UserError(
            f"{type(block).__name__} makes {experts.num_experts} experts of a config that says {count}"
        )
    for child, module in block.named_children():
        if "shared" in child:  # its width may follow that of the experts
            resized.set_submodule(child, module)
    layer.set_submodule(name, resized)


def _narrow(layer: nn.Module, index: int, width: int, config: PreTrainedConfig) -> None:
    """Build the experts of a layer anew with `width` channels; all else keeps its own."""
    _, block = _mixture(layer)
    experts: Any = _rebuild(block, index, config).get_submodule("experts")
    if experts.down_proj.shape[1 if experts.is_transposed else 2] != width:
        raise UserError(f"{type(block).__name__} does not make experts {width} wide of a config that says so")
    block.set_submodule("experts", experts)


def _rebuild(block: nn.Module, index: int, config: PreTrainedConfig) -> nn.Module:
    """The same kind of block as the layer's own config makes it."""
    kind = type(block)
    numbered = {"layer_idx": index} if "layer_idx" in inspect.signature(kind).parameters else {}
    layer_config = config.per_layer_config[index]
    for key in COUNT_KEYS:
        if getattr(layer_config, key, None) == 0:  # a guard
            setattr(layer_config, key, getattr(config, key))
    rebuilt = kind(layer_config, **numbered)
    # Which function computes experts is switched in the model's config.
    experts: Any = rebuilt.get_submodule("experts")
    experts.config = config
    return rebuilt


def _mixture(layer: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of a layer's MoE block: the parent of what goes through transformers' experts
    interface."""
    for name, module in layer.named_modules():
        if hasattr(module, "has_gate") and name.endswith(".experts"):
            parent = name.rpartition(".")[0]
            return parent, layer.get_submodule(parent)
    raise UserError("it has no mixture of experts in a block of its own")
