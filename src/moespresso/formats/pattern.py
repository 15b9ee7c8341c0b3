"""Arithmetic of formats: whether groups divide a row, and how many weights a density keeps."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from moespresso.core.errors import UserError
from moespresso.core.format import Format


def check_group(width: int, format: Format, what: str, beside: Iterable[int] = ()) -> None:
    """Raise `UserError` where `format` cannot cut `width` inputs of `what` into whole groups; the cure is
    one that takes the widths of the matrices `beside` it too, which have the same setting."""
    size = format.group_size
    if size and width % size:
        fitting = _dividing((128, 64, 32, 16, 8), (width, *beside))
        cure = f"group_size={fitting[0]}" if fitting else "group_size=0 (one scale per channel)"
        raise UserError(f"{what} has {width} inputs, which groups of {size} do not divide: use {cure}")


def _dividing(sizes: Iterable[int], widths: Collection[int]) -> list[int]:
    """Those of some sizes of groups that divide all widths."""
    return [size for size in sizes if all(width % size == 0 for width in widths)]


def check_pattern(width: int, format: Format, what: str, beside: Iterable[int] = ()) -> None:
    """Raise `UserError` where `format` cannot prune `width` inputs of `what`: a share that is none, groups
    that do not fit; the cure fits the widths of the matrices `beside` it too."""
    size = format.group_size
    if not 0 < format.density <= 1:
        raise UserError(f"{what}: a density of {format.density:g} is no share between 0 and 1")
    if size and width % size:
        fitting = _dividing((4, 8, 16, 2), (width, *beside))
        cure = f"such as {fitting[0] // 2}:{fitting[0]}" if fitting else ""
        cure = f"another pattern, {cure}" if cure else f"a plain share such as {1 - format.density:g}"
        raise UserError(f"{what} has {width} inputs, which groups of {size} do not divide: use {cure}")


def kept_in_row(format: Format, width: int) -> int:
    """Number of weights that stay in a row of `width` inputs where every row keeps the same number; raises
    `UserError` where the row is not whole groups."""
    size = format.group_size
    if not size:
        return staying(width, format)
    if width % size:
        raise UserError(f"rows of {width} inputs are not whole groups of {size}: use a plain share")
    return width // size * staying(size, format)


def staying(width: int, format: Format) -> int:
    """How many of `width` inputs stay: at least one where any shall."""
    return max(int(format.density > 0), round(format.density * width))
