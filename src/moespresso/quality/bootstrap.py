"""Confidence by resampling sequences: tokens within one sequence are not independent, sequences nearly
are."""

from __future__ import annotations

import torch
from torch import Tensor

_RESAMPLES = 2000


def mean_interval(sums: Tensor, counts: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """Mean of all tokens and its 95% interval (percentile bootstrap), from sums and token counts [N] per
    sequence.

    One sequence gives an interval of no width: nothing is known about the spread.
    """
    sums, counts = sums.double(), counts.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(sums), (_RESAMPLES, len(sums)), generator=generator)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(sums.sum() / counts.sum()), low, high
