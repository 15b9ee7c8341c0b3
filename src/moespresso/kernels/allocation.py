"""How many neurons stay where, when not everything becomes equally narrow.

What narrower experts would lose is known for some widths; between them it is taken as a line, and of all
those lines the lowest that nowhere bend upwards, so that taking always where the next neurons cost least is
the best for every total.

No tensors here: curves are points (neurons removed, loss), by layer or by expert.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from heapq import heapify, heappop, heappush
from itertools import pairwise

# A layer, or one of its experts.
Key = tuple[int, ...]
# Neurons that are removed, ascending from 0, and what is lost without them.
Points = list[tuple[int, float]]


def allocate(
    curves: Mapping[Key, Points],
    widths: Mapping[Key, int],
    counts: Mapping[Key, int],
    total: int,
    multiple: int,
) -> dict[Key, int]:
    """Neurons to remove of each, so that `total` go in all, the least is lost, and what is left of `widths`
    where some go are multiples of `multiple`.

    `counts` says of how many experts each of `curves` is the sum. Steps are whole, so more than `total` may
    go.
    """
    slopes = {key: _slopes(points) for key, points in curves.items()}
    removed = dict.fromkeys(curves, 0)

    def step(key: Key) -> int:
        return (widths[key] - removed[key]) % multiple or multiple

    def priced(keys: Iterable[Key]) -> list[tuple[float, Key]]:
        able = (key for key in keys if slopes[key] and removed[key] + step(key) <= slopes[key][-1][0])
        return [(_price(slopes[key], removed[key], counts[key]), key) for key in able]

    queue = priced(curves)
    heapify(queue)
    while queue and total > 0:
        _, key = heappop(queue)
        more = step(key)
        total -= more * counts[key]
        removed[key] += more
        for again in priced([key]):
            heappush(queue, again)
    return removed


def _slopes(points: Points) -> list[tuple[int, float]]:
    """The lower convex hull: where each of its lines ends, and how steep it is."""
    hull: Points = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(end[0], _slope(start, end)) for start, end in pairwise(hull)]


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def _price(slopes: list[tuple[int, float]], removed: int, count: int) -> float:
    """What the next neuron of one expert costs when so many have gone."""
    return slopes[bisect_right(slopes, removed, key=lambda line: line[0])][1] / count
