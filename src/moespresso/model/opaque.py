"""Whether a family's experts can be seen and cut: by the general code, or not at all.

Where they cannot, they are opaque: left whole, while depth and attention, which need nothing of them, are
treated. The reason travels in the blueprint, for every step that would need them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from moespresso.model import quirks
from moespresso.model.counts import expert_axes, is_unequal
from moespresso.model.experts import is_experts
from moespresso.model.meta_model import find_router, moe_block
from moespresso.model.skeleton import Skeleton


def expert_axes_or_why(made: Skeleton, raw: Mapping[str, Any], place: str) -> tuple[dict[str, int], str]:
    """The axes that count experts, and why those cannot be cut nor seen, where that is so."""
    text = made.config.get_text_config()
    reasons = (
        quirks.OPAQUE.get(text.model_type),
        next(filter(None, map(_why_opaque, made.layers)), None),
        _why_unseen(made),
    )
    axes = next(filter(None, reasons), None) or expert_axes(raw, made.model, place)
    return ({}, axes) if isinstance(axes, str) else (axes, "")


def _why_opaque(layer: nn.Module) -> str | None:
    """Experts must be of the one shape that is measured and cut: one stack, one router, in one block."""
    stacks = [name for name, module in layer.named_modules() if is_experts(module)]
    if not stacks:
        return None
    if len(stacks) > 1:
        return f"its layers have {len(stacks)} sets of experts"
    if not stacks[0].endswith(".experts"):
        return "its experts are not in a block of their own"
    block = layer.get_submodule(stacks[0].removesuffix(".experts"))
    router = find_router(block)
    if router is None or not isinstance(getattr(router[1], "top_k", None), int):
        return "it has no router of the kind this version measures"
    tables = [name for name, tensor in block.state_dict().items() if not tensor.is_floating_point()]
    return f"{tables[0]} is a table of expert numbers, which cannot be cut" if tables else None


def _why_unseen(made: Skeleton) -> str | None:
    """A mixture whose experts the general code cannot see must not pass for a dense model."""
    if any(moe_block(layer) for layer in made.layers):
        return None
    text = made.config.get_text_config()
    lists = _kinds_of_layers(text)
    said = any(sparse in words for words, sparse in lists)
    kinds = vars(sys.modules[type(made.base).__module__]).values()
    if not said and any(isinstance(kind, type) and hasattr(kind, "_apply_gate") for kind in kinds):
        return None  # they would be seen: none of the layers has any
    promised = [
        key
        for key in quirks.COUNT_KEYS
        if isinstance(getattr(text, key, None), int) and getattr(text, key) > 1
    ]
    dense = len(getattr(text, "mlp_only_layers", None) or ()) == len(made.layers) or (lists and not said)
    emptied = is_unequal(made.config.to_dict()) or dense
    if not promised or emptied:
        return None
    return f"its config has {promised[0]}, but no experts that go through transformers' experts interface"


def _kinds_of_layers(text: PreTrainedConfig) -> list[tuple[Sequence[object], object]]:
    """The lists by which a config tells mixtures from dense layers, each with its word for a mixture."""
    lists = ((getattr(text, key, None), sparse) for key, (sparse, _) in quirks.DENSE_WORDS.items())
    return [(words, sparse) for words, sparse in lists if words and isinstance(words, list | tuple | str)]
