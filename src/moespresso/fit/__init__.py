"""Runs one step: what it measures, decides, searches and fits, layer by layer."""

from moespresso.fit.ahead import choose_ahead
from moespresso.fit.job import Clock, Job
from moespresso.fit.keep import Fitted
from moespresso.fit.layerwise import fit_stage
from moespresso.fit.measured import all_needs, measure, see_text
from moespresso.fit.repairs import unrepaired
from moespresso.fit.searching import Judge
from moespresso.fit.step import StepResult, run_step

__all__ = [
    "Clock",
    "Fitted",
    "Job",
    "Judge",
    "StepResult",
    "all_needs",
    "choose_ahead",
    "fit_stage",
    "measure",
    "run_step",
    "see_text",
    "unrepaired",
]
