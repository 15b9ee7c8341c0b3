"""Decide layer by layer, each one on the stream as the layers before it were already changed.

Scores are usually taken on one model for all layers. A step that is `sequential` instead sees, at every
layer, what really arrives there: the layer is measured, decided on, loaded again as it will be, and the
batches go on through that.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from moespresso.build import Tensors, View, make_meta_model
from moespresso.core.layer import Layer, Taps
from moespresso.core.method import Selects
from moespresso.core.plan import Decision, Stage, Treatment
from moespresso.core.runtime import Runtime
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.fit.job import Job
from moespresso.fit.numbers import in_source, numbered
from moespresso.fit.repairs import orders_of
from moespresso.statistics import Measurer
from moespresso.stream import sweep


@dataclass
class _Sequence:
    """Visits the layers of a sweep, and changes each before the batches pass it."""

    step: Selects
    now: View
    measurer: Measurer
    tensors: Tensors
    runtime: Runtime
    treatments: dict[Unit, Treatment] = field(default_factory=dict[Unit, Treatment])
    scores: dict[Unit, float] = field(default_factory=dict[Unit, float])
    notes: list[str] = field(default_factory=list[str])

    def __call__(self, layer: Layer, taps: Taps) -> None:
        self.measurer(layer, taps)
        if not layer.spec.experts:
            return
        stats = Stats("", self.now.source.digest, 0, self.measurer.values)
        decision = self.step.decide(stats, replace(self.now.blueprint, layers=(layer.spec,)))
        self.treatments |= decision.treatments
        self.scores |= decision.scores
        self.notes += [note for note in decision.notes if note not in self.notes]
        after = self._changed(layer, decision)
        with make_meta_model(after, self.tensors, self.runtime).layer(layer.spec.index) as rebuilt:
            for number, output in enumerate(taps.through(rebuilt.module)):
                taps.put(number, output)

    def _changed(self, layer: Layer, decision: Decision) -> View:
        """The model with this one layer as it will be."""
        stage = Stage({}, {in_source(unit, self.now): numbered(unit, what, self.now)
                           for unit, what in decision.treatments.items()})  # fmt: skip
        plan = replace(self.now.plan, stages=(*self.now.plan.stages, stage))
        orders: dict[str, Tensor] = orders_of(self.now, plan, layer)
        return replace(self.now, plan=plan, fits={**self.now.fits, **orders})


def decide_in_sequence(job: Job, step: Selects, now: View) -> tuple[Decision, list[str]]:
    """What a step decides on the model `now`, layer after layer; and what went wrong while measuring."""
    batches = job.text()
    with job.tensors() as tensors:
        visitor = _Sequence(step, now, Measurer(step.needs(), batches.num_tokens), tensors, job.runtime)
        meta = make_meta_model(now, tensors, job.runtime)
        sweep(meta, batches.ids, batches.mask, visitor, watch=job.watch("decide layers"))
    return Decision(visitor.treatments, tuple(visitor.notes), visitor.scores), visitor.measurer.warnings
