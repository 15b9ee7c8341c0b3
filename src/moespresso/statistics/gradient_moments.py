"""Second moments of the loss's gradient along what every channel of an expert writes.

Expert j answers f = sum_k a_k w_k, the columns w_k of its down projection times what its channels hold, and
is weighted with the gate g. The empirical Fisher information G_j = E[d d^T], with d = dL/df = g dL/dy (y: the
weighted sum of all experts), stands for the curvature of the loss L at that answer. Along one column it is a
number,

    w_k^T G_j w_k  =  E_t[(g_t  dL/dy_t . w_k)^2]

so that leaving out channel k costs about s_jk = E[a_jk^2] w_k^T G_j w_k (HEAPr, arXiv 2509.22299). G_j [H, H]
is never built. L is the *sum* of the cross-entropies of all predicted tokens: a mean would make d smaller the
longer the text is, until squares of it are lost in rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moespresso.core.layer import Fed, Layer
from moespresso.kernels import RoutedExperts


@dataclass(frozen=True, slots=True)
class FedGradient(Fed):
    """What reaches the routed experts of a layer, and `grad` [T, H]: the gradient of the summed loss with
    respect to what they answer together (the sum weighted by the gate)."""

    grad: Tensor


class GradientMoments:
    """Visits the layers of a sweep back and keeps `values[layer]` [E, I]: w_k^T G_j w_k, zeros for experts
    without a token."""

    def __init__(self) -> None:
        self.values: dict[int, Tensor] = {}

    def __call__(self, layer: Layer, batches: Iterable[FedGradient]) -> None:
        """Measure one layer."""
        experts: Any = layer.experts
        down = experts.down_proj.mT if experts.is_transposed else experts.down_proj
        sums = torch.zeros(len(down), down.shape[2], device=down.device)
        tokens = torch.zeros(len(down), dtype=torch.long, device=down.device)
        for batch in batches:
            routed = RoutedExperts.of(experts, [batch])
            tokens += routed.tokens
            for expert, slopes in _slopes(routed, batch.grad, down):
                sums[expert] += slopes.square().sum(0)
        self.values[layer.spec.index] = sums / tokens.clamp_min(1).unsqueeze(1)


def _slopes(routed: RoutedExperts, grad: Tensor, down: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The gradient along every column of an expert's `down` [H, I], at each of its tokens [n, I]."""
    for expert in routed.tokens.nonzero().flatten().tolist():
        rows, gates = routed.rows(expert)
        yield expert, gates.float().unsqueeze(1) * (grad[rows].float() @ down[expert].float())
