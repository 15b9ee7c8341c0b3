"""Products whose second factor is a mixture of bases that the experts of a layer share; only moespresso reads
them.

The matrix is `weight_own` [out, r] times the sum of the bases `weight_bases` [m, r, in], each times its of
the `weight_shares` float32 [m]. The first of a layer's experts stores the bases; all are decoded with them.

Shapes: N matrices of `out` x `in`, m bases of rank r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats.codec import Codec, Parts, Shapes, codec

# Own factors N x out x r, shares N x m and the bases m x r x in of all; axes without a name, since a codec takes one mixture
# and returns another.
Mixture = tuple[Float[Tensor, "_ _ _"], Float[Tensor, "_ _"], Float[Tensor, "_ _ _"]]


def based(
    own: Float[Tensor, "N out r"], shares: Float[Tensor, "N m"], bases: Float[Tensor, "#N m r in"]
) -> Float[Tensor, "N out in"]:
    """What factors with `shares` of `bases` (of each, or of all) stand for, in their dtype."""
    mixed = torch.einsum("nm,nmri->nri", shares, bases.float().expand(len(own), -1, -1, -1))
    return (own.float() @ mixed).to(own.dtype)


@codec
class Bases(Codec):
    """One factor a matrix, and shares of what a layer's experts have in common."""

    layout: ClassVar[str] = "bases"
    kinds: ClassVar[frozenset[str]] = frozenset({"bases"})
    parts: ClassVar[tuple[str, ...]] = ("weight_own", "weight_shares", "weight_bases")
    scaled: ClassVar[str] = "weight_own"
    shared: ClassVar[frozenset[str]] = frozenset({"weight_bases"})
    fitted: ClassVar[bool] = True
    title: ClassVar[str] = "matrices as factors with bases that experts share"
    settings: ClassVar[tuple[str, ...]] = ("group_size", "density", "rank", "bases")

    def shapes(self, format: Format, out: int, width: int, dtype: str) -> Shapes:
        """Its own factor and shares, and the bases."""
        return {
            "weight_own": ((out, format.rank), dtype),
            "weight_shares": ((format.bases,), "F32"),
            "weight_bases": ((format.bases, format.rank, width), dtype),
        }

    def check(self, format: Format, shape: tuple[int, ...], name: str, beside: Iterable[int] = ()) -> None:
        """Raise `UserError` where there can be no such bases."""
        _ = beside
        out, width = shape[-2:]
        if not 0 < format.rank <= width or format.bases < 1:
            raise UserError(f"{name} of {out} x {width} has no {format.bases} bases of rank {format.rank}")

    def check_entry(self, format: Format, expert: int | None, matrix: str, name: str) -> None:
        """Raise `UserError` where a matrix has no layer-mates that read the same."""
        _ = format
        if expert is None or matrix.startswith("down"):
            raise UserError(f"{name} has no bases to share: only gate and up of a layer's experts have")

    def encode(self, numbers: Mixture, format: Format) -> dict[str, Tensor]:
        """The parts, as they are stored; the bases stand once, before all."""
        _ = format
        own, shares, bases = numbers
        return {"weight_own": own, "weight_shares": shares, "weight_bases": bases.unsqueeze(0)}

    def decode(self, parts: Parts, format: Format, shape: tuple[int, int]) -> Tensor:
        """Products with mixed bases; raises `UserError` where the parts do not fit."""
        _ = format
        own, shares, bases = (parts.get(name) for name in self.parts)
        if own is None or shares is None or bases is None or (own.shape[1], bases.shape[3]) != shape or bases.shape[:3] != (len(own), shares.shape[1], own.shape[2]):  # fmt: skip
            raise UserError(
                f"the bases of a matrix of {shape[0]} x {shape[1]} are missing or of other shapes: fetch the files again"
            )
        return based(own, shares, bases)

    def cut(self, numbers: Mixture, expert: int, rows: slice, columns: int) -> Mixture:
        """The parts of one expert; the bases are everybody's."""
        own, shares, bases = numbers
        return own[expert : expert + 1, rows], shares[expert : expert + 1], bases[..., :columns]

    def size(
        self, parts: Mapping[str, TensorRef], format: Format, read: Callable[[TensorRef], list[int]]
    ) -> tuple[int, int]:
        """By its own factor and the bases."""
        _ = format, read
        (out, _), (_, _, width) = parts["weight_own"].shape, parts["weight_bases"].shape
        return out, width

    def words(self, format: Format, ranks: str) -> str:
        """Ranks and bases."""
        return f"products of rank {ranks} with {format.bases} bases that experts share"
