"""Which class of transformers a config.json asks for.

Most families have a causal language model. Wrappers, which put a language model beside towers for images or
sound, often have one class only, that of the whole. What is built to look at and to measure is the causal
model where there is one, since towers have no part in text; what a user loads, and what a result is checked
with, is the class that `architectures` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import transformers
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from moespresso.core.errors import UserError
from moespresso.runtime import stock

_CAUSAL = cast("dict[str, str]", dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
_WRAPPERS = cast("dict[str, str]", dict(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES))


def maker(config: PreTrainedConfig, place: str) -> Any:
    """The auto class that builds the language model of a config; raises `UserError` where none does."""
    if config.model_type in _CAUSAL:
        return AutoModelForCausalLM
    if config.model_type in _WRAPPERS:
        return AutoModelForMultimodalLM
    raise UserError(
        f"{place}: transformers has no language model for model_type {config.model_type!r}: give a checkpoint that "
        "generates text"
    )


def class_name(family: str) -> str:
    """The class that `architectures` would name for a family."""
    return _CAUSAL.get(family) or _WRAPPERS[family]


def auto_class(config: Mapping[str, Any]) -> str:
    """The auto class that loads what a config.json names."""
    causal = own_class(config).__name__ in _CAUSAL.values()
    return "AutoModelForCausalLM" if causal else "AutoModelForMultimodalLM"


def own_class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that a config.json names, or the one that its family has."""
    known = {*_CAUSAL.values(), *_WRAPPERS.values()}
    named = [name for name in stock(config.get("architectures") or []) if name in known]
    return getattr(transformers, named[0] if named else class_name(str(config["model_type"])))
