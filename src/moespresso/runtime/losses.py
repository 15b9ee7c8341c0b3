"""The loss that balances a router's choices, where layers have different numbers of experts.

Families compute it from the router logits of all layers at once, `E sum_e f_e P_e`: f_e the share of tokens
that selects expert e, P_e the mean probability it is given. That needs one number of experts E. Where layers
differ, those with the same number are taken together by the family's own function, and the groups averaged,
each counting as many layers as it has: `sum_g (n_g / n) loss_g`. With one group that is the family's own
loss. Layers without a mixture have no logits, and a model without any mixture has no loss of this kind.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

# What families call the function, and what it is called with (a few have another under the same name).
_NAME = "load_balancing_loss_func"
_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
# Marks our function.
_DONE = "_moespresso"


def balance_by_count(model: type) -> None:
    """Have the family of a class of models balance layers of the same number of experts with one another."""
    for module in {sys.modules[kind.__module__] for kind in model.__mro__}:
        loss = getattr(module, _NAME, None)
        if (
            loss is not None
            and not hasattr(loss, _DONE)
            and list(inspect.signature(loss).parameters) == _PARAMETERS
        ):
            setattr(module, _NAME, _by_count(loss))


def _by_count(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load_balancing_loss_func(
        gate_logits: Any, num_experts: int | None = None, top_k: int = 2, attention_mask: Tensor | None = None
    ) -> Any:
        if not isinstance(gate_logits, tuple):
            return original(gate_logits, num_experts, top_k, attention_mask)
        groups: dict[int, list[Tensor]] = {}
        for logits in gate_logits:
            groups.setdefault(logits.shape[-1], []).append(logits)
        losses = [
            len(group) / len(gate_logits) * original(tuple(group), count, top_k, attention_mask)
            for count, group in groups.items()
        ]
        return (
            sum((loss.to(losses[0].device) for loss in losses[1:]), losses[0]) if losses else torch.zeros(())
        )

    load_balancing_loss_func.__dict__[_DONE] = True
    return load_balancing_loss_func
