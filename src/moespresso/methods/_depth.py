"""What Layer Drop and Block Drop share: candidates, the order of similarity, and the greedy search on true
KL.

A candidate is what goes together: one branch of a layer, a block, or a run of blocks. `greedy` removes one
candidate after the other, each time the one whose loss the whole model feels least, and then goes once
through its choice: would another candidate in the place of one of them be better still? The judge answers for
all candidates of a round at once, with one pass over the layers (`stream.sweep_variants`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Literal, TypeVar

from moespresso.core.blueprint import Blueprint
from moespresso.core.errors import UserError
from moespresso.core.method import Candidate, Losses
from moespresso.core.plan import Treatment
from moespresso.core.unit import Unit
from moespresso.model import quirks

RepairChoice = Literal["none", "bias", "scale", "linear"]
T = TypeVar("T", bound=Hashable)
# Whether candidates may go together.
Allowed = Callable[[Sequence[Unit]], bool]


def _anything(units: Sequence[Unit]) -> bool:
    _ = units
    return True


def treatment(repair: RepairChoice) -> Treatment:
    """The treatment of what goes."""
    return Treatment(drop=True, repair=None if repair == "none" else repair)


def check_divisible(kind: str, blueprint: Blueprint) -> None:
    """Raise `UserError` where the layers are no plain sum of branches, of which one could go."""
    if blueprint.indivisible:
        raise UserError(
            f"{kind}: the layers of {blueprint.place} ({blueprint.family}) cannot lose a part ({blueprint.indivisible}); "
            "drop whole blocks (block_drop) or experts"
        )


def check_comparable(kind: str, blueprint: Blueprint) -> None:
    """Raise `UserError` where candidates cannot go through the model side by side."""
    if blueprint.family in quirks.HANDS_ON:
        raise UserError(
            f"{kind}: candidates cannot be compared on {blueprint.place}, whose layers hand on more than hidden states: "
            "use score=cosine"
        )


def one_stays(blocks: Iterable[int], counting: frozenset[int]) -> bool:
    """Whether a block by which a cache counts tokens is left when `blocks` go, of a model that has any."""
    return not counting or not counting <= set(blocks)


def most_similar(values: Mapping[T, float], count: int) -> tuple[list[T], list[str]]:
    """The `count` keys of highest similarity, and a note where the last one was chosen among equals.

    Deeper layers go first among equals.
    """
    order = sorted(values, key=lambda key: (-values[key], -_depth(key)))
    chosen = order[:count]
    if 0 < count < len(order) and values[order[count]] == values[chosen[-1]]:
        return chosen, [
            f"{order[count]} is exactly as similar as {chosen[-1]}, which goes: the deeper one was taken"
        ]
    return chosen, []


def _depth(key: object) -> int:
    return key.layer or 0 if isinstance(key, Unit) else int(str(key))


def greedy(
    candidates: Mapping[Unit, Candidate], count: int, judge: Losses, allowed: Allowed = _anything
) -> tuple[dict[Unit, float], list[str]]:
    """The `count` candidates to remove, each with the KL after its removal, in order; and what the swaps
    did. Only what is `allowed` together is tried."""
    chosen: dict[Unit, float] = {}
    while len(chosen) < count:
        rest = [unit for unit in candidates if unit not in chosen and allowed([*chosen, unit])]
        losses = judge([_union(candidates, [*chosen, unit]) for unit in rest])
        loss, best = min(zip(losses, rest, strict=True))
        chosen[best] = loss
    return _swapped(candidates, chosen, judge, allowed)


def _swapped(
    candidates: Mapping[Unit, Candidate], chosen: dict[Unit, float], judge: Losses, allowed: Allowed
) -> tuple[dict[Unit, float], list[str]]:
    """One pass: each choice, first to last, against every candidate that was not taken."""
    notes: list[str] = []
    current = min(chosen.values(), default=0.0) if len(chosen) < 2 else list(chosen.values())[-1]
    if len(chosen) < 2:
        return chosen, notes  # the first choice already was the best of all
    for old in list(chosen):
        others = [unit for unit in chosen if unit != old]
        rest = [unit for unit in candidates if unit not in chosen and allowed([*others, unit])]
        if not rest:
            break
        loss, new = min(zip(judge([_union(candidates, [*others, unit]) for unit in rest]), rest, strict=True))
        if loss < current:
            notes.append(f"{new} in the place of {old} lowers the KL from {current:.4g} to {loss:.4g}")
            chosen = {(new if unit == old else unit): value for unit, value in chosen.items()} | {new: loss}
            current = loss
    return chosen, notes


def _union(candidates: Mapping[Unit, Candidate], units: Sequence[Unit]) -> Candidate:
    return {key: value for unit in units for key, value in candidates[unit].items()}
