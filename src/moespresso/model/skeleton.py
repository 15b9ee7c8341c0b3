"""The model that a config.json makes, to look at: on `meta`, built once for all, written into by nobody.

One press asks some thirty times what its model is made of: to describe the source, to double its experts, to
edit the config, to name what is written, to check it. `MetaModel`, which loads layers, builds its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moespresso.checkpoint import SECTION, check_readable
from moespresso.model.meta_model import build_meta, decoder_layers, read_config
from moespresso.model.names import Names
from moespresso.runtime import Anatomy, NotResidual, find_anatomy, stacked, stock


@dataclass(frozen=True, eq=False)
class Skeleton:
    """One config and its model."""

    config: PreTrainedConfig
    model: PreTrainedModel
    layers_name: str
    layers: nn.ModuleList

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
    """The names of the class that a config.json names, where that holds more than the language model; else
    None."""
    named = stock(raw.get("architectures") or [])
    kind = getattr(transformers, named[0], None) if named else None
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        return None
    if named[0] == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(raw["model_type"]):
        return None
    return _whole(json.dumps({key: value for key, value in raw.items() if key != SECTION}), named[0], place)


@lru_cache(maxsize=2)
def _whole(text: str, name: str, place: str) -> Names | None:
    config = read_config(json.loads(text), place)
    kind = getattr(transformers, name)
    if kind.config_class is not type(config):  # a class for the language model alone
        return None
    with torch.device("meta"), no_init_weights(), stacked():
        return Names(kind(config))


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
