"""How a matrix is stored, and what one of its weights costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Bytes per element of the safetensors dtypes.
DTYPE_BYTES: dict[str, float] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Format:
    """A storage format; the default is the dtype the source has.

    `group_size` counts weights that share one scale (0: one per output channel); `density` is the share of
    weights that are stored.
    """

    kind: Literal["source", "integer", "sparse"] = "source"
    bits: int = 16
    group_size: int = 0
    symmetric: bool = True
    density: float = 1.0

    def bits_per_weight(self, scale_bits: int = 16) -> float:
        """Return stored bits per weight, scales, zeros and the sparse mask included."""
        bits = self.bits * self.density + (1.0 if self.density < 1 else 0.0)
        if self.kind == "integer" and self.group_size:
            bits += (scale_bits + (0 if self.symmetric else self.bits)) / self.group_size
        return bits
