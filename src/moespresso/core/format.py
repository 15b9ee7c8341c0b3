"""Which numbers stand for a matrix: how many bits, how many weights share a scale, how many of them stay.

A `Format` is data. Which tensors those numbers are packed into, and everything that depends on that, is a
codec's (`moespresso.formats`).
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes per element of the safetensors dtypes.
DTYPE_BYTES: dict[str, float] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Format:
    """A storage format; the default is the dtype the source has.

    `group_size` counts weights that share one scale (0: one per output channel). `density` is the share of
    weights that stay when others are pruned: `sparse` stores those with a mask, `source` stores zeros between
    them; there `group_size` m > 0 means n:m, density x m of every m neighbouring inputs. `factors` stores two
    matrices of `rank` whose product it is; `bases` one of them, and the shares of so many `bases` that are
    mixed to the other, which all experts of a layer share; `rows` and `columns` store so many (`rank`) of
    those of a matrix that is zero elsewhere. `ordered`: which group an input is in is stored (act-order), and
    not counted off; sources may have it, plans never give it.
    """

    kind: str = "source"
    bits: int = 16
    group_size: int = 0
    symmetric: bool = True
    density: float = 1.0
    rank: int = 0
    bases: int = 0
    ordered: bool = False
