"""Text to token batches, the same every time.

`Source` names text (a file, a folder, a hub dataset); `calibration` draws seeded, weighted rows from sources
for measuring; `sequences` cuts them in file order for evaluation. Both give `Batches`, whose digest stands in
the plan, so that a build on other text is noticed.
"""

from moespresso.data.hub import READY
from moespresso.data.pack import Batches, Mode, Sampling, calibration, sequences
from moespresso.data.text import Source
from moespresso.data.tokenizer import load_tokenizer

__all__ = ["READY", "Batches", "Mode", "Sampling", "Source", "calibration", "load_tokenizer", "sequences"]
