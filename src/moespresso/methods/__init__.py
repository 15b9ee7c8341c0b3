"""One file per method. A method scores, merges, trims or rounds; it never sees the loop.

Importing this package registers all of them (`moespresso.core.registry`).
"""

from moespresso.methods._matrices import OnMatrices
from moespresso.methods._on_text import LayerContext, LayerResult, OnText
from moespresso.methods._quantization import Quantization
from moespresso.methods.attention_rank import AttentionRank
from moespresso.methods.autoround import AutoRound
from moespresso.methods.awq import Awq
from moespresso.methods.block_drop import BlockDrop
from moespresso.methods.channel_prune import ChannelPrune
from moespresso.methods.expert_drop import ExpertDrop
from moespresso.methods.expert_merge import ExpertMerge
from moespresso.methods.gptq import Gptq
from moespresso.methods.hqq import Hqq
from moespresso.methods.layer_drop import LayerDrop
from moespresso.methods.low_rank import LowRank
from moespresso.methods.magnitude import Magnitude
from moespresso.methods.refit import Refit
from moespresso.methods.rtn import Rtn
from moespresso.methods.sparsegpt import SparseGpt
from moespresso.methods.wanda import Wanda

__all__ = [
    "AttentionRank",
    "AutoRound",
    "Awq",
    "BlockDrop",
    "ChannelPrune",
    "ExpertDrop",
    "ExpertMerge",
    "Gptq",
    "Hqq",
    "LayerContext",
    "LayerDrop",
    "LayerResult",
    "LowRank",
    "Magnitude",
    "OnMatrices",
    "OnText",
    "Quantization",
    "Refit",
    "Rtn",
    "SparseGpt",
    "Wanda",
]
