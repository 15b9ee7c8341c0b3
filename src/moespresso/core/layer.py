"""What a visitor of the loop is handed: one loaded layer, and what flows through it.

`Layer` is a decoder layer with its weights in memory. Iterating `Taps` runs the layer over the calibration
batches, one `Call` each; a MoE layer's call carries `Routed`: what its router said and what its experts
answered. A visitor may return `LayerWeights`: new values for the layer's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moespresso.core.blueprint import Branch, LayerSpec

# In-memory parameter names inside the layer -> new values.
LayerWeights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Routed:
    """One batch through a MoE block. T tokens (batch and length flattened), k experts each, E experts, width
    H.

    `logits` [T, E] before softmax or sigmoid; `index` [T, k]; `weights` [T, k], the gate really used;
    `outputs` [T, k, H], what each selected expert returned, unweighted; `router_args`, what the router was
    called with.
    """

    hidden: Tensor
    logits: Tensor
    index: Tensor
    weights: Tensor
    outputs: Tensor
    router_args: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One batch through a layer: `input` and `output` [B, L, H], `valid` [B, L] (False: padding).

    `middle` is the residual stream before the feed-forward part, `fed` what that is given behind its norm,
    `answer` what it answers; None where the layer has no such part, or is not a plain sum of branches.
    """

    input: Tensor
    output: Tensor
    valid: Tensor
    routed: Routed | None
    middle: Tensor | None = None
    fed: Tensor | None = None
    answer: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer in memory. `experts` and `router` are None in a dense layer.

    `scores` turns router logits into routing scores (softmax, or sigmoid where the family's router uses it);
    `residual_multiplier` is what the block's output is multiplied with before it joins the residual stream;
    `anatomy` names the modules of its branches (`runtime.anatomy.Anatomy`; None where they cannot be told
    apart).
    """

    spec: LayerSpec
    module: nn.Module
    experts: nn.Module | None = None
    router: nn.Module | None = None
    sigmoid_router: bool = False
    residual_multiplier: float = 1.0
    anatomy: Any = None

    def scores(self, logits: Tensor) -> Tensor:
        """Routing scores [T, E] over all experts, in float32."""
        return logits.float().sigmoid() if self.sigmoid_router else logits.float().softmax(-1)


@dataclass(frozen=True, slots=True)
class Fed:
    """What reaches the routed experts of a layer, T tokens that are no padding: `hidden` [T, H], `index`
    [T, k], and `weights` [T, k], the gate."""

    hidden: Tensor
    index: Tensor
    weights: Tensor


class Taps(Protocol):
    """The calibration batches, run through the layer as they are asked for (once each).

    `fed` runs them as far as the experts, which stay silent, and hands what every module named in `watched`
    is given to its function (tokens [T, in], padding left out).

    A visitor may take the batches through the layer itself: `inputs` are their hidden states [B, L, H],
    `valid` their masks, `branch` runs one branch of the layer by itself on any hidden states of a batch,
    `through` runs every batch through another layer in its place, and `put` says what goes on.
    """

    def __iter__(self) -> Iterator[Call]: ...

    def fed(self, watched: Mapping[str, Callable[[Tensor], None]]) -> list[Fed]: ...

    @property
    def inputs(self) -> list[Tensor]: ...

    @property
    def valid(self) -> list[Tensor]: ...

    def branch(self, number: int, hidden: Tensor, branch: Branch) -> Tensor: ...

    def through(self, module: nn.Module) -> Iterator[Tensor]: ...

    def put(self, number: int, output: Tensor) -> None: ...


def valid_tokens(call: Call) -> Tensor:
    """Indices [N] of the tokens of a call that are not padding."""
    return torch.nonzero(call.valid.reshape(-1)).squeeze(-1)
