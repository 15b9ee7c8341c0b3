"""What a config cannot say about a family, as data. Everything else is read from the model itself."""

from __future__ import annotations

# Families whose experts do not go through transformers' experts interface (integrations/moe.py), so that they cannot
# be observed or cut by the general code.
REFUSED: dict[str, str] = {
    "llama4": "its experts compute all tokens in one dense product",
    "llama4_text": "its experts compute all tokens in one dense product",
    "dbrx": "its experts are stored as one matrix without the common interface",
    "jetmoe": "its attention is a mixture of experts too, without the common interface",
    "longcat_flash": "its router also selects zero-computation experts",
}

# Keys of config.json that count routed experts. A stale alias wins over the right key, so all present are edited.
COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

# Families that also need an alias written: other engines read `num_experts`, transformers saves `num_local_experts`.
COUNT_ALIASES: dict[str, tuple[str, ...]] = {"qwen3_moe": ("num_experts", "num_local_experts")}

# Families whose decoder layers return, beside hidden states, what the next layer takes up (chosen positions).
HANDS_ON = frozenset({"glm_moe_dsa", "hy_v4"})

# Fewest experts a family's code takes as a mixture at all: with one, JambaConfig.layers_num_experts says dense, and
# phimoe's sparsemixer always picks two.
FEWEST_EXPERTS: dict[str, int] = {"jamba": 2, "phimoe": 2}

# Names of submodules that mix tokens; anything else beside norms is the feed-forward part.
MIXERS: dict[str, str] = {"self_attn": "attention", "mamba": "mamba", "linear_attn": "linear_attention",
                          "conv": "convolution", "short_conv": "convolution"}  # fmt: skip
