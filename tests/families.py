"""The zoo: one tiny random checkpoint per model family, and the truth they are tested against.

Everything here is made from transformers' own classes and none of it knows moespresso, so that a
fault in the product cannot hide in its own reference.  Four things are offered:

* `write_checkpoint` writes a family to disk the way real checkpoints lie there: several shards, a
  decoder layer and even an expert cut in two by a shard border, a stray tensor, mixed dtypes.
* `reference` loads such a folder with stock transformers, eager everywhere, nothing missing.
* `expert_on_disk` reads one expert's matrices straight from the files.
* `cut_by_hand` is Expert Drop done on a model in memory, with the quirks of every family spelt out.

The shapes are deliberately odd.  Defaults hide indexing faults: with as many key heads as query
heads, one group of experts and a zero router bias, a wrong slice often still computes.
"""

import copy
import itertools
import json
import logging
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    HunYuanMoEV1Config,
    JambaConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.utils import logging as transformers_logging

# Six query heads on two key heads; with head_dim=16 the heads together are wider than the hidden state.
COMMON = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """One model family: how to make its config, and where it keeps its experts in memory.

    `block` is the decoder layer's attribute that holds the MoE, `router` the block's attribute that
    holds the router, `count_key` the config field with the number of experts.
    """

    name: str
    make_config: Callable[..., PreTrainedConfig]
    notes: str
    count_key: str
    block: str = "mlp"
    router: str = "gate"

    def config(self, **changes: Any) -> PreTrainedConfig:
        """A fresh config; `changes` override single fields."""
        return self.make_config(**changes)


def _maker(config_class: type[PreTrainedConfig], **fields: Any) -> Callable[..., PreTrainedConfig]:
    """Return a factory that builds `config_class` from COMMON and `fields`, each overridable at the call."""
    return lambda **changes: config_class(**copy.deepcopy({**COMMON, **fields, **changes}))


