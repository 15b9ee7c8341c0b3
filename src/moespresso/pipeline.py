"""The conductor: checkpoint to view, text to stats, stats to plan, plan to shards, in that order.

Every arrow leaves a file in the work folder, so that a run can be stopped anywhere and taken up again: measured
layers, stats per stage, the plan, and a journal line per finished shard. Steps are decided one after another; a
re-scored step is measured on the model as the earlier ones leave it, others share one measurement of the original.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from moespresso.checkpoint import (
    Checkpoint,
    Journal,
    Reader,
    Written,
    copy_sidecar,
    layout,
    open_checkpoint,
    shard_limit,
    sidecars,
    write_index,
    write_shard,
    write_text,
)
from moespresso.core.blueprint import Blueprint
from moespresso.core.errors import UserError
from moespresso.core.plan import Decision, Plan, Stage
from moespresso.core.rewrite import kept_by_layer
from moespresso.core.runtime import Runtime
from moespresso.core.stats import Stats, stats_key
from moespresso.core.unit import Unit
from moespresso.data import Batches
from moespresso.measure import Measurer, weight_sums
from moespresso.model import Skeleton, View, read_blueprint
from moespresso.stream import ANSWER_BYTES, Memento, sweep

# Formats of what is measured: raise when the same needs would give other numbers.
_STATS_VERSION = "1"
# Memory beside the layer and its hidden states: a few copies of what all selected experts answer to one batch, and more.
_OVERHEAD = 4 * ANSWER_BYTES


class Step(Protocol):
    """What the conductor asks of a method's settings."""

    kind: str
    rescore: bool
    uneven: bool

    def needs(self) -> frozenset[str]: ...

    def check(self, blueprint: Blueprint) -> None: ...

    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision: ...

    def outline(self, source: Blueprint, before: Plan) -> Stage: ...


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


def open_view(folder: Path) -> View:
    """The checkpoint in `folder`, as it is."""
    checkpoint: Checkpoint = open_checkpoint(folder)
    blueprint = read_blueprint(checkpoint)
    return View(checkpoint, blueprint, Plan(blueprint.digest))


def make_skeleton(view: View, reader: Reader, runtime: Runtime) -> Skeleton:
    """The view's model on `meta`, for the runtime's device and precision."""
    device = pick_device(runtime.device)
    return view.skeleton(reader, pick_dtype(runtime.dtype, view, device), device)


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {name!r} is not to be had here ({str(error).splitlines()[0]})") from error


