"""Runs one step: what it measures, decides, searches and fits, layer by layer."""

from moespresso.fit.job import Clock, Job
from moespresso.fit.keep import Fitted
from moespresso.fit.layerwise import found
from moespresso.fit.measured import all_needs, measure, see_text
from moespresso.fit.repairs import unrepaired
from moespresso.fit.searching import Judge
from moespresso.fit.step import Found, run_step

__all__ = [
    "Clock",
    "Fitted",
    "Found",
    "Job",
    "Judge",
    "all_needs",
    "found",
    "measure",
    "run_step",
    "see_text",
    "unrepaired",
]