def _list_families() -> Iterable[Family]:
    yield Family(
        "mixtral",
        _maker(
            MixtralConfig,
            head_dim=16,
            num_local_experts=8,
            num_experts_per_tok=3,
        ),
        "6 query heads on 2 key heads, head_dim 16 (not 48 / 6), top-3 of 8",
        count_key="num_local_experts",
    )
    yield Family(
        "qwen2_moe",
        _maker(
            Qwen2MoeConfig,
            intermediate_size=56,
            moe_intermediate_size=40,
            shared_expert_intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=4,
            head_dim=16,
            num_experts=9,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            mlp_only_layers=[1],
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=4,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        ),
        "dense layer 1 by mlp_only_layers, gated shared expert, three widths, windows by layer_types, top-3 of 9",
        count_key="num_experts",
    )
    yield Family(
        "qwen3_moe",
        _maker(
            Qwen3MoeConfig,
            intermediate_size=72,
            moe_intermediate_size=28,
            num_hidden_layers=5,
            num_attention_heads=4,
            head_dim=20,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            decoder_sparse_step=2,
            attention_bias=True,
        ),
        "decoder_sparse_step 2: experts in layers 1 and 3 only; head_dim 20; attention bias",
        count_key="num_local_experts",
    )
    yield Family(
        "deepseek_v2",
        _maker(
            DeepseekV2Config,
            intermediate_size=64,
            moe_intermediate_size=20,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=24,
            qk_nope_head_dim=12,
            qk_rope_head_dim=8,
            v_head_dim=20,
            n_routed_experts=12,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=3,
            topk_group=2,
            topk_method="group_limited_greedy",
            routed_scaling_factor=1.5,
            first_k_dense_replace=1,
        ),
        "3 groups of 4, two of them live; gates not renormalised, scaled by 1.5; dense prefix; no query compression",
        count_key="n_routed_experts",
    )
    yield Family(
        "deepseek_v3",
        _maker(
            DeepseekV3Config,
            intermediate_size=64,
            moe_intermediate_size=20,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=28,
            kv_lora_rank=24,
            qk_nope_head_dim=12,
            qk_rope_head_dim=8,
            v_head_dim=20,
            n_routed_experts=12,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=3,
            topk_group=2,
            norm_topk_prob=False,
            routed_scaling_factor=1.7,
            first_k_dense_replace=2,
        ),
        "3 groups of 4, two live; correction bias; gates not renormalised; two dense layers; query compression",
        count_key="n_routed_experts",
    )
    yield Family(
        "olmoe",
        _maker(
            OlmoeConfig,
            intermediate_size=28,
            num_experts=10,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            clip_qkv=1.5,
            tie_word_embeddings=True,
        ),
        "clipped q, k, v; query norm over all heads; renormalised top-3 of 10; tied",
        count_key="num_experts",
    )
    yield Family(
        "glm4_moe",
        _maker(
            Glm4MoeConfig,
            intermediate_size=72,
            moe_intermediate_size=24,
            head_dim=16,
            n_routed_experts=12,
            n_shared_experts=1,
            num_experts_per_tok=3,
            n_group=2,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.3,
            first_k_dense_replace=1,
            use_qk_norm=True,
            attention_bias=True,
        ),
        "2 groups of 6, one live; query and key norms; half the head is rotated; dense prefix",
        count_key="n_routed_experts",
    )
    yield Family(
        "gpt_oss",
        _maker(
            GptOssConfig,
            num_hidden_layers=4,
            head_dim=16,
            num_local_experts=8,
            num_experts_per_tok=3,
            sliding_window=6,
            layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            swiglu_limit=2.0,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
        ),
        "fused, transposed, interleaved and biased experts; router bias; windows out of the usual order; sinks",
        count_key="num_local_experts",
        router="router",
    )
    yield Family(
        "granitemoe",
        _maker(
            GraniteMoeConfig,
            num_attention_heads=4,
            num_local_experts=8,
            num_experts_per_tok=3,
            embedding_multiplier=3.0,
            logits_scaling=2.0,
            residual_multiplier=0.6,
            attention_multiplier=0.2,
            attention_bias=True,
            tie_word_embeddings=True,
        ),
        "experts fused on disk; the four multipliers; tied",
        count_key="num_local_experts",
        block="block_sparse_moe",
        router="router",
    )
    yield Family(
        "minimax_m2",
        _maker(
            MiniMaxM2Config,
            head_dim=16,
            num_local_experts=8,
            num_experts_per_tok=3,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        ),
        "sigmoid router whose correction bias belongs to the block; half the head is rotated",
        count_key="num_local_experts",
    )
    yield Family(
        "ernie4_5_moe",
        _maker(
            Ernie4_5_MoeConfig,
            intermediate_size=72,
            moe_intermediate_size=24,
            num_hidden_layers=6,
            head_dim=16,
            moe_num_experts=8,
            moe_k=3,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
            moe_layer_end_index=4,
            moe_layer_interval=2,
            use_bias=True,
            tie_word_embeddings=True,
        ),
        "experts in layers 1 and 3 only (start, end and interval all bite); bias of shape [1, E]; tied",
        count_key="moe_num_experts",
    )
    yield Family(
        "phimoe",
        _maker(
            PhimoeConfig,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=11,
            attention_bias=True,
            lm_head_bias=True,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.5, 2.0, 3.0, 4.0],
                "short_mscale": 1.1,
                "long_mscale": 1.2,
                "original_max_position_embeddings": 64,
            },
        ),
        "sparse mixer router, layer norms with bias, biased head, long rope, one window for all layers",
        count_key="num_local_experts",
        router="router",
    )
    yield Family(
        "dots1",
        _maker(
            Dots1Config,
            intermediate_size=72,
            moe_intermediate_size=20,
            num_hidden_layers=4,
            head_dim=16,
            n_routed_experts=16,
            n_shared_experts=2,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=1.4,
            first_k_dense_replace=1,
            sliding_window=6,
            layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        ),
        "4 groups of 4, two live; windows by layer_types; dense prefix",
        count_key="n_routed_experts",
    )
    yield Family(
        "hunyuan_v1_moe",
        _maker(
            HunYuanMoEV1Config,
            head_dim=16,
            num_experts=8,
            moe_topk=[2, 3, 2],
            attention_bias=True,
            tie_word_embeddings=True,
        ),
        "a different top-k in every layer; router inside a linear layer; shared MLP as wide as an expert; tied",
        count_key="num_experts",
    )
    yield Family(
        "jamba",
        _maker(
            JambaConfig,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_experts=8,
            num_experts_per_tok=3,
            expert_layer_period=2,
            expert_layer_offset=1,
            attn_layer_period=3,
            attn_layer_offset=1,
            mamba_d_state=6,
            mamba_d_conv=3,
            mamba_expand=2,
            mamba_dt_rank=5,
        ),
        "attention in layers 1 and 4, experts in 1 and 3: one of each mixer; gates not renormalised",
        count_key="num_experts",
        block="feed_forward",
        router="router",
    )


