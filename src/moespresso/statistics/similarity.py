"""How much a layer turns the residual stream: mean cosines between what goes in and what comes out.

Per layer, over all tokens that are not padding, in float64 (the differences between layers are smaller than what
bfloat16 can tell apart near one):

    cosine      of a block: cos(x, y); of its attention: cos(x, x'); of its feed-forward part with its norm:
                cos(x', y)                                                S^NM of arXiv 2406.02500
    cosine_moe  of the feed-forward part alone: cos(Norm(x'), MoE(Norm(x')))                            its S^M
    run@N       cos(h_i, h_{i+N}) across exactly N blocks, from block i

Runs hold a sample of tokens at the last N boundaries, so that any N fits into a bound.
"""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from moespresso.core.layer import Call, Layer, valid_tokens
from moespresso.core.unit import Unit

# Bytes of hidden states that are held for runs.
RUN_BYTES = 256 << 20

Row = dict[str, float]


class CosineSums:
    """Sums of cosines over the tokens of one layer."""

    def __init__(self) -> None:
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

    def values(self, layer: Layer) -> dict[Unit, Row]:
        """Mean cosines by unit: the block, and its branches."""
        spec = layer.spec
        units = {"block": Unit(spec.index), "attention": spec.unit("attention"), "mlp": spec.unit("mlp")}
        found: dict[Unit, Row] = {}
        for (part, name), total in self._sums.items():
            if part == "block" or part in spec.bodies:
                found.setdefault(units[part], {})[name] = total / self._tokens
        return found


class Runs:
    """Cosines across every run of `length` blocks, on a sample of tokens."""

    def __init__(self, length: int, tokens: int) -> None:
        self._length, self._tokens = length, tokens
        self._held: deque[Tensor] = deque(maxlen=length)

    def add(self, layer: int, calls: list[tuple[Tensor, Tensor]]) -> dict[Unit, Row]:
        """Take in a layer's sampled inputs and outputs; returns the run that ends with it, where there is one."""
        self._held.append(torch.cat([before for before, _ in calls]))
        if len(self._held) < self._length:
            return {}
        after = torch.cat([after for _, after in calls])
        value = torch.cosine_similarity(self._held[0], after, dim=-1).mean()
        return {Unit(layer - self._length + 1): {f"run@{self._length}": float(value)}}

    def sample(self, call: Call) -> tuple[Tensor, Tensor]:
        """Evenly spaced tokens [n, H] of a batch before and after the layer, in float64."""
        tokens, hidden = valid_tokens(call), call.input.shape[-1]
        share = min(1.0, RUN_BYTES / (8 * hidden * (self._length + 1)) / self._tokens)
        count = min(tokens.numel(), math.ceil(share * tokens.numel()))
        tokens = tokens[torch.linspace(0, tokens.numel() - 1, count).round().long()]
        return _rows(call.input, tokens), _rows(call.output, tokens)


def cosines(before: Tensor, after: Tensor, tokens: Tensor) -> Tensor:
    """cos(before, after) of each token [n] in float64, from [B, L, H] (or more, flattened)."""
    return torch.cosine_similarity(_rows(before, tokens), _rows(after, tokens), dim=-1)


def _rows(states: Tensor, tokens: Tensor) -> Tensor:
    """One row a token, all its streams one behind the other where a family has several."""
    flat = states if states.ndim == 2 else states.flatten(0, 1)
    return flat[tokens.to(flat.device)].flatten(1).double()
