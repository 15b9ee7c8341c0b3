"""What steps decide by: statistics of the model as it is now, or of the original, measured once and kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moespresso.build import Tensors, View, make_meta_model, precision
from moespresso.checkpoint import write_text
from moespresso.core.method import Step
from moespresso.core.plan import Decision
from moespresso.core.stats import Stats, stats_key
from moespresso.core.unit import Unit
from moespresso.fit.job import Job
from moespresso.statistics import Measurer, OfWeights, needs_text, restricted, statistics_of
from moespresso.stream import SweepOptions, SweepState, sweep

# Formats of what is measured: raise when the same needs would give other numbers.
_STATS_VERSION = "2"


def all_needs(steps: Sequence[Step]) -> frozenset[str]:
    """The statistics that all steps together must have measured, by name."""
    return frozenset().union(*(step.needs() for step in steps))


def see_text(steps: Sequence[Step]) -> bool:
    """Whether any of the steps needs text, to be measured or found on."""
    return any(step.sees_text for step in steps) or needs_text(all_needs(steps))


def measured(
    job: Job, step: Step, now: View, shared: Sequence[Step], given: Stats | None
) -> tuple[Decision, Stats]:
    """What a step decides by what is measured: on the model as it is now, or (`rescore: false`) on the
    original. What the `shared` steps need of the original too is measured with it; `given` stats are of
    the original."""
    seen = now if step.rescore and now.plan.stages else job.view
    with job.clock.phase("measure"):
        asking = shared if seen is job.view else [step]
        stats = given if given is not None and seen is job.view else measure(job, asking, seen)
    with job.clock.phase("plan"):
        return step.decide(stats if seen is now else _restricted(stats, now), now.blueprint), stats


def measure(job: Job, steps: Sequence[Step], view: View) -> Stats:
    """Measure what the steps need on a view; a finished measurement is taken up, an unfinished one
    continued."""
    needs = all_needs(steps)
    text = needs_text(needs)
    batches = job.text() if text else None
    # `text` stands among the needs where a step is found on text, though nothing is measured under that name.
    seen = sorted(needs | ({"text"} if any(step.sees_text for step in steps) else set[str]()))
    key = stats_key(
        view.source.digest,
        view.plan.digest,
        batches.digest if batches is not None else "",
        *seen,
        precision(view, job.runtime) if text else "",
        _STATS_VERSION,
    )
    saved = job.work / f"stats-{key[:16]}.json"
    if saved.is_file():
        return Stats.load(saved)
    values: dict[Unit, dict[str, float]] = {}
    warnings: list[str] = []
    nonfinite: dict[str, int] = {}
    state = job.work / f"sweep-{key[:16]}.safetensors"
    if text:
        with job.tensors() as tensors:
            measurer = _sweep(job, view, needs, state, tensors)
            values, warnings, nonfinite = measurer.values, measurer.warnings, tensors.nonfinite
    for each in statistics_of(needs):
        if isinstance(each, OfWeights):
            with job.tensors() as tensors:
                for unit, row in each.measure(view, tensors, job.runtime.progress).items():
                    values.setdefault(unit, {}).update(row)
                nonfinite |= tensors.nonfinite
    warnings += [f"{name}: {count} NaN or infinite values" for name, count in sorted(nonfinite.items())]
    stats = Stats(
        key,
        view.source.digest,
        batches.num_tokens if batches is not None else 0,
        values,
        tuple(warnings),
        batches.describe() if batches is not None else {},
        tuple(seen),
    )
    write_text(saved, stats.to_json())
    state.unlink(missing_ok=True)
    return stats


def _sweep(job: Job, view: View, needs: frozenset[str], path: Path, tensors: Tensors) -> Measurer:
    batches = job.text()
    meta = make_meta_model(view, tensors, job.runtime)
    measurer = Measurer(needs, batches.num_tokens)

    def recall(notes: dict[str, Any]) -> None:
        measurer.recall(notes["measured"])
        tensors.nonfinite = notes["nonfinite"]

    state = SweepState(path, lambda: {"measured": measurer.notes(), "nonfinite": tensors.nonfinite}, recall)
    options = SweepOptions(state=state if measurer.resumable else None, spill=job.spill(view))
    sweep(meta, batches.ids, batches.mask, measurer, options, job.watch("measure layers"))
    return measurer


def _restricted(stats: Stats, now: View) -> Stats:
    """Stats of the original, renumbered to what is left (`rescore: false`)."""
    whole = not now.plan.stages
    values: dict[Unit, Mapping[str, float]] = {}
    for position, layer in enumerate(now.remains.layers):
        experts = now.remains.experts.get(layer, ())
        units = {Unit(layer): Unit(position)}
        units |= {Unit(layer, part): Unit(position, part) for part in ("attention", "experts", "dense")}
        units |= {Unit(layer, "experts", e): Unit(position, "experts", at) for at, e in enumerate(experts)}
        for old, new in units.items():
            row = stats.values.get(old)
            if row is not None:
                values[new] = row if whole else restricted(row, experts)
    return replace(stats, values=values)
