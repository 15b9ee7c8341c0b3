"""From a recipe to a result: rehearsed, carried out stage by stage, written and signed."""

from moespresso.run.pipeline import Clock, Decided, decide, measure, see_text
from moespresso.run.recipe import Options, Recipe, parse_size, row_length, say_shorter
from moespresso.run.rehearsal import NotOnThisModel, housed, in_some_form, rehearse
from moespresso.run.result import Order, format_notes, produce, source_notes

__all__ = [
    "Clock",
    "Decided",
    "NotOnThisModel",
    "Options",
    "Order",
    "Recipe",
    "decide",
    "format_notes",
    "housed",
    "in_some_form",
    "measure",
    "parse_size",
    "produce",
    "rehearse",
    "row_length",
    "say_shorter",
    "see_text",
    "source_notes",
]
