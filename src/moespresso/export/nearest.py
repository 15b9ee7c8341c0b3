"""The nearest plan that a target can load, for a refusal to name: steps in words, tried on shapes before they are said.

A cure that the next refusal takes back is none, so where more than one could be meant the first is named that holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

from moespresso.build import View, rehoused_views
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan, Stage
from moespresso.core.registry import parse_step
from moespresso.effect import slims, validated

Load = Callable[[View], Any]


def stored_plainly(view: View, load: Load) -> str:
    """What to do instead of storing matrices with a mask, in part or as factors."""
    steps = [_step(stage.method) for stage in view.plan.stages if slims(stage)]
    if len(steps) == 1:
        return "pack=false" if "pack" in steps[0].describe() else _not_in_factors(steps[0], view, load)
    # More than one step: each in full, since the one that is meant is not told from the others by a setting alone. A request for
    # low_rank:method=modegpt comes to this too, which is short for two.
    words = [_not_in_factors(step, view, load) if step.kind == "low_rank" else _whole(step) for step in steps]
    return " and then ".join(words) + " as the steps that treat matrices"


def _step(method: Mapping[str, Any]) -> Any:
    return parse_step({name: value for name, value in method.items() if value is not None})


def _whole(step: Any) -> str:
    """A step with all that it was told, and plain matrices."""
    step = replace(step, pack=False) if "pack" in step.describe() else step
    told = (f"{each.name}={_said(getattr(step, each.name))}" for each in fields(step)
            if getattr(step, each.name) != each.default)  # fmt: skip
    return ":".join(filter(None, (step.kind, ",".join(told))))


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _not_in_factors(step: Any, view: View, load: Load) -> str:
    """The step nearest to a decomposition that leaves matrices of an ordinary shape on this model."""
    share, parts = step.ratio, str(step.parts)
    narrower = [f"channel_prune:ratio={share}"] if "experts" in parts.split("+") else []
    fewer = [f"attention_rank:ratio={share},pack=false"] if parts == "attention" else []
    tried = [*narrower, *fewer, f"wanda:parts={parts},sparsity={share}"]
    return next((steps for steps in tried if _holds(steps, view, load)), "expert_drop")


def _holds(words: str, view: View, load: Load) -> bool:
    """Whether a step by itself can be done on the model, and its result be loaded."""
    with suppress(UserError):
        step: Any = parse_step(words)
        step.check(view.source)
        empty = Plan(view.source.digest)
        made = validated(replace(empty, stages=(step.outline(view.source, empty),)), view.source)
        load(replace(view, plan=made))
        return True
    return False


def repaired_otherwise(view: View, load: Load) -> str | None:
    """The repair that stands in for a bias on this model, under any name that its family has; None where the part cannot go."""
    stages = tuple(_mapped(stage) for stage in view.plan.stages)
    for form in (view, *rehoused_views(view)):
        with suppress(UserError):
            load(replace(form, plan=Plan(form.source.digest, stages)))
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
