"""What an expert's stored tensor is: which of its matrices, and which axes run along channels and along the
output."""

from __future__ import annotations

import re
from typing import Any


def axes_of_expert(matrix: str, experts: Any) -> dict[str, Any]:
    """Of an expert's tensor: both axes counted from the last, as some are stored one by one and some in a
    stack."""
    rows, columns = (-1, -2) if experts.is_transposed else (-2, -1)
    if matrix == "novices":
        return {"out_axis": -1}
    if matrix.startswith("down"):
        return {"out_axis": -1} if matrix.endswith("_bias") else {"out_axis": rows, "channel_axis": columns}
    joined = (
        ("halves" if getattr(experts, "is_concatenated", True) else "interleaved")
        if matrix.startswith("gate_up")
        else ""
    )
    return {"channel_axis": -1 if matrix.endswith("_bias") else rows, "joined": joined}


def matrix_of_expert(inner: str, pattern: str | None) -> str:
    """`gate`, `up`, `down`, or `gate_up` where both are stored as one; biases end in `_bias`."""
    stem = inner.removeprefix("experts.").removesuffix("_bias")
    bias = "_bias" if inner.endswith("_bias") else ""
    if stem == "gate_up_proj" and pattern is not None:
        for role, words in (("gate", ("gate_proj", "w1")), ("up", ("up_proj", "w3"))):
            if any(re.search(rf"\b{word}\b", pattern) for word in words):
                return role + bias
    return stem.removesuffix("_proj") + bias
