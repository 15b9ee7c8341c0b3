"""What a pressed model needs where it is loaded: transformers taught about layers that differ from one
another.

`import moespresso` comes through this door for `watch`, and must not pull in torch. So what does need torch
is imported from its own module: `anatomy` (what a decoder layer adds to the residual stream) and `unequal`
(`install`, and what `per_layer_config` may say).
"""

from moespresso.runtime.anatomy import MIXERS, Anatomy, BranchParts, NotResidual, find_anatomy
from moespresso.runtime.guard import OWN_WIDTHS, guarded, is_own, stock, zero_means_nothing
from moespresso.runtime.parts import NoNorm, Silent, SilentMixer, hidden_of
from moespresso.runtime.widths import stacked, widened

__all__ = [
    "MIXERS",
    "OWN_WIDTHS",
    "Anatomy",
    "BranchParts",
    "NoNorm",
    "NotResidual",
    "Silent",
    "SilentMixer",
    "find_anatomy",
    "guarded",
    "hidden_of",
    "is_own",
    "stacked",
    "stock",
    "widened",
    "zero_means_nothing",
]
