"""What a plan needs that is found on real text or weights, and where it is kept: tensors by address.

A stage says *that* a cut is repaired, the fit says *with what*: plans stay readable, and a build with the
same text finds the same values again. Keys are `STAGE/UNIT/KIND`, with the unit whose tensors are changed:

    linear   [H, H]  the map that the last branch before the cut is multiplied with
    scale    [H]     its diagonal form
    bias     [H]     what is added to the residual stream where the branch was
    novices  [G, H]  mean answers of the experts that are gone, in ascending order
    order    [I]     the channels of an expert, in the order of the one it merges into

What slimming finds is of single tensors, and goes by the name that the source has for them:
`STAGE/NAME/SUFFIX`, with the parts that the encoded matrix is stored as, or `dense` for a tensor that is
replaced as a whole. What the experts of a layer share goes by the unit of their matrices:
`STAGE/L3.experts.gate/weight_bases`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moespresso.core.blueprint import Blueprint, Branch
from moespresso.core.plan import Plan
from moespresso.core.unit import Unit
from moespresso.effect.remains import Remains, remains
from moespresso.formats import codecs

Fits = Mapping[str, Tensor]
Repair = Literal["bias", "scale", "linear"]
REPAIRS: tuple[Repair, ...] = ("bias", "scale", "linear")


@dataclass(frozen=True, slots=True)
class Cut:
    """A run of branches that go in one stage, with the last one before them that stays (None: there is none).

    `stub` is the last of them whose block stays, so that a plugin can put a constant there.
    """

    repair: Repair
    branches: tuple[tuple[int, Branch], ...]
    before: tuple[int, Branch] | None
    stub: tuple[int, Branch] | None


def key(stage: int, unit: Unit, kind: str) -> str:
    """The name of a fitted tensor."""
    return f"{stage}/{unit}/{kind}"


def is_part(name: str) -> bool:
    """Whether what is found under a name is a part of one matrix, packed: neither a whole tensor nor what
    others share."""
    suffix = name.rpartition("/")[2]
    return any(suffix in codec.parts and suffix not in codec.shared for codec in codecs())


def fitted_key(stage: int, name: str, suffix: str) -> str:
    """The name of a tensor that slimming found for the source's tensor `name`."""
    return f"{stage}/{name}/{suffix}"


def cuts(plan: Plan, stage: int, blueprint: Blueprint) -> list[Cut]:
    """The runs of branches that `plan`'s stage number `stage` removes and wants repaired."""
    earlier = remains(Plan(plan.blueprint, plan.stages[:stage]), blueprint)
    alive = [at for at in blueprint.branches if is_left(at, earlier)]
    after = remains(Plan(plan.blueprint, plan.stages[: stage + 1]), blueprint)
    treatments = plan.stages[stage].treatments
    runs: list[Cut] = []
    run: list[tuple[int, Branch]] = []
    before: tuple[int, Branch] | None = None
    for at in [*alive, None]:
        if at is not None and not is_left(at, after):
            run.append(at)
            continue
        if run:
            repair = _repair_of(run, blueprint, treatments)
            stubs = [branch for branch in run if branch[0] in after.layers]
            if repair is not None:
                runs.append(Cut(repair, tuple(run), before, stubs[-1] if stubs else None))
        before, run = at, []
    return runs


def _repair_of(
    run: list[tuple[int, Branch]], blueprint: Blueprint, treatments: Mapping[Unit, object]
) -> Repair | None:
    specs = {layer.index: layer for layer in blueprint.layers}
    for layer, branch in run:
        for unit in (Unit(layer), specs[layer].unit(branch)):
            repair = getattr(treatments.get(unit), "repair", None)
            if repair in REPAIRS:
                return repair
    return None


def is_left(at: tuple[int, Branch], left: Remains) -> bool:
    """Whether a branch is still there."""
    return at[0] in left.layers and at not in left.cut


def needs_fit(plan: Plan, stage: int) -> frozenset[str]:
    """What stage number `stage` has fitted: `text` where it takes calibration text, `weights` where weights
    are enough."""
    treatments = plan.stages[stage].treatments.values()
    kinds: set[str] = set()
    if any(treatment.repair in (*REPAIRS, "novice") for treatment in treatments):
        kinds.add("text")
    if any(treatment.repair == "align" for treatment in treatments):
        kinds.add("weights")
    return frozenset(kinds)
