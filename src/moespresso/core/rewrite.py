"""What a plan does to each stored tensor: the one function that pricing, building and verifying share.

`rewrite` turns an entry of the source into a `Piece` of the result (or None when it is dropped), from names and
shapes alone: which bytes are taken, under which name and shape they are written, and what is multiplied in.
`pressed_blueprint` is the source's blueprint after that, so a plan's cost is the sum of what will be written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from moespresso.core.blueprint import Blueprint, Entry, LayerSpec, TensorRef
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan, Treatment
from moespresso.core.unit import Unit

_EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor to write: `source` bytes, of which only `take` along `axis` (None: all), times `scale`."""

    name: str
    shape: tuple[int, ...]
    source: Entry
    axis: int | None = None
    take: tuple[int, ...] | None = None
    scale: float = 1.0

    @property
    def ref(self) -> TensorRef:
        """The tensor as it will be written (its file is not known yet)."""
        return replace(self.source.ref, name=self.name, shape=self.shape, file="", offset=0)


def kept_by_layer(plan: Plan, blueprint: Blueprint) -> dict[int, tuple[int, ...]]:
    """Kept experts of every MoE layer, in source numbers."""
    return {layer.index: plan.kept_experts(layer.index, layer.experts) for layer in blueprint.moe_layers}


def rewrite(entry: Entry, kept: dict[int, tuple[int, ...]], scales: dict[int, float]) -> Piece | None:
    """Say what becomes of one entry, given the kept experts and the routed scale of every MoE layer."""
    layer = entry.unit.layer
    if layer is None or layer not in kept or not entry.in_graph:
        return Piece(entry.ref.name, entry.ref.shape, entry)
    scale = scales[layer] if _is_routed_output(entry.unit) else 1.0
    if entry.unit.expert is not None:
        if entry.unit.expert not in kept[layer]:
            return None
        position = kept[layer].index(entry.unit.expert)
        return Piece(_EXPERT_NUMBER.sub(str(position), entry.ref.name), entry.ref.shape, entry, scale=scale)
    axis = entry.expert_axis
    if axis is None or len(kept[layer]) == entry.ref.shape[axis]:
        return Piece(entry.ref.name, entry.ref.shape, entry, scale=scale)
    shape = (*entry.ref.shape[:axis], len(kept[layer]), *entry.ref.shape[axis + 1 :])
    return Piece(entry.ref.name, shape, entry, axis, kept[layer], scale)


def _is_routed_output(unit: Unit) -> bool:
    return unit.part == "experts" and (unit.matrix or "").startswith("down")


def pieces(blueprint: Blueprint, plan: Plan) -> list[Piece]:
    """Everything that `plan` writes, in the source's order."""
    kept = kept_by_layer(plan, blueprint)
    scales = {layer: plan.routed_scale(layer) for layer in kept}
    rewritten = (rewrite(entry, kept, scales) for entry in blueprint.entries)
    return [piece for piece in rewritten if piece is not None]


def pressed_blueprint(blueprint: Blueprint, plan: Plan) -> Blueprint:
    """The blueprint of what `plan` makes of `blueprint`, before anything is written."""
    kept = kept_by_layer(plan, blueprint)
    layers = tuple(_pressed_layer(layer, kept) for layer in blueprint.layers)
    entries = tuple(replace(piece.source, ref=piece.ref) for piece in pieces(blueprint, plan))
    return replace(blueprint, layers=layers, entries=entries)


def _pressed_layer(layer: LayerSpec, kept: dict[int, tuple[int, ...]]) -> LayerSpec:
    return replace(layer, experts=len(kept[layer.index])) if layer.experts else layer


def check_routable(plan: Plan, blueprint: Blueprint) -> None:
    """Raise `UserError` when a treatment names what is not there, asks for what this version cannot do, or leaves a
    router without enough experts."""
    known = {layer.index: layer for layer in blueprint.moe_layers}
    for stage in plan.stages:
        for unit, treatment in stage.treatments.items():
            layer = known.get(-1 if unit.layer is None else unit.layer)
            if layer is None or unit != Unit(layer.index, "experts"):
                raise UserError(
                    f"the plan treats {unit}, but {blueprint.source} has no routed experts there "
                    "(this version treats them layer by layer, as L3.experts)"
                )
            if replace(treatment, keep=None, scale=1.0) != Treatment():
                extra = ", ".join(sorted(treatment.as_dict().keys() - {"keep", "scale"}))
                raise UserError(
                    f"the plan's treatment of {unit} has {extra}, which is not available in this version"
                )
            strangers = [number for number in treatment.keep or () if not 0 <= number < layer.experts]
            if strangers:
                raise UserError(
                    f"the plan keeps expert {strangers[0]} of L{layer.index}, which has {layer.experts}"
                )
    for index, kept in kept_by_layer(plan, blueprint).items():
        _check_layer(known[index], kept)


def _check_layer(layer: LayerSpec, kept: tuple[int, ...]) -> None:
    if len(kept) < layer.floor:
        raise UserError(
            f"L{layer.index} would keep {len(kept)} experts, but its router (top_k={layer.top_k}, "
            f"{layer.groups} groups) needs at least {layer.floor}: keep more"
        )
    size = layer.experts // layer.groups
    per_group = {sum(number // size == group for number in kept) for group in range(layer.groups)}
    if len(per_group) > 1:
        raise UserError(
            f"L{layer.index} routes in {layer.groups} groups, which must all keep the same number of experts"
        )
