"""How much exactly N blocks in a row turn the residual stream.

    run@N       cos(h_i, h_{i+N}) across N blocks, from block i                                     arXiv
                2406.02500

the mean over a sample of tokens, in float64. The sample is held at the last N boundaries between layers, so
that any N fits into a bound; a killed measurement starts afresh.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from moespresso.core.layer import Call, Layer, valid_tokens
from moespresso.core.stats import indexed
from moespresso.core.unit import Unit
from moespresso.statistics.base import LayerSums, Measurement, OfText, Rows
from moespresso.statistics.registry import statistic
from moespresso.statistics.similarity import rows_of

# Bytes of hidden states that are held.
RUN_BYTES = 256 << 20


@statistic
@dataclass(frozen=True)
class Runs(OfText):
    """Mean cosines across every run of `length` blocks, kept at the run's first."""

    length: int

    name = "run"
    measures = ("run",)
    resumable = False

    @property
    def need(self) -> str:
        """What a step says to have it measured."""
        return indexed(self.name, self.length)

    def begin(self, layer: Layer, measurement: Measurement) -> RunSums:
        """The run that ends with this layer."""
        before = measurement.held.setdefault(self, deque(maxlen=self.length))
        return RunSums(self, layer.spec.index, before, measurement.num_tokens)


class RunSums(LayerSums):
    """Gathers a sample of tokens before and after one layer; `inputs` are those of the layers before it,
    which its own join."""

    def __init__(self, run: Runs, layer: int, inputs: deque[Tensor], num_tokens: int) -> None:
        self._run, self._layer, self._inputs, self._num_tokens = run, layer, inputs, num_tokens
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []

    def add(self, call: Call) -> None:
        """Take evenly spaced tokens of one batch."""
        tokens, hidden = valid_tokens(call), call.input.shape[-1]
        share = min(1.0, RUN_BYTES / (8 * hidden * (self._run.length + 1)) / self._num_tokens)
        count = min(tokens.numel(), math.ceil(share * tokens.numel()))
        tokens = tokens[torch.linspace(0, tokens.numel() - 1, count).round().long()]
        self._before.append(rows_of(call.input, tokens))
        self._after.append(rows_of(call.output, tokens))

    def values(self) -> Rows:
        """The run's cosine, where as many layers have been seen."""
        self._inputs.append(torch.cat(self._before))
        if len(self._inputs) < self._run.length:
            return {}
        value = torch.cosine_similarity(self._inputs[0], torch.cat(self._after), dim=-1).mean()
        return {Unit(self._layer - self._run.length + 1): {self._run.need: float(value)}}
