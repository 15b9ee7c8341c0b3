"""Which tensors a slimming stage encodes, in which format, and by which step: what plans, pieces and checks
agree on.

A treatment's `format` stands on a part of a layer (`L3.experts`, `L3.attention`) or on one projection of it
(`L3.experts.down`), which then counts. Routers, norms, biases and embeddings have none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from moespresso.core.blueprint import Blueprint, Entry
from moespresso.core.errors import UserError
from moespresso.core.format import DTYPE_BYTES, Format
from moespresso.core.method import MATRIX_PARTS, Refits, Treats
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.unit import Part, Unit
from moespresso.effect.cuts import REPAIRS
from moespresso.effect.remains import Remains, channels_left, remains
from moespresso.formats import codec_of

# The repair of a part whose tensors are replaced by fitted ones, since a stage moved a scale into them.
REFIT = "rescale"
REFIT_PARTS: tuple[Part, ...] = ("norm", "router", "shared")


def is_matrix(entry: Entry) -> bool:
    """Whether an entry is a weight matrix that a format can be given to (the one row of a shared expert's
    gate is none)."""
    shape = entry.ref.shape
    return (
        entry.in_graph
        and entry.unit.part in MATRIX_PARTS
        and entry.ref.name.endswith(".weight")
        and len(shape) == 2
        and shape[0] > 1
    )


def is_stack(entry: Entry) -> bool:
    """Whether an entry holds one matrix of every expert of a layer, as they are in memory: gate above up,
    outputs by inputs. Such experts can lose channels and weights, but have no packed form that is known to
    load."""
    down = (entry.unit.matrix or "").startswith("down")
    return (
        entry.in_graph
        and entry.unit.part == "experts"
        and entry.expert_axis == 0
        and len(entry.ref.shape) == 3
        and entry.joined != "interleaved"
        and entry.channel_axis == (-1 if down else -2)
    )


def format_of(entry: Entry, stage: Stage) -> Format | None:
    """The format that `stage` gives to an entry, or None."""
    if not (is_matrix(entry) or is_stack(entry)):
        return None
    whole_part = Unit(entry.unit.layer, entry.unit.part)
    single = Unit(entry.unit.layer, entry.unit.part, None, entry.unit.matrix)
    formats = (stage.treatments.get(unit, Treatment()).format for unit in (single, whole_part))
    return next((format for format in formats if format is not None), None)


def channels_of(entry: Entry, stage: Stage) -> int | None:
    """The channels that `stage` leaves to the expert of an entry that is one of its matrices, or None."""
    if entry.unit.part != "experts" or not (is_matrix(entry) or is_stack(entry)):
        return None
    return channels_left(stage, entry.unit.layer or 0, entry.unit.expert)


def replaces(entry: Entry, stage: Stage) -> bool:
    """Whether `stage` puts fitted values in the place of a whole tensor whatever its step is: those of a part
    that a scale was moved into, of experts that lose channels, and of biases whose matrix loses rows."""
    part = stage.treatments.get(Unit(entry.unit.layer, entry.unit.part), Treatment())
    narrows = (
        entry.unit.part == "experts"
        and channels_left(stage, entry.unit.layer or 0, entry.unit.expert) is not None
    )
    return part.repair == REFIT or narrows or _loses_rows(entry, stage)


def _loses_rows(entry: Entry, stage: Stage) -> bool:
    """Whether an entry is the bias of a matrix of which `stage` keeps some rows only."""
    unit = entry.unit
    if unit.part != "attention" or not entry.ref.name.endswith(".bias"):
        return False
    single = Unit(unit.layer, unit.part, None, (unit.matrix or "").removesuffix("_bias"))
    format = stage.treatments.get(single, Treatment()).format
    return format is not None and codec_of(format).loses_rows(format)


def scale_dtypes(blueprint: Blueprint) -> dict[int | None, str]:
    """By layer, the dtype that the scales of its experts are stored in: the narrowest of the experts' own,
    since loaders stack all of them in one dtype."""
    dtypes: dict[int | None, str] = {}
    for entry in blueprint.entries:
        if entry.unit.part == "experts" and (is_matrix(entry) or is_stack(entry)):
            other = dtypes.get(entry.unit.layer, entry.ref.dtype)
            dtypes[entry.unit.layer] = min(
                other, entry.ref.dtype, key=lambda dtype: (DTYPE_BYTES[dtype], dtype)
            )
    return dtypes


def treats_matrices(stage: Stage) -> bool:
    """Whether a stage encodes matrices, prunes them or takes channels out of them."""
    return any(
        treatment.format is not None or treatment.channels is not None
        for treatment in stage.treatments.values()
    )


def fits_on_text(stage: Stage) -> bool:
    """Whether a stage encodes by a step that takes calibration text."""
    return treats_matrices(stage) and isinstance(step_of(stage), Refits)


def step_of(stage: Stage) -> Treats:
    """The settings of the step that encodes in `stage`; raises `UserError` where that is none that can."""
    method: Mapping[str, Any] = stage.method
    step = stage.step
    if not isinstance(step, Treats):
        raise UserError(
            f"the plan gives formats or channels by {method.get('kind')!r}, which is no step that treats_matrices weights"
        )
    return step


def check_formats(plan: Plan, number: int, blueprint: Blueprint) -> None:
    """Raise `UserError` where stage `number` of a plan encodes what is not there or cannot be, or changes
    values that an earlier stage encoded."""
    stage = plan.stages[number]
    before = plan.stages[:number]
    slimmed = any(map(treats_matrices, before))
    for unit, treatment in stage.treatments.items():
        if treatment.format is not None and treatment != Treatment(format=treatment.format):
            raise UserError(
                f"the plan gives {unit} a format and something else as well: do one after the other"
            )
        _check_values(unit, treatment, slimmed, _formats_before(unit, before))
    refitted = _refit_units(stage)
    if not treats_matrices(stage):
        return
    # Shared experts may be those of the family that the checkpoint is presented as, so only the layer is looked up.
    known = {Unit(layer.index, part) for layer in blueprint.moe_layers for part in REFIT_PARTS}
    if refitted - known:
        raise UserError(f"the plan rescales {min(refitted - known)}, but {blueprint.place} has no such part")
    met: set[Unit] = set()
    left = remains(Plan(plan.blueprint, plan.stages[: number + 1]), blueprint)
    treated: list[tuple[Entry, Format, tuple[int, ...]]] = []
    for entry in blueprint.entries:
        _check_fused(entry, stage, blueprint, left)
        format = format_of(entry, stage)
        if format is not None:
            treated.append((entry, format, narrowed(entry, left)))
            met |= {
                Unit(entry.unit.layer, entry.unit.part, None, matrix) for matrix in (None, entry.unit.matrix)
            }
    check_all_storable(treated)
    for unit, treatment in stage.treatments.items():
        if treatment.format is not None and unit not in met:
            raise UserError(f"the plan gives {unit} a format, but {blueprint.place} has no matrices there")


def _formats_before(unit: Unit, before: Collection[Stage]) -> set[Format]:
    """What earlier stages have given to the part of a layer that a unit is in; of experts all matrices, which
    are solved together."""
    return {
        treatment.format
        for stage in before
        for other, treatment in stage.treatments.items()
        if treatment.format is not None
        and (other.layer, other.part) == (unit.layer, unit.part)
        and (unit.part == "experts" or None in (unit.matrix, other.matrix) or unit.matrix == other.matrix)
    }


def _refit_units(stage: Stage) -> set[Unit]:
    return {unit for unit, treatment in stage.treatments.items() if treatment.repair == REFIT}


def check_step(stage: Stage, blueprint: Blueprint) -> None:
    """Raise `UserError` where a stage's step cannot make the formats it is said to give, or on text would be
    shown some matrices of experts and not the others, which it solves together. Needs the step to be known: a
    plan is priced without."""
    if (refitted := _refit_units(stage)) and not fits_on_text(stage):
        raise UserError(f"the plan rescales {min(refitted)} in a step that does not round weights on text")
    if not treats_matrices(stage):
        return
    step = step_of(stage)
    kinds, able = step.kinds, step.able
    for unit, treatment in stage.treatments.items():
        if treatment.format is not None and unit.part not in able:
            raise UserError(
                f"the plan gives {unit} a format by {step.kind}, which treats {', '.join(able[:-1])} or {able[-1]} only: leave it out"
            )
        if treatment.format is not None and treatment.format.kind not in kinds:
            raise UserError(
                f"the plan gives {unit} the format {treatment.format.kind}, which {step.kind} as it is set does not make: it makes "
                f"{' or '.join(sorted(kinds)) or 'none'}"
            )
    if not isinstance(step, Refits):
        return
    for layer, entries in blueprint.by_layer.items():
        experts = [e for e in entries if e.unit.part == "experts" and (is_matrix(e) or is_stack(e))]
        lacking = [entry for entry in experts if format_of(entry, stage) is None]
        if lacking and len(lacking) < len(experts):
            raise UserError(
                f"the plan gives some matrices of L{layer}'s experts a format, but {lacking[0].unit.matrix} none: {step.kind} solves "
                "them together"
            )


def _check_values(unit: Unit, treatment: Treatment, slimmed: bool, formats: Collection[Format]) -> None:
    """Whether a treatment may follow steps that have slimmed weights, or given them such formats."""
    changes = treatment.into is not None or treatment.repair in REPAIRS
    if changes and slimmed:
        what = "merges" if treatment.into is not None else "repairs"
        raise UserError(
            f"the plan {what} {unit} after a step that rounds or prunes weights: put that step last"
        )
    reason = _why_not_after(treatment, formats)
    if reason is not None:
        raise UserError(f"the plan {reason.format(unit=unit)}: {_in_order(treatment, formats)}")


def _why_not_after(treatment: Treatment, formats: Collection[Format]) -> str | None:
    """Why a treatment cannot follow steps that gave such formats; None where it can."""
    format, narrows = treatment.format, treatment.channels is not None
    if format is None and not narrows:
        return None
    before = [codec_of(one_format) for one_format in formats]
    if any(codec.packs and not codec.renews for codec in before):
        return "treats {unit} after a step that stores matrices with a mask or as factors or in part"
    anew = narrows or (format is not None and (codec_of(format).fitted or format.rank > 0))
    if anew and any(one_format.density < 1 for one_format in formats):
        return "fits {unit} anew after a step that prunes single weights, which would no longer be zero"
    cuts = narrows or (format is not None and not codec_of(format).rounds)
    if cuts and any(codec.rounds for codec in before):
        return "prunes {unit} after a step that rounds weights"
    return None


def _in_order(treatment: Treatment, formats: Collection[Format]) -> str:
    """The orders and forms of a treatment and what stands before it that can be done, as a cure."""

    def swapped(now: Treatment) -> bool:
        after = set[Format]() if now.format is None else {now.format}
        return all(_why_not_after(Treatment(format=format), after) is None for format in formats)

    plain = (
        treatment
        if treatment.format is None
        else replace(treatment, format=_without_packing(treatment.format))
    )
    last = (
        "put the rounding last"
        if all(codec_of(format).rounds for format in formats)
        else "put that step last"
    )
    unpacked = {_without_packing(format) for format in formats}
    cures = [last] if swapped(treatment) else []
    if unpacked != set(formats) and _why_not_after(treatment, unpacked) is None:
        cures.append("say pack=false there")
    if not cures and swapped(plain):
        cures.append(f"{last} and say pack=false here")
    return ", or ".join(cures) or "neither can follow the other, so leave one of the two out"


def _without_packing(format: Format) -> Format:
    """What a step makes instead with pack=false, where it has that setting."""
    return codec_of(format).unpacked(format)


def _check_fused(entry: Entry, stage: Stage, blueprint: Blueprint, left: Remains) -> None:
    """Experts that are stored as one tensor have no packed form that an engine knows, and one width."""
    if entry.unit.part != "experts" or entry.unit.expert is not None or len(entry.ref.shape) != 3:
        return
    treated = [
        treatment
        for unit, treatment in stage.treatments.items()
        if unit.layer == entry.unit.layer
        and unit.part == "experts"
        and (treatment.format or treatment.channels)
    ]
    packs = any(treatment.format is not None and codec_of(treatment.format).packs for treatment in treated)
    differ = len(set(left.widths.get(entry.unit.layer or 0, {}).values())) > 1
    if treated and (packs or differ or not is_stack(entry)):
        raise UserError(
            f"{blueprint.place} ({blueprint.family}) stores all experts of a layer in one tensor ({entry.ref.name}), for which no "
            "packed form and no widths of their own are known to load: drop experts, or narrow all alike"
        )


def narrowed(entry: Entry, left: Remains) -> tuple[int, ...]:
    """The shape of a tensor with the channels that are left to its expert."""
    shape, axis = list(entry.ref.shape), entry.channel_axis
    widths = left.widths.get(-1 if entry.unit.layer is None else entry.unit.layer, {})
    width = widths.get(next(iter(widths), -1) if entry.unit.expert is None else entry.unit.expert)
    if width is not None and axis is not None and entry.unit.part == "experts":
        shape[axis] = 2 * width if entry.joined else width
    return tuple(shape)


def check_all_storable(treated: Collection[tuple[Entry, Format, tuple[int, ...]]]) -> None:
    """Raise `UserError` where a matrix of some shape, of all that one step treats, cannot be stored in its
    format."""
    widths = {shape[-1] for _, _, shape in treated}
    for entry, format, shape in treated:
        check_storable(entry, format, shape, widths)


def check_storable(entry: Entry, format: Format, shape: tuple[int, ...], beside: Collection[int]) -> None:
    """Raise `UserError` where a matrix of `shape` cannot be stored in `format`; the cure is one for all
    widths `beside` it."""
    codec, unit = codec_of(format), entry.unit
    codec.check_entry(format, unit.expert, unit.matrix or "", entry.ref.name)
    codec.check(format, shape, entry.ref.name, beside)
