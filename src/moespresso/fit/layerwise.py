"""What a step that fits on text finds: one layer after the other, each on what the fitted ones before let
through.

A layer is loaded as the stages before leave it; its batches run as far as the experts; the step is shown it
(`show`) and answers; the answer is kept in a file (`keep`), put in place (`place`), and the batches go on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from moespresso.build import View, make_meta_model, precision
from moespresso.core.layer import Layer, LayerWeights, Taps
from moespresso.core.method import Refits
from moespresso.core.plan import Plan
from moespresso.core.stats import stats_key
from moespresso.effect import fits_on_text, step_of
from moespresso.fit.job import Job
from moespresso.fit.keep import Fitted, coverage_of, gathered, kept, write_layer, write_tensors
from moespresso.fit.place import check_finite, placed
from moespresso.fit.repairs import fit
from moespresso.fit.show import Showing
from moespresso.fit.treated import Treated
from moespresso.methods import LayerContext, LayerResult
from moespresso.model import MetaModel
from moespresso.stream import SweepOptions, SweepState, gradient_moments, sweep

# Raise when the same plan and text would give other codes.
_VERSION = "1"


def fit_stage(job: Job, view: View, plan: Plan) -> Fitted:
    """Whatever the last stage of `plan` needs beside the decision, `view` being the model before it."""
    if not fits_on_text(plan.stages[-1]):
        return Fitted(fit(job, view, plan))
    job.text("this plan is fitted on", ", as it was made with")
    return fit_layers(job, view, plan)


def fit_layers(job: Job, view: View, plan: Plan) -> Fitted:
    """Everything that the last stage of `plan`, which fits on text, needs; `view` is the model before it."""
    step, batches, work = step_of(plan.stages[-1]), job.text(), job.work
    assert isinstance(step, Refits)
    name = stats_key(
        "slim",
        view.source.digest,
        plan.digest_of_stages,
        batches.digest,
        precision(view, job.runtime),
        _VERSION,
    )[:16]
    files = [work / f"slim-{name}-{index:05d}.safetensors" for index in range(len(view.blueprint.layers))]
    state = SweepState(work / f"sweep-{name}.safetensors", dict, lambda _: None)
    bends = work / f"curvature-{name}.safetensors"
    if not all(file.is_file() for file in files):
        with job.tensors() as tensors:
            meta = make_meta_model(view, tensors, job.runtime)
            original = None
            if "original" in step.shows and view.plan.stages:
                whole = replace(view, plan=replace(view.plan, stages=()), fits={})
                original = make_meta_model(whole, tensors, job.runtime)
            curvature = _curvature(job, meta, bends) if "gradient" in step.shows else {}
            showing = Showing(Treated(view, plan, meta), tensors, step.shows, curvature, original)
            options = SweepOptions("rebuilt" if step.sequential else "original", state, job.spill(view))
            watch = job.watch(f"{step.kind}, layers")
            sweep(meta, batches.ids, batches.mask, _Visitor(step, showing, files), options, watch)
    state.path.unlink(missing_ok=True)
    bends.unlink(missing_ok=True)
    return gathered(files)


def _curvature(job: Job, meta: MetaModel, file: Path) -> dict[int, Tensor]:
    """By layer, how sharply the model's loss bends along every channel's output [E, I]; kept in `file` for
    a run that is killed later."""
    if not file.is_file():
        batches, watch = job.text(), job.watch("")
        moments = gradient_moments(meta, batches.ids, batches.mask, file.parent, watch)
        write_tensors(file, {str(layer): tensor for layer, tensor in moments.items()}, {})
    return {int(layer): tensor.to(meta.device) for layer, tensor in load_file(file).items()}


@dataclass(frozen=True)
class _Visitor:
    """Shows each layer to the step, keeps what it answers, and puts that in place."""

    step: Refits[LayerContext, LayerResult]
    showing: Showing
    files: list[Path]

    def __call__(self, layer: Layer, taps: Taps) -> LayerWeights | None:
        at, treated = layer.spec.index, self.showing.treated
        pieces = treated.pieces.get(at, [])
        if not pieces:
            write_layer(self.files[at], {}, LayerResult(), {})
            return None
        with self.showing.stored(layer, pieces) as stored:
            context = self.showing.context(layer, taps, pieces, stored)
            result = self.step.solve(context)
        check_finite(result, at)
        write_layer(
            self.files[at], kept(treated, pieces, result, layer), result, coverage_of(context, result)
        )
        return placed(layer, result, context)
