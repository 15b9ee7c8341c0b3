"""The model that a config.json makes, to look at: on `meta`, built once for all, written into by nobody.

One press asks some thirty times what its model is made of: to describe the source, to double its experts, to
edit the config, to name what is written, to check it. `MetaModel`, which loads layers, builds its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from moespresso.checkpoint import SECTION, check_readable
from moespresso.model.classes import own_class
from moespresso.model.meta_model import build_meta, decoder_layers, head_of, language_parts, read_config
from moespresso.model.names import Names
from moespresso.runtime import Anatomy, NotResidual, find_anatomy, stacked


@dataclass(frozen=True, eq=False)
class Skeleton:
    """One config and its model."""

    config: PreTrainedConfig
    model: PreTrainedModel
    layers_name: str
    layers: nn.ModuleList

    @cached_property
    def base(self) -> PreTrainedModel:
        """The language model without its head, and without what it is wrapped in."""
        return cast("PreTrainedModel", self.model.get_submodule(self.layers_name.rpartition(".")[0]))

    @cached_property
    def head(self) -> nn.Module | None:
        """What makes logits of its last hidden states."""
        return head_of(self.model, self.layers_name)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """What the in-memory names of the language model begin with."""
        return language_parts(self.model, self.layers_name)

    @cached_property
    def names(self) -> Names:
        """The names of its tensors, on disk and in memory."""
        return Names(self.model)

    @cached_property
    def anatomies(self) -> list[Anatomy | str]:
        """The residual branches of each layer, or why they cannot be told."""
        return [_anatomy(layer) for layer in self.layers]


def skeleton(raw: Mapping[str, Any], place: str) -> Skeleton:
    """What the config.json `raw` makes, packed or not; raises `UserError` for what is not supported."""
    check_readable(raw, place)
    return _built(json.dumps({key: value for key, value in raw.items() if key != SECTION}), place)


def whole_names(raw: Mapping[str, Any], place: str) -> Names | None:
    """The names of the class that a config.json names; None where that is of the language model alone."""
    made, kind = skeleton(raw, place), own_class(raw)
    if kind.config_class is not type(made.config):
        return None
    return made.names if isinstance(made.model, kind) else _whole(made, kind)


@lru_cache(maxsize=2)
def _whole(made: Skeleton, kind: type[PreTrainedModel]) -> Names:
    with torch.device("meta"), no_init_weights(), stacked():
        return Names(kind(made.config))


# A press looks at its source, at the source with twice the experts, and at what comes out, in a form or two.
@lru_cache(maxsize=8)
def _built(text: str, place: str) -> Skeleton:
    config = read_config(json.loads(text), place)
    model = build_meta(config, torch.bfloat16, place)
    return Skeleton(config, model, *decoder_layers(model, place))


def _anatomy(layer: nn.Module) -> Anatomy | str:
    try:
        return find_anatomy(layer)
    except NotResidual as error:
        return str(error)
