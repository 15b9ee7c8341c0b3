"""Statistics by name. Steps ask by name (`Step.needs`), stats files keep the names, and here a name becomes a
`Statistic`.

Nobody else knows which statistics there are: what needs text, what of a row holds when experts are gone, and
in which order the values stand in it (that of registration) is asked here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TypeVar

from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.stats import split_index
from moespresso.statistics.base import Statistic

_STATISTICS: dict[str, type[Statistic]] = {}
T = TypeVar("T", bound=Statistic)


def statistic(cls: type[T]) -> type[T]:
    """Register a statistic under its name. One that has a field (a number) is asked for with an index,
    such as `run@4`."""
    known = _STATISTICS.setdefault(cls.name, cls)
    assert known.__qualname__ == cls.__qualname__, f"two statistics named {cls.name}"
    _STATISTICS[cls.name] = cls
    return cls


def statistics_of(needs: Iterable[str]) -> list[Statistic]:
    """The statistics asked for by name, in the order in which rows hold their values; raises `UserError`
    for an unknown name."""
    order = list(_STATISTICS)
    return sorted(
        map(_named, set(needs)), key=lambda each: (order.index(each.name), split_index(each.need)[1] or 0)
    )


def needs_text(needs: Iterable[str]) -> bool:
    """Whether any of them is measured on text."""
    return any(each.sees == "text" for each in statistics_of(needs))


def restricted(row: Mapping[str, float], kept: Sequence[int]) -> dict[str, float]:
    """What a unit's values still say when only the experts `kept` of its layer are left, by their new
    numbers."""
    valid: dict[str, float] = {}
    for cls in _STATISTICS.values():
        values = {name: value for name, value in row.items() if split_index(name)[0] in cls.measures}
        valid |= cls.restrict(values, kept)
    return valid


def _named(need: str) -> Statistic:
    name, index = split_index(need)
    cls = _STATISTICS.get(name)
    if cls is None or bool(fields(cls)) != (index is not None):
        raise UserError(f"nothing is measured under the name {need!r}{did_you_mean(need, _STATISTICS)}")
    return cls() if index is None else cls(index)  # pyright: ignore[reportCallIssue]
