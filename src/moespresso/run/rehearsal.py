"""The dress rehearsal: every step on shapes alone, before anything is measured or written.

What cannot be done on a model, or cannot be loaded by the target, shows here; so does whether the target can
load the result only from the checkpoint under another family's name, and how much must go for a size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from moespresso.build import View, apart_view, equivalent_views
from moespresso.core.errors import UserError
from moespresso.core.method import Step
from moespresso.core.plan import Ahead, Plan
from moespresso.effect import price, validated
from moespresso.export import find_target, formed
from moespresso.run.recipe import Recipe, parse_size

T = TypeVar("T")


def rehearse(view: View, recipe: Recipe) -> tuple[View, tuple[Step, ...]]:
    """Walk through all steps on shapes alone: what cannot be done, or not be loaded by the target, shows
    here.

    Returns the view in the equivalent that the target can load the result from, and the steps with their
    amounts filled in where the recipe has a budget.
    """
    find_target(recipe.target)
    size = recipe.budget.size
    if not recipe.steps and size is None:
        return _asked(view, recipe), ()

    def tried(form: View) -> tuple[View, tuple[Step, ...]]:
        steps = recipe.steps if size is None else _fit_budget(_asked(form, recipe), recipe.steps, size)
        return in_equivalent(form, lambda form: _walk(_asked(form, recipe), steps, recipe.target)), steps

    found, steps = in_some_form(view, recipe.steps, tried)
    return _asked(found, recipe), steps


def _asked(view: View, recipe: Recipe) -> View:
    """The view with what the recipe wants of prediction layers, which is no step of its own."""
    return replace(view, plan=replace(view.plan, mtp=Ahead(recipe.mtp)))


class NotOnThisModel(UserError):
    """A step cannot be done, which another family's name for the same model does not change: what that adds
    is not there."""


def in_some_form(view: View, steps: Iterable[Step], do: Callable[[View], T]) -> T:
    """What `do` makes of the view or, where experts lie in stacks that can be taken apart, of the same
    checkpoint with its experts apart: if it raises `UserError` for the stacks, or a step would make something
    else of them."""
    if any(step.by_matrix for step in steps):
        return do(apart_view(view) or view)
    try:
        return do(view)
    except UserError:
        apart = apart_view(view)
        if apart is None:
            raise
    return do(apart)


def in_equivalent(view: View, try_out: Callable[[View], None]) -> View:
    """The view, or the same checkpoint under another family's name, in which `try_out` raises no `UserError`;
    its first complaint where there is none, or where no other name helps."""
    try:
        try_out(view)
    except NotOnThisModel:
        raise
    except UserError as error:
        for other in equivalent_views(view):
            with suppress(UserError):
                try_out(other)
                return other
        raise error from None
    return view


def _walk(view: View, steps: Sequence[Step], loads: str) -> None:
    target, plan = find_target(loads), view.plan
    ragged: Plan | None = None  # the same with widths that an uneven step may come to
    for step in steps:
        now = replace(view, plan=plan)
        try:
            step.check(now.blueprint)
            if ragged is not None:
                step.check(replace(view, plan=ragged).blueprint)
        except UserError as error:
            raise NotOnThisModel(str(error)) from error
        if step.uneven and not target.plugin:
            raise UserError(
                f"{step.kind}: {step.why_uneven}, which {target.name} cannot load; the nearest plan "
                f"that it can is scope=layer,{step.even(now.blueprint)}, or say --target plugin"
            )
        if ragged is not None or step.uneven:
            ragged = _with_uneven_stage(step, view, ragged or plan)
        plan = validated(replace(plan, stages=(*plan.stages, step.outline(view.source, plan))), view.source)
    for each in filter(None, (plan, ragged)):  # a family may have words for one width only
        formed(loads, replace(view, plan=each)).check_fits()


def _with_uneven_stage(step: Step, view: View, before: Plan) -> Plan:
    """The plan with a stage of a step as uneven as that may make it."""
    make = step.uneven_outline if step.uneven else step.outline
    return replace(before, stages=(*before.stages, make(view.source, before)))


def _fit_budget(view: View, steps: Sequence[Step], asked: str) -> tuple[Step, ...]:
    """Choose the amounts of the allowed steps so that the result's tensor bytes fit the size asked for."""
    total = view.source.cost().bytes
    size = parse_size(asked, total)
    if len(steps) != 1:
        raise UserError("--size needs exactly one step to fit in this version, such as --step expert_drop")
    step = steps[0]
    smallest = total
    for candidate in step.amounts(view.source):
        plan = replace(view.plan, stages=(candidate.outline(view.source, view.plan),))
        smallest = price(plan, view.source).bytes
        if smallest <= size:
            return (candidate,)
    raise UserError(
        f"--size {asked} cannot be reached by {step.kind} alone: it leaves at least {smallest} bytes of {total}"
    )
