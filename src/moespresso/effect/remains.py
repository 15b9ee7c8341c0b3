"""What remains of a model after a plan: which blocks, which branches of them, which experts.

Everything is numbered as in the source; `layers` in order gives each kept block its new number. Pricing,
writing and config editing all read this one answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moespresso.core.blueprint import BRANCHES, Blueprint, Branch, LayerSpec
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.unit import Unit

# Repairs of an Expert Drop that leave the router whole: the dropped experts' rows are kept.
ROWS_STAY = ("skip", "novice")
# A layer without attention still tells the cache how many tokens it has seen, by a key and a value of width one.
SILENT_KV = 2


@dataclass(frozen=True)
class Remains:
    """`layers`: kept blocks; `cut`: branches that go from kept blocks; `experts`: kept experts of every MoE
    branch that stays; `gone`: experts that the router of a layer may still select, of the layers where there
    are any; `novices`: those layers in which a constant answers for them; `widths`: channels that each kept
    expert has, of the layers where some go or experts differ."""

    layers: tuple[int, ...]
    cut: frozenset[tuple[int, Branch]]
    experts: Mapping[int, tuple[int, ...]]
    gone: Mapping[int, tuple[int, ...]]
    novices: frozenset[int] = frozenset()
    widths: Mapping[int, Mapping[int, int]] = field(default_factory=dict[int, Mapping[int, int]])

    def position(self, layer: int) -> int:
        """The new number of a kept block."""
        return self.layers.index(layer)

    def rows(self, layer: int) -> tuple[int, ...]:
        """Experts that the router of a layer selects from."""
        return tuple(sorted({*self.experts[layer], *self.gone.get(layer, ())}))


def remains(plan: Plan, blueprint: Blueprint) -> Remains:
    """What `plan` leaves of `blueprint`."""
    dropped = dropped_units(plan)
    layers = tuple(layer.index for layer in blueprint.layers if Unit(layer.index) not in dropped)
    specs = {layer.index: layer for layer in blueprint.layers}
    cut: frozenset[tuple[int, Branch]] = frozenset(
        (layer, branch) for layer in layers for branch in BRANCHES if specs[layer].unit(branch) in dropped
    )
    experts = {
        layer: plan.kept_experts(layer, specs[layer].experts)
        for layer in layers
        if specs[layer].experts and (layer, "mlp") not in cut
    }
    gone = {layer: lost for layer in experts if (lost := _gone(plan, layer, specs[layer].experts))}
    novices = frozenset(layer for layer in gone if _has_novices(plan, layer))
    widths = {
        layer: channels for layer, kept in experts.items() if (channels := _widths(plan, specs[layer], kept))
    }
    return Remains(layers, cut, experts, gone, novices, widths)


def dropped_units(plan: Plan) -> frozenset[Unit]:
    """Blocks and branches that some stage removes."""
    return frozenset(
        unit for stage in plan.stages for unit, treatment in stage.treatments.items() if treatment.drop
    )


def merged_into(plan: Plan, layer: int) -> dict[int, int]:
    """Experts of `layer` that are part of an average, each with the one whose place it takes."""
    leaders: dict[int, int] = {}
    for stage in plan.stages:
        for unit, treatment in stage.treatments.items():
            into = treatment.into
            if unit.layer == layer and unit.expert is not None and into is not None and into != unit.expert:
                leaders |= {member: into for member, leader in leaders.items() if leader == unit.expert}
                leaders[unit.expert] = into
    return leaders


def _widths(plan: Plan, layer: LayerSpec, kept: tuple[int, ...]) -> dict[int, int]:
    """Channels of every kept expert of a layer; nothing where all have as many as before, which is one
    number."""
    channels_of = {expert: layer.widths[expert] if layer.widths else layer.width for expert in kept}
    cut = False
    for stage in plan.stages:
        for expert in kept:
            channels = channels_left(stage, layer.index, expert)
            if channels is not None:
                channels_of[expert], cut = min(channels_of[expert], channels), True
    return channels_of if cut or layer.widths else {}


def channels_left(stage: Stage, layer: int, expert: int | None) -> int | None:
    """The channels that `stage` leaves to an expert: what it says of that one, else of all in the layer; None
    for all."""
    of_expert, of_layer = (
        stage.treatments.get(Unit(layer, "experts", number), Treatment()).channels
        for number in (expert, None)
    )
    return of_layer if of_expert is None else of_expert


def _gone(plan: Plan, layer: int, experts: int) -> tuple[int, ...]:
    """Experts that a stage drops behind a router that stays whole (at most one does: `effect.check`)."""
    kept = set(range(experts))
    for stage in plan.stages:
        treatment = stage.treatments.get(Unit(layer, "experts"))
        if treatment is None or treatment.keep is None:
            continue
        if treatment.repair in ROWS_STAY:
            return tuple(sorted(kept - set(treatment.keep)))
        kept &= set(treatment.keep)
    return ()


def _has_novices(plan: Plan, layer: int) -> bool:
    unit = Unit(layer, "experts")
    return any(
        unit in stage.treatments and stage.treatments[unit].repair == "novice" for stage in plan.stages
    )


def pressed_layers(blueprint: Blueprint, left: Remains) -> tuple[LayerSpec, ...]:
    """The kept layers as they are afterwards, renumbered."""
    specs = {layer.index: layer for layer in blueprint.layers}
    return tuple(_remaining_layer(specs[layer], position, left) for position, layer in enumerate(left.layers))


def _remaining_layer(layer: LayerSpec, position: int, left: Remains) -> LayerSpec:
    bodies = {branch: name for branch, name in layer.bodies.items() if (layer.index, branch) not in left.cut}
    layer = replace(layer, bodies=bodies)
    if (layer.index, "attention") in left.cut:
        layer = replace(layer, mixer="none", qk_width=0, v_width=0, kv_width=SILENT_KV, heads=None)
    if (layer.index, "mlp") in left.cut:
        layer = replace(
            layer, experts=0, shared_experts=0, top_k=0, groups=1, floor=0, width=0, skipped=0, widths=()
        )
    if layer.experts:
        gone = len(left.gone.get(layer.index, ()))
        widths = tuple(left.widths.get(layer.index, {}).values())
        layer = replace(
            layer,
            experts=len(left.experts[layer.index]),
            skipped=layer.skipped + gone,
            width=max(widths, default=layer.width),
            widths=widths if len(set(widths)) > 1 else (),
        )
    return replace(layer, index=position)
