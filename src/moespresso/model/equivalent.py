"""Equivalent architectures: a checkpoint of one family, presented as one of another whose stock code computes
the same function.

Some configs cannot say what a plan wants ("this layer has no mixture"), and one old family is not in
transformers at all. Where another family's code computes the same, a `Equivalent` says how to move: the
config's words, the tensors' names, zeros for parts that only the other family has, and factors that are
powers of two, so that every stored value stays exact. It is done on the `Checkpoint`, and nothing above it
knows: blueprint, plan, shards and verify see the other family.

Logits are equal to the last bit in float32. In half precision the two codes may round at other places:
Mixtral keeps its gate weights in float32, Qwen2-MoE rounds them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moespresso.checkpoint import Checkpoint
from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.model.classes import class_name
from moespresso.model.meta_model import read_config
from moespresso.model.unstack import Unstacked

Config = Mapping[str, Any]

# Width of a shared expert that is all zeros: engines have kernels for eight, and none for nothing.
_NO_WIDTH = 8


@dataclass(frozen=True, slots=True)
class Rename:
    """A tensor whose name matches `pattern` is called `to`, and its values are multiplied by `factor`."""

    pattern: str
    to: str
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Filler:
    """Zeros `name`, of the `shape` that the new config makes, beside every tensor `beside` and in its dtype.

    Both names end a tensor's name in the new family. A source whose config has a value for `unless` brings
    its own.
    """

    name: str
    beside: str
    shape: Callable[[Config], tuple[int, ...]]
    unless: str = ""


@dataclass(frozen=True)
class Equivalent:
    """How checkpoints of `source` become checkpoints of `target`.

    `config` makes the entries of the new config that differ from the source's, `gone` are keys that the
    target does not have. `unless` are the reasons why a config cannot move, one clause and one test each.
    `defaults` stand in for the config class of a family that transformers does not have.
    """

    source: str
    target: str
    config: Callable[[Config], dict[str, Any]]
    gone: frozenset[str]
    renames: tuple[Rename, ...] = ()
    fillers: tuple[Filler, ...] = ()
    unless: tuple[tuple[str, Callable[[Config], bool]], ...] = ()
    defaults: Config = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Converted(Checkpoint):
    """A checkpoint under another family's config and names; plans and stats stay those of `source`."""

    source: Checkpoint = field(kw_only=True, repr=False)

    @cached_property
    def digest(self) -> str:
        """The source's: the content is the same."""
        return self.source.digest


def equivalents_of(family: str) -> tuple[Equivalent, ...]:
    """All equivalents that a family's checkpoints may move to, the best one first."""
    return tuple(equivalent for equivalent in EQUIVALENTS if equivalent.source == family)


def equivalent_for(config: Config) -> Equivalent | None:
    """The first equivalent that nothing in a config.json stands against."""
    return next(
        (
            equivalent
            for equivalent in equivalents_of(config["model_type"])
            if obstacle(equivalent, config) is None
        ),
        None,
    )


def obstacle(equivalent: Equivalent, config: Config) -> str | None:
    """Why a config.json of the equivalent's source family cannot move, in one clause; None when it can."""
    complete = _complete_config(equivalent, config)
    return next((reason for reason, holds in equivalent.unless if holds(complete)), None)


def converted(checkpoint: Checkpoint, equivalent: Equivalent) -> Converted:
    """The checkpoint as one of `equivalent.target`; raises `UserError` when something stands against it."""
    reason = obstacle(equivalent, checkpoint.config)
    if reason is not None:
        raise UserError(
            f"{checkpoint.folder}: this {equivalent.source} model cannot be presented as {equivalent.target} ({reason})"
        )
    complete = _complete_config(equivalent, checkpoint.config)
    config = _new_config(equivalent, complete)
    fillers = [filler for filler in equivalent.fillers if not (filler.unless and complete[filler.unless])]
    renamed = (_apply_renames(ref, equivalent.renames) for ref in checkpoint.tensors.values())
    tensors = {ref.name: ref for old in renamed for ref in (old, *_fillers_beside(old, fillers, config))}
    return Converted(checkpoint.folder, config, tensors, checkpoint.files, source=checkpoint)


