"""Round to nearest: every weight goes to the closest level of its grid, whatever the inputs are.

The plainest way to quantize, and the mark that others must beat. It needs no text, so it also serves experts
that no token reached.

Codes of least squared error are too small: what is lost of a weight is uncorrelated with its code, not with
the weight, so q points less far in the direction of w than w does. Each row's output shrinks a little, in
every layer in the same direction, and that adds up where random errors cancel. `unbias` lengthens the scales
of each row by

    (w H w^T) / (w H q^T)        H = Hessian of the inputs, or the identity

which costs some squared error in the layer, and saves more in the model's own output.

Shapes: N matrices of `out` x `in`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moespresso.core.format import Format
from moespresso.formats.grids import Search, minmax, searched, stored
from moespresso.formats.integer import QuantizedWeights, decode, encode, slabs

Scales = Literal["searched", "minmax"]


def round_nearest(
    weights: Float[Tensor, "N out in"],
    format: Format,
    dtype: torch.dtype,
    scales: Scales = "searched",
    *,
    unbiased: bool = True,
    signed: bool = True,
) -> QuantizedWeights:
    """Codes of `weights`, with scales stored as `dtype` that were chosen as `scales` says."""
    if scales == "searched":
        scale, zero = searched(weights, format, dtype, search=Search(signed=signed))
    else:
        scale, zero = minmax(weights, format, dtype, signed=signed)
    codes = encode(weights, scale, zero, format)
    return unbias(weights, codes) if unbiased else codes


def unbias(
    weights: Float[Tensor, "N out in"],
    codes: QuantizedWeights,
    hessians: Float[Tensor, "N in in"] | None = None,
) -> QuantizedWeights:
    """The same codes with each row's scales times (w H w^T) / (w H q^T), where that is between 1/2 and 2."""
    scale = torch.empty_like(codes.scale)
    for part in slabs(weights.shape):
        rows = weights[part].float()
        toward = rows if hessians is None else rows @ hessians[part[0]]
        slab = QuantizedWeights(codes.format, codes.values[part], codes.scale[part], codes.zero[part])
        factor = (toward * rows).sum(-1, keepdim=True) / (toward * decode(slab).float()).sum(-1, keepdim=True)
        factor = torch.where((factor > 0.5) & (factor < 2), factor, torch.ones_like(factor))
        scale[part] = stored(slab.scale.float() * factor, scale.dtype)
    return replace(codes, scale=scale)
