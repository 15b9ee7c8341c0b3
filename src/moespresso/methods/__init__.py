"""One file per method. A method scores, merges, trims or rounds; it never sees the loop.

Importing this package registers all of them (`moespresso.core.registry`).
"""

from moespresso.methods._on_text import LayerContext, LayerResult
from moespresso.methods.autoround import AutoRound
from moespresso.methods.awq import Awq
from moespresso.methods.block_drop import BlockDrop
from moespresso.methods.expert_drop import ExpertDrop
from moespresso.methods.expert_merge import ExpertMerge
from moespresso.methods.gptq import Gptq
from moespresso.methods.hqq import Hqq
from moespresso.methods.layer_drop import LayerDrop
from moespresso.methods.rtn import Rtn

__all__ = [
    "AutoRound",
    "Awq",
    "BlockDrop",
    "ExpertDrop",
    "ExpertMerge",
    "Gptq",
    "Hqq",
    "LayerContext",
    "LayerDrop",
    "LayerResult",
    "Rtn",
]
