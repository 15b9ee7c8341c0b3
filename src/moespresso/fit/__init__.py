"""Runs one step: what it measures, decides, searches and fits, layer by layer."""

from moespresso.fit.layerwise import Slimmed, found
from moespresso.fit.repairs import unrepaired
from moespresso.fit.sequential import decide_in_sequence, in_source, numbered

__all__ = ["Slimmed", "decide_in_sequence", "found", "in_source", "numbered", "unrepaired"]
