"""What a visitor of the loop is handed: one loaded layer, and what flows through it.

`Layer` is a decoder layer with its weights in memory. Iterating `Taps` runs the layer over the calibration batches,
one `Call` each; a MoE layer's call carries `Routed`: what its router said and what its experts answered.
A visitor may return `LayerWeights`: new values for the layer's parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moespresso.core.blueprint import LayerSpec

# In-memory parameter names inside the layer -> new values.
LayerWeights = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Routed:
    """One batch through a MoE block. T tokens (batch and length flattened), k experts each, E experts, width H.

    `logits` [T, E] before softmax or sigmoid; `index` [T, k]; `weights` [T, k], the gate really used;
    `outputs` [T, k, H], what each selected expert returned, unweighted; `router_args`, what the router was called with.
    """

    hidden: Tensor
    logits: Tensor
    index: Tensor
    weights: Tensor
    outputs: Tensor
    router_args: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One batch through a layer: `input` and `output` [B, L, H], `valid` [B, L] (False: padding)."""

    input: Tensor
    output: Tensor
    valid: Tensor
    routed: Routed | None


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer in memory. `experts` and `router` are None in a dense layer.

    `scores` turns router logits into routing scores (softmax, or sigmoid where the family's router uses it);
    `residual_multiplier` is what the block's output is multiplied with before it joins the residual stream.
    """

    spec: LayerSpec
    module: nn.Module
    experts: nn.Module | None = None
    router: nn.Module | None = None
    sigmoid_router: bool = False
    residual_multiplier: float = 1.0

    def scores(self, logits: Tensor) -> Tensor:
        """Routing scores [T, E] over all experts, in float32."""
        return logits.float().sigmoid() if self.sigmoid_router else logits.float().softmax(-1)


class Taps(Protocol):
    """The calibration batches, run through the layer as they are asked for (once each)."""

    def __iter__(self) -> Iterator[Call]: ...


def valid_tokens(call: Call) -> Tensor:
    """Indices [N] of the tokens of a call that are not padding."""
    return torch.nonzero(call.valid.reshape(-1)).squeeze(-1)
