"""Decide layer by layer, each one on the stream as the layers before it were already changed.

Scores are usually taken on one model for all layers. A step that is `sequential` instead sees, at every layer, what
really arrives there: the layer is measured, decided on, loaded again as it will be, and the batches go on through that.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from moespresso.build import Tensors, View, make_skeleton
from moespresso.core.layer import Layer, Taps
from moespresso.core.method import Selects
from moespresso.core.plan import Decision, Stage, Treatment
from moespresso.core.runtime import Runtime
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.data import Batches
from moespresso.fit.repairs import orders_of
from moespresso.statistics import Measurer
from moespresso.stream import Watch, sweep


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
        with make_skeleton(after, self.tensors, self.runtime).layer(layer.spec.index) as rebuilt:
            for number, output in enumerate(taps.through(rebuilt.module)):
                taps.put(number, output)

    def _changed(self, layer: Layer, decision: Decision) -> View:
        """The model with this one layer as it will be."""
        stage = Stage({}, {in_source(unit, self.now): numbered(unit, what, self.now)
                           for unit, what in decision.treatments.items()})  # fmt: skip
        plan = replace(self.now.plan, stages=(*self.now.plan.stages, stage))
        orders: dict[str, Tensor] = orders_of(self.now, plan, layer)
        return replace(self.now, plan=plan, fits={**self.now.fits, **orders})


def decide_in_sequence(
    step: Selects, now: View, batches: Batches, runtime: Runtime
) -> tuple[Decision, list[str]]:
    """What a step decides on the model `now`, layer after layer; and what went wrong while measuring."""
    with Tensors(now.checkpoint.folder, allow_nonfinite=runtime.allow_nonfinite) as tensors:
        visitor = _Sequence(step, now, Measurer(step.needs(), batches.num_tokens), tensors, runtime)
        skeleton = make_skeleton(now, tensors, runtime)
        sweep(skeleton, batches.ids, batches.mask, visitor, watch=Watch(runtime.progress, "decide layers"))
    return Decision(visitor.treatments, tuple(visitor.notes), visitor.scores), visitor.measurer.trouble


def in_source(unit: Unit, now: View) -> Unit:
    """A unit of the model as it is now, in the source's numbers."""
    if unit.layer is None:  # the head has none
        return unit
    layer = now.left.layers[unit.layer]
    expert = None if unit.expert is None else now.left.experts[layer][unit.expert]
    return replace(unit, layer=layer, expert=expert)


def numbered(unit: Unit, treatment: Treatment, now: View) -> Treatment:
    """A treatment with the source's numbers of experts in it."""
    if unit.layer is None:
        return treatment
    there = now.left.experts.get(now.left.layers[unit.layer], ())
    kept = None if treatment.keep is None else tuple(there[position] for position in treatment.keep)
    return replace(treatment, keep=kept, into=None if treatment.into is None else there[treatment.into])
