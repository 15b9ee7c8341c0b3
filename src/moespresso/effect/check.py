"""Whether a plan can be done to a model at all: every unit is there, every layer stays usable.

Plans are edited by hand and shared, so nothing in them is taken on trust: what does not fit is a `UserError`
with the unit's address, before a byte is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from moespresso.core.blueprint import BRANCHES, Blueprint, LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.unit import Unit
from moespresso.effect.ahead import check_ahead
from moespresso.effect.cuts import REPAIRS, cuts
from moespresso.effect.matrices import REFIT, check_formats, check_step
from moespresso.effect.remains import ROWS_STAY, remains
from moespresso.effect.rewrite import folds_into


def validated(plan: Plan, blueprint: Blueprint, *, steps: bool = False) -> Plan:
    """Return the plan, or raise `UserError` where it does not fit the blueprint or leaves a layer unroutable;
    with `steps`, which must then be known, also where one of them cannot do what the plan says of it."""
    if plan.blueprint != blueprint.digest:
        raise UserError(
            f"the plan was made for another checkpoint (digest {plan.blueprint[:12]}, "
            f"{blueprint.place} has {blueprint.digest[:12]}): make a new plan for this one"
        )
    check_plan(plan, blueprint, steps=steps)
    return plan


def check_plan(plan: Plan, blueprint: Blueprint, *, steps: bool = False) -> None:
    """Raise `UserError` when a treatment names what is not there, asks for what this version cannot do, or
    leaves a router without enough experts or a model without blocks."""
    specs = {layer.index: layer for layer in blueprint.layers}
    for number, stage in enumerate(plan.stages):
        if steps:
            check_step(stage, blueprint)
        check_formats(plan, number, blueprint)
        for unit, treatment in stage.treatments.items():
            if treatment.format is not None or treatment.repair == REFIT:
                continue
            layer = specs.get(-1 if unit.layer is None else unit.layer)
            if layer is None:
                raise _nothing_there(unit, blueprint)
            _check_treatment(unit, treatment, layer, blueprint)
        experts_before = remains(Plan(plan.blueprint, plan.stages[:number]), blueprint).experts
        _check_still_there(stage, experts_before)
        _check_widths(stage, experts_before)
        _check_merges(stage)
        _check_cuts(plan, number, blueprint)
    left = remains(plan, blueprint)
    if not left.layers:
        raise UserError(f"the plan drops all {len(blueprint.layers)} blocks: at least one must stay")
    if blueprint.counting and not blueprint.counting & set(left.layers):
        last = ", ".join(f"L{layer}" for layer in sorted(blueprint.counting))
        raise UserError(
            f"the plan drops {last}, and so every block with attention of {blueprint.place}, which could then not "
            "generate: leave one of them"
        )
    for index, kept in left.experts.items():
        _check_layer(specs[index], kept)
    _check_rows(plan)
    check_ahead(plan, blueprint)


def _check_treatment(unit: Unit, treatment: Treatment, layer: LayerSpec, blueprint: Blueprint) -> None:
    if treatment.drop:
        _check_drop(unit, treatment, layer, blueprint)
    elif unit == Unit(layer.index, "experts") and layer.experts:
        _check_experts(unit, treatment, layer)
    elif unit.expert is not None and layer.experts:
        _check_member(unit, treatment, layer)
    elif not (unit == Unit(layer.index, "router") and treatment == Treatment(repair="mean")):
        raise _nothing_there(unit, blueprint)


def _nothing_there(unit: Unit, blueprint: Blueprint) -> UserError:
    return UserError(
        f"the plan treats {unit}, but {blueprint.place} has no routed experts there "
        "(this version treats them layer by layer, as L3.experts, lets blocks and branches go, and merges experts)"
    )


def _check_drop(unit: Unit, treatment: Treatment, layer: LayerSpec, blueprint: Blueprint) -> None:
    if treatment.repair not in (None, *REPAIRS):
        raise UserError(
            f"the plan repairs the cut of {unit} by {treatment.repair!r}: choose from {', '.join(REPAIRS)}"
        )
    if treatment.repair is not None and blueprint.indivisible:
        raise UserError(
            f"what {unit} leaves cannot be repaired in {blueprint.place} ({blueprint.indivisible}): leave the repair out"
        )
    if unit == Unit(layer.index):
        return
    if unit not in {layer.unit(branch) for branch in BRANCHES if branch in layer.bodies}:
        why = f" ({blueprint.indivisible})" if blueprint.indivisible else ""
        raise UserError(f"the plan drops {unit}, but {blueprint.place} has no such part to drop{why}")


def _check_experts(unit: Unit, treatment: Treatment, layer: LayerSpec) -> None:
    strangers = [number for number in treatment.keep or () if not 0 <= number < layer.experts]
    if strangers:
        raise UserError(f"the plan keeps expert {strangers[0]} of L{layer.index}, which has {layer.experts}")
    if treatment != replace(treatment, into=None, share=1.0):
        raise UserError(
            f"the plan merges {unit}: say of each expert by itself, as L3.E5, what it merges into"
        )
    if treatment.channels is not None:
        _check_channels(unit, treatment.channels, layer.width)
    if treatment.repair not in (None, *ROWS_STAY):
        raise UserError(
            f"the plan repairs {unit} by {treatment.repair!r}: experts know {', '.join(ROWS_STAY)}"
        )
    if layer.skipped:
        raise UserError(
            f"L{layer.index} already skips experts behind a whole router, so no more can go: start from the original"
        )


def _check_channels(unit: Unit, channels: int, width: int) -> None:
    if not 0 < channels <= width:
        raise UserError(f"the plan leaves {channels} channels to {unit}, which has {width}")


def _check_member(unit: Unit, treatment: Treatment, layer: LayerSpec) -> None:
    assert unit.expert is not None
    exists = unit.matrix is None and 0 <= unit.expert < layer.experts
    if exists and treatment.channels is not None and treatment == Treatment(channels=treatment.channels):
        width = layer.widths[unit.expert] if layer.widths else layer.width
        _check_channels(unit, treatment.channels, width)
        return
    wrong = [
        number
        for number in (unit.expert, treatment.into)
        if number is None or not 0 <= number < layer.experts
    ]
    plain = replace(treatment, into=None, share=1.0, repair=None) == Treatment()
    if wrong or unit.matrix is not None or not plain or treatment.repair not in (None, "align"):
        raise UserError(f"the plan's treatment of {unit} does not merge it into an expert of L{layer.index}")


def _check_still_there(stage: Stage, experts_before: Mapping[int, Sequence[int]]) -> None:
    """What merges, or leaves something in its place, must not have gone before."""
    for unit, treatment in stage.treatments.items():
        left = experts_before.get(-1 if unit.layer is None else unit.layer, ())
        if treatment.into is not None and unit.expert not in left:
            raise UserError(f"the plan merges {unit}, which an earlier step let go")
        if treatment.channels is not None and unit.expert is not None and unit.expert not in left:
            raise UserError(f"the plan narrows {unit}, which an earlier step let go")
        if treatment.repair in ROWS_STAY and not left:
            raise UserError(f"the plan repairs {unit} by {treatment.repair}, but an earlier step let it go")


def _check_widths(stage: Stage, experts_before: Mapping[int, Sequence[int]]) -> None:
    """What stays of a layer's experts is fitted together, so all of them have a width or none."""
    narrowed: dict[int, set[int]] = {}
    for unit, treatment in stage.treatments.items():
        if treatment.channels is not None and unit.layer is not None and unit.expert is not None:
            narrowed.setdefault(unit.layer, set()).add(unit.expert)
    for layer, experts in narrowed.items():
        of_layer = stage.treatments.get(Unit(layer, "experts"), Treatment())
        missing = set(experts_before.get(layer, ())) - experts
        if missing and of_layer.channels is None:
            raise UserError(
                f"the plan narrows experts of L{layer} but says nothing of {Unit(layer, 'experts', min(missing))}: give each "
                "its channels, be it as many as it has"
            )


