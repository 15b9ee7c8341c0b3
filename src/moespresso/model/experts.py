"""Every expert of every family in one function, so that what they compute can be seen.

transformers lets an experts implementation be registered by name; ours computes each selected expert's answer
and shows tokens, gate weights and answers to whoever is `observing` (one at a time; who began last). The
modules' own flags (`has_gate`, `has_bias`, `is_transposed`, `has_post_expert_norm`) say how their weights are
laid out; their classes share no base, hence `Any`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "moespresso"
# hidden [T, H], index [T, k], weights [T, k]; what it returns is answered in the experts' place, and with None they answer.
Before = Callable[[Tensor, Tensor, Tensor], Tensor | None]
# the same, and outputs [T, k, H]
After = Callable[[Tensor, Tensor, Tensor, Tensor], None]
_OBSERVERS = "moespresso_observers"


@dataclass(frozen=True, slots=True)
class _Observers:
    before: Before | None = None
    after: After | None = None


_NOBODY = _Observers()


@contextmanager
def observing(
    experts: nn.Module, *, before: Before | None = None, after: After | None = None
) -> Generator[None]:
    """While in here, `before` sees what the experts are asked (and may answer in their place) and `after`
    what each selected one answered, unweighted. Whoever observed them until then does not, and does again
    afterwards."""
    outer = experts.__dict__.get(_OBSERVERS)
    experts.__dict__[_OBSERVERS] = _Observers(before, after)
    try:
        yield
    finally:
        if outer is None:
            del experts.__dict__[_OBSERVERS]
        else:
            experts.__dict__[_OBSERVERS] = outer


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Weighted sum [T, H] of what the selected experts answer; a slot with index >= num_experts adds
    nothing."""
    observers: _Observers = self.__dict__.get(_OBSERVERS, _NOBODY)
    if observers.before is not None:
        answer = observers.before(hidden_states, top_k_index, top_k_weights)
        if answer is not None:
            return answer
    outputs = expert_outputs(self, hidden_states, top_k_index)
    if observers.after is not None:
        observers.after(hidden_states, top_k_index, top_k_weights, outputs)
    if outputs.dtype == top_k_weights.dtype:  # no copy of all answers
        return torch.einsum("tkh,tk->th", outputs, top_k_weights)
    return (outputs * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def expert_outputs(experts: Any, hidden: Tensor, index: Tensor) -> Tensor:
    """What each selected expert answers, unweighted: [T, k, H] for tokens [T, H] and selections [T, k]."""
    slots = index.reshape(-1)
    order = slots.argsort(stable=True)
    counts = torch.bincount(slots, minlength=experts.num_experts).tolist()
    outputs = hidden.new_zeros(slots.numel(), hidden.shape[-1])
    start = 0
    for expert, count in enumerate(counts[: experts.num_experts]):
        if count:
            rows = order[start : start + count]
            outputs[rows] = expert_forward(experts, expert, hidden[rows // index.shape[-1]])
        start += count
    return outputs.view(*index.shape, -1)


def expert_forward(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    """One expert on tokens [N, H]: down(act(gate) * up), as the module's flags say; in the precision of the
    tokens."""
    inner = _linear(experts, "gate_up_proj" if experts.has_gate else "up_proj", expert, hidden)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    output = _linear(experts, "down_proj", expert, inner)
    return experts.post_expert_norm(output) if experts.has_post_expert_norm else output


def _linear(experts: Any, name: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert].to(inputs.dtype)
    output = inputs @ (weight if experts.is_transposed else weight.T)
    return output + getattr(experts, f"{name}_bias")[expert].to(inputs.dtype) if experts.has_bias else output


def is_experts(module: nn.Module) -> bool:
    """Whether a module goes through transformers' experts interface."""
    return hasattr(module, "_apply_gate") and hasattr(module, "has_gate") and hasattr(module, "num_experts")


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