def is_converted(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint stands under another family's name than its files."""
    return isinstance(checkpoint, Converted)


def is_apart(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has experts apart that its files have in stacks."""
    return isinstance(checkpoint.source if isinstance(checkpoint, Converted) else checkpoint, Unstacked)


def adopt(checkpoint: Checkpoint) -> Checkpoint:
    """Re-equivalent a checkpoint whose family transformers does not have but computes under another name.

    Everything else is returned as it is. Raises `UserError` for what the other family's config cannot say.
    """
    family = str(checkpoint.config.get("model_type"))
    if family in CONFIG_MAPPING or not equivalents_of(family):
        return checkpoint
    return converted(checkpoint, equivalents_of(family)[0])


def tokenizer_config(config: Config) -> dict[str, Any]:
    """A tokenizer_config.json for the other family: tokenizer.json, which must be there, is read as it is.

    Left alone, `AutoTokenizer` goes by the family: it reads Mixtral's file as it is, but under Qwen2-MoE's
    name believes the class that Mixtral's tokenizer_config.json names, which cuts leading spaces differently.
    """
    return {**config, "tokenizer_class": "PreTrainedTokenizerFast"}


def _new_config(equivalent: Equivalent, config: Config) -> dict[str, Any]:
    remaining = {key: value for key, value in config.items() if key not in equivalent.gone}
    architecture = class_name(equivalent.target)
    return (
        remaining
        | equivalent.config(config)
        | {"model_type": equivalent.target, "architectures": [architecture]}
    )


def _complete_config(equivalent: Equivalent, config: Config) -> dict[str, Any]:
    """A config.json with everything that it leaves to the defaults of its family."""
    if equivalent.source in CONFIG_MAPPING:
        complete = json.loads(read_config(config, "this checkpoint").to_json_string())
    else:
        complete = {**equivalent.defaults, **config}
    complete.pop("auto_map", None)  # custom code has no part in the other family
    return complete


def _apply_renames(ref: TensorRef, renames: tuple[Rename, ...]) -> TensorRef:
    for rename in renames:
        name, count = re.subn(rename.pattern, rename.to, ref.name)
        if count:
            ref = replace(ref, name=name, factor=ref.factor * rename.factor)
    return ref


def _fillers_beside(ref: TensorRef, fillers: list[Filler], config: Config) -> Iterator[TensorRef]:
    """The zeros that stand beside a tensor."""
    for filler in fillers:
        if ref.name.endswith("." + filler.beside):
            name = ref.name.removesuffix(filler.beside) + filler.name
            yield TensorRef(name, filler.shape(config), ref.dtype, "")


def _head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _mixtral_to_qwen2(config: Config) -> dict[str, Any]:
    return {
        "num_experts": config["num_local_experts"],
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
        "shared_expert_intermediate_size": _NO_WIDTH,
        "head_dim": _head_dim(config),
        "qkv_bias": True,
        # Where dense layers are, and how wide; as yet there are none.
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "intermediate_size": _NO_WIDTH,
    }


def _deepseek_to_qwen2(config: Config) -> dict[str, Any]:
    top_k, layers = config["num_experts_per_tok"], range(config["num_hidden_layers"])
    first, step = config["first_k_dense_replace"], config["moe_layer_freq"]
    shared = (config["n_shared_experts"] or 0) * config["moe_intermediate_size"]
    return {
        "num_experts": config["n_routed_experts"],
        # The old code does not renormalise a single gate weight.
        "norm_topk_prob": config["norm_topk_prob"] and top_k > 1,
        "shared_expert_intermediate_size": shared or _NO_WIDTH,
        "num_key_value_heads": config["num_key_value_heads"] or config["num_attention_heads"],
        "head_dim": _head_dim(config),
        "qkv_bias": False,
        "router_aux_loss_coef": config["aux_loss_alpha"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index in layers if index < first or index % step],
    }


def _deepseek3_to_glm4_lite(config: Config) -> dict[str, Any]:
    return {"mlp_layer_types": _dense_prefix(config)}


def _dots1_to_hy3(config: Config) -> dict[str, Any]:
    return {
        "num_experts": config["n_routed_experts"],
        "num_shared_experts": config["n_shared_experts"],
        "router_scaling_factor": config["routed_scaling_factor"],
        "mlp_layer_types": _dense_prefix(config),
        "enable_moe_fp32_combine": False,
        "head_dim": _head_dim(config),
    }


def _dense_prefix(config: Config) -> list[str]:
    dense = config["first_k_dense_replace"]
    return ["dense" if index < dense else "sparse" for index in range(config["num_hidden_layers"])]


# What Qwen2-MoE has and others may lack. The router's weight is stored in every layer with experts, and only there.
_GATE = "mlp.gate.weight"
_SHARED_GATE = Filler("mlp.shared_expert_gate.weight", _GATE, lambda c: (1, c["hidden_size"]))


def _zero_bias(projection: str, heads: str) -> Filler:
    beside = f"self_attn.{projection}.weight"
    return Filler(f"self_attn.{projection}.bias", beside, lambda c: (c[heads] * c["head_dim"],))


def _no_shared_expert(unless: str = "") -> tuple[Filler, ...]:
    """A shared expert that is all zeros."""

    def inward(config: Config) -> tuple[int, ...]:
        return config["shared_expert_intermediate_size"], config["hidden_size"]

    def outward(config: Config) -> tuple[int, ...]:
        return config["hidden_size"], config["shared_expert_intermediate_size"]

    shapes = {"gate_proj": inward, "up_proj": inward, "down_proj": outward}
    return tuple(
        Filler(f"mlp.shared_expert.{name}.weight", _GATE, shape, unless) for name, shape in shapes.items()
    )


def _scaled_otherwise(config: Config) -> bool:
    """Whether an old config stretches its rotary tables in a way other than the linear one.

    The old code names the way `type`; what newer transformers saved of such a config names it `rope_type`.
    """
    scaling = config["rope_scaling"]
    if scaling is None:
        return False
    if not isinstance(scaling, Mapping):
        return True
    named = cast("Config", scaling)
    ways = [named[name] for name in ("type", "rope_type") if name in named]
    return ways not in (["linear"], ["linear", "linear"])


def _no_factor(config: Config) -> bool:
    """Whether an old config stretches its rotary tables by nothing that could be reckoned with."""
    factor = (config["rope_scaling"] or {"factor": 1.0}).get("factor")
    return isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf


def _no_count(key: str, least: int, *, optional: bool = False) -> tuple[str, Callable[[Config], bool]]:
    """An obstacle: a number that the move reckons with is none, which the old code could not run either."""

    def holds(config: Config) -> bool:
        value = config.get(key)
        if value is None:
            return not optional
        return isinstance(value, bool) or not isinstance(value, int) or value < least

    return f"its {key} is not a whole number of at least {least}", holds


# The old remote code's own defaults, for what a config.json leaves out.
_DEEPSEEK_DEFAULTS: dict[str, Any] = {
    "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008, "moe_intermediate_size": 1407,
    "num_hidden_layers": 30, "num_attention_heads": 32, "num_key_value_heads": None, "n_shared_experts": None,
    "n_routed_experts": None, "num_experts_per_tok": None, "moe_layer_freq": 1, "first_k_dense_replace": 0,
    "norm_topk_prob": False, "scoring_func": "softmax", "aux_loss_alpha": 0.001, "hidden_act": "silu",
    "max_position_embeddings": 2048, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True,
    "pad_token_id": None, "bos_token_id": 100000, "eos_token_id": 100001, "tie_word_embeddings": False,
    "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0,
}  # fmt: skip

_DEEPSEEK_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "num_experts_per_tok", "n_routed_experts", "moe_layer_freq")  # fmt: skip

# What DeepSeek-V3's code reckons with and a config of Kimi-K2 must say itself, whose class has defaults of its own.
_KIMI_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
                "num_attention_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group",
                "topk_group", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")  # fmt: skip
_KIMI_SAID = ("q_lora_rank", "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps", "tie_word_embeddings")

# Keys that say what the new family's config says in other words, or cannot say.
_DEEPSEEK_ONLY = frozenset({
    "n_routed_experts", "n_shared_experts", "moe_layer_freq", "first_k_dense_replace", "scoring_func", "seq_aux",
    "aux_loss_alpha", "attention_bias", "pretraining_tp", "ep_size",
})  # fmt: skip
_DOTS1_ONLY = frozenset({
    "n_routed_experts", "n_shared_experts", "routed_scaling_factor", "first_k_dense_replace", "n_group", "topk_group",
    "norm_topk_prob", "sliding_window", "max_window_layers", "layer_types",
})  # fmt: skip

EQUIVALENTS: tuple[Equivalent, ...] = (
    Equivalent(
        "mixtral",
        "qwen2_moe",
        _mixtral_to_qwen2,
        frozenset({"num_local_experts", "router_jitter_noise", "sliding_window"}),
        renames=(
            Rename(r"\.block_sparse_moe\.experts\.(\d+)\.w1\.", r".mlp.experts.\1.gate_proj."),
            Rename(r"\.block_sparse_moe\.experts\.(\d+)\.w3\.", r".mlp.experts.\1.up_proj."),
            Rename(r"\.block_sparse_moe\.experts\.(\d+)\.w2\.", r".mlp.experts.\1.down_proj."),
            Rename(r"\.block_sparse_moe\.gate\.", ".mlp.gate."),
        ),
        fillers=(
            _zero_bias("q_proj", "num_attention_heads"),
            _zero_bias("k_proj", "num_key_value_heads"),
            _zero_bias("v_proj", "num_key_value_heads"),
            *_no_shared_expert(),
            _SHARED_GATE,
        ),
        # Qwen2-MoE's config can name a window, but its code hands none to flash attention.
        unless=(("its attention has a sliding window", lambda c: c["sliding_window"] is not None),),
    ),
    Equivalent(
        "deepseek",
        "qwen2_moe",
        _deepseek_to_qwen2,
        _DEEPSEEK_ONLY,
        renames=(
            # Behind a gate of zeros: a sigmoid of one half.
            Rename(r"\.mlp\.shared_experts\.down_proj\.", ".mlp.shared_expert.down_proj.", 2.0),
            Rename(r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),
        ),
        fillers=(*_no_shared_expert(unless="n_shared_experts"), _SHARED_GATE),
        unless=(
            ("it has no routed experts", lambda c: not c["n_routed_experts"]),
            ("its router does not score by softmax", lambda c: c["scoring_func"] != "softmax"),
            ("its attention has an output bias", lambda c: c["attention_bias"]),
            ("its experts' activation is not silu", lambda c: c["hidden_act"] != "silu"),
            ("its rope_scaling is not linear", _scaled_otherwise),
            ("the factor of its rope_scaling is not a positive number", _no_factor),
            *(_no_count(key, 1) for key in _DEEPSEEK_COUNTS),
            _no_count("first_k_dense_replace", 0),
            _no_count("n_shared_experts", 0, optional=True),
            _no_count("num_key_value_heads", 1, optional=True),
            _no_count("head_dim", 1, optional=True),
        ),
        defaults=_DEEPSEEK_DEFAULTS,
    ),
    Equivalent(
        "kimi_k2",
        "deepseek_v3",
        lambda _: {},
        frozenset(),
        unless=(
            ("its router does not score by sigmoid", lambda c: c.get("scoring_func", "sigmoid") != "sigmoid"),
            ("its router selects in another way", lambda c: c.get("topk_method", "noaux_tc") != "noaux_tc"),
            ("not every layer behind the dense ones has experts", lambda c: c.get("moe_layer_freq", 1) != 1),
            *(_no_count(key, 1) for key in _KIMI_COUNTS),
            _no_count("first_k_dense_replace", 0),
            *((f"its config does not say {key}", lambda c, key=key: key not in c) for key in _KIMI_SAID),
            (
                "its config does not say rope_theta",
                lambda c: not c.keys() & {"rope_theta", "rope_parameters"},
            ),
        ),
    ),
    Equivalent(
        "deepseek_v3",
        "glm4_moe_lite",
        _deepseek3_to_glm4_lite,
        frozenset({"first_k_dense_replace", "moe_layer_freq", "head_dim", "qk_head_dim"}),
        unless=(
            (
                "its rope has a partial_rotary_factor, which DeepSeek-V3 ignores",
                lambda c: "partial_rotary_factor" in c["rope_parameters"],
            ),
        ),
    ),
    Equivalent(
        "dots1",
        "hy_v3",
        _dots1_to_hy3,
        _DOTS1_ONLY,
        renames=(
            Rename(r"\.mlp\.gate\.weight$", ".mlp.router.gate.weight"),
            Rename(r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.expert_bias"),
            Rename(r"\.mlp\.shared_experts\.", ".mlp.shared_mlp."),
        ),
        unless=(
            ("it has no shared expert", lambda c: not c["n_shared_experts"]),
            ("its router chooses among groups", lambda c: c["n_group"] != 1),
            ("its gate weights are not renormalised", lambda c: not c["norm_topk_prob"]),
            ("its attention has a sliding window", lambda c: set(c["layer_types"]) != {"full_attention"}),
        ),
    ),
)
