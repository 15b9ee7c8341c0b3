"""Running sums over the tokens of a layer, from which the whole family of expert scores follows.

One pass gathers, for every expert j with its routed tokens X_j, gate weight g, answer f_j and routing score s
(softmax or sigmoid of the router's logits): counts, sums of s, of g, of ||f_j||, ||f_j||^2, g ||f_j||, s
||f_j||, and of c_t g ||f_j|| with c_t = 1 - cos(residual stream before, after the routed experts). Nothing
per token is kept. Sums are float64; padding is left out of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moespresso.core.layer import Call, Layer, valid_tokens
from moespresso.core.unit import Unit
from moespresso.statistics.base import LayerSums, Measurement, OfExperts, Rows
from moespresso.statistics.registry import statistic

# name of a sum -> what it adds up; E values each
SUMS = (
    "tokens",
    "score",
    "score_selected",
    "gate",
    "norm",
    "norm_squared",
    "gate_norm",
    "score_norm",
    "change_gate_norm",
)


@statistic
@dataclass(frozen=True)
class Routing(OfExperts):
    """Sums per expert and, of a layer's experts together, its `tokens`, whether its gates are plain shares of
    one softmax, and whether they answer in another (latent) width than their router sees."""

    name = "routing"
    measures = (*SUMS, "largest", "softmax_gates", "latent")

    def begin(self, layer: Layer, measurement: Measurement) -> RoutingSums:
        """The sums of one layer."""
        _ = measurement
        return RoutingSums(layer)


class RoutingSums(LayerSums):
    """Accumulates the sums of one MoE layer."""

    def __init__(self, layer: Layer) -> None:
        self._layer, self._experts = layer, layer.spec.experts
        self._total_tokens = 0
        self._sums = {name: torch.zeros(self._experts, dtype=torch.float64) for name in SUMS}
        self._largest = torch.zeros(self._experts, dtype=torch.float64)
        self._router_args: tuple[Tensor, ...] = ()
        self._nonfinite = 0
        self._one_stream, self._latent = True, False

    def add(self, call: Call) -> None:
        """Take in one batch."""
        layer, routed = self._layer, call.routed
        assert routed is not None
        tokens = valid_tokens(call)
        index, gate = routed.index[tokens], routed.weights[tokens].float()
        # The largest tensor of all: copied only where there is padding to leave out.
        outputs = routed.outputs if bool(call.valid.all()) else routed.outputs[tokens]
        outputs, scores = outputs.float(), layer.scores(routed.logits[tokens])
        norm = outputs.norm(dim=-1)
        self._nonfinite += int((~norm.isfinite()).sum())
        chosen = scores.gather(1, index)
        # Some families carry several hidden states a token, or experts answer in a width of their own: what an expert turns
        # is then not to be told from outside.
        self._latent = outputs.shape[-1] != routed.router_args[0].shape[-1]
        self._one_stream = call.output.shape == (*call.valid.shape, outputs.shape[-1])
        change = (
            _change(layer, call, tokens, outputs, gate) if self._one_stream else torch.zeros_like(norm[:, 0])
        )
        self._total_tokens += tokens.numel()
        if not self._router_args:
            first, *rest = routed.router_args
            # One token, in as many dimensions as the router is used to.
            one = first.reshape(-1, first.shape[-1])[:1].view(*[1] * (first.ndim - 1), -1)
            self._router_args = (one, *rest)
        self._sums["score"] += scores.sum(0).double().cpu()
        per_slot = {"tokens": torch.ones_like(norm), "score_selected": chosen, "gate": gate, "norm": norm,
                    "norm_squared": norm**2, "gate_norm": gate * norm, "score_norm": chosen * norm,
                    "change_gate_norm": change.unsqueeze(1) * gate * norm}  # fmt: skip
        for name, values in per_slot.items():
            self._sums[name] += _by_expert(values, index, self._experts)
        peaks = torch.linalg.vector_norm(outputs, math.inf, dim=-1).double().cpu().reshape(-1)
        self._largest.scatter_reduce_(0, index.reshape(-1).cpu(), peaks, "amax")

    def values(self) -> Rows:
        """Every sum that is defined per expert, and `largest`, the largest absolute value an expert ever
        answered; of the layer its tokens, and whether its gates are plain shares of one softmax, and its
        experts latent (1) or not (0)."""
        index = self._layer.spec.index
        columns = {
            name: sums.tolist()
            for name, sums in self._sums.items()
            if self._one_stream or name != "change_gate_norm"
        }
        columns["largest"] = self._largest.tolist()
        rows: Rows = {
            Unit(index, "experts", expert): {name: column[expert] for name, column in columns.items()}
            for expert in range(self._experts)
        }
        of_layer = {
            "tokens": float(self._total_tokens),
            "softmax_gates": float(self._softmax_gates(self._layer)),
            "latent": float(self._latent),
        }
        return rows | {Unit(index, "experts"): of_layer}

    def warnings(self) -> list[str]:
        """Experts that no token reached, and answers that are no numbers."""
        return list(self._warnings(self._layer.spec.index))

    def _warnings(self, layer: int) -> Iterator[str]:
        unreached = [expert for expert, count in enumerate(self._sums["tokens"].tolist()) if count == 0]
        if unreached:
            names = ", ".join(str(Unit(layer, "experts", expert)) for expert in unreached)
            yield f"no calibration token reached {names}: every score but routing puts them last"
        if self._nonfinite:
            yield f"L{layer}: {self._nonfinite} answers of experts were not finite"

    def _softmax_gates(self, layer: Layer) -> bool:
        """Gates are routing scores times one factor, the same for every expert on this text and for a
        token without any preference. (A router that renormalises over the selected experts can look so on
        text where it is sure.)"""
        reached = self._sums["score_selected"] > 0
        if layer.sigmoid_router or not bool(reached.any()):
            return False
        factors = self._sums["gate"][reached] / self._sums["score_selected"][reached]
        assert layer.router is not None
        logits, gate, index = layer.router(torch.zeros_like(self._router_args[0]), *self._router_args[1:])
        undecided = gate.double().sum() / layer.scores(logits).gather(1, index).double().sum()
        factors = torch.cat([factors, undecided.cpu().reshape(1)])
        return float(factors.max() - factors.min()) < 1e-2 * float(factors.mean())


def _by_expert(values: Tensor, index: Tensor, experts: int) -> Tensor:
    """Sum [T, k] `values` by the expert each slot selected."""
    sums = torch.zeros(experts, dtype=torch.float64)
    return sums.index_add_(0, index.reshape(-1).cpu(), values.reshape(-1).double().cpu())


def _change(layer: Layer, call: Call, tokens: Tensor, outputs: Tensor, gate: Tensor) -> Tensor:
    """c_t = 1 - cos(before, after) [N]: how far the routed experts turn the residual stream."""
    # In float64: 1 - cos of nearly parallel vectors loses all digits otherwise.
    after = call.output.reshape(-1, call.output.shape[-1])[tokens].double()
    routed = torch.einsum("tkh,tk->th", outputs, gate).double() * layer.residual_multiplier
    return (1 - torch.cosine_similarity(after - routed, after, dim=-1)).float()
