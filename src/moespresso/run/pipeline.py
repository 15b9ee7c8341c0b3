"""The conductor: one step after another, each on the model as the earlier ones leave it.

Every arrow leaves a file in the work folder, so that a run can be stopped anywhere and taken up again:
measured layers, stats per stage, what was fitted, and a journal line per finished shard. What comes of
`decide` is a plan with its fitted values; what changes values afterwards (healing) stands between that and
`build.write`, as a stage of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from moespresso.core.method import Step
from moespresso.core.plan import Plan
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.fit import Fitted, Job, StepResult, choose_ahead, fit_stage, run_step, unrepaired


@dataclass
class Decided:
    """A plan with what it stands on: stats, fitted values, notes for the user, and every unit's score (in
    source numbers)."""

    plan: Plan
    fits: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    stats: list[Stats] = field(default_factory=list[Stats])
    notes: list[str] = field(default_factory=list[str])
    scores: dict[Unit, float] = field(default_factory=dict[Unit, float])
    protected: set[Unit] = field(default_factory=set[Unit])
    more_warnings: list[str] = field(default_factory=list[str])
    coverage: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def take(self, result: StepResult) -> None:
        """Take up what a step came to."""
        self.plan = result.plan
        if result.stats is not None and result.stats not in self.stats:
            self.stats.append(result.stats)
        self.notes += result.notes
        self.scores |= result.scores
        self.protected |= result.protected
        self.more_warnings += result.warnings
        self.add(result.fitted)

    def add(self, fitted: Fitted) -> None:
        """Take up what a stage needs."""
        self.fits |= fitted.fits
        self.more_warnings += fitted.warnings
        self.coverage |= fitted.coverage

    @property
    def warnings(self) -> list[str]:
        """What went wrong while measuring, each once."""
        lines = [line for stats in self.stats for line in stats.warnings]
        return list(dict.fromkeys([*lines, *self.more_warnings]))


def decide(job: Job, steps: Sequence[Step], measured: Stats | None = None) -> Decided:
    """Choose for every step in order, and fit what stands in for what is removed; `measured` stats of the
    original are not measured again."""
    view = job.view
    done = Decided(view.plan, dict(view.fits))
    for step in steps:
        now = replace(view, plan=done.plan, fits=dict(done.fits))
        shared = [other for other in steps if other is step or other is steps[0] or not other.rescore]
        done.take(run_step(job, step, now, shared, measured))
    return _with_ahead(job, done)


def fit_again(job: Job, plan: Plan) -> Decided:
    """A plan with what each of its stages needs, found again on the text it was made on."""
    done = Decided(plan)
    for stage in range(len(plan.stages)):
        before = replace(job.view, plan=replace(plan, stages=plan.stages[:stage]), fits=dict(done.fits))
        so_far = replace(plan, stages=plan.stages[: stage + 1])
        with job.clock.phase("fit"):
            done.add(fit_stage(job, before, so_far))
        done.notes += unrepaired(so_far, before)
    return _with_ahead(job, done)


def _with_ahead(job: Job, done: Decided) -> Decided:
    """With what the trunk's plan means for the layers that predict tokens further ahead."""
    done.plan, notes = choose_ahead(job, done.plan)
    done.notes += notes
    return done
