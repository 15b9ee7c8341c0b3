"""What a plan does to the layers that predict tokens further ahead, which the model's class passes over.

One config counts experts for them and for the trunk, so they must have as many, and as wide, as it will say:
experts go with the router rows that lead to them, the same number from every group. Which ones stay, the plan
says; which channels stay of an expert that is narrowed, its weights say when it is written. Whatever these
layers draft is checked by the trunk, so a worse choice costs speed and no answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from moespresso.core.blueprint import Blueprint, Entry
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan
from moespresso.effect.piece import Piece, Slim, as_expert
from moespresso.effect.remains import pressed_layers, remains

_DROP = 'say --mtp drop (in a plan: "mtp": {"wish": "drop"})'


@dataclass(frozen=True, slots=True)
class ExpertsSize:
    """How many routed experts a layer has, and how many channels each."""

    experts: int
    width: int

    def __str__(self) -> str:
        """`6 experts of 48 channels`."""
        return f"{self.experts} experts of {self.width} channels"


def mixtures_ahead(blueprint: Blueprint) -> dict[int, list[Entry]]:
    """The experts and router rows of every prediction layer that has such, by its number."""
    found: dict[int, list[Entry]] = defaultdict(list)
    for entry in blueprint.outside:
        if entry.ahead is not None and entry.ahead.part in ("experts", "router"):
            found[entry.ahead.layer or 0].append(entry)
    return {layer: entries for layer, entries in sorted(found.items())
            if any(entry.ahead and entry.ahead.part == "experts" for entry in entries)}  # fmt: skip


def is_understood(entries: Iterable[Entry]) -> bool:
    """Whether the names of a prediction layer's experts say which is whose."""
    return all(
        entry.expert_axis is not None or (entry.ahead and entry.ahead.expert is not None) for entry in entries
    )


