"""Matrices as they are: in the dtype that the source has, with zeros where weights or whole rows were
pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

from torch import Tensor

from moespresso.core.blueprint import TensorRef
from moespresso.core.format import Format
from moespresso.formats.codec import Codec, Parts, Shapes, codec
from moespresso.formats.pattern import check_pattern


@codec
class Plain(Codec):
    """One tensor, the matrix itself."""

    layout: ClassVar[str] = "plain"
    kinds: ClassVar[frozenset[str]] = frozenset({"source"})
    parts: ClassVar[tuple[str, ...]] = ("weight",)
    scaled: ClassVar[str] = "weight"
    packs: ClassVar[bool] = False

    def shapes(self, format: Format, out: int, width: int, dtype: str) -> Shapes:
        """The matrix."""
        _ = format
        return {"weight": ((out, width), dtype)}

    def check(self, format: Format, shape: tuple[int, ...], name: str, beside: Iterable[int] = ()) -> None:
        """Raise `UserError` where weights cannot be pruned in its pattern."""
        check_pattern(shape[-1], format, name, beside)

    def encode(self, numbers: Tensor, format: Format) -> dict[str, Tensor]:
        """The weights."""
        _ = format
        return {"weight": numbers}

    def decode(self, parts: Parts, format: Format, shape: tuple[int, int]) -> Tensor:
        """The weights."""
        _ = format, shape
        return parts["weight"]

    def size(
        self, parts: Mapping[str, TensorRef], format: Format, read: Callable[[TensorRef], list[int]]
    ) -> tuple[int, int]:
        """Its own shape."""
        _ = format, read
        out, width = parts["weight"].shape
        return out, width

    def loses_rows(self, format: Format) -> bool:
        """Rows that go are zeros here."""
        return format.rank > 0

    def words(self, format: Format, ranks: str) -> str:
        """Nothing is packed."""
        _ = format, ranks
        return "as it was"