FAMILIES: dict[str, Family] = {family.name: family for family in _list_families()}
# Those that between them have every mechanism: plain experts; a gated shared one, dense layers between, windows; layers without
# experts, attention biases; groups, correction biases, latent attention; fused and transposed experts with biases and sinks;
# stacks on disk with multipliers and a tied head; a hybrid. Tests over all families leave the others to `make test-all`.
CORE = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "jamba"})


# Building


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' log lines and progress bars (not Python warnings) for a while."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def instantiate(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the stock model of `config`: eager attention, eager experts, eval mode."""
    with _quiet(), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="eager"
        )
    return model.eval()


def build(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a lively random model of `family` in memory, in float32; `changes` override config fields."""
    model = instantiate(FAMILIES[family].config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in _own_tensors(model):
            tensor.copy_(_sample(name, tensor, generator, fan_dim=_fan_dim(family, name)))
    return model


def _own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what a checkpoint must hold: every parameter once, and the persistent buffers."""
    yield from model.named_parameters()
    persistent = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in persistent)


def _fan_dim(family: str, name: str) -> int:
    """Return the dimension a weight sums over: the last, but for the transposed experts of gpt_oss."""
    return -2 if family == "gpt_oss" and "experts." in name else -1


def _sample(name: str, tensor: Tensor, generator: torch.Generator, *, fan_dim: int) -> Tensor:
    """Draw values for one tensor, loud enough that tokens are routed differently."""
    noise = torch.randn(tensor.shape, generator=generator)
    if re.search(r"norm\.weight$", name) or name.endswith("mamba.D"):
        return 1 + 0.1 * noise
    if name.endswith("A_log"):
        return tensor + 0.1 * noise
    if name.endswith("sinks"):
        return noise
    if name.endswith("router.bias"):
        return 0.7 * noise
    if "moe_statics" in name:  # added to probabilities, not to sigmoids
        return 0.06 * noise
    if tensor.dim() == 1 or "bias" in name:
        return 0.25 * noise
    if name.endswith("embed_tokens.weight"):
        return 0.5 * noise
    loud = 2.0 if is_router(name) or name.startswith("lm_head") else 1.2
    return loud * tensor.shape[fan_dim] ** -0.5 * noise


def is_router(name: str) -> bool:
    """Tell whether `name`, on disk or in memory, is a router's weight."""
    return re.search(r"\.(gate|router|gate\.wg|router\.layer)\.weight$", name) is not None


# On disk


def with_prediction_layer(folder: Path, *, seed: int = 5) -> Path:
    """Give the checkpoint in `folder` (of one shard) a layer that predicts the token after the next, as DeepSeek and GLM
    publish theirs: numbered behind the last decoder layer, with norms and a projection of its own around a copy of it.
    Its experts are drawn anew, loud and quiet ones, so that which of them goes is not what goes in the trunk."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    last, hidden = config["num_hidden_layers"] - 1, config["hidden_size"]
    layer = {name.replace(f"layers.{last}.", "", 1).removeprefix("model."): tensor
             for name, tensor in tensors.items() if name.startswith(f"model.layers.{last}.")}  # fmt: skip
    around = {
        name: torch.ones(hidden) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
    }
    around["eh_proj.weight"] = torch.empty(hidden, 2 * hidden)
    _write_beside(folder, tensors, f"model.layers.{last + 1}.", _redrawn({**layer, **around}, seed))
    config = {key: value for key, value in config.items() if key != "num_mtp_layers"}
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}, indent=2))
    return folder


def with_mtp_module(folder: Path, *, seed: int = 5) -> Path:
    """Give the checkpoint in `folder` (of one shard) a prediction layer as Qwen3-Next publishes it: `mtp.layers.0.*` of full
    attention, and around it `mtp.fc` and norms; its config counts it in no key that its class knows."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    hidden = config["hidden_size"]
    last = max(int(name.split(".")[2]) for name in tensors if ".self_attn." in name)
    layer = {name.replace(f"model.layers.{last}.", "layers.0."): tensor
             for name, tensor in tensors.items() if name.startswith(f"model.layers.{last}.")}  # fmt: skip
    around = {name: torch.ones(hidden)
              for name in ("norm.weight", "pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight")}  # fmt: skip
    around["fc.weight"] = torch.empty(hidden, 2 * hidden)
    _write_beside(folder, tensors, "mtp.", _redrawn({**layer, **around}, seed))
    return folder


