"""Tiny random checkpoints of every mixture that the installed transformers knows, as people download them.

A family is found, not listed: the library's own table of configs is walked, and whoever counts experts, or holds a config
that does, is a mixture (`found`). Its tiny config is made from the class's own fields: what `TEXT` or `TOWER` has a value for
is set, the configs inside likewise (`tiny`). What cannot be found stands in tables: `FIELDS` (what a family needs beside
that), `PAIRS` (wrappers whose language model may be any) and `LAYOUTS` (names that published files have and `save_pretrained`
does not write).

    hidden 64, 4 layers, 8 experts of width 64, top 2, bfloat16, several files, the tokenizer of a bundled model
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from moespresso.bundled import MODELS

Fields = dict[str, Any]
Named = dict[str, Tensor]
VOCABULARY, EXPERTS, TOP_K, HIDDEN, WIDTH, LAYERS = 2048, 8, 2, 64, 64, 4
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# The library's tables of classes with a head, first the one that people download a wrapper as.
HEADS = ("MULTIMODAL_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "TOKEN_CLASSIFICATION")
NOT_TEXT = re.compile("vision|audio|code2wav|timestamp")
EMPTY = object()  # leave this field to the class

# Values of a language model's fields, by the names that the families have for them.
TEXT: Fields = {
    **dict.fromkeys(COUNTS, EXPERTS),
    "num_experts_per_tok": TOP_K, "moe_k": TOP_K, "moe_topk": TOP_K, "moe_num_active_primary_experts": TOP_K,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 128, "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH, "shared_intermediate_size": WIDTH, "moe_shared_expert_intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS, "first_k_dense_replace": 1, "num_dense_layers": 1, "num_mtp_layers": 0,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16, "max_position_embeddings": 512,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "hc_mult": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 16, "linear_num_heads": 4,
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16, "mamba_dt_rank": 4,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 8, "chunk_size": 16, "use_mamba_kernels": False,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
# Values of the fields of whatever sees or hears.
TOWER: Fields = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "depth": 2, "num_attention_heads": 2, "num_heads": 2,
    "num_key_value_heads": 2, "image_size": 56, "patch_size": 14, "out_hidden_size": HIDDEN, "num_position_embeddings": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_mel_bins": 16,
}  # fmt: skip

HYBRID = ["linear_attention", "full_attention"] * 2
STATES = ["linear_attention", "moe", "full_attention", "moe"] * 2
BY_TURNS = ["sliding_attention", "full_attention"] * 2
DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]


def _rotary(*sections: int, **more: Any) -> Fields:
    """Rotary positions in sections (time, height, width)."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections), **more}


NARROW: Fields = {"intermediate_size": WIDTH}
INKLING: Fields = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 16,
                   "d_rel": 4, "rel_extent": 32, "unpadded_vocab_size": VOCABULARY}  # fmt: skip
GEMMA: Fields = {"enable_moe_block": True, "top_k_experts": TOP_K, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
                 "layer_types": BY_TURNS, "tie_word_embeddings": True, "vocab_size_per_layer_input": VOCABULARY}  # fmt: skip
SAM: Fields = {"output_channels": 16, "mlp_dim": 64, "downsample_channels": [24, 32], "image_size": 64, "patch_size": 16,
               "window_size": 2, "global_attn_indexes": [1]}  # fmt: skip
STRIPED = _rotary(2, 1, 1, partial_rotary_factor=0.5, mrope_interleaved=True)
DEEP: Fields = {"deepstack_visual_indexes": [0, 1]}

