"""How alike the experts of a layer are, pair by pair, on a sample of tokens that all of them answer.

output_distance@J  || mean_x f_i - mean_x f_J ||                        HC-SMoE, arXiv 2410.08589
logit_cosine@J     cosine of their router logits over the tokens        M-SMoE, arXiv 2310.01334
gated_cosine@J     cosine of their answers times routing score, taken over all tokens at once
profile_cosine@J   cosine of their routing scores over the tokens       both REAM, arXiv 2604.04356
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moespresso.core.layer import Layer
from moespresso.statistics.sample import Sample

PAIRS = ("output_distance", "logit_cosine", "gated_cosine", "profile_cosine")


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
        f"{name}@{other}": column.tolist()
        for name, table in tables.items()
        for other, column in enumerate(table.T)
    }


def _cosines(rows: Tensor) -> Tensor:
    """Cosines of all pairs of rows [E, E]."""
    unit = F.normalize(rows.double(), dim=-1)
    return unit @ unit.T
