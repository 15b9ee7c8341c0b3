"""The conductor: checkpoint to view, text to stats, stats to plan, plan to shards, in that order.

Every arrow leaves a file in the work folder, so that a run can be stopped anywhere and taken up again: measured
layers, stats per stage, the plan, and a journal line per finished shard. Steps are decided one after another; a
re-scored step is measured on the model as the earlier ones leave it, others share one measurement of the original.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moespresso.build import Tensors, View, make_skeleton, precision
from moespresso.checkpoint import (
    write_text,
)
from moespresso.core.errors import text_missing
from moespresso.core.method import Cuts, Searches, Selects, Step
from moespresso.core.plan import Decision, Plan, Stage
from moespresso.core.runtime import Runtime
from moespresso.core.stats import Stats, stats_key
from moespresso.core.unit import Unit
from moespresso.data import Batches
from moespresso.effect import validated
from moespresso.fit import Slimmed, decide_in_sequence, found, in_source, numbered, unrepaired
from moespresso.quality import token_kl
from moespresso.statistics import Measurer, OfWeights, needs_text, restricted, statistics_of
from moespresso.stream import (
    SweepOptions,
    SweepState,
    Watch,
    lanes_at_once,
    layer_bytes,
    must_spill,
    state_bytes,
    sweep,
    sweep_variants,
)

logger = logging.getLogger(__name__)

# Formats of what is measured: raise when the same needs would give other numbers.
_STATS_VERSION = "2"


@dataclass
class Clock:
    """Seconds spent per phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Any:
        """Add the time inside to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def all_needs(steps: Sequence[Step]) -> frozenset[str]:
    """The statistics that all steps together must have measured, by name."""
    return frozenset().union(*(step.needs() for step in steps))


def see_text(steps: Sequence[Step]) -> bool:
    """Whether any of the steps needs text, to be measured or found on."""
    return any(step.sees_text for step in steps) or needs_text(all_needs(steps))


def measure(
    view: View, batches: Batches | None, steps: Sequence[Step], work: Path, runtime: Runtime
) -> Stats:
    """Measure what the steps need on the view; a finished measurement in `work` is taken up, an unfinished one continued."""
    needs = all_needs(steps)
    text = needs_text(needs)
    if text:
        _needed(batches)
    # `text` stands among the needs where a step is found on text, though nothing is measured under that name.
    seen = sorted(needs | ({"text"} if any(step.sees_text for step in steps) else set[str]()))
    key = stats_key(
        view.source.digest,
        view.plan.digest,
        batches.digest if batches is not None and text else "",
        *seen,
        precision(view, runtime) if text else "",
        _STATS_VERSION,
    )
    saved = work / f"stats-{key[:16]}.json"
    if saved.is_file():
        return Stats.load(saved)
    values: dict[Unit, dict[str, float]] = {}
    trouble: list[str] = []
    nonfinite: dict[str, int] = {}
    state = work / f"sweep-{key[:16]}.safetensors"
    folder = view.checkpoint.folder
    if batches is not None and text:
        with Tensors(folder, allow_nonfinite=runtime.allow_nonfinite) as tensors:
            measurer = _sweep(view, batches, needs, state, tensors, runtime)
            values, trouble, nonfinite = measurer.values, measurer.trouble, tensors.nonfinite
    for each in statistics_of(needs):
        if isinstance(each, OfWeights):
            with Tensors(folder, allow_nonfinite=runtime.allow_nonfinite) as tensors:
                for unit, row in each.measure(view, tensors, runtime.progress).items():
                    values.setdefault(unit, {}).update(row)
                nonfinite |= tensors.nonfinite
    trouble += [f"{name}: {count} NaN or infinite values" for name, count in sorted(nonfinite.items())]
    measured = batches if text else None
    stats = Stats(
        key,
        view.source.digest,
        measured.num_tokens if measured is not None else 0,
        values,
        tuple(trouble),
        measured.describe() if measured is not None else {},
        tuple(seen),
    )
    write_text(saved, stats.to_json())
    state.unlink(missing_ok=True)
    return stats


def _sweep(
    view: View, batches: Batches, needs: frozenset[str], path: Path, tensors: Tensors, runtime: Runtime
) -> Measurer:
    skeleton = make_skeleton(view, tensors, runtime)
    measurer = Measurer(needs, batches.num_tokens)

    def recall(notes: dict[str, Any]) -> None:
        measurer.recall(notes["measured"])
        tensors.nonfinite = notes["nonfinite"]

    state = SweepState(path, lambda: {"measured": measurer.notes(), "nonfinite": tensors.nonfinite}, recall)
    options = SweepOptions(
        state=state if measurer.resumable else None,
        spill=path.parent if must_spill(view, batches, runtime) else None,
    )
    watch = Watch(runtime.progress, "measure layers")
    sweep(skeleton, batches.ids, batches.mask, measurer, options, watch)
    return measurer


@dataclass
class Decided:
    """A plan with what it stands on: stats, fitted values, notes for the user, and every unit's score (in source
    numbers)."""

    plan: Plan
    fits: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    stats: list[Stats] = field(default_factory=list[Stats])
    notes: list[str] = field(default_factory=list[str])
    scores: dict[Unit, float] = field(default_factory=dict[Unit, float])
    protected: set[Unit] = field(default_factory=set[Unit])
    more_trouble: list[str] = field(default_factory=list[str])
    coverage: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def add(self, fitted: Slimmed) -> None:
        """Take up what a stage needs."""
        self.fits |= fitted.fits
        self.more_trouble += fitted.trouble
        self.coverage |= fitted.coverage

    @property
    def trouble(self) -> list[str]:
        """What went wrong while measuring, each once."""
        lines = [line for stats in self.stats for line in stats.trouble]
        return list(dict.fromkeys([*lines, *self.more_trouble]))


def decide(
    view: View,
    steps: Sequence[Step],
    batches: Batches | None,
    given: Stats | None,
    work: Path,
    runtime: Runtime,
    clock: Clock,
) -> Decided:
    """Choose for every step in order, and fit what stands in for what goes."""
    done = Decided(view.plan, dict(view.fits))
    for step in steps:
        now = replace(view, plan=done.plan, fits=done.fits)
        step.check(now.blueprint)
        match step:
            case Searches(searches=True):
                with clock.phase("search"):
                    decision = _searched(step, now, view, batches, work, runtime)
            case Selects(sequential=True):
                with clock.phase("measure"):
                    decision, trouble = decide_in_sequence(step, now, _needed(batches), runtime)
                done.more_trouble += trouble
            case _:
                decision = _measured(step, steps, now, view, batches, given, work, runtime, clock, done)
        _take(step, decision, now, done)
        with clock.phase("fit"):
            done.add(found(now, done.plan, batches, work, runtime))
    return done


def _measured(
    step: Step,
    steps: Sequence[Step],
    now: View,
    view: View,
    batches: Batches | None,
    given: Stats | None,
    work: Path,
    runtime: Runtime,
    clock: Clock,
    done: Decided,
) -> Decision:
    """Let a step decide by what is measured: on the model as it is now, or (`rescore: false`) on the original."""
    seen = now if step.rescore and done.plan.stages else view
    with clock.phase("measure"):
        shared = [other for other in steps if other is step or other is steps[0] or not other.rescore]
        asking = shared if seen is view else [step]
        stats = given if given is not None and seen is view else measure(seen, batches, asking, work, runtime)
    if stats not in done.stats:
        done.stats.append(stats)
    with clock.phase("plan"):
        return step.decide(stats if seen is now else _restricted(stats, now), now.blueprint)


def _searched(
    step: Searches, now: View, view: View, batches: Batches | None, work: Path, runtime: Runtime
) -> Decision:
    """Let a step try candidates on the model as it is now, against the original."""
    batches = _needed(batches)
    ids, mask = batches.ids[: step.rows], batches.mask[: step.rows]
    with Tensors(view.checkpoint.folder, allow_nonfinite=runtime.allow_nonfinite) as tensors:
        model, source = (make_skeleton(each, tensors, runtime) for each in (now, view))
        each = state_bytes(source, ids, mask)
        left = sys.maxsize
        if runtime.max_memory is not None:
            left = runtime.max_memory - layer_bytes(view, source.dtype)
        _, spill = lanes_at_once(1, each, left, work)
        watch = Watch(runtime.progress, "layers, original")
        truth = sweep(source, ids, mask, options=SweepOptions(spill=spill), watch=watch)

        def judge(candidates: Sequence[Cuts]) -> list[float]:
            losses: list[float] = []
            most, spill = lanes_at_once(len(candidates), each, left - truth.nbytes, work)
            if most < len(candidates):
                # No note: what the disk holds must not show in the result.
                logger.info("%d of %d cuts are tried at once, for lack of disk space", most, len(candidates))
            for first in range(0, len(candidates), most):
                some = candidates[first : first + most]
                watch = Watch(runtime.progress, f"try {len(some)} cuts")
                with sweep_variants(model, ids, mask, some, spill=spill, watch=watch) as hidden:
                    losses += token_kl([model, source], hidden, truth, mask)
            return losses

        return step.search(now.blueprint, judge)


def _needed(batches: Batches | None) -> Batches:
    if batches is None:
        raise text_missing("these steps see")
    return batches


def _take(step: Step, decision: Decision, now: View, done: Decided) -> None:
    """Add what a step decided on the model as it is now to the plan, in the source's numbers."""
    treatments = {
        in_source(unit, now): numbered(unit, what, now) for unit, what in decision.treatments.items()
    }
    done.notes += decision.notes
    done.scores |= {in_source(unit, now): score for unit, score in decision.scores.items()}
    done.protected |= {in_source(unit, now) for unit in decision.protected}
    stage = Stage(step.describe(), treatments)
    done.plan = validated(replace(done.plan, stages=(*done.plan.stages, stage)), now.source)
    done.notes += unrepaired(done.plan, now)


def _restricted(stats: Stats, now: View) -> Stats:
    """Stats of the original, renumbered to what is left (`rescore: false`)."""
    whole = not now.plan.stages
    values: dict[Unit, Mapping[str, float]] = {}
    for position, layer in enumerate(now.left.layers):
        experts = now.left.experts.get(layer, ())
        units = {Unit(layer): Unit(position)}
        units |= {Unit(layer, part): Unit(position, part) for part in ("attention", "experts", "dense")}
        units |= {Unit(layer, "experts", e): Unit(position, "experts", at) for at, e in enumerate(experts)}
        for old, new in units.items():
            row = stats.values.get(old)
            if row is not None:
                values[new] = row if whole else restricted(row, experts)
    return replace(stats, values=values)
