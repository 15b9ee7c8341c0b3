"""Mean answer of every expert over the tokens that are routed to it: what a novice says in its place
(MoNE)."""

from __future__ import annotations

import torch
from torch import Tensor

from moespresso.core.layer import Layer, Taps, valid_tokens


class MeanAnswers:
    """Visits the layers of a sweep; `values[layer]` [E, H] in float32, zeros for an expert that no token
    reached."""

    def __init__(self, layers: set[int]) -> None:
        self._layers = layers
        self.values: dict[int, Tensor] = {}

    def __call__(self, layer: Layer, taps: Taps) -> None:
        """Add up one layer."""
        if layer.spec.index not in self._layers:
            return
        sums, counts = torch.zeros(()), torch.zeros(layer.spec.experts, dtype=torch.float64)
        for call in taps:
            assert call.routed is not None
            tokens = valid_tokens(call)
            index, outputs = call.routed.index[tokens].reshape(-1), call.routed.outputs[tokens].flatten(0, 1)
            each = outputs.new_zeros(layer.spec.experts, outputs.shape[-1], dtype=torch.float64)
            sums = sums + each.index_add_(0, index, outputs.double()).cpu()
            counts += torch.bincount(index, minlength=layer.spec.experts).cpu()
        self.values[layer.spec.index] = (sums / counts.clamp_min(1).unsqueeze(-1)).float()
