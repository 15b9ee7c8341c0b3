"""One step of a recipe, from the model as it is to what becomes of it: decided by its role, added to the
plan, fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moespresso.build import View
from moespresso.core.method import Searches, Selects, Step
from moespresso.core.plan import Decision, Plan, Stage
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.effect import validated
from moespresso.fit.job import Job
from moespresso.fit.keep import Fitted
from moespresso.fit.layerwise import fit_stage
from moespresso.fit.measured import measured
from moespresso.fit.numbers import in_source, numbered
from moespresso.fit.repairs import unrepaired
from moespresso.fit.searching import searched
from moespresso.fit.sequential import decide_in_sequence


@dataclass(frozen=True)
class StepResult:
    """What a step comes to: the plan with its stage, what that was fitted, the stats it stands on; and in
    the source's numbers what a reader wants to know of the choice."""

    plan: Plan
    fitted: Fitted
    stats: Stats | None
    notes: list[str]
    scores: dict[Unit, float]
    protected: set[Unit]
    warnings: list[str]


def run_step(
    job: Job, step: Step, now: View, shared: Sequence[Step] = (), given: Stats | None = None
) -> StepResult:
    """Do one step on the model `now`; `shared` steps and `given` stats as in `measured`."""
    step.check(now.blueprint)
    decision, stats, warnings = _decided(job, step, now, shared or [step], given)
    stage = Stage(
        {**step.describe(), **decision.settled},
        {in_source(unit, now): numbered(unit, what, now) for unit, what in decision.treatments.items()},
    )
    plan = validated(replace(now.plan, stages=(*now.plan.stages, stage)), now.source)
    with job.clock.phase("fit"):
        slimmed = fit_stage(job, now, plan)
    return StepResult(
        plan,
        slimmed,
        stats,
        [*decision.notes, *unrepaired(plan, now)],
        {in_source(unit, now): score for unit, score in decision.scores.items()},
        {in_source(unit, now) for unit in decision.protected},
        warnings,
    )


def _decided(
    job: Job, step: Step, now: View, shared: Sequence[Step], given: Stats | None
) -> tuple[Decision, Stats | None, list[str]]:
    """What a step decides, by its role; the stats it went by, and what went wrong while it was measured
    otherwise."""
    match step:
        case Searches(searches=True):
            with job.clock.phase("search"):
                return searched(job, step, now), None, []
        case Selects(sequential=True):
            with job.clock.phase("measure"):
                decision, warnings = decide_in_sequence(job, step, now)
            return decision, None, warnings
        case _:
            return *measured(job, step, now, shared, given), []
