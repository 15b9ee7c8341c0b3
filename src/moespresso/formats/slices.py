"""Matrices of which whole rows or columns went; only moespresso reads them.

`weight_kept` [n, in] (`rows`) or [out, n] (`columns`) stand at the ascending places `weight_index` int32 [n]
of a matrix of `weight_shape` that is zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats.codec import Codec, Parts, Shapes, codec


@codec
class Slices(Codec):
    """Some rows, or some columns."""

    layout: ClassVar[str] = "slices"
    kinds: ClassVar[frozenset[str]] = frozenset({"rows", "columns"})
    parts: ClassVar[tuple[str, ...]] = ("weight_kept", "weight_index", "weight_shape")
    scaled: ClassVar[str] = "weight_kept"
    fitted: ClassVar[bool] = True
    title: ClassVar[str] = "matrices without the rows or columns that went"

    def shapes(self, format: Format, out: int, width: int, dtype: str) -> Shapes:
        """What is kept, where it stands, and the whole shape."""
        kept = (format.rank, width) if _axis(format) == 1 else (out, format.rank)
        return {
            "weight_kept": (kept, dtype),
            "weight_index": ((format.rank,), "I32"),
            "weight_shape": ((2,), "I64"),
        }

    def check(self, format: Format, shape: tuple[int, ...], name: str, beside: Iterable[int] = ()) -> None:
        """Raise `UserError` where there are no such rows or columns."""
        _ = beside
        out, width = shape[-2:]
        if not 0 < format.rank <= (out, width)[_axis(format) - 1]:
            raise UserError(f"{name} of {out} x {width} has no {format.rank} {format.kind} to keep")

    def encode(self, numbers: Tensor, format: Format) -> dict[str, Tensor]:
        """Those rows or columns of weights that are not all zero, and the first others where these are
        fewer than the format says."""
        weights, axis = numbers, _axis(format)
        alive = (weights != 0).any(3 - axis)
        most = int(alive.sum(1).max())
        if most > format.rank:
            raise UserError(
                f"{most} {format.kind} of a matrix are not zero, of which the format keeps {format.rank}: cut it to that first"
            )
        order = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        index = order[:, : format.rank].sort(dim=1).values
        kept = torch.stack([one.index_select(axis - 1, own) for one, own in zip(weights, index, strict=True)])
        return {
            "weight_kept": kept,
            "weight_index": index.to(torch.int32),
            "weight_shape": torch.tensor([weights.shape[1:]] * len(weights)),
        }

    def decode(self, parts: Parts, format: Format, shape: tuple[int, int]) -> Tensor:
        """The matrices [N, out, in], zero where nothing is stored; raises `UserError` where the parts do
        not fit."""
        kept, index, stated = (parts.get(name) for name in self.parts)
        axis, size = _axis(format), list(shape)
        size[axis - 1] = format.rank
        if (
            kept is None
            or index is None
            or stated is None
            or list(kept.shape[1:]) != size
            or tuple(index.shape) != (len(kept), format.rank)
            or not bool((stated == stated.new_tensor(shape)).all())
        ):
            raise UserError(
                f"the {format.kind} of a matrix of {shape[0]} x {shape[1]} are missing or of other shapes: fetch the files again"
            )
        ascending = bool((index.diff(dim=1) > 0).all())
        if not ascending or int(index[:, 0].min()) < 0 or int(index[:, -1].max()) >= shape[axis - 1]:
            raise UserError(
                f"weight_index does not name {format.rank} {format.kind} of {shape[axis - 1]} in ascending order: fetch the files again"
            )
        dense = kept.new_zeros(len(kept), *shape)
        for whole, some, own in zip(dense, kept, index.long(), strict=True):
            whole.index_copy_(axis - 1, own, some)
        return dense

    def size(
        self, parts: Mapping[str, TensorRef], format: Format, read: Callable[[TensorRef], list[int]]
    ) -> tuple[int, int]:
        """As its stored shape says, which is no less than what is kept on one side, and the same on the
        other."""
        kept, axis = parts["weight_kept"], _axis(format)
        _, _ = kept.shape
        if "weight_shape" not in parts:
            raise UserError(f"{kept.name} lacks the weight_shape beside it: download it again")
        shape = read(parts["weight_shape"])
        cut, whole = shape[axis - 1], shape[2 - axis] == kept.shape[2 - axis]
        if not whole or not format.rank <= cut < 1 << 31:
            raise UserError(
                f"{parts['weight_shape'].name} says {shape[0]} x {shape[1]}, of which {list(kept.shape)} are no {format.kind}: "
                "download it again"
            )
        return shape[0], shape[1]

    def loses_rows(self, format: Format) -> bool:
        """Where rows go, and not columns."""
        return _axis(format) == 1

    def unpacked(self, format: Format) -> Format:
        """Zeros where they were."""
        return replace(format, kind="source")

    def words(self, format: Format, ranks: str) -> str:
        """How many are kept."""
        return f"{ranks} {format.kind}"


def _axis(format: Format) -> int:
    """The axis of matrices [N, out, in] that a format stores a part of."""
    return 1 if format.kind == "rows" else 2
