"""From a recipe to a result: rehearsed, carried out stage by stage, written and signed."""

from moespresso.run.pipeline import Decided, decide, fit_again
from moespresso.run.recipe import Options, Recipe, parse_size, row_length, say_shorter
from moespresso.run.rehearsal import NotOnThisModel, in_equivalent, in_some_form, rehearse
from moespresso.run.result import Order, ahead_notes, format_notes, produce, source_notes

__all__ = [
    "Decided",
    "NotOnThisModel",
    "Options",
    "Order",
    "Recipe",
    "ahead_notes",
    "decide",
    "fit_again",
    "format_notes",
    "in_equivalent",
    "in_some_form",
    "parse_size",
    "produce",
    "rehearse",
    "row_length",
    "say_shorter",
    "source_notes",
]
