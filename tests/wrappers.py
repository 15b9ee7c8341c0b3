"""Language models as most are published: beside a tower for images, in one checkpoint with one config.

Tiny random ones, of transformers' own classes. Towers are as small as their code takes; the language models are those of the
zoo's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families import COMMON

IMAGE_TOKEN, VIDEO_TOKEN, START, END = 90, 91, 92, 93
_TOKENS = {
    "image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    **COMMON, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 16, "moe_intermediate_size": 24, "num_experts": 8,
    "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "shared_expert_intermediate_size": 24,
}  # fmt: skip
_TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "depth": 2, "num_attention_heads": 2, "num_heads": 2,
    "image_size": 56, "patch_size": 14, "out_hidden_size": 32, "num_position_embeddings": 16, "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}  # fmt: skip
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
           "num_key_value_heads": 4, "head_dim": 8}  # fmt: skip


def _rope(sections: list[int], share: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share,
                                "mrope_section": sections, **more}}  # fmt: skip


_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_key_head_dim": 16,
           "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}  # fmt: skip
# Type, fields of the whole, type and fields of the language model, type and fields of the tower.
WRAPPERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], str, dict[str, Any]]] = {
    "qwen3_vl_moe": ("qwen3_vl_moe", _TOKENS, "qwen3_vl_moe_text", _rope([4, 2, 2], mrope_interleaved=True),
                     "qwen3_vl_moe_vision", {"deepstack_visual_indexes": [0, 1]}),
    "qwen3_5_moe": ("qwen3_5_moe", _TOKENS, "qwen3_5_moe_text",
                    _LINEAR | _rope([2, 1, 1], 0.5, mrope_interleaved=True), "qwen3_5_moe_vision", {}),
    "qwen4_exp": ("qwen4_exp", _TOKENS, "qwen4_exp_text",
                  {**_LINEAR, "hc_count": 2, "hc_lowrank": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                   "indexer_budget": 16, "indexer_compress_ratio": 4, "ple_layer_ids": [1], "ple_embed_dim": 32,
                   "heads_per_ngram": 2, "ngram_vocab_size_base": 64, "split_ngram_parts": 4,
                   **_rope([2, 1, 1], 0.5, mrope_interleaved=True)}, "qwen4_exp_vision", {}),
    "glm4v_moe": ("glm4v_moe", {**_TOKENS, "image_start_token_id": START, "image_end_token_id": END}, "glm4v_moe_text",
                  _rope([1, 1, 2]), "glm4v_moe_vision", {}),
    "kimi_k25": ("kimi_k25", {"projection_hidden_size": 16, "image_token_id": IMAGE_TOKEN, "tie_word_embeddings": False},
                 "deepseek_v3", {**_LATENT, "head_dim": ...}, "kimi_k25_vision", {"pos_emb_height": 4, "pos_emb_width": 4}),
    "internvl": ("internvl", {"image_token_id": IMAGE_TOKEN, "image_seq_length": 4, "tie_word_embeddings": False}, "qwen3_moe", {},
                 "internvl_vision", {"image_size": (56, 56), "patch_size": (14, 14)}),
    "mistral3": ("mistral3", {"image_token_index": IMAGE_TOKEN, "tie_word_embeddings": False}, "mistral4",
                 {**_LATENT, "head_dim": ...}, "pixtral", {}),
}  # fmt: skip


# Its experts are two sets in a layer, one for images, that cannot be cut; several parameters are stored as one tensor.
WHOLE = "ernie4_5_vl_moe"
_ALL = WRAPPERS | {
    WHOLE: (WHOLE, {"tie_word_embeddings": True}, "ernie4_5_vl_moe_text",
            {"moe_intermediate_size": [24, 16], "moe_num_experts": 8, "moe_num_shared_experts": 1, "moe_k": 2,
             "tie_word_embeddings": True, **_rope([1, 1, 2])}, "ernie4_5_vl_moe_vision", {}),
}  # fmt: skip


def config_of(kind: str, base: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    """A config of those fields of `base` that it knows, and of `fields` (... takes one out)."""
    made = CONFIG_MAPPING[kind]
    # One number may have two names; where the other is no field of its own, both mean the same.
    known = set(made.__dataclass_fields__) - set(made.attribute_map)
    whole = {key: value for key, value in base.items() if key in known} | dict(fields)
    return made(**{key: value for key, value in whole.items() if value is not ...})


def wrapper_config(name: str) -> Any:
    """The config of a tiny wrapper."""
    kind, fields, text, text_fields, tower, tower_fields = _ALL[name]
    inner = {
        "text_config": config_of(text, _TEXT, text_fields),
        "vision_config": config_of(tower, _TOWER, tower_fields),
    }
    return CONFIG_MAPPING[kind](**fields, **inner)


def write_wrapper(name: str, folder: Path) -> PreTrainedModel:
    """Write a wrapper in float32, as `save_pretrained` does; returns what was written."""
    torch.manual_seed(0)
    config = wrapper_config(name)
    kind = transformers.models.auto.modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[config.model_type]
    model: PreTrainedModel = getattr(transformers, kind)._from_config(config).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape) * (0.3 if tensor.dim() > 1 else 0.1) + (tensor.dim() == 1))
    model.save_pretrained(folder, max_shard_size="200KB")
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Tiny"}\n')
    return model


def language_model(model: PreTrainedModel) -> Any:
    """The part with the decoder layers."""
    return next(module for name, module in model.named_modules() if name.endswith("language_model"))


def cut_by_hand(model: PreTrainedModel, kept: Mapping[int, list[int]]) -> PreTrainedModel:
    """The same model with only the experts `kept` of each layer."""
    for number, experts in kept.items():
        block = language_model(model).layers[number].mlp
        for module in (block.experts, block.gate):
            for name, tensor in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                _set(module, name, tensor[experts])
            for count in ("num_experts", "n_routed_experts"):
                if hasattr(module, count):
                    setattr(module, count, len(experts))
        for count in ("num_experts", "n_routed_experts"):
            if hasattr(block, count):
                setattr(block, count, len(experts))
    return model


def _set(module: torch.nn.Module, name: str, values: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
    else:
        module._buffers[name] = values


def picture(model: PreTrainedModel) -> dict[str, Tensor]:
    """What such a model is called with for an image of four tokens within a text."""
    vision: Any = model.config.vision_config
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ids = torch.tensor([[5, 6, START, *[IMAGE_TOKEN] * 4, END, 7, 8, 9]])
    return {"input_ids": ids, "pixel_values": torch.randn(16, size, generator=torch.Generator().manual_seed(1)),
            "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE_TOKEN).int()}  # fmt: skip
