"""Running statistics that never keep activations.

`Measurer` is the visitor of a measuring sweep: it gathers, per layer, what the given needs ask for, and can be saved
and recalled between layers.
"""

from moespresso.statistics.align import channel_order
from moespresso.statistics.channels import grid
from moespresso.statistics.curvature import Pulled, Stiffness
from moespresso.statistics.folds import Folds
from moespresso.statistics.means import MeanAnswers
from moespresso.statistics.measurer import Measurer
from moespresso.statistics.pairs import PAIRS
from moespresso.statistics.reconstruction import Reconstruction
from moespresso.statistics.sample import Sample
from moespresso.statistics.weights import weight_sums

__all__ = [
    "PAIRS",
    "Folds",
    "MeanAnswers",
    "Measurer",
    "Pulled",
    "Reconstruction",
    "Sample",
    "Stiffness",
    "channel_order",
    "grid",
    "weight_sums",
]
