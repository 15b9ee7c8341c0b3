"""Products of two matrices: `weight_left` [out, r] and `weight_right` [r, in], which only moespresso reads.

The product is taken in float32 and brought to their dtype.

Shapes: N matrices of `out` x `in`, r the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats.codec import Codec, Parts, Shapes, codec

# Left N x out x r and right N x r x in; axes without a name, since a codec takes one pair and returns another.
Pair = tuple[Float[Tensor, "_ _ _"], Float[Tensor, "_ _ _"]]


def product(left: Float[Tensor, "N out r"], right: Float[Tensor, "N r in"]) -> Float[Tensor, "N out in"]:
    """What two factors stand for, in their dtype."""
    return (left.float() @ right.float()).to(left.dtype)


@codec
class Factors(Codec):
    """Two factors a matrix."""

    layout: ClassVar[str] = "factors"
    kinds: ClassVar[frozenset[str]] = frozenset({"factors"})
    parts: ClassVar[tuple[str, ...]] = ("weight_left", "weight_right")
    scaled: ClassVar[str] = "weight_left"
    fitted: ClassVar[bool] = True
    title: ClassVar[str] = "products as their factors"

    def shapes(self, format: Format, out: int, width: int, dtype: str) -> Shapes:
        """Both factors."""
        return {"weight_left": ((out, format.rank), dtype), "weight_right": ((format.rank, width), dtype)}

    def check(self, format: Format, shape: tuple[int, ...], name: str, beside: Iterable[int] = ()) -> None:
        """Raise `UserError` where the matrix has no factors of that rank."""
        _ = beside
        out, width = shape[-2:]
        if not 0 < format.rank <= min(out, width):
            raise UserError(f"{name} of {out} x {width} has no factors of rank {format.rank}")

    def encode(self, numbers: Pair, format: Format) -> dict[str, Tensor]:
        """The factors, as they are stored."""
        _ = format
        return {"weight_left": numbers[0], "weight_right": numbers[1]}

    def decode(self, parts: Parts, format: Format, shape: tuple[int, int]) -> Tensor:
        """Their products; raises `UserError` where they do not fit."""
        left, right = parts.get("weight_left"), parts.get("weight_right")
        _ = format
        if left is None or right is None or (left.shape[1], right.shape[2]) != shape or left.shape[2] != right.shape[1]:  # fmt: skip
            raise UserError(
                f"the factors of a matrix of {shape[0]} x {shape[1]} are missing or of other shapes: fetch the files again"
            )
        return product(left, right)

    def cut(self, numbers: Pair, expert: int, rows: slice, columns: int) -> Pair:
        """The factors of one expert."""
        left, right = numbers
        return left[expert : expert + 1, rows], right[expert : expert + 1, :, :columns]

    def size(
        self, parts: Mapping[str, TensorRef], format: Format, read: Callable[[TensorRef], list[int]]
    ) -> tuple[int, int]:
        """By the outer sides of both."""
        _ = format, read
        (out, _), (_, width) = parts["weight_left"].shape, parts["weight_right"].shape
        return out, width

    def words(self, format: Format, ranks: str) -> str:
        """Ranks."""
        _ = format
        return f"products of rank {ranks}"
