"""Candidates compared by the whole model: plans in, mean token KL to the original out, many at once.

A plan may change experts, widths, bits and branches of any layer. Each layer is loaded once a round, and once
more in every form that some candidate gives it; candidates that are still the same model run once
(`stream.variants`).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from moespresso.build import Tensors, View, make_meta_model
from moespresso.core.blueprint import BRANCHES, Branch
from moespresso.core.errors import UserError
from moespresso.core.layer import Layer
from moespresso.core.method import Candidate, Searches, Step
from moespresso.core.plan import Decision, Plan, Stage, Treatment
from moespresso.core.unit import Unit
from moespresso.effect import fits_on_text, needs_fit
from moespresso.fit.job import Job
from moespresso.fit.numbers import in_source, numbered
from moespresso.model import MetaModel
from moespresso.quality import token_kl
from moespresso.stream import (
    SweepOptions,
    Variant,
    lanes_at_once,
    layer_bytes,
    state_bytes,
    sweep,
    sweep_variants,
)

logger = logging.getLogger(__name__)


def searched(job: Job, step: Searches, now: View) -> Decision:
    """Let a step try candidates on the model as it is now, against the original."""
    with Judge.of(job, now, step.rows) as judge:

        def losses(candidates: Sequence[Candidate]) -> list[float]:
            return judge([planned(step, each, now) for each in candidates])

        return step.search(now.blueprint, losses)


def planned(step: Step, candidate: Candidate, now: View) -> Plan:
    """The plan of the model as it is now, and a candidate of a step behind it."""
    treatments = {in_source(unit, now): numbered(unit, what, now) for unit, what in candidate.items()}
    return replace(now.plan, stages=(*now.plan.stages, Stage(step.describe(), treatments)))


@dataclass(frozen=True)
class Judge:
    """What plans that go on from `now` cost: mean token KL to the original, on some rows of the text.

    `model` and `source` load the model as it is and the original, whose last states are `truth` [N, L, H];
    those of one candidate between two layers take `state` bytes.
    """

    job: Job
    now: View
    tensors: Tensors
    model: MetaModel
    source: MetaModel
    text: tuple[Tensor, Tensor]
    truth: Tensor
    state: int

    @classmethod
    @contextmanager
    def of(cls, job: Job, now: View, rows: int) -> Iterator[Judge]:
        """One for plans behind the model as it is now, on the first rows of the text."""
        batches = job.text()
        ids, mask = batches.ids[:rows], batches.mask[:rows]
        with job.tensors() as tensors:
            model, source = (make_meta_model(each, tensors, job.runtime) for each in (now, job.view))
            state = state_bytes(source, ids, mask)
            _, spill = lanes_at_once(1, state, _memory(job, source), job.work)
            options = SweepOptions(spill=spill)
            truth = sweep(source, ids, mask, options=options, watch=job.watch("layers, original"))
            yield cls(job, now, tensors, model, source, (ids, mask), truth, state)

    def __call__(self, plans: Sequence[Plan]) -> list[float]:
        """The loss of every plan, in order; raises `UserError` for one that needs fitted values, or changes
        what lies outside the layers."""
        for plan in plans:
            _check_judged(plan, self.now)
        memory = _memory(self.job, self.source) - self.truth.nbytes
        most, spill = lanes_at_once(len(plans), self.state, memory, self.job.work)
        if most < len(plans):
            # No note: what the disk holds must not show in the result.
            logger.info("%d of %d candidates are tried at once, for lack of disk space", most, len(plans))
        return [
            loss
            for first in range(0, len(plans), most)
            for loss in self._at_once(plans[first : first + most], spill)
        ]

    def _at_once(self, plans: Sequence[Plan], spill: Path | None) -> list[float]:
        """The losses of as many plans as go through the model together."""
        forms: dict[Hashable, Plan] = {}
        variants = [_variant(plan, self.now, forms) for plan in plans]
        watch = self.job.watch(f"try {len(plans)} candidates")
        load = partial(self._load, forms)
        with sweep_variants(self.model, self.text, variants, load=load, spill=spill, watch=watch) as hidden:
            return token_kl([self.model, self.source], hidden, self.truth, self.text[1])

    @contextmanager
    def _load(self, forms: Mapping[Hashable, Plan], index: int, form: Hashable) -> Iterator[Layer]:
        """A layer as some plan leaves it."""
        changed = replace(self.now, plan=forms[form])
        with make_meta_model(changed, self.tensors, self.job.runtime).layer(index) as layer:
            yield layer


def _check_judged(plan: Plan, now: View) -> None:
    """Raise `UserError` for a plan that would be judged without a part of what it does."""
    for number, stage in enumerate(plan.stages[len(now.plan.stages) :], len(now.plan.stages)):
        if needs_fit(plan, number) or fits_on_text(stage):
            raise UserError(
                f"a candidate of {stage.method.get('kind')} needs values that are found on text or weights: compare it "
                "by a step that works from the weights alone"
            )
        if any(unit.layer is None for unit in stage.treatments):
            raise UserError(
                "candidates are compared by what they do to layers, not to the head: leave it out"
            )


def _memory(job: Job, source: MetaModel) -> int:
    """What is left beside a layer, in bytes."""
    limit = job.runtime.max_memory
    return sys.maxsize if limit is None else limit - layer_bytes(job.view, source.dtype)


def _variant(plan: Plan, now: View, forms: dict[Hashable, Plan]) -> Variant:
    """What a plan does to the model as it is now, layer by layer; what has other weights then is added to
    `forms`."""
    cut: set[tuple[int, Branch]] = set()
    changed: dict[int, list[Stage]] = {}
    for stage in plan.stages[len(now.plan.stages) :]:
        by_layer: dict[int, dict[Unit, Treatment]] = {}
        for unit, treatment in sorted(stage.treatments.items(), key=lambda item: item[0]):
            assert unit.layer is not None
            position = now.remains.position(unit.layer)
            if treatment.drop:
                cut |= {(position, branch) for branch in _branches(unit)}
            else:
                by_layer.setdefault(position, {})[unit] = treatment
        for position, treatments in by_layer.items():
            changed.setdefault(position, []).append(Stage(stage.method, treatments))
    named = {position: (position, _identity(stages)) for position, stages in changed.items()}
    for position, stages in changed.items():
        forms[named[position]] = replace(now.plan, stages=(*now.plan.stages, *stages))
    return Variant(frozenset(cut), named)


def _identity(stages: Sequence[Stage]) -> Hashable:
    """What stages do to a layer, so that the same is known as the same."""
    return tuple((repr(sorted(stage.method.items())), *stage.treatments.items()) for stage in stages)


def _branches(unit: Unit) -> tuple[Branch, ...]:
    """The branches that go with a unit: of a block both."""
    if unit == Unit(unit.layer):
        return BRANCHES
    return ("attention",) if unit.part == "attention" else ("mlp",)