def size_of(entries: Iterable[Entry]) -> ExpertsSize | None:
    """What a prediction layer holds; None where its experts and its router do not agree, or cannot be told
    apart."""
    numbers: dict[str, set[int]] = defaultdict(set)
    counts, widths, parts = set[int](), set[int](), set[str]()
    for entry in entries:
        unit = entry.ahead
        assert unit is not None
        parts.add(unit.part)
        if unit.expert is not None:
            numbers[unit.matrix or ""].add(unit.expert)
        elif entry.expert_axis is None:
            return None
        else:
            counts.add(entry.ref.shape[entry.expert_axis])
        if unit.part == "experts" and entry.channel_axis is not None:
            widths.add(entry.ref.shape[entry.channel_axis] // (2 if entry.joined else 1))
    counts |= {len(found) if found == set(range(len(found))) else -1 for found in numbers.values()}
    alike = len(counts) == len(widths) == 1 and min(counts) > 0 and "router" in parts
    return ExpertsSize(counts.pop(), widths.pop()) if alike else None


def most_common(counts: Collection[int]) -> int:
    """The number that most layers have; of several the largest."""
    numbers = list(counts)
    return max(sorted(set(numbers), reverse=True), key=numbers.count)


def size_left(plan: Plan, blueprint: Blueprint) -> ExpertsSize:
    """What the config of the result says of experts: the number that most layers have, and their width where
    all of them are narrowed alike (else one layer says it of itself)."""
    left, before = remains(plan, blueprint), blueprint.moe_layers
    layers = [layer for layer in pressed_layers(blueprint, left) if layer.experts]
    count = most_common([layer.experts + layer.skipped for layer in layers or before])
    widths = {layer.width for layer in layers}
    alike = len(left.widths) == len(left.experts) and len(widths) == 1
    return ExpertsSize(count, widths.pop() if alike else most_common([layer.width for layer in before]))


class Predictions:
    """Says what becomes of one tensor of the prediction layers after another."""

    def __init__(self, plan: Plan, blueprint: Blueprint) -> None:
        self._plan, self._blueprint = plan, blueprint

    @cached_property
    def _kept(self) -> Mapping[int, tuple[int, ...]]:
        return kept_ahead(self._plan, self._blueprint)

    @cached_property
    def _width(self) -> int:
        return size_left(self._plan, self._blueprint).width

    @cached_property
    def _experts(self) -> Mapping[tuple[int | None, int | None], tuple[Entry, ...]]:
        """The matrices of every expert."""
        found: dict[tuple[int | None, int | None], list[Entry]] = defaultdict(list)
        for entry in self._blueprint.outside:
            if entry.ahead is not None and entry.ahead.expert is not None:
                found[entry.ahead.layer, entry.ahead.expert].append(entry)
        return {key: tuple(entries) for key, entries in found.items()}

    def __call__(self, entry: Entry) -> Piece | None:
        """The piece that `entry` becomes, under its old layer's number, or None when it goes."""
        unit = entry.ahead
        assert unit is not None
        if self._plan.mtp.wish == "drop":
            return None
        kept = self._kept.get(unit.layer or 0)
        piece = Piece(entry.ref.name, entry.ref.shape, entry)
        if kept is None or unit.part not in ("experts", "router"):
            return piece
        if unit.expert is None:
            return _rows(piece, kept)
        if unit.expert not in kept:
            return None
        return _moved(self._narrowed(piece), kept.index(unit.expert))

    def _narrowed(self, piece: Piece) -> Piece:
        """With the strongest of its expert's channels only, where the config will say fewer."""
        axis, unit = piece.source.channel_axis, piece.source.ahead
        assert unit is not None
        if axis is None or piece.shape[axis] <= self._width:
            return piece
        shape = list(piece.shape)
        shape[axis] = self._width
        return replace(
            piece, shape=tuple(shape), slim=Slim(self._experts[unit.layer, unit.expert], self._width)
        )


def _moved(piece: Piece, position: int) -> Piece:
    """An expert's tensor under its new number."""
    unit = piece.source.ahead
    assert unit is not None
    source = replace(piece.source, ahead=replace(unit, expert=position))
    return replace(piece, name=as_expert(piece.name, position), source=source)


def _rows(piece: Piece, kept: tuple[int, ...]) -> Piece:
    """A tensor that all experts share: the entries of those that stay."""
    axis = piece.source.expert_axis
    if axis is None or len(kept) == piece.shape[axis]:
        return piece
    shape = (*piece.shape[:axis], len(kept), *piece.shape[axis + 1 :])
    return replace(piece, shape=shape, axis=axis, take=kept)


def kept_ahead(plan: Plan, blueprint: Blueprint) -> dict[int, tuple[int, ...]]:
    """The experts that every prediction layer keeps which is cut; where the plan does not say yet, the lowest
    numbers of every group."""
    kept: dict[int, tuple[int, ...]] = {}
    if plan.mtp.wish != "like_trunk" or not changes_experts(plan, blueprint):
        return kept
    count, groups = size_left(plan, blueprint).experts, max(layer.groups for layer in blueprint.moe_layers)
    for layer, entries in mixtures_ahead(blueprint).items():
        size = size_of(entries)
        if size is not None:
            kept[layer] = plan.mtp.keep.get(layer) or strongest([0.0] * size.experts, count, groups)
    return kept


def strongest(scores: Sequence[float], count: int, groups: int) -> tuple[int, ...]:
    """The `count` experts with the highest scores, the same number from each router group, ascending; ties go
    to the lower number."""
    size, share = len(scores) // groups, count // groups
    ranked = (sorted(range(at, at + size), key=lambda expert: (-scores[expert], expert))
              for at in range(0, len(scores), size))  # fmt: skip
    return tuple(sorted(expert for group in ranked for expert in group[:share]))


def changes_experts(plan: Plan, blueprint: Blueprint) -> bool:
    """Whether the config of the result says another number or width of experts than the source's."""
    if not blueprint.moe_layers:
        return False
    return size_left(plan, blueprint) != size_left(Plan(blueprint.digest), blueprint)


def check_ahead(plan: Plan, blueprint: Blueprint) -> None:
    """Raise `UserError` where prediction layers could not be loaded with the config of the result."""
    mixtures = mixtures_ahead(blueprint)
    strangers = plan.mtp.keep.keys() - mixtures.keys()
    if strangers:
        raise UserError(
            f"the plan keeps experts of prediction layer {min(strangers)}, but {blueprint.place} has no mixture there"
        )
    if plan.mtp.wish == "drop" or not mixtures or not changes_experts(plan, blueprint):
        return
    before, after = size_left(Plan(blueprint.digest), blueprint), size_left(plan, blueprint)
    if plan.mtp.wish == "keep":
        raise UserError(
            f"mtp=keep leaves prediction layers with {before}, but their config will say {after} for all layers: "
            f"say --mtp like_trunk, or {_DROP}"
        )
    for layer, entries in mixtures.items():
        reason = _why_uncut(entries, before, narrows=after.width != before.width)
        if reason is not None:
            raise UserError(
                f"prediction layer {layer} of {blueprint.place} {reason}, so it cannot follow the trunk: {_DROP}"
            )
    groups = max(layer.groups for layer in blueprint.moe_layers)
    for layer in plan.mtp.keep:
        _check_kept(layer, plan.mtp.keep[layer], before.experts, after.experts, groups)


def _why_uncut(entries: Sequence[Entry], before: ExpertsSize, *, narrows: bool) -> str | None:
    if size_of(entries) != before:
        return f"has not {before}, with names that are understood, as its config says"
    stored = [entry for entry in entries if entry.ahead is not None and entry.ahead.part == "experts"]
    if narrows and any(entry.ahead and entry.ahead.expert is None for entry in stored):
        return "stores all its experts in one tensor, of which this version takes whole experts only"
    if narrows and any(entry.ref.packed is not None for entry in stored):
        return "stores its experts packed, of which this version takes whole experts only"
    return None


def _check_kept(layer: int, kept: Sequence[int], there: int, count: int, groups: int) -> None:
    """Experts that a plan keeps of a prediction layer must be as many as the config will say, of every
    group."""
    in_groups = [sum(expert * groups // there == group for expert in kept) for group in range(groups)]
    if in_groups != [count // groups] * groups or len(kept) != count:
        raise UserError(
            f"the plan keeps {len(kept)} experts of prediction layer {layer}, but the config of the result counts {count} of {there} "
            "for all layers, the same number in every group: keep that many, or leave its row out and they are chosen anew"
        )