# What a config class needs beside TEXT and TOWER, or other than there; by its model type, or its name.
FIELDS: dict[str, Fields] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "aria_text": NARROW,
    "bailing_hybrid": {"q_lora_rank": EMPTY, "head_dim": 16, "layer_group_size": 2},
    "cohere2_moe": NARROW | {"prefix_dense_intermediate_size": 128},
    "dbrx": {"d_model": HIDDEN, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 512, "tie_word_embeddings": EMPTY,
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": WIDTH, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K, "hidden_size": HIDDEN}},
    "deepseek_ocr2_sam_vision_model": SAM,
    "deepseek_ocr2_text": {"mlp_layer_types": DENSE_FIRST},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8, "num_key_value_heads": 1, "num_nextn_predict_layers": 0},
    "diffusion_gemma": {"canvas_length": 16},
    "diffusion_gemma_text": {"top_k_experts": TOP_K, "layer_types": BY_TURNS, "tie_word_embeddings": True},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note_audio_encoder": {"downsample_hidden_size": 8, "feature_size": 16, "adapter_input_size": 32, "adapter_out_dim": HIDDEN},
    "dots3_note_text": {"head_dim": 24, "shared_experts_intermediate_size": WIDTH, "swa_num_attention_heads": 2,
                        "swa_num_key_value_heads": 2, "swa_q_lora_rank": 48, "swa_kv_lora_rank": 40, "swa_head_dim": 24,
                        "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16},
    "dots3_note_vision_encoder": {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "pyramid_num_routed": [-1, 4],
                                  "adapter_in_dim": 32, "adapter_out_dim": HIDDEN},
    "ernie4_5_moe": {"tie_word_embeddings": True},
    "ernie4_5_vl_moe": {"tie_word_embeddings": True},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [64, 32], "tie_word_embeddings": True, "rope_parameters": _rotary(3, 3, 2)},
    "flex_olmo": {"num_key_value_heads": 4},
    "gemma4": {"audio_config": None},
    "gemma4_text": GEMMA,
    "gemma4_vision": {"head_dim": 16, "patch_size": 4, "position_embedding_size": 64},
    "glm4_moe": {"use_qk_norm": True},
    "glm4v_moe_text": {"rope_parameters": _rotary(1, 1, 2, partial_rotary_factor=0.5)},
    "glm5_next_text": {"qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 4},
    "glm5_next_vision": {"projection_intermediate_size": 64},
    "gpt_oss": NARROW,
    "granitemoe": NARROW,
    "granitemoe_swa": NARROW,
    "granitemoehybrid": NARROW | {"layer_types": ["mamba", "attention"] * 2},
    "granitemoeshared": NARROW,
    "hunyuan_v1_moe": NARROW,
    "inkling2_text": INKLING | {"n_layers_per_attn_res_block": 2},
    "inkling2_vision": {"text_hidden_size": HIDDEN, "projection_hidden_dim": 64, "posemb_grid_size": 4},
    "inkling_audio": {"n_mel_bins": 8, "mel_vocab_size": 16, "text_hidden_size": HIDDEN},
    "inkling_text": INKLING | {"tie_word_embeddings": EMPTY, "logits_mup_width_multiplier": 1.0},
    "inkling_vision": {"text_hidden_size": HIDDEN, "patch_size": 16},
    "internvl": {"image_seq_length": 4},
    "internvl_vision": {"image_size": (56, 56), "patch_size": (14, 14)},
    "jamba": NARROW | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "jetmoe": {"kv_channels": 16, "num_attention_heads": EMPTY, "head_dim": EMPTY},
    "kimi_k25": {"projection_hidden_size": 32},
    "kimi_k25_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "kimi_linear": {"q_lora_rank": None, "head_dim": EMPTY, "layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": NARROW | {"intermediate_size_mlp": 128, "num_experts_per_tok": 1, "attention_chunk_size": 32},
    "llama4_vision_model": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    "longcat_flash": {"num_layers": 2, "num_hidden_layers": EMPTY, "ffn_hidden_size": 128, "expert_ffn_hidden_size": WIDTH, "zero_expert_num": 4},
    "minimax": NARROW | {"block_size": 16, "layer_types": HYBRID},
    "minimax_m2": NARROW,
    "minimax_m3_vl": {"projector_hidden_size": HIDDEN},
    "minimax_m3_vl_text": NARROW | {"dense_intermediate_size": 128, "rotary_dim": 8, "index_block_size": 16, "index_topk_blocks": 2},
    "mistral_large4_text": {"q_lora_rank": EMPTY},
    "mixtral": NARROW,
    "muse_spark": {"out_hidden_size": 32, "projector_hidden_size": 32},
    "muse_spark_audio": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_hidden_layers": 4},
    "muse_spark_text": {"moe_hidden_size": 32},
    "muse_spark_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "nemotron3_5_transcribe_word_timestamp": {"num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 64, "blank_token_id": 63},
    "Nemotron3DiarizationHeadConfig": {"hidden_size": 16, "audio_hidden_size": 32},
    "nemotron_h": {"num_hidden_layers": EMPTY, "layers_block_type": STATES},
    "nemotron_h_omni": {"projector_hidden_size": 32, "vision_hidden_size": 32},
    "nllb-moe": {"d_model": HIDDEN, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": WIDTH, "decoder_ffn_dim": WIDTH,
                 "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "olmoe": NARROW,
    "openai_privacy_filter": NARROW | {"num_labels": 3},
    "parakeet_encoder": {"subsampling_conv_channels": 8, "conv_kernel_size": 3, "projection_hidden_size": 32, "projection_bias": False},
    "phimoe": NARROW,
    "qwen3_5_moe_text": {"layer_types": HYBRID, "rope_parameters": STRIPED},
    "qwen3_next": {"layer_types": HYBRID},
    "Qwen3OmniMoeCode2WavConfig": {"num_hidden_layers": 1, "decoder_dim": 32, "codebook_size": 64, "num_quantizers": 4},
    "Qwen3OmniMoeTalkerConfig": {"thinker_hidden_size": HIDDEN, "num_code_groups": 4, "accept_hidden_layer": 2, "spatial_merge_size": 2},
    "qwen3_omni_moe_audio_encoder": {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32,
                                     "output_dim": HIDDEN, "downsample_hidden_size": 8, "max_source_positions": 64, "n_window": 8},
    "qwen3_omni_moe_talker_code_predictor": {"num_code_groups": 4},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": WIDTH},
    "qwen3_omni_moe_text": {"tie_word_embeddings": EMPTY, "rope_parameters": _rotary(4, 2, 2, mrope_interleaved=True)},
    "qwen3_omni_moe_vision_encoder": DEEP,
    "qwen3_vl_moe_text": {"moe_intermediate_size": 96, "rope_parameters": _rotary(4, 2, 2, mrope_interleaved=True)},
    "qwen3_vl_moe_vision": DEEP,
    "qwen4_exp_text": {"layer_types": HYBRID, "hc_count": 2, "hc_lowrank": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1,
                       "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4, "ple_layer_ids": [1],
                       "ple_embed_dim": 64, "heads_per_ngram": 2, "ngram_vocab_size_base": 512, "split_ngram_parts": 4,
                       "rope_parameters": STRIPED},
    "radio": {"video_temporal_patch_size": 2, "image_size": 32, "max_img_size": 64, "patch_size": 16},
    "step3p5": {"share_expert_dim": WIDTH, "num_sliding_attention_heads": 4},
    "switch_transformers": {"d_model": HIDDEN, "d_kv": 16, "d_ff": WIDTH, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4,
                            "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
    "unlimited_ocr_sam_vision_model": SAM,
    "unlimited_ocr_text": {"mlp_layer_types": DENSE_FIRST},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
# Configs inside that published models have and the class leaves out by default.
INSIDE: dict[str, dict[str, str]] = {
    "gemma4": {"vision_config": "gemma4_vision"},
    "nemotron_h_omni": {"audio_config": "parakeet_encoder"},
}
# Wrappers whose language model may be of any family, with one that people download them with.
PAIRS: dict[str, tuple[str, str]] = {
    "internvl+qwen3_moe": ("internvl", "qwen3_moe"),
    "internvl+gpt_oss": ("internvl", "gpt_oss"),
    "mistral3+mistral4": ("mistral3", "mistral4"),
}
# Other forms of a family: what its config says then.
FORMS: dict[str, Fields] = {
    "nemotron_h~latent": {"moe_latent_size": 32},
    "qwen3_next~one_attention": {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    "granitemoehybrid~one_attention": {"layer_types": ["mamba"] * 3 + ["attention"]},
}


# From the library's classes to tiny configs


def counts_experts(config: PreTrainedConfig) -> bool:
    """Whether this config, or one inside it that is of text, counts experts."""
    names = {field.name for field in fields(type(config))} | set(type(config).attribute_map)
    inside = (getattr(config, key, None) for key in config.sub_configs if not NOT_TEXT.search(key))
    return bool(names & set(COUNTS)) or any(
        isinstance(each, PreTrainedConfig) and counts_experts(each) for each in inside
    )


def head_of(family: str) -> str | None:
    """The class with a head that the library has for a model type."""
    tables = (getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES") for head in HEADS)
    return next((table[family] for table in tables if family in table), None)


def _default(family: str) -> PreTrainedConfig | None:
    """A family's config without any values, where the class has defaults for all."""
    try:
        return CONFIG_MAPPING[family]()
    except Exception:  # of over 500 classes, two have defaults that they do not take themselves
        return None


@cache
def found() -> tuple[str, ...]:
    """Every model type that has a head and counts experts, then pairs, forms, and the layouts of the hub."""
    headed = [family for family in CONFIG_MAPPING if head_of(family)]
    mixtures = [each for each in headed if (default := _default(each)) and counts_experts(default)]
    return (*mixtures, *PAIRS, *FORMS, *LAYOUTS)


def _values(kind: type[PreTrainedConfig], text: bool) -> Fields:
    """The tiny values of a class's own fields."""
    have = {field.name for field in fields(kind)}
    chosen = {name: value for name, value in (TEXT if text else TOWER).items() if name in have}
    if text and "kv_lora_rank" in have:  # keys come from a latent vector: as many heads as queries have
        chosen |= {"num_key_value_heads": 4} | ({"head_dim": 8} if "head_dim" in have else {})
    chosen |= FIELDS.get(kind.model_type or kind.__name__, {})
    return {name: value for name, value in chosen.items() if value is not EMPTY}


def _special(kind: type[PreTrainedConfig]) -> Fields:
    """A wrapper's tokens for images and sounds, inside the tiny vocabulary."""
    names = [field.name for field in fields(kind) if re.search(r"token_(id|index)$", field.name)]
    names = [name for name in names if name not in TEXT]
    return {name: VOCABULARY - 8 - place for place, name in enumerate(names)}


def tiny(
    config: PreTrainedConfig, text: bool = True, inner: str | None = None, **more: Any
) -> PreTrainedConfig:
    """A default config made small, with those inside it; `inner` is the family of the language model, where any may be."""
    kind = type(config)
    values = (_special(kind) if kind.sub_configs else {}) | _values(kind, text) | more
    named = INSIDE.get(kind.model_type, {}) | ({"text_config": inner} if inner else {})
    for key in kind.sub_configs:
        inside = CONFIG_MAPPING[named[key]]() if key in named else getattr(config, key, None)
        if isinstance(inside, PreTrainedConfig) and key not in values:
            values[key] = tiny(inside, text and not NOT_TEXT.search(key)).to_dict()
    return kind(**values)


def config_of(name: str) -> PreTrainedConfig:
    """The tiny config of a family, of a pair or form, or of what a layout is a layout of."""
    family, inner = PAIRS.get(name, (re.split("[@~]", name)[0], None))
    return tiny(CONFIG_MAPPING[family](), inner=inner, **FORMS.get(name, {}))


# From configs to folders


def make(name: str) -> PreTrainedModel:
    """A random model in bfloat16 whose layers all change what they are given."""
    config = config_of(name)
    kind = getattr(transformers, head_of(config.model_type) or "")
    torch.manual_seed(0)
    model = kind._from_config(config).eval()
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                _draw(tensor, _fan_in(model, key, tensor), drawn)
    model.config.dtype = torch.bfloat16
    return model.to(torch.bfloat16)


def _draw(tensor: Tensor, fan_in: int, drawn: torch.Generator) -> None:
    """Values for a matrix by its inputs; what has one axis stays near what it is."""
    noise = torch.randn(tensor.shape, generator=drawn)
    if tensor.dim() > 1:
        tensor.copy_(noise * 1.2 * fan_in**-0.5)
    elif tensor.dim():
        tensor.add_(0.1 * noise)


def _fan_in(model: nn.Module, key: str, tensor: Tensor) -> int:
    """How many inputs a matrix has; some families store those of all experts transposed."""
    owner = model.get_submodule(key.rpartition(".")[0])
    turned = tensor.dim() == 3 and getattr(owner, "is_transposed", False)
    return tensor.shape[-2 if turned else -1] if tensor.dim() > 1 else 1


def write(name: str, folder: Path) -> str:
    """A family's checkpoint in several files with all that lies beside it; the name of its class."""
    model = make(name)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=max(size // 2, 10_000))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS["mixtral"] / file, folder / file)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    if model.config.sub_configs:
        for file, word in (
            ("preprocessor_config", "image_processor_type"),
            ("processor_config", "processor_class"),
        ):
            (folder / f"{file}.json").write_text(json.dumps({word: "Any"}))
    if name in LAYOUTS:
        LAYOUTS[name](folder)
    return type(model).__name__


# Layouts: names that published files have and save_pretrained does not write


def _rewrite(folder: Path, change: Callable[[Named], Named]) -> None:
    """Put all tensors through `change`, and into two files again."""
    whole: Named = {}
    for file in sorted(folder.glob("*.safetensors")):
        whole |= load_file(file)
        file.unlink()
    whole = change(whole)
    names = sorted(whole)
    where = {
        name: f"model-{1 + (2 * place >= len(names)):05d}-of-00002.safetensors"
        for place, name in enumerate(names)
    }
    for file in set(where.values()):
        tensors = {name: whole[name].contiguous() for name in names if where[name] == file}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in whole.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _edit(folder: Path, change: Callable[[Fields], None]) -> None:
    """Change config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _fused(whole: Named, turned: bool = False) -> Named:
    """All experts of a layer in two tensors, gate above up: [expert, out, in], or turned: [expert, in, out]."""
    apart = re.compile(r"(?!mtp)(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight$")
    found = {name: match for name in whole if (match := apart.match(name))}
    parts = {(match[1], int(match[2]), match[3]): whole[name] for name, match in found.items()}
    fused = {name: tensor for name, tensor in whole.items() if name not in found}
    for prefix in {prefix for prefix, _, _ in parts}:
        experts = range(sum(key[0] == prefix and key[2] == "down" for key in parts))
        both = [torch.cat([parts[prefix, each, "gate"], parts[prefix, each, "up"]]) for each in experts]
        down = [parts[prefix, each, "down"] for each in experts]
        fused |= {f"{prefix}gate_up_proj": torch.stack(both), f"{prefix}down_proj": torch.stack(down)}
    if turned:
        stacked = re.compile(r".*\.mlp\.experts\.(gate_up|down)_proj$")
        fused |= {name: tensor.transpose(1, 2) for name, tensor in fused.items() if stacked.match(name)}
    return fused


def _last(whole: Named, prefix: str) -> str:
    """The prefix of the last decoder layer with attention and experts."""
    numbers = {
        int(match[1]) for name in whole if (match := re.match(rf"{re.escape(prefix)}(\d+)\.self_attn", name))
    }
    return f"{prefix}{max(numbers)}."


def _copied(whole: Named, source: str, to: str) -> Named:
    """The layer's tensors under another prefix."""
    return {
        name.replace(source, to, 1): tensor.clone()
        for name, tensor in whole.items()
        if name.startswith(source)
    }


def _ones(*names: str) -> Named:
    """Norms."""
    return {name: torch.ones(HIDDEN, dtype=torch.bfloat16) for name in names}


def _wide(name: str) -> Named:
    """What joins a state and the next token's embedding."""
    return {name: torch.randn(HIDDEN, 2 * HIDDEN, dtype=torch.bfloat16) * 0.1}


def _with_mtp(whole: Named, prefix: str) -> Named:
    """A prediction layer as Qwen's `mtp.*`."""
    norms = _ones("mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight")
    return whole | _copied(whole, _last(whole, prefix), "mtp.layers.0.") | norms | _wide("mtp.fc.weight")


def _numbered_mtp(folder: Path) -> None:
    """A prediction layer as DeepSeek's and GLM's: numbered behind the last decoder layer."""
    to = f"model.layers.{LAYERS}."

    def change(whole: Named) -> Named:
        norms = _ones(f"{to}enorm.weight", f"{to}hnorm.weight", f"{to}shared_head.norm.weight")
        shared = {f"{to}embed_tokens.weight": whole["model.embed_tokens.weight"].clone(),
                  f"{to}shared_head.head.weight": whole["lm_head.weight"].clone()}  # fmt: skip
        return (
            whole
            | _copied(whole, _last(whole, "model.layers."), to)
            | norms
            | shared
            | _wide(f"{to}eh_proj.weight")
        )

    def told(config: Fields) -> None:
        config.pop("num_mtp_layers", None)
        config["num_nextn_predict_layers"] = 1

    _rewrite(folder, change)
    _edit(folder, told)


def _qwen_wrapper(folder: Path) -> None:
    """Qwen3.5, Qwen3.8: fused experts, and a prediction layer whose experts lie apart."""
    _rewrite(folder, lambda whole: _fused(_with_mtp(whole, "model.language_model.layers.")))
    _edit(folder, lambda config: config["text_config"].update(mtp_num_hidden_layers=1))


def _dots3(folder: Path) -> None:
    """dots3: a key for each number of the windowed layers, and no `per_layer_config`."""

    def told(config: Fields) -> None:
        text = config["text_config"]
        text.pop("per_layer_config")
        text.pop("rope_parameters", None)
        text |= {key: value for key, value in FIELDS["dots3_note_text"].items() if key.startswith("swa_")}
        names = {"indexed_attention": "full_attention"}
        text["layer_types"] = [names.get(each, each) for each in text["layer_types"]]

    _edit(folder, told)


def _kimi(folder: Path) -> None:
    """Kimi-K2.5: the decoder's list is called layers, as in DeepSeek-V3's files."""
    _rewrite(
        folder, lambda whole: {name.replace("model.blocks.", "model.layers."): t for name, t in whole.items()}
    )


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "deepseek_v3@hub": _numbered_mtp,
    "dots3_note@hub": _dots3,
    "glm4_moe@hub": _numbered_mtp,
    "kimi_k25@hub": _kimi,
    "qwen3_5_moe@hub": _qwen_wrapper,
    "qwen3_next@hub": lambda folder: _rewrite(folder, lambda whole: _with_mtp(whole, "model.layers.")),
    "qwen3_vl_moe@hub": lambda folder: _rewrite(folder, lambda whole: _fused(whole, turned=True)),
    "qwen4_exp@hub": _qwen_wrapper,
}
