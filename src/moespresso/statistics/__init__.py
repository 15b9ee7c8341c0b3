"""Running statistics that never keep activations: one class, one file each, registered by name.

`Measurer` is the visitor of a measuring sweep: it shows every layer's batches to the statistics that are
asked for, and can be saved and recalled between layers. `Folds`, `MeanAnswers` and `GradientMoments` are
visitors of their own, for what is fitted.
"""

# isort: off
# Importing a statistic registers it, in the order in which rows hold their values.
from moespresso.statistics.routing import Routing
from moespresso.statistics.reconstruction import Reconstruction
from moespresso.statistics.pairs import Pairs
from moespresso.statistics.similarity import Similarity
from moespresso.statistics.channels import Channels, grid
from moespresso.statistics.removal import Removal
from moespresso.statistics.runs import Runs
from moespresso.statistics.weights import Weights, spread
# isort: on

from moespresso.statistics.align import channel_order
from moespresso.statistics.base import LayerSums, Measurement, OfExperts, OfText, OfWeights, Rows, Statistic
from moespresso.statistics.folds import Folds
from moespresso.statistics.gradient_moments import FedGradient, GradientMoments
from moespresso.statistics.means import MeanAnswers
from moespresso.statistics.measurer import Measurer
from moespresso.statistics.registry import needs_text, restricted, statistic, statistics_of

__all__ = [
    "Channels",
    "FedGradient",
    "Folds",
    "GradientMoments",
    "LayerSums",
    "MeanAnswers",
    "Measurement",
    "Measurer",
    "OfExperts",
    "OfText",
    "OfWeights",
    "Pairs",
    "Reconstruction",
    "Removal",
    "Routing",
    "Rows",
    "Runs",
    "Similarity",
    "Statistic",
    "Weights",
    "channel_order",
    "grid",
    "needs_text",
    "restricted",
    "spread",
    "statistic",
    "statistics_of",
]