def pick_dtype(name: str, view: View, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU (statistics should not carry rounding) and the checkpoint's own elsewhere."""
    if name == "auto":
        config = view.checkpoint.config
        stored = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        name = "float32" if device.type == "cpu" else str(stored)
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UserError(f"dtype {name!r} is unknown: use float32, bfloat16 or float16")
    return found


def all_needs(steps: Sequence[Step]) -> frozenset[str]:
    """What all steps together must have measured."""
    return frozenset().union(*(step.needs() for step in steps))


def measure(
    view: View, batches: Batches | None, needs: frozenset[str], work: Path, runtime: Runtime
) -> Stats:
    """Measure `needs` on the view; a finished measurement in `work` is taken up, an unfinished one continued."""
    text = needs - {"weights"}
    if text and batches is None:
        raise UserError("these steps score on real text: give --text FILE or --dataset NAME")
    tokens = batches.digest if batches is not None and text else ""
    key = stats_key(
        view.source.digest, view.plan.digest, tokens, *sorted(needs), runtime.dtype, _STATS_VERSION
    )
    saved = work / f"stats-{key[:16]}.json"
    if saved.is_file():
        return Stats.load(saved)
    values: dict[Unit, dict[str, float]] = {}
    trouble: list[str] = []
    nonfinite: dict[str, int] = {}
    memento = work / f"sweep-{key[:16]}.safetensors"
    folder = view.checkpoint.folder
    if batches is not None and text:
        with Reader(folder, allow_nonfinite=runtime.allow_nonfinite) as reader:
            measurer = _sweep(view, batches, text, memento, reader, runtime)
            values, trouble, nonfinite = measurer.values, measurer.trouble, reader.nonfinite
    if "weights" in needs:
        with Reader(folder, allow_nonfinite=runtime.allow_nonfinite) as reader:
            for unit, row in weight_sums(view, reader, runtime.progress).items():
                values.setdefault(unit, {}).update(row)
            nonfinite |= reader.nonfinite
    trouble += [f"{name}: {count} NaN or infinite values" for name, count in sorted(nonfinite.items())]
    measured = batches if text else None
    stats = Stats(
        key,
        view.source.digest,
        measured.num_tokens if measured is not None else 0,
        values,
        tuple(trouble),
        measured.describe() if measured is not None else {},
        tuple(sorted(needs)),
    )
    write_text(saved, stats.to_json())
    memento.unlink(missing_ok=True)
    return stats


def _sweep(
    view: View, batches: Batches, needs: frozenset[str], path: Path, reader: Reader, runtime: Runtime
) -> Measurer:
    skeleton = make_skeleton(view, reader, runtime)
    measurer = Measurer(needs, batches.num_tokens)

    def recall(notes: dict[str, Any]) -> None:
        measurer.recall(notes["measured"])
        reader.nonfinite = notes["nonfinite"]

    memento = Memento(path, lambda: {"measured": measurer.notes(), "nonfinite": reader.nonfinite}, recall)
    spill = path.parent if must_spill(view, batches, runtime) else None
    sweep(skeleton, batches.ids, batches.mask, measurer, memento=memento, spill=spill, progress=runtime.progress,
          label="measure layers")  # fmt: skip
    return measurer


def must_spill(view: View, batches: Batches | None, runtime: Runtime) -> bool:
    """Whether hidden states go to disk between layers; raises `UserError` when not even one layer fits the limit."""
    if runtime.max_memory is None or batches is None:
        return False
    dtype = pick_dtype(runtime.dtype, view, pick_device(runtime.device))
    largest = max(
        sum(entry.ref.numel for entry in view.blueprint.by_layer[layer.index])
        for layer in view.blueprint.layers
    )
    needed = int(largest * dtype.itemsize) + _OVERHEAD
    if needed > runtime.max_memory:
        raise UserError(
            f"--max-memory {runtime.max_memory >> 20} MiB is too little to measure: one layer takes about "
            f"{needed >> 20} MiB in {dtype}; give that much, try --dtype bfloat16, or score=aimer"
        )
    return needed + 2 * batches.ids.numel() * view.blueprint.hidden * dtype.itemsize > runtime.max_memory


@dataclass
class Decided:
    """A plan with what it stands on: stats, notes for the user, and every expert's score (in source numbers)."""

    plan: Plan
    stats: list[Stats] = field(default_factory=list[Stats])
    notes: list[str] = field(default_factory=list[str])
    scores: dict[Unit, float] = field(default_factory=dict[Unit, float])
    protected: set[Unit] = field(default_factory=set[Unit])

    @property
    def trouble(self) -> list[str]:
        """What went wrong while measuring, each once."""
        return list(dict.fromkeys(line for stats in self.stats for line in stats.trouble))


def decide(
    view: View,
    steps: Sequence[Step],
    batches: Batches | None,
    given: Stats | None,
    work: Path,
    runtime: Runtime,
    clock: Clock,
) -> Decided:
    """Choose for every step in order."""
    done = Decided(view.plan)
    for step in steps:
        now = replace(view, plan=done.plan)
        seen = now if step.rescore and done.plan.stages else view
        step.check(now.blueprint)
        with clock.phase("measure"):
            shared = [other for other in steps if other is step or other is steps[0] or not other.rescore]
            needs = all_needs(shared) if seen is view else step.needs()
            stats = (
                given if given is not None and seen is view else measure(seen, batches, needs, work, runtime)
            )
        if stats not in done.stats:
            done.stats.append(stats)
        with clock.phase("plan"):
            _take(step, stats if seen is now else _restricted(stats, now), now, done)
    return done


def _take(step: Step, stats: Stats, now: View, done: Decided) -> None:
    """Let a step decide on the model as it is now, and add that to what is decided."""
    decision = step.decide(stats, now.blueprint)
    kept = kept_by_layer(now.plan, now.source)

    def in_source(unit: Unit) -> Unit:
        assert unit.layer is not None
        return unit if unit.expert is None else replace(unit, expert=kept[unit.layer][unit.expert])

    treatments = {
        unit: replace(t, keep=tuple(kept[unit.layer][position] for position in t.keep))
        if t.keep is not None and unit.layer is not None else t
        for unit, t in decision.treatments.items()
    }  # fmt: skip
    done.notes += decision.notes
    done.scores |= {in_source(unit): score for unit, score in decision.scores.items()}
    done.protected |= {in_source(unit) for unit in decision.protected}
    stage = Stage(describe_step(step), treatments)
    done.plan = replace(done.plan, stages=(*done.plan.stages, stage)).validated(now.source)


def describe_step(step: Step) -> Mapping[str, Any]:
    """A step as data: its kind and every setting."""
    names = cast("Any", step).__dataclass_fields__
    return {"kind": step.kind} | {name: getattr(step, name) for name in names}


def _restricted(stats: Stats, now: View) -> Stats:
    """Stats of the original, renumbered to the experts that are left (`rescore: false`)."""
    values = {unit: row for unit, row in stats.values.items() if unit.expert is None}
    whole = not now.plan.stages
    for layer, experts in kept_by_layer(now.plan, now.source).items():
        for position, expert in enumerate(experts):
            row = stats.values.get(Unit(layer, "experts", expert), {})
            # Sets found by trying all subsets of the original say nothing about the rest.
            values[Unit(layer, "experts", position)] = {k: v for k, v in row.items() if whole or "@" not in k}
    return replace(stats, values=values)


def write(view: View, folder: Path, journal: Journal, runtime: Runtime) -> tuple[list[Written], list[str]]:
    """Write the view's tensors, config and side files; finished ones are not done again. Returns files and notes."""
    source = view.checkpoint.folder
    shards = layout(view.pieces, shard_limit(sum(piece.ref.nbytes for piece in view.pieces)))
    runtime.progress.stage("write shards", len(shards))
    with Reader(source, allow_nonfinite=runtime.allow_nonfinite) as reader:
        for shard in shards:
            if shard.name not in journal.finished:
                journal.record(write_shard(folder, shard, reader))
            runtime.progress.advance()
    written = [journal.finished[shard.name] for shard in shards]
    index = write_index(folder, shards)
    if index is not None:
        written.append(Written("model.safetensors.index.json", *index))
    written.append(
        Written("config.json", *write_text(folder / "config.json", json.dumps(view.config, indent=2) + "\n"))
    )
    travel, left = sidecars(source)
    written += [copy_sidecar(source, folder, name) for name in travel]
    return written, [f"left behind: {', '.join(left)}"] if left else []
