"""One file per method. A method scores, merges, trims or rounds; it never sees the loop.

Importing this package registers all of them (`moespresso.core.registry`).
"""

from moespresso.methods import expert_drop
from moespresso.methods.expert_drop import ExpertDrop

__all__ = ["ExpertDrop", "expert_drop"]
