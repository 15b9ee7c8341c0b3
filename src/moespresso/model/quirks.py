"""What a config cannot say about a family, as data. Everything else is read from the model itself."""

from __future__ import annotations

# Language models whose experts do not go through transformers' experts interface (integrations/moe.py), so that they cannot
# be observed or cut by the general code. What needs none of that is done: depth, attention.
OPAQUE: dict[str, str] = {
    "llama4": "its experts compute all tokens in one dense product",
    "llama4_text": "its experts compute all tokens in one dense product",
    "dbrx": "its experts are stored as one matrix without the common interface",
    "jetmoe": "its attention is a mixture of experts too, without the common interface",
    "longcat_flash": "its router also selects zero-computation experts",
}

# Families that answer otherwise than with the next token.
REFUSED: dict[str, str] = {
    "diffusion_gemma": "it fills in blocks of text instead of going on from token to token"
}

# Families that transformers 5.23 does not have: where the same weights, or the same computation, are to be had.
ELSEWHERE: dict[str, str] = {
    "internvl_chat": "the same weights are published for transformers under a name that ends in -HF: give that one",
    "minimax_text_01": "the same weights are published for transformers as MiniMaxAI/MiniMax-Text-01-hf: give that one",
    "minimax_m1": "the same weights are published for transformers under a name that ends in -hf: give that one",
    "kimi_vl": "its language model computes as deepseek_v3: give a checkpoint of that alone",
}

# Families whose stacks of experts transformers takes apart wherever anything is packed: it then looks for packed ones.
TAKEN_APART = frozenset({"llama4", "llama4_text"})

# Keys of config.json that count routed experts. A stale alias wins over the right key, so all present are edited.
COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

# Keys of config.json that set the channels of an expert, and those that count shared experts (as multiples of that width).
WIDTH_KEYS = ("moe_intermediate_size", "intermediate_size")
SHARED_KEYS = ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts")

# Families that also need an alias written: other engines read `num_experts`, transformers saves `num_local_experts`.
COUNT_ALIASES: dict[str, tuple[str, ...]] = {"qwen3_moe": ("num_experts", "num_local_experts")}

# Keys of config.json that count the layers which predict tokens further ahead (multi-token prediction), and what they are
# called where they are not numbered behind the last decoder layer: `mtp.layers.0.`, `mtp.0.`, `model.mtp_layers.0.`.
AHEAD_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "mtp_num_layers")
AHEAD_NAMES = r"(?:^|\.)mtp\w*\.(?:layers\.)?(?:(\d+)\.)?(.+)"

# Families whose decoder layers return, beside hidden states, what the next layer takes up (chosen positions).
HANDS_ON = frozenset({"glm_moe_dsa", "hy_v4", "glm5_next_text", "mistral_large4_text", "zaya"})

# Fewest experts a family's code takes as a mixture at all: with one, JambaConfig.layers_num_experts says dense, and
# phimoe's sparsemixer always picks two.
FEWEST_EXPERTS: dict[str, int] = {"jamba": 2, "phimoe": 2}

# Names of the linear maps that attention, dense and shared feed-forward parts end with.
OUTPUTS = frozenset({"o_proj", "out_proj", "wo", "down_proj", "w2", "fc2", "c_proj", "output_linear"})


# Depth: how configs say what each decoder layer is (model/depth.py)

# Fields with one entry a layer (lists, or strings of letters). Entries beyond the last layer belong to extra heads.
LAYER_LISTS = (
    "layer_types", "mlp_layer_types", "layers_block_type", "hybrid_override_pattern", "hybrid_layer_pattern",
    "indexer_types", "index_topk_pattern", "compress_ratios", "sparse_attention_freq", "no_rope_layers",
    "layer_rope_theta", "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "swiglu_limits",
    "swiglu_limits_shared", "activation_sparsity_pattern", "intermediate_size", "moe_layer_freq", "moe_topk",
    "moe_intermediate_size", "num_shared_expert", *COUNT_KEYS,
)  # fmt: skip

# Fields that list layers by number, and the number that the first layer has there.
LAYER_NUMBERS: dict[str, int] = {"mlp_only_layers": 0, "attn_layer_indices": 0, "full_attn_idxs": 0, "moe_layers": 0,
                                 "cross_attention_layers": 0, "local_layer_ids": 0, "full_attn_layers": 1, "kda_layers": 1,
                                 "ple_layer_ids": 1}  # fmt: skip

# Numbers that part the layers: how many lie before the border, the number of the last one before it, and how many lie
# behind it. A value beyond the last layer means no border and stays.
LAYERS_BEFORE = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
LAST_LAYER = ("moe_layer_end_index",)
LAYERS_BEHIND = ("num_kv_shared_layers",)

# Sub-dictionaries of a language model's config that hold fields of the kinds above.
LAYERS_INSIDE = ("linear_attn_config", "sparse_attention_config")

# What a layer takes from an earlier one, so that it cannot be the first.
TAKEN_FROM_EARLIER: dict[str, str] = {"indexer_types": "shared"}

# Attributes of modules that only number a layer. (MiniMax derives decays from them, but checkpoints store those.)
NUMBERING = frozenset({"layer_idx", "layer_id", "layer_number", "num_hidden_layers"})

# Lists of LAYER_LISTS that tell mixtures from dense layers, and the two words they use.
DENSE_WORDS: dict[str, tuple[str | int, str | int]] = {"mlp_layer_types": ("sparse", "dense"), "moe_layer_freq": (1, 0),
                                                       "layers_block_type": ("moe", "mlp"),
                                                       "hybrid_override_pattern": ("E", "-")}  # fmt: skip

# Fields that may be the width of dense layers; what counts is the model they make.
DENSE_WIDTHS = ("prefix_dense_intermediate_size", "dense_intermediate_size", "intermediate_size")
