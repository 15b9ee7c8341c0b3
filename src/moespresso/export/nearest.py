"""The nearest plan that a target can load, for a refusal to name: steps in words, tried on shapes before they
are said.

A cure that the next refusal takes back is none, so where more than one could be meant the first is named that
holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from moespresso.build import View, equivalent_views
from moespresso.core.errors import UserError
from moespresso.core.method import Treats
from moespresso.core.plan import Plan, Stage
from moespresso.core.registry import parse_step
from moespresso.effect import treats_matrices, validated
from moespresso.formats import codec_of

Load = Callable[[View], Any]


def stored_plainly(view: View, load: Load) -> str:
    """What to do instead of storing matrices with a mask, in part or as factors."""
    stages = [stage for stage in view.plan.stages if treats_matrices(stage)]
    if len(stages) == 1:
        step = _step(stages[0])
        return "pack=false" if "pack" in step.describe() else _near(step, view, load)
    # More than one step: each in full, since the one that is meant is not told from the others by a setting alone. A request for
    # low_rank:method=modegpt comes to this too, which is short for two.
    words = [_near(_step(stage), view, load) if _is_own(stage) else _whole(_step(stage)) for stage in stages]
    return " and then ".join(words) + " as the steps that treat matrices"


def _is_own(stage: Stage) -> bool:
    """Whether a stage stores matrices as only moespresso reads them, and has no setting that it would not."""
    formats = (treatment.format for treatment in stage.treatments.values())
    return "pack" not in stage.method and any(each is not None and codec_of(each).own for each in formats)


def _step(stage: Stage) -> Any:
    return parse_step({name: value for name, value in stage.method.items() if value is not None})


def _whole(step: Any) -> str:
    """A step with all that it was told, and plain matrices."""
    step = replace(step, pack=False) if "pack" in step.describe() else step
    told = (f"{each.name}={_said(getattr(step, each.name))}" for each in fields(step)
            if getattr(step, each.name) != each.default)  # fmt: skip
    return ":".join(filter(None, (step.kind, ",".join(told))))


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _near(step: Treats, view: View, load: Load) -> str:
    """The step nearest to one that leaves matrices of an ordinary shape on this model."""
    return next((words for words in step.plainly if _holds(words, view, load)), "expert_drop")


def _holds(words: str, view: View, load: Load) -> bool:
    """Whether a step by itself can be done on the model, and its result be loaded."""
    with suppress(UserError):
        step: Any = parse_step(words)
        step.check(view.source)
        empty = Plan(view.source.digest, mtp=view.plan.mtp)
        made = validated(replace(empty, stages=(step.outline(view.source, empty),)), view.source)
        load(replace(view, plan=made))
        return True
    return False


def repaired_otherwise(view: View, load: Load) -> str | None:
    """The repair that stands in for a bias on this model, under any name that its family has; None where
    the part cannot go."""
    stages = tuple(_mapped(stage) for stage in view.plan.stages)
    for form in (view, *equivalent_views(view)):
        with suppress(UserError):
            load(replace(form, plan=Plan(form.source.digest, stages, mtp=view.plan.mtp)))
            return "repair=linear or repair=scale"
    return None


def _mapped(stage: Stage) -> Stage:
    return replace(stage, treatments={
        unit: replace(each, repair="linear") if each.repair == "bias" else each for unit, each in stage.treatments.items()
    })  # fmt: skip


def to_leave_out(stages: Iterable[Stage]) -> str:
    """Settings by which the experts of some layers come to another format than the others, in words."""
    there = [name for name in ("layers", "exclude") if any(stage.method.get(name) for stage in stages)]
    return f", with {' and '.join(there)} left out" if there else ""