def _redrawn(tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same shapes and dtypes with other values; of experts every second one has values nearer to one another."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        values = _sample(name, tensor.float(), generator, fan_dim=-1)
        number = re.search(r"experts\.(\d+)\.", name)
        if number and int(number[1]) % 2:
            values = values.sign() * (values.abs() * values.abs().mean()).sqrt()
        drawn[name] = values.to(tensor.dtype if name in tensors else torch.bfloat16)
    return drawn


def _write_beside(folder: Path, tensors: dict[str, Tensor], prefix: str, more: Mapping[str, Tensor]) -> None:
    named = {prefix + name: tensor for name, tensor in more.items()}
    save_file({**tensors, **named}, folder / "model.safetensors", metadata={"format": "pt"})


def write_checkpoint(
    family: str,
    folder: Path,
    *,
    seed: int = 0,
    shards: int = 3,
    mixed_dtypes: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a random checkpoint of `family` into `folder` and return the folder.

    Most tensors have `dtype`.  With `mixed_dtypes` the norms, the routers, the correction biases and
    one expert's down projection are float32 with values no 16-bit format holds, and one attention
    output is float16.  With one shard the file is `model.safetensors`, without an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = build(family, seed=seed)
    with tempfile.TemporaryDirectory() as stock, _quiet():
        model.save_pretrained(stock)
        tensors = load_file(Path(stock) / "model.safetensors")
        for name in ("config.json", "generation_config.json"):
            if (Path(stock) / name).exists():
                shutil.copy(Path(stock) / name, folder / name)
    dtypes = _mixed_dtypes(list(tensors), dtype) if mixed_dtypes else {}
    tensors = {name: tensor.to(dtypes.get(name, dtype)) for name, tensor in tensors.items()}
    _write_shards(tensors, folder, shards)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def _mixed_dtypes(names: list[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of the tensors that differ from the common `dtype`."""
    single = [n for n in names if is_router(n) or re.search(r"norm|router\.bias|correction_bias", n)]
    single += sorted(n for n in names if re.search(r"experts\.1\.(w2|down_proj)", n))[:1]
    half = sorted(n for n in names if re.search(r"(o_proj|out_proj)\.weight$", n))[:1]
    brain = ["model.embed_tokens.weight"] if dtype == torch.float32 else []
    return {
        **dict.fromkeys(single, torch.float32),
        **dict.fromkeys(half, torch.float16),
        **dict.fromkeys(brain, torch.bfloat16),
    }


def _write_shards(tensors: Mapping[str, Tensor], folder: Path, shards: int) -> None:
    """Write `tensors` as `shards` safetensors files, with an index where there are several."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors, key=_reading_order)
    borders = [0, *(_awkward_border(names, len(names) * i // shards) for i in range(1, shards)), len(names)]
    parts = [names[start:stop] for start, stop in itertools.pairwise(borders)]
    stray = "model.layers.0.input_layernorm.weight"
    parts = [[name for name in part if name != stray] for part in parts]
    parts[-1].append(stray)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def layer_of(name: str) -> int | None:
    """Return the decoder layer a tensor name belongs to, or None."""
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _reading_order(name: str) -> tuple[bool, int, list[tuple[int, str]]]:
    """Sort key: embedding, layers by number, the rest; numbers within a name by value."""
    layer = layer_of(name)
    pieces = [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in name.split(".")]
    return "embed_tokens" not in name, 10**6 if layer is None else layer, pieces


def _awkward_border(names: list[str], wanted: int) -> int:
    """Return the place nearest `wanted` that cuts an expert, or failing that a layer, in two."""

    def score(place: int) -> tuple[bool, bool, int]:
        before, after = names[place - 1].rsplit(".", 2)[0], names[place].rsplit(".", 2)[0]
        same_layer = layer_of(before + ".") == layer_of(after + ".") is not None
        same_expert = before == after and re.search(r"experts\.\d+$", before) is not None
        return not same_layer, not same_expert, abs(place - wanted)

    reach = len(names) // 8
    return min(range(max(1, wanted - reach), min(len(names), wanted + reach)), key=score)


def expert_on_disk(family: str, folder: Path, layer: int, expert: int) -> dict[str, Tensor]:
    """Return one expert's `gate` [I, H], `up` [I, H] and `down` [H, I] as the files hold them."""
    prefix = f"model.layers.{layer}.{_disk_block(family)}."
    if family == "granitemoe":
        gate, up = read_tensor(folder, prefix + "input_linear.weight")[expert].chunk(2)
        return {"gate": gate, "up": up, "down": read_tensor(folder, prefix + "output_linear.weight")[expert]}
    if family == "gpt_oss":
        gate_up = read_tensor(folder, prefix + "experts.gate_up_proj")[expert].T
        down = read_tensor(folder, prefix + "experts.down_proj")[expert].T
        return {"gate": gate_up[0::2], "up": gate_up[1::2], "down": down}
    parts = ("w1", "w3", "w2") if "sparse" in prefix else ("gate_proj", "up_proj", "down_proj")
    names = [f"{prefix}experts.{expert}.{part}.weight" for part in parts]
    return {key: read_tensor(folder, name) for key, name in zip(("gate", "up", "down"), names, strict=True)}


def _disk_block(family: str) -> str:
    """Return the on-disk name of the MoE block inside a decoder layer."""
    if family in ("mixtral", "minimax_m2", "phimoe", "granitemoe"):
        return "block_sparse_moe"
    return FAMILIES[family].block


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return where each tensor of a checkpoint lies."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict.fromkeys(file.keys(), folder / "model.safetensors")


def read_tensor(folder: Path, name: str) -> Tensor:
    """Return one tensor of a checkpoint by its on-disk name."""
    with safe_open(tensor_files(folder)[name], "pt") as file:
        return file.get_tensor(name)


def reference(folder: Path, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """Load `folder` with stock transformers, eager and in eval mode; every key must find its place."""
    with _quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    warnings = {kind: keys for kind, keys in info.items() if keys}
    assert not warnings, f"{folder}: {warnings}"
    return model.eval()


# Looking


def random_ids(config: PreTrainedConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    """Return [batch, length] token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.vocab_size, (batch, length), generator=generator)


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits [batch, length, vocab] without gradients and without a cache."""
    with torch.inference_mode(), _quiet():
        return model(ids, use_cache=False).logits


def same_model(one: PreTrainedModel, other: PreTrainedModel, ids: Tensor) -> None:
    """Assert that two models hold the same weights to the bit and answer alike; not to the bit, since kernels add up in an order
    that depends on where weights lie in memory."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    torch.testing.assert_close(logits_of(one, ids), logits_of(other, ids), rtol=1e-5, atol=1e-5)


def family_of(model: PreTrainedModel) -> Family:
    """Return the family a model belongs to."""
    return FAMILIES[model.config.model_type]


def moe_blocks(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return layer index -> MoE block, leaving out the dense layers."""
    family = family_of(model)
    blocks = {index: getattr(layer, family.block) for index, layer in enumerate(model.model.layers)}
    return {index: block for index, block in blocks.items() if hasattr(block, "experts")}


def routers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return layer index -> router, leaving out the dense layers."""
    return {index: getattr(block, family_of(model).router) for index, block in moe_blocks(model).items()}


def experts_of(model: PreTrainedModel) -> dict[int, tuple[int, int]]:
    """Return layer index -> (number of experts, top_k), leaving out the dense layers."""
    tops = {index: router.top_k for index, router in routers(model).items()}
    return {index: (len(block.experts.down_proj), tops[index]) for index, block in moe_blocks(model).items()}


def groups_of(model: PreTrainedModel) -> dict[int, int]:
    """Return layer index -> number of expert groups the router chooses among (1: no groups)."""
    return {index: getattr(router, "num_group", None) or 1 for index, router in routers(model).items()}


# Expert Drop by hand


def random_kept(model: PreTrainedModel, count: int | None = None, *, seed: int = 0) -> dict[int, list[int]]:
    """Draw which experts to keep in every layer, the same number from each group; about 60 % by default."""
    rng = random.Random(seed)
    kept: dict[int, list[int]] = {}
    for layer, (num_experts, _) in experts_of(model).items():
        groups = groups_of(model)[layer]
        size = num_experts // groups
        share = -(-3 * size // 5) if count is None else count // groups
        members = [range(group * size, (group + 1) * size) for group in range(groups)]
        kept[layer] = [expert for group in members for expert in sorted(rng.sample(group, share))]
    return kept


def cut_by_hand(model: PreTrainedModel, kept: Mapping[int, list[int]]) -> PreTrainedModel:
    """Return a copy of `model` that has only the `kept` experts; layers not named stay whole.

    Where all layers end with the same number, the config is corrected too, so that the copy can be
    saved and loaded again.
    """
    for layer, ids in kept.items():
        _check_kept(model, layer, ids)
    model = copy.deepcopy(model)
    family = family_of(model)
    for layer, ids in kept.items():
        block = moe_blocks(model)[layer]
        _cut_experts(block.experts, ids)
        _cut_router(family.name, block, getattr(block, family.router), ids)
    counts = {num_experts for num_experts, _ in experts_of(model).values()}
    if len(counts) == 1:
        setattr(model.config, family.count_key, counts.pop())
    return model


def _check_kept(model: PreTrainedModel, layer: int, ids: list[int]) -> None:
    """Refuse a choice that the layer's router could not work with."""
    num_experts, top_k = experts_of(model)[layer]
    groups, router = groups_of(model)[layer], routers(model)[layer]
    if ids != sorted(set(ids)) or not set(ids) <= set(range(num_experts)):
        raise ValueError(f"layer {layer}: ids must be distinct, ascending and below {num_experts}: {ids}")
    per_group = Counter(expert // (num_experts // groups) for expert in ids)
    if len({per_group[group] for group in range(groups)}) != 1:
        raise ValueError(f"layer {layer}: every one of the {groups} groups must keep as many experts: {ids}")
    reachable = per_group[0] * (router.topk_group if groups > 1 else 1)
    if reachable < top_k:
        raise ValueError(f"layer {layer}: {reachable} reachable experts are fewer than top_k = {top_k}")
    if hasattr(router, "e_score_correction_bias") and per_group[0] < 2:
        raise ValueError(f"layer {layer}: a group is scored by its two best experts and must keep two")


def _cut_experts(experts: nn.Module, ids: list[int]) -> None:
    """Keep the experts `ids`: the stacked weights, and gpt_oss' biases, have the expert first."""
    for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
        if hasattr(experts, name):
            _keep(experts, name, ids)
    experts.num_experts = len(ids)


def _cut_router(family: str, block: nn.Module, router: nn.Module, ids: list[int]) -> None:
    """Keep the router's rows `ids`, and whatever else has one entry per expert, family by family."""
    match family:
        case "hunyuan_v1_moe":  # the rows are those of a linear layer within the router
            _keep(router.wg, "weight", ids)
            router.wg.out_features = len(ids)
        case "phimoe":  # the router is itself a linear layer
            _keep(router, "weight", ids)
            router.out_features = len(ids)
        case "gpt_oss":
            _keep(router, "weight", ids)
            _keep(router, "bias", ids)
        case "deepseek_v3" | "glm4_moe" | "dots1":
            _keep(router, "weight", ids)
            _keep(router, "e_score_correction_bias", ids)
        case "minimax_m2":  # the bias belongs to the block, which hands it to the router
            _keep(router, "weight", ids)
            _keep(block, "e_score_correction_bias", ids)
        case "ernie4_5_moe":  # the bias has shape [1, experts]
            _keep(router, "weight", ids)
            _keep(router.moe_statics, "e_score_correction_bias", ids, dim=1)
        case _:  # mixtral, qwen2_moe, qwen3_moe, deepseek_v2, olmoe, granitemoe, jamba
            _keep(router, "weight", ids)
    router.num_experts = len(ids)  # group-limited routers divide this by their number of groups
    if family in ("ernie4_5_moe", "phimoe", "jamba"):
        block.num_experts = len(ids)


def _keep(module: nn.Module, name: str, ids: list[int], *, dim: int = 0) -> None:
    """Replace a parameter or buffer by its slices `ids` along `dim`."""
    whole = getattr(module, name)
    part = whole.detach().index_select(dim, torch.tensor(ids)).clone()
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(part, requires_grad=whole.requires_grad)
    else:
        module._buffers[name] = part
