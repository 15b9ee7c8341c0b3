"""How much a layer turns the residual stream: mean cosines between what goes in and what comes out.

Per layer, over all tokens that are not padding, in float64 (the differences between layers are smaller than
what bfloat16 can tell apart near one):

    cosine      of a block: cos(x, y); of its attention: cos(x, x'); of its feed-forward part with its norm:
                cos(x', y)                                                S^NM of arXiv 2406.02500
    cosine_moe  of the feed-forward part alone: cos(Norm(x'), MoE(Norm(x')))                            its
                S^M
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moespresso.core.layer import Call, Layer, valid_tokens
from moespresso.core.unit import Unit
from moespresso.statistics.base import LayerSums, Measurement, OfText, Rows
from moespresso.statistics.registry import statistic


@statistic
@dataclass(frozen=True)
class Similarity(OfText):
    """Mean cosines of every block and of its branches."""

    name = "similarity"
    measures = ("cosine", "cosine_moe")

    def begin(self, layer: Layer, measurement: Measurement) -> CosineSums:
        """The sums of one layer."""
        _ = measurement
        return CosineSums(layer)


class CosineSums(LayerSums):
    """Sums of cosines over the tokens of one layer."""

    def __init__(self, layer: Layer) -> None:
        self._spec = layer.spec
        self._sums: dict[tuple[str, str], float] = {}
        self._tokens = 0

    def add(self, call: Call) -> None:
        """Take in one batch."""
        tokens = valid_tokens(call)
        self._tokens += tokens.numel()
        pairs = {("block", "cosine"): (call.input, call.output)}
        if call.middle is not None and call.fed is not None and call.answer is not None:
            pairs |= {
                ("attention", "cosine"): (call.input, call.middle),
                ("mlp", "cosine"): (call.middle, call.output),
                ("mlp", "cosine_moe"): (call.fed, call.answer),
            }
        for name, (before, after) in pairs.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(cosines(before, after, tokens).sum())

    def values(self) -> Rows:
        """Mean cosines by unit: the block, and its branches."""
        spec = self._spec
        units = {"block": Unit(spec.index), "attention": spec.unit("attention"), "mlp": spec.unit("mlp")}
        rows: Rows = {}
        for (part, name), total in self._sums.items():
            if part == "block" or part in spec.bodies:
                rows.setdefault(units[part], {})[name] = total / self._tokens
        return rows


def cosines(before: Tensor, after: Tensor, tokens: Tensor) -> Tensor:
    """cos(before, after) of each token [n] in float64, from [B, L, H] (or more, flattened)."""
    return torch.cosine_similarity(rows_of(before, tokens), rows_of(after, tokens), dim=-1)


def rows_of(states: Tensor, tokens: Tensor) -> Tensor:
    """One row a token in float64, all its streams one behind the other where a family has several."""
    flat = states if states.ndim == 2 else states.flatten(0, 1)
    return flat[tokens.to(flat.device)].flatten(1).double()
