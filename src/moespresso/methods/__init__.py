"""One file per method. A method scores, merges, trims or rounds; it never sees the loop.

Importing this package registers all of them (`moespresso.core.registry`).
"""

from moespresso.methods.block_drop import BlockDrop
from moespresso.methods.expert_drop import ExpertDrop
from moespresso.methods.expert_merge import ExpertMerge
from moespresso.methods.layer_drop import LayerDrop

__all__ = ["BlockDrop", "ExpertDrop", "ExpertMerge", "LayerDrop"]
