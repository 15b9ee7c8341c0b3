"""Round to nearest: every weight goes to the nearest level of its group's grid, without any text.

    q = round(w / s) + z,     w' = (q - z) s,     s from the extremes of the group, or of the least sum |w -
                              w'|^2.4

The plainest way to round, and the mark that the others are measured by. Each row's scales are then lengthened
by what rounding took from its output (`formats/rounding.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moespresso.core.format import Format
from moespresso.core.method import Quantizes
from moespresso.core.registry import method
from moespresso.formats import QuantizedWeights, Scales, round_nearest
from moespresso.methods._quantization import Quantization


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class Rtn(Quantization, Quantizes):
    """Settings of one rounding to nearest.

    scales: `searched` shrinks each group's range to where the rounding error is least, `minmax` takes it as
        it is.
    unbiased: lengthen the scales of each row by what rounding took from its output.
    """

    kind: ClassVar[str] = "rtn"
    scales: Scales = "searched"
    unbiased: bool = True

    def quantize(self, weights: Tensor, format: Format, dtype: torch.dtype) -> QuantizedWeights:
        """Codes of `weights` [N, out, in], with scales stored as `dtype`."""
        return round_nearest(weights, format, dtype, self.scales, unbiased=self.unbiased)
