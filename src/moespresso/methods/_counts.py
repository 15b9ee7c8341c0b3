"""How many experts stay: what Expert Drop and expert merging share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moespresso.core.blueprint import Blueprint, LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.plan import Treatment
from moespresso.core.unit import Unit
from moespresso.effect import Remains, is_stack


def keep_count(settings: Any, layer: LayerSpec, *, even: bool = True) -> int:
    """Experts to keep in `layer` by `keep` or `ratio` (a quarter goes when neither is said), a multiple of
    its groups.

    Raises `UserError` for more than there are, for fewer than the router works with, and, where all layers
    are to be `even`, for what does not divide into its groups.
    """
    if settings.keep is not None:
        wanted = settings.keep
    else:
        share = 1 - (0.25 if settings.ratio is None else settings.ratio)
        wanted = round(layer.experts * share / layer.groups) * layer.groups
    place = f"{settings.kind}: keep={wanted} in L{layer.index}"
    fewest = -(-layer.floor // layer.groups) * layer.groups if even else layer.floor
    if wanted > layer.experts:
        raise UserError(f"{place} is more than the {layer.experts} experts there are")
    if wanted < layer.floor:
        raise UserError(f"{place} is under {fewest}, the fewest its router (top_k={layer.top_k}) works with")
    if wanted % layer.groups and even:
        lower = max(wanted // layer.groups * layer.groups, fewest)
        higher = f" or {lower + layer.groups}" if lower + layer.groups <= layer.experts else ""
        raise UserError(f"{place} does not divide into {layer.groups} router groups: keep {lower}{higher}")
    return wanted


def outlined(
    settings: Any, source: Blueprint, left: Remains, *, repair: str | None = None
) -> dict[Unit, Treatment]:
    """Treatments of the right size, before anything is measured: the lowest numbers of every group are
    kept."""
    treatments: dict[Unit, Treatment] = {}
    for layer in source.moe_layers:
        if layer.index not in left.experts:
            continue
        there, size = left.experts[layer.index], layer.experts // layer.groups
        each = keep_count(settings, replace(layer, experts=len(there)), even=False) // layer.groups
        groups = [
            [expert for expert in there if expert // size == group][:each] for group in range(layer.groups)
        ]
        kept = tuple(expert for group in groups for expert in group)
        treatments[Unit(layer.index, "experts")] = Treatment(keep=kept, repair=repair)
    return treatments


def refuse_skipped(kind: str, blueprint: Blueprint) -> None:
    """Raise `UserError` where experts are gone behind a router that still selects them: numbers have
    parted there."""
    for layer in blueprint.moe_layers:
        if layer.skipped:
            raise UserError(
                f"{kind}: the router of L{layer.index} still selects {layer.skipped} experts that are gone, so its experts "
                "cannot change again: do this step before the one with router=preserve or replace=novice"
            )


def refuse_widths(
    kind: str, blueprint: Blueprint, cure: str = "do this step before the one with per_expert=true"
) -> None:
    """Raise `UserError` where experts of a layer differ in width, for a step that makes one of several or
    treats all alike."""
    for layer in blueprint.moe_layers:
        if layer.widths:
            raise UserError(
                f"{kind}: the experts of L{layer.index} differ in width ({min(layer.widths)} to {max(layer.widths)} channels), which "
                f"it cannot treat: {cure}"
            )


def need_experts(kind: str, blueprint: Blueprint, *, alone: bool = False) -> None:
    """Raise `UserError` where there are no routed experts, or none whose matrices are stored as they are
    in memory (`alone`: by themselves), for a step that changes these."""
    if not blueprint.moe_layers:
        raise UserError(
            f"{kind} needs routed experts, but {blueprint.place} ({blueprint.family}) {blueprint.no_experts}"
        )
    for entry in blueprint.entries:
        if entry.unit.part != "experts" or entry.unit.matrix == "novices":
            continue
        if (entry.unit.expert is None or len(entry.ref.shape) != 2) and (alone or not is_stack(entry)):
            cure = "use per_expert=false" if is_stack(entry) else "drop experts instead"
            raise UserError(
                f"{kind}: {blueprint.place} ({blueprint.family}) stores its experts as {entry.ref.name}, not as matrices of "
                f"their own, which this version cannot treat: {cure}"
            )
