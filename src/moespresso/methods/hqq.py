"""Half-quadratic quantization (HQQ): grids of least sum |error|^p with p = 0.7, without any text.

Few large errors weigh little under such a norm, so the grid follows the bulk of the weights. The kernel and
its formula are in `kernels/hqq.py`; the published one also lets zeros be fractions, which no integer format
stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.method import Quantizes
from moespresso.core.registry import method
from moespresso.formats import QuantizedWeights
from moespresso.kernels import hqq
from moespresso.methods._quantization import Quantization


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class Hqq(Quantization, Quantizes):
    """Settings of one half-quadratic quantization.

    p: the norm of the error, in (0, 1).
    iterations: turns at most; a group rests when its error no longer falls.
    """

    kind: ClassVar[str] = "hqq"
    p: float = 0.7
    iterations: int = 20

    def __post_init__(self) -> None:
        """Refuse what the formula does not allow."""
        Quantization.__post_init__(self)
        if not 0 < self.p < 1:
            raise UserError(f"hqq: p={self.p} must lie between 0 and 1")
        if self.iterations < 1:
            raise UserError(f"hqq: iterations={self.iterations} must be at least 1")

    def quantize(self, weights: Tensor, format: Format, dtype: torch.dtype) -> QuantizedWeights:
        """Codes of `weights` [N, out, in], with scales stored as `dtype`."""
        return hqq.quantize(weights, format, dtype, hqq.Settings(p=self.p, iterations=self.iterations))
