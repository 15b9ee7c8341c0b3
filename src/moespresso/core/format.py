"""How a matrix is stored, and what one of its weights costs.

A `Format` says which numbers stand for a matrix (how many bits, how many weights share a scale). A `Layout` says which
tensors those numbers are packed into, as one family of engines reads them; `stored_parts` lists them from the shape
alone, so a plan is priced without reading a weight.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from moespresso.core.errors import UserError

Layout = Literal["compressed-tensors", "gptq", "awq", "bitmask", "factors", "bases", "slices"]
# What packed matrices can be laid out as when they are written again: not packed at all, too.
Form = Layout | Literal["plain"]
# Layouts of matrices that are no integers, which only moespresso reads.
OWN_LAYOUTS: frozenset[Layout] = frozenset({"bitmask", "factors", "bases", "slices"})
# Parts that the matrices of a layer's experts share: one of them stores such a part, and all are decoded with it.
SHARED_PARTS = frozenset({"weight_bases"})

# The widths of a value that each layout can hold.
LAYOUT_BITS: dict[Layout, tuple[int, ...]] = {
    "compressed-tensors": (2, 3, 4, 8),
    "gptq": (2, 3, 4, 8),
    "awq": (4,),
}
WORD_BITS = 32

# Bytes per element of the safetensors dtypes.
DTYPE_BYTES: dict[str, float] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F4": 0.5, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Format:
    """A storage format; the default is the dtype the source has.

    `group_size` counts weights that share one scale (0: one per output channel). `density` is the share of weights that
    stay when others are pruned: `sparse` stores those with a mask, `source` stores zeros between them; there
    `group_size` m > 0 means n:m, density x m of every m neighbouring inputs. `factors` stores two matrices of `rank`
    whose product it is; `bases` one of them, and the shares of so many `bases` that are mixed to the other, which all
    experts of a layer share; `rows` and `columns` store so many (`rank`) of those of a matrix that is zero elsewhere.
    `ordered`: which group an input is in is stored (act-order), and not counted off; sources may have it, plans never give it.
    """

    kind: Literal["source", "integer", "sparse", "factors", "bases", "rows", "columns"] = "source"
    bits: int = 16
    group_size: int = 0
    symmetric: bool = True
    density: float = 1.0
    rank: int = 0
    bases: int = 0
    ordered: bool = False

    def bits_per_weight(self, scale_bits: int = 16) -> float:
        """Return stored bits per weight, scales, zeros and the sparse mask included.

        This is the price of a large matrix as compressed-tensors stores it. What a layout adds per matrix, row or
        column (the one scale of a channel, `weight_shape`, GPTQ's `g_idx`, the zeros that GPTQ and AWQ store for
        symmetric formats too) is left out: `stored_parts` has the exact shapes.
        """
        dense = self.kind == "source" or self.density == 1
        bits = float(self.bits) if dense else self.bits * self.density + 1
        if self.kind == "integer" and self.group_size:
            bits += (scale_bits + (0 if self.symmetric else self.bits)) / self.group_size
        return bits


def check_group(width: int, format: Format, what: str, beside: Iterable[int] = ()) -> None:
    """Raise `UserError` where `format` cannot cut `width` inputs of `what` into whole groups; the cure is one that takes the
    widths of the matrices `beside` it too, which have the same setting."""
    size = format.group_size
    if size and width % size:
        fitting = _dividing((128, 64, 32, 16, 8), (width, *beside))
        cure = f"group_size={fitting[0]}" if fitting else "group_size=0 (one scale per channel)"
        raise UserError(f"{what} has {width} inputs, which groups of {size} do not divide: use {cure}")


def _dividing(sizes: Iterable[int], widths: Collection[int]) -> list[int]:
    """Those of some sizes of groups that divide all widths."""
    return [size for size in sizes if all(width % size == 0 for width in widths)]


def check_pattern(width: int, format: Format, what: str, beside: Iterable[int] = ()) -> None:
    """Raise `UserError` where `format` cannot prune `width` inputs of `what`: a share that is none, groups that do not fit; the
    cure fits the widths of the matrices `beside` it too."""
    size = format.group_size
    if not 0 < format.density <= 1:
        raise UserError(f"{what}: a density of {format.density:g} is no share between 0 and 1")
    if size and width % size:
        fitting = _dividing((4, 8, 16, 2), (width, *beside))
        cure = f"such as {fitting[0] // 2}:{fitting[0]}" if fitting else ""
        cure = f"another pattern, {cure}" if cure else f"a plain share such as {1 - format.density:g}"
        raise UserError(f"{what} has {width} inputs, which groups of {size} do not divide: use {cure}")


def layout_of(format: Format) -> Layout:
    """The layout that a matrix of `format` is stored in first."""
    return _LAYOUTS.get(format.kind, "compressed-tensors")


_LAYOUTS: dict[str, Layout] = {
    "sparse": "bitmask",
    "factors": "factors",
    "bases": "bases",
    "rows": "slices",
    "columns": "slices",
}


def kept_in_row(format: Format, width: int) -> int:
    """Number of weights that stay in a row of `width` inputs where every row keeps the same number; raises `UserError`
    where the row is not whole groups."""
    size = format.group_size
    if not size:
        return staying(width, format)
    if width % size:
        raise UserError(f"rows of {width} inputs are not whole groups of {size}: use a plain share")
    return width // size * staying(size, format)


def staying(width: int, format: Format) -> int:
    """How many of `width` inputs stay: at least one where any shall."""
    return max(int(format.density > 0), round(format.density * width))


def stored_parts(
    layout: Layout, format: Format, out: int, width: int, scale_dtype: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return every tensor that a matrix of `out` x `width` is stored as: suffix -> (shape, safetensors dtype).

    A part is named by the weight's name with the suffix in the place of `weight`. `scale_dtype` is the safetensors
    dtype of the scales in compressed-tensors, and of values and factors; GPTQ and AWQ have F16 scales always. Raises `UserError` where the
    layout cannot hold such a matrix.
    """
    if layout == "bitmask":
        kept = out * kept_in_row(format, width)
        return {"weight_values": ((kept,), scale_dtype), "weight_mask": ((out, -(-width // 8)), "U8"),
                "weight_shape": ((2,), "I64")}  # fmt: skip
    if layout == "factors":
        return {"weight_left": ((out, format.rank), scale_dtype), "weight_right": ((format.rank, width), scale_dtype)}  # fmt: skip
    if layout == "bases":
        return {"weight_own": ((out, format.rank), scale_dtype), "weight_shares": ((format.bases,), "F32"),
                "weight_bases": ((format.bases, format.rank, width), scale_dtype)}  # fmt: skip
    if layout == "slices":
        kept = (format.rank, width) if format.kind == "rows" else (out, format.rank)
        return {"weight_kept": (kept, scale_dtype), "weight_index": ((format.rank,), "I32"),
                "weight_shape": ((2,), "I64")}  # fmt: skip
    check_layout(layout, format, out, width)
    bits, groups = format.bits, width // (format.group_size or width)
    if layout == "compressed-tensors":
        parts = {
            "weight_packed": ((out, _words(width, bits)), "I32"),
            "weight_scale": ((out, groups), scale_dtype),
            "weight_shape": ((2,), "I64"),
        }
        if format.ordered:
            parts["weight_g_idx"] = ((width,), "I32")
        return (
            parts if format.symmetric else parts | {"weight_zero_point": ((_words(out, bits), groups), "I32")}
        )
    parts = {"qzeros": ((groups, _words(out, bits)), "I32"), "scales": ((groups, out), "F16")}
    if layout == "gptq":
        return {"qweight": ((_words(width, bits), out), "I32"), **parts, "g_idx": ((width,), "I32")}
    return {"qweight": ((width, _words(out, bits)), "I32"), **parts}


def check_layout(layout: Layout, format: Format, out: int, width: int) -> None:
    """Raise `UserError` where `layout` cannot hold a matrix of `out` x `width` in `format`."""
    if format.kind != "integer":
        raise UserError(
            f"{layout} stores integers, not matrices that are pruned, cut or of low rank: round them first"
        )
    if layout == "awq" and format.ordered:
        raise UserError(
            "awq counts groups off and cannot store inputs in an order of their own (act-order): use the layout gptq"
        )
    known = LAYOUT_BITS[layout]
    if format.bits not in known:
        others = "" if layout == "compressed-tensors" else ", or the layout compressed-tensors"
        choice = " or ".join(f"bits={bits}" for bits in known)
        raise UserError(f"{layout} cannot store values of {format.bits} bits: use {choice}{others}")
    check_group(width, format, f"a matrix of {out} x {width}")
    if layout == "compressed-tensors":
        return  # it pads the last word of a row
    whole = WORD_BITS // math.gcd(WORD_BITS, format.bits)  # as many values as fill words to the last bit
    sides = {"outputs": out, "inputs": width} if layout == "gptq" else {"outputs": out}
    for side, count in sides.items():
        if count % whole:
            raise UserError(
                f"{layout} packs {format.bits}-bit values by {whole}, which do not divide the {count} {side} of a "
                f"matrix of {out} x {width}: use the layout compressed-tensors"
            )


def _words(count: int, bits: int) -> int:
    """Words of 32 bits that `count` values fill when they are laid end to end, across the borders of words."""
    return -(-count * bits // WORD_BITS)
