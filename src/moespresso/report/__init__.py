"""What came of a run, as data and for people: the `Report`, its renderings, the model card, the progress
bars.

The renderers are pure functions from a result to text of at most 100 columns without terminal codes, so that
a report reads the same on a screen, in a pipe and in a file.
"""

from moespresso.report.card import Licence, model_card, shareable, source_licence
from moespresso.report.catalogue import describe_methods
from moespresso.report.machine import machine, total_memory, versions
from moespresso.report.report import LayerScores, Report, to_json
from moespresso.report.screen import Bars, screen
from moespresso.report.tables import (
    render_demo,
    render_evaluation,
    render_inspection,
    render_methods,
    render_plan,
    render_report,
    render_stats,
    render_verdict,
)

__all__ = [
    "Bars",
    "LayerScores",
    "Licence",
    "Report",
    "describe_methods",
    "machine",
    "model_card",
    "render_demo",
    "render_evaluation",
    "render_inspection",
    "render_methods",
    "render_plan",
    "render_report",
    "render_stats",
    "render_verdict",
    "screen",
    "shareable",
    "source_licence",
    "to_json",
    "total_memory",
    "versions",
]
