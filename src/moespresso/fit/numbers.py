"""Units and treatments of the model as it is now, in the numbers of the source, which plans have in every
stage."""

from __future__ import annotations

from dataclasses import replace

from moespresso.build import View
from moespresso.core.plan import Treatment
from moespresso.core.unit import Unit


def in_source(unit: Unit, now: View) -> Unit:
    """A unit of the model as it is now, in the source's numbers."""
    if unit.layer is None:  # the head has none
        return unit
    layer = now.remains.layers[unit.layer]
    expert = None if unit.expert is None else now.remains.experts[layer][unit.expert]
    return replace(unit, layer=layer, expert=expert)


def numbered(unit: Unit, treatment: Treatment, now: View) -> Treatment:
    """A treatment with the source's numbers of experts in it."""
    if unit.layer is None:
        return treatment
    there = now.remains.experts.get(now.remains.layers[unit.layer], ())
    kept = None if treatment.keep is None else tuple(there[position] for position in treatment.keep)
    return replace(treatment, keep=kept, into=None if treatment.into is None else there[treatment.into])
