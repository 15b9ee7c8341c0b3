"""How alike the experts of a layer are, pair by pair, on a sample of tokens that all of them answer.

output_distance@J  || mean_x f_i - mean_x f_J ||                        HC-SMoE, arXiv 2410.08589
logit_cosine@J     cosine of their router logits over the tokens        M-SMoE, arXiv 2310.01334
gated_cosine@J     cosine of their answers times routing score, taken over all tokens at once
profile_cosine@J   cosine of their routing scores over the tokens       both REAM, arXiv 2604.04356
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moespresso.core.layer import Call, Layer
from moespresso.core.stats import indexed, split_index
from moespresso.core.unit import Unit
from moespresso.statistics.base import LayerSums, Measurement, OfExperts, Rows
from moespresso.statistics.registry import statistic
from moespresso.statistics.sample import Sample


@statistic
@dataclass(frozen=True)
class Pairs(OfExperts):
    """How alike every two experts of a layer are; the index of a value is the other expert."""

    name = "pairs"
    measures = ("output_distance", "logit_cosine", "gated_cosine", "profile_cosine")

    def begin(self, layer: Layer, measurement: Measurement) -> PairSample:
        """A sample of one layer's tokens."""
        return PairSample(layer, Sample.of(layer, measurement.num_tokens))

    @classmethod
    def restrict(cls, row: Mapping[str, float], kept: Sequence[int]) -> dict[str, float]:
        """Pairs that are left, by their new numbers."""
        positions = {expert: position for position, expert in enumerate(kept)}
        pairs = {split_index(name): value for name, value in row.items()}
        return {
            indexed(name, positions[other]): value
            for (name, other), value in pairs.items()
            if other is not None and other in positions
        }


class PairSample(LayerSums):
    """Collects a sample of a layer's tokens, and asks all experts about it in the end."""

    def __init__(self, layer: Layer, sample: Sample) -> None:
        self._layer, self._sample = layer, sample

    def add(self, call: Call) -> None:
        """Take the batch's share."""
        self._sample.add(call)

    def values(self) -> Rows:
        """The values of every expert for every other one."""
        columns, spec = pair_values(self._layer, self._sample), self._layer.spec
        return {
            Unit(spec.index, "experts", expert): {name: column[expert] for name, column in columns.items()}
            for expert in range(spec.experts)
        }


def pair_values(layer: Layer, sample: Sample) -> dict[str, list[float]]:
    """`NAME@J` of every expert for every other one J."""
    answers, scores = sample.answers(layer), layer.scores(sample.logits)
    means = answers.mean(0)
    gated = (answers * scores.unsqueeze(-1)).transpose(0, 1).flatten(1)
    tables = {
        "output_distance": torch.cdist(
            means.double(), means.double(), compute_mode="donot_use_mm_for_euclid_dist"
        ),
        "logit_cosine": _cosines(sample.logits.float().T),
        "gated_cosine": _cosines(gated),
        "profile_cosine": _cosines(scores.T),
    }
    return {
        indexed(name, other): column.tolist()
        for name, table in tables.items()
        for other, column in enumerate(table.T)
    }


def _cosines(rows: Tensor) -> Tensor:
    """Cosines of all pairs of rows [E, E]."""
    unit = F.normalize(rows.double(), dim=-1)
    return unit @ unit.T
