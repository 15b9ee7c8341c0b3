"""How a folder of layers that differ stops whoever does not know of them.

Such a folder must never be loaded as an ordinary model: numbers would come out, and wrong ones. Two guards
stand in its config.json, because readers look at different things.

* `architectures` names a class that exists nowhere (`MoespressoMixtralForCausalLM`). vLLM and llama.cpp's
  converter choose their code by this name and refuse it; the converter reads nothing else that could stop it.
* `per_layer_config` says of every changed layer at least one number that other layers do not have, if need be
  a count of zero experts that means nothing else (`zero_means_nothing`). transformers, whatever class it
  loads with, raises AmbiguousGlobalPerLayerAttributeError when a model reads that number for all layers, and
  so does vLLM, even where the name was mended by hand or by a resave.

Where moespresso is imported the name is the stock one in memory, since trainers and pipelines look classes up
by it; it is guarded again in everything that is made of a config to be written. Folders from before there was
this name load as well.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

# Keys of a config that count routed experts.
COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Keys of a config that set the width of experts.
WIDTH_KEYS = ("moe_intermediate_size", "intermediate_size")
# Our own, for the widths of all experts of a layer in which they differ.
OWN_WIDTHS = "expert_widths"
# What a layer may say that is for us; families with a `per_layer_config` of their own say none of it.
_OURS = frozenset({"skip", OWN_WIDTHS, *COUNT_KEYS, *WIDTH_KEYS})

_PREFIX = "Moespresso"
# Marks our method.
_DONE = "_moespresso"


def guarded(names: list[str]) -> list[str]:
    """Names of classes that no engine knows."""
    return [_PREFIX + name.removeprefix(_PREFIX) for name in names]


def stock(names: list[str]) -> list[str]:
    """The names of the classes that transformers has."""
    return [name.removeprefix(_PREFIX) for name in names]


def is_own(entry: Mapping[str, Any]) -> bool:
    """Whether what `per_layer_config` says of a layer is for us, not for the code of its family alone."""
    return not _OURS.isdisjoint(entry)


def zero_means_nothing(override: Mapping[str, Any]) -> bool:
    """Whether a count of zero in what a layer says is there for stock loaders only."""
    return OWN_WIDTHS in override or bool(override.get("skip"))


def install(ours: Callable[[PreTrainedConfig], bool]) -> None:
    """Have names guarded in what is written of configs that are `ours`, and stock in memory."""
    PreTrainedConfig.__post_init__ = _naming_stock(PreTrainedConfig.__post_init__)
    written = PreTrainedConfig._update_heterogeneous_to_dict_output
    PreTrainedConfig._update_heterogeneous_to_dict_output = _guarding(written, ours)


def _naming_stock(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def __post_init__(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.architectures:
            self.architectures = stock(self.architectures)

    return __post_init__


def _guarding(original: Callable[..., None], ours: Callable[[PreTrainedConfig], bool]) -> Callable[..., None]:
    @wraps(original)
    def update(self: PreTrainedConfig, written: dict[str, Any]) -> None:
        original(self, written)
        parts = [self, *(part for part in vars(self).values() if isinstance(part, PreTrainedConfig))]
        if written.get("architectures") and any(map(ours, parts)):
            written["architectures"] = guarded(written["architectures"])

    return update


@cache
def reads_the_key(kind: type) -> bool:
    """Whether a family's own code, that of its models or of its config, knows `per_layer_config`."""
    if not kind.__module__.startswith(("transformers.models.", "transformers_modules.")):
        return False
    return "per_layer_config" in inspect.getsource(sys.modules[kind.__module__])
