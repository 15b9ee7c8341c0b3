"""From a recipe to a result: rehearsed, carried out stage by stage, written and signed."""

from moespresso.run.pipeline import Clock, Decided, decide, measure, see_text
from moespresso.run.recipe import Recipe, Request, parse_size, row_length, say_shorter
from moespresso.run.rehearsal import NotOnThisModel, housed, in_some_form, rehearse
from moespresso.run.result import format_notes, produce, source_notes

__all__ = [
    "Clock",
    "Decided",
    "NotOnThisModel",
    "Recipe",
    "Request",
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