def _check_merges(stage: Stage) -> None:
    """Each average is of shares that make one, and what others merge into is itself a member, and the only
    one that is kept."""
    sums: dict[Unit, float] = {}
    for unit, treatment in stage.treatments.items():
        if treatment.into is None:
            continue
        target = Unit(unit.layer, "experts", treatment.into)
        sums[target] = sums.get(target, 0.0) + treatment.share
        if unit != target and unit.expert in _kept_experts(stage, unit):
            raise UserError(f"the plan merges {unit} into {target} and keeps it as well: do one of the two")
    for target, total in sums.items():
        of_target = stage.treatments.get(target, Treatment())
        if of_target.into != target.expert or target.expert not in _kept_experts(stage, target):
            raise UserError(f"the plan merges experts into {target}, which it does not keep")
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise UserError(f"the shares of what merges into {target} sum to {total:g}, not 1")


def _kept_experts(stage: Stage, expert: Unit) -> Sequence[int]:
    """What a stage says it keeps of the layer of an expert."""
    return stage.treatments.get(Unit(expert.layer, "experts"), Treatment()).keep or ()


def _check_cuts(plan: Plan, stage: int, blueprint: Blueprint) -> None:
    for cut in cuts(plan, stage, blueprint):
        if cut.repair == "bias" and not folds_into(blueprint, cut.before, "bias") and cut.stub is None:
            layer, _ = cut.branches[0]
            raise UserError(
                f"repair=bias has no place where L{layer} was: no block stays to hold it and the branch before it has no "
                "bias; use repair=linear or scale"
            )


def _check_rows(plan: Plan) -> None:
    """After a stage that leaves routers whole, positions and router rows part ways, so it must be a layer's
    last."""
    whole_routers: set[int | None] = set()
    for stage in plan.stages:
        for unit in sorted(stage.treatments):
            treatment = stage.treatments[unit]
            if unit.part != "experts" or treatment.drop or treatment == _format_and_width(treatment):
                continue
            if unit.layer in whole_routers:
                raise UserError(
                    f"L{unit.layer} keeps its whole router after an earlier step, so its experts cannot change again"
                )
            if unit.expert is None and treatment.repair in ROWS_STAY:
                whole_routers.add(unit.layer)


def _format_and_width(treatment: Treatment) -> Treatment:
    """What of a treatment leaves the number and order of experts alone."""
    return Treatment(format=treatment.format, channels=treatment.channels)


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
