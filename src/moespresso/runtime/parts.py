"""What stands where something was taken out of a layer.

`Silent` is a branch's body that answers with zeros or one constant vector, `SilentMixer` the same for
attention, which also keeps the key-value cache counting tokens; `NoNorm` is the norm of such a branch.
`thin_out` takes experts out of a stack while the router goes on selecting them: their terms are lost, or a
constant vector, a novice, takes their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from moespresso.runtime.mixed import Mixed, mixed
from moespresso.runtime.widths import Ragged


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among what a layer calls its child with; raises `KeyError` when there are none."""
    return args[0] if args else kwargs["hidden_states"]


class NoNorm(nn.Identity):
    """Hands on what it is given. A layer that casts to its weight's dtype casts to none."""

    weight = SimpleNamespace(dtype=None)


class Silent(nn.Module):
    """A body that adds nothing, or the same vector to every token.

    `answers` is the form of its answer: None for a bare tensor, else the length of the tuple that starts with
    it.
    """

    bias: nn.Parameter | None

    def __init__(self, answers: int | None) -> None:
        super().__init__()
        self.answers, self.multiplier = answers, 1.0
        self.register_parameter("bias", None)

    def add_bias(self, width: int, multiplier: float) -> None:
        """Own a vector [width]; `multiplier`, which the layer scales answers with, will not reach it."""
        self.bias, self.multiplier = nn.Parameter(torch.zeros(width)), multiplier

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros or the bias, in the shape of the hidden states it is given."""
        answer = torch.zeros_like(hidden_of(args, kwargs))
        if self.bias is not None:
            answer = answer + self.bias / self.multiplier
        return answer if self.answers is None else (answer, *[None] * (self.answers - 1))


class SilentMixer(Silent):
    """The same in the place of attention: a cache still learns how many tokens have passed layer `index`."""

    def __init__(self, answers: int | None, index: int) -> None:
        super().__init__(answers)
        self.layer_idx = index

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `Silent`."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                _pass_by(value, self.layer_idx, hidden_of(args, kwargs))
        return super().forward(*args, **kwargs)


def _pass_by(cache: Cache, index: int, hidden: Tensor) -> None:
    """Write the smallest entry for every token of `hidden` [B, L, H]: masks and positions are read off the
    cache."""
    # A cache that was made without a config makes its layers as they are first written to.
    layer = cache.layers[index] if index < len(cache.layers) else None
    if layer is None or isinstance(layer, CacheLayerMixin):  # those of recurrent mixers count no tokens
        nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        cache.update(nothing, nothing, index)


def thin_out(experts: Any, gone: Mapping[int, bool]) -> None:
    """Take experts out of a stack that the router still selects from; True beside one puts a novice in its
    place.

    The weights of the stack are made anew with the same dtype and device, so this is for models under
    construction. Those that are kept are renumbered, in their old order.
    """
    kept = [expert for expert in range(experts.num_experts) if expert not in gone]
    novices = [expert for expert in sorted(gone) if gone[expert]]
    experts.places = _places(experts.num_experts, kept)
    experts.novice_places = _places(experts.num_experts, novices)
    experts.__class__ = mixed(_Thinned, type(experts))
    _cut(experts, len(kept))
    experts.register_parameter("novices", _vectors(experts, len(novices)) if novices else None)
    # transformers' functions skip experts with a number past the last only where others may lie on another device.
    experts._is_expert_parallel = True


def _places(count: int, members: list[int]) -> list[int]:
    """Place of each of `count` experts among `members`; one past the last for those that are not."""
    return [members.index(expert) if expert in members else len(members) for expert in range(count)]


def _cut(experts: Any, count: int) -> None:
    if not isinstance(experts, Ragged):  # which has only those that are kept
        _shorten(experts, count)
    experts.num_experts = count


def _shorten(experts: Any, count: int) -> None:
    for name, stack in list(experts.named_parameters(recurse=False)):
        setattr(experts, name, nn.Parameter(torch.empty_like(stack[:count])))


def _vectors(experts: Any, count: int) -> nn.Parameter:
    width = experts.down_proj.shape[-1 if experts.is_transposed else -2]
    return nn.Parameter(experts.down_proj.new_zeros(count, width))


class _Thinned(Mixed):
    """Mixed into a family's class of experts: what it is called with are the router's numbers, of all
    experts."""

    num_experts: int
    config: Any
    places: list[int]
    novice_places: list[int]
    novices: nn.Parameter | None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum [T, H] over those of the selected experts that are there, and over novices."""
        index = top_k_index.new_tensor(self.places)[top_k_index]
        gone = index == self.num_experts
        if self.config._experts_implementation == "eager":
            # Not every family's own loop knows a number past the last; with a weight of zero any other will do.
            index = index.masked_fill(gone, 0)
        answer = super().forward(hidden_states, index, top_k_weights.masked_fill(gone, 0))
        if self.novices is None:
            return answer
        return answer + self._of_novices(self.novices, top_k_index, top_k_weights).to(answer.dtype)

    def _of_novices(self, novices: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        place = index.new_tensor(self.novice_places)[index]
        gates = weights.new_zeros(len(weights), len(novices) + 1).scatter_add(1, place, weights)
        return gates[:, :-1] @ novices.to(weights.dtype)
