"""What a stage of a plan needs beside the decision: values found on real text or weights, kept in one file.

`fit` runs the model as the stages before leave it, finds what stands in for what goes (`statistics.folds`),
the mean answers of dropped experts (`statistics.means`) and the order of neurons that are averaged
(`statistics.align`), and keeps the result in the work folder: the same plan, text and checkpoint give the
same values, and a run that was stopped takes them up again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from moespresso.build import View, make_meta_model, precision
from moespresso.checkpoint import write_file
from moespresso.core.blueprint import Branch
from moespresso.core.layer import Layer, Taps
from moespresso.core.plan import Plan
from moespresso.core.stats import stats_key
from moespresso.core.unit import Unit
from moespresso.effect import Cut, cuts, folds_into, is_left, key, needs_fit, remains
from moespresso.fit.job import Job
from moespresso.model import MetaModel
from moespresso.statistics import Folds, MeanAnswers, channel_order
from moespresso.stream import sweep

# Raise when the same plan and text would give other values.
_FIT_VERSION = "2"


def fit(job: Job, view: View, plan: Plan) -> dict[str, Tensor]:
    """Everything that the last stage of `plan` needs, `view` being the model before it; {} where it needs
    nothing."""
    needs = needs_fit(plan, len(plan.stages) - 1)
    if not needs:
        return {}
    tokens = job.text("this plan is fitted on", ", as it was made with").digest if "text" in needs else ""
    name = stats_key(
        "fit", view.source.digest, plan.digest_of_stages, tokens, precision(view, job.runtime), _FIT_VERSION
    )
    path = job.work / f"fit-{name[:16]}.safetensors"
    if path.is_file():
        return load_file(path)
    with job.tensors() as tensors:
        meta = make_meta_model(view, tensors, job.runtime)
        found: dict[str, Tensor] = {}
        if "text" in needs:
            found |= _on_text(job, view, plan, meta)
        if "weights" in needs:
            found |= _on_weights(job, view, plan, meta)
    write_file(path, [memoryview(save({name: value.contiguous() for name, value in sorted(found.items())}))])
    return found


def unrepaired(plan: Plan, view: View) -> list[str]:
    """Cuts of the last stage that no weight can make up for, in sentences."""
    found = [cut for cut in cuts(plan, len(plan.stages) - 1, view.source) if _home(cut, view) is None]
    return [
        f"L{cut.branches[0][0]} goes without repair={cut.repair}: no output weights come before it that could hold it"
        for cut in found
    ]


@dataclass
class _Both:
    """Two visitors of one sweep."""

    folds: Folds
    means: MeanAnswers

    def __call__(self, layer: Layer, taps: Taps) -> None:
        self.means(layer, taps)
        self.folds(layer, taps)


def _on_text(job: Job, view: View, plan: Plan, meta: MetaModel) -> dict[str, Tensor]:
    stage, batches = len(plan.stages) - 1, job.text()
    made = cuts(plan, stage, view.source)
    homes = {cut.branches[0]: home for cut in made if (home := _home(cut, view)) is not None}
    here = [_moved(cut, view) for cut in made]
    fitted = [moved for cut, moved in zip(made, here, strict=True) if cut.branches[0] in homes]
    others = [at for at in _going(view, plan) if not any(at in cut.branches for cut in fitted)]
    novices = _novices(view, plan, stage)
    if not fitted and not novices:
        return {}
    both = _Both(Folds(fitted, others), MeanAnswers(set(novices)))
    last = sweep(meta, batches.ids, batches.mask, both, watch=job.watch("fit layers"))
    both.folds.close([last])
    back = {_moved(cut, view).branches[0]: cut for cut in made}
    found: dict[str, Tensor] = {}
    for first, value in both.folds.values.items():
        cut = back[first]
        found[key(stage, _unit(view, homes[cut.branches[0]]), cut.repair)] = value
    for position, (unit, rows) in novices.items():
        found[key(stage, unit, "novices")] = both.means.values[position][list(rows)]
    return found


def _going(view: View, plan: Plan) -> list[tuple[int, Branch]]:
    """All branches that go in the last stage, in the numbers of the model as it is before it."""
    after = remains(plan, view.source)
    gone = [at for at in view.source.branches if is_left(at, view.remains) and not is_left(at, after)]
    return [(view.remains.position(layer), branch) for layer, branch in gone]


def _home(cut: Cut, view: View) -> tuple[int, Branch] | None:
    """The branch whose weights, or place, take up what is fitted for a cut."""
    if folds_into(view.source, cut.before, cut.repair):
        return cut.before
    return cut.stub if cut.repair == "bias" else None


def _moved(cut: Cut, view: View) -> Cut:
    """A cut in the numbers of the model as it is before the stage."""

    def here(at: tuple[int, Branch]) -> tuple[int, Branch]:
        return view.remains.position(at[0]), at[1]

    branches = tuple(here(at) for at in cut.branches)
    return replace(cut, branches=branches, before=here(cut.before) if cut.before else None)


def _unit(view: View, at: tuple[int, Branch]) -> Unit:
    return next(layer for layer in view.source.layers if layer.index == at[0]).unit(at[1])


def _novices(view: View, plan: Plan, stage: int) -> dict[int, tuple[Unit, tuple[int, ...]]]:
    """By layer as it is before the stage: the unit, and which of its experts leave their mean answer."""
    found: dict[int, tuple[Unit, tuple[int, ...]]] = {}
    for unit, treatment in plan.stages[stage].treatments.items():
        if treatment.repair == "novice" and unit.layer is not None:
            there = view.remains.experts[unit.layer]
            gone = tuple(place for place, expert in enumerate(there) if expert not in (treatment.keep or ()))
            found[view.remains.position(unit.layer)] = unit, gone
    return found


def _on_weights(job: Job, view: View, plan: Plan, meta: MetaModel) -> dict[str, Tensor]:
    """The order of neurons of every expert that is put in line with the one it merges into."""
    stage = len(plan.stages) - 1
    layers = sorted({unit.layer for unit, treatment in plan.stages[stage].treatments.items()
                     if treatment.repair == "align" and unit.layer is not None})  # fmt: skip
    found: dict[str, Tensor] = {}
    job.runtime.progress.stage("align experts", len(layers))
    for index in layers:
        with meta.layer(view.remains.position(index)) as layer:
            found |= orders_of(view, plan, layer)
        job.runtime.progress.advance()
    return found


def orders_of(view: View, plan: Plan, layer: Layer) -> dict[str, Tensor]:
    """The same for one layer, loaded as it is before the last stage of `plan`."""
    stage, index = len(plan.stages) - 1, view.remains.layers[layer.spec.index]
    there = view.remains.experts.get(index, ())
    experts: Any = layer.experts
    return {
        key(stage, unit, "order"): channel_order(experts, there.index(unit.expert), there.index(treatment.into))
        for unit, treatment in sorted(plan.stages[stage].treatments.items())
        if unit.layer == index and unit.expert is not None and treatment.into is not None
        and treatment.repair == "align"
    }  # fmt: skip
