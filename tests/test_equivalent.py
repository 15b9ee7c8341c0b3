"""Equivalent architectures: the same function under another family's name, as stock transformers computes both.

Every equivalent is entered by tiny random checkpoints of odd shapes; what stock code computes before and after the move is
compared bit by bit. The one family that transformers does not have is checked against its paper's equations, written
out below in plain torch. Then what a move is for: a layer without its mixture, said in the new config's own words.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import families
from conftest import tiny_tokenizer
from moespresso import api
from moespresso.build import Tensors, View
from moespresso.build.write import shards_of, write_shard
from moespresso.checkpoint import Checkpoint, open_checkpoint
from moespresso.core.blueprint import Entry, TensorRef
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan
from moespresso.core.unit import Unit
from moespresso.effect import Piece
from moespresso.model import read_blueprint
from moespresso.model.equivalent import (
    EQUIVALENTS,
    Converted,
    adopt,
    converted,
    equivalent_for,
    equivalents_of,
    obstacle,
    tokenizer_config,
)
from test_engine import close, quarter_dropped, streamed_logits

CONFIGS = Path(__file__).parents[1] / "benchmarks" / "configs"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
DOTS = {"n_group": 1, "topk_group": 1, "sliding_window": None, "layer_types": None}

# Family and what differs from the zoo's config (key heads shared, head_dim not hidden / heads, router biases, ...).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, tied, linear rope": ("mixtral", {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}),
    "mixtral, head_dim left out, top-1, eps": ("mixtral", {"head_dim": None, "num_experts_per_tok": 1,
                                                           "rms_norm_eps": 1e-2}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3, no query compression, biased, yarn": ("deepseek_v3", {
        "q_lora_rank": None, "attention_bias": True, "norm_topk_prob": True, "rope_interleave": False,
        "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}}),
    "dots1": ("dots1", DOTS),
    "dots1, biased, yarn, all sparse": ("dots1", DOTS | {"attention_bias": True, "rope_parameters": YARN,
                                                         "first_k_dense_replace": 0, "n_shared_experts": 1}),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", list(CASES))


def stored(folder: Path, case: str) -> Checkpoint:
    """A case's checkpoint on disk, in float32."""
    family, changes = CASES[case]
    families.build(family, **changes).save_pretrained(folder)
    return open_checkpoint(folder)


def moved(checkpoint: Checkpoint) -> Converted:
    equivalent = equivalent_for(checkpoint.config)
    assert equivalent is not None
    return converted(checkpoint, equivalent)


def view_of(checkpoint: Checkpoint) -> View:
    blueprint = read_blueprint(checkpoint)
    return View(checkpoint, blueprint, Plan(blueprint.digest))


def written(checkpoint: Checkpoint, folder: Path) -> Path:
    """A folder made of what a checkpoint refers to, by the product's own writer."""
    return write_view(view_of(checkpoint), folder)


def write_view(view: View, folder: Path) -> Path:
    folder.mkdir()
    with Tensors(view.checkpoint.folder) as reader:
        (shard,) = shards_of(view.pieces, 1 << 40)
        write_shard(folder, shard, reader)
    (folder / "config.json").write_text(json.dumps(view.config))
    return folder


def stock_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    model = families.reference(folder, dtype)
    return families.logits_of(model, families.random_ids(model.config, 3, 21))


# The same function


@every_case
@pytest.mark.few(3)
def test_stock_logits_are_equal_to_the_last_bit(tmp_path: Path, case: str) -> None:
    checkpoint = stored(tmp_path / "old", case)
    new = written(moved(checkpoint), tmp_path / "new")
    assert json.loads((new / "config.json").read_text())["model_type"] != checkpoint.config["model_type"]
    assert torch.equal(stock_logits(tmp_path / "new"), stock_logits(tmp_path / "old"))


@pytest.mark.parametrize("case", ["deepseek_v3", "dots1"])
def test_these_codes_round_alike_in_half_precision_too(tmp_path: Path, case: str) -> None:
    new = written(moved(stored(tmp_path / "old", case)), tmp_path / "new")
    dtype = torch.bfloat16
    assert torch.equal(stock_logits(new, dtype), stock_logits(tmp_path / "old", dtype))


def test_mixtral_rounds_elsewhere_in_half_precision_but_no_worse(tmp_path: Path) -> None:
    new = written(moved(stored(tmp_path / "old", "mixtral")), tmp_path / "new")
    truth = stock_logits(new)
    before, after = (
        stock_logits(folder, torch.bfloat16).float() - truth for folder in (tmp_path / "old", new)
    )
    assert 0.8 < float(after.abs().mean() / before.abs().mean()) < 1.25


@every_case
@pytest.mark.few(3)
def test_the_streamed_forward_of_a_rehoused_checkpoint_is_the_sources(tmp_path: Path, case: str) -> None:
    checkpoint = stored(tmp_path / "old", case)
    ids = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(1))
    wanted = families.logits_of(families.reference(checkpoint.folder), ids)
    close(streamed_logits(view_of(moved(checkpoint)), ids), wanted)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_mixed_dtypes_over_three_shards_move_as_they_are(tmp_path: Path, family: str) -> None:
    checkpoint = open_checkpoint(families.write_checkpoint(family, tmp_path / "old"))
    move = moved(checkpoint)
    assert torch.equal(stock_logits(written(move, tmp_path / "new")), stock_logits(tmp_path / "old"))
    stored_refs = {(ref.file, ref.offset): ref for ref in move.tensors.values() if ref.file}
    assert [(ref.file, ref.offset) for ref in checkpoint.tensors.values()] == list(stored_refs)
    assert all(
        stored_refs[ref.file, ref.offset] == replace(ref, name=stored_refs[ref.file, ref.offset].name)
        for ref in checkpoint.tensors.values()
    )


def test_zeros_have_the_dtype_of_what_they_stand_beside(tmp_path: Path) -> None:
    move = moved(open_checkpoint(families.write_checkpoint("mixtral", tmp_path)))
    zeros = {name: ref.dtype for name, ref in move.tensors.items() if not ref.file}
    layer = "model.layers.2."
    assert zeros[layer + "self_attn.q_proj.bias"] == "BF16"
    assert zeros[layer + "mlp.shared_expert_gate.weight"] == move.tensors[layer + "mlp.gate.weight"].dtype
    assert len(zeros) == 7 * 3


def test_names_as_they_are_in_memory_move_too(tmp_path: Path) -> None:
    model = families.build("mixtral")
    model.config.save_pretrained(tmp_path)
    model.config.architectures = ["MixtralForCausalLM"]
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    new = written(moved(open_checkpoint(tmp_path)), tmp_path / "new")
    assert torch.equal(stock_logits(new), stock_logits(tmp_path))


def test_tensors_that_the_source_did_not_know_stay_unknown(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, "deepseek_v3")
    stray = replace(checkpoint.tensors["model.norm.weight"], name="model.layers.4.shared_head.norm.weight")
    checkpoint.tensors[stray.name] = stray
    blueprint = read_blueprint(moved(checkpoint))
    assert [entry.ref.name for entry in blueprint.outside] == [stray.name]


def test_what_the_source_lacks_is_still_missed(tmp_path: Path) -> None:
    checkpoint = stored(tmp_path, "mixtral")
    del checkpoint.tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    with pytest.raises(UserError, match="lacks the down projection of expert 3 in L1"):
        read_blueprint(moved(checkpoint))


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "dots1"])
def test_a_plan_made_for_the_source_does_the_same_in_the_new_house(tmp_path: Path, case: str) -> None:
    before = view_of(stored(tmp_path / "old", case))
    plan = quarter_dropped(before)
    after = replace(view_of(moved(before.checkpoint)), plan=plan)
    cut = [
        write_view(view, tmp_path / name) for view, name in ((replace(before, plan=plan), "a"), (after, "b"))
    ]
    assert torch.equal(stock_logits(cut[0]), stock_logits(cut[1]))


# What the move is for


@pytest.mark.parametrize("case", ["mixtral", "deepseek_v3", "dots1"])
def test_the_new_config_can_say_that_a_layer_has_no_mixture(tmp_path: Path, case: str) -> None:
    checkpoint, layer = stored(tmp_path / "old", case), 2
    new = without_mixture(moved(checkpoint), layer)
    model = families.reference(checkpoint.folder)
    model.model.layers[layer].mlp = Silent()
    ids = families.random_ids(model.config, 2, 13)
    loaded = families.reference(written(new, tmp_path / "new"))
    torch.testing.assert_close(
        families.logits_of(loaded, ids), families.logits_of(model, ids), rtol=1e-5, atol=1e-5
    )


class Silent(nn.Module):
    """A feed-forward part that adds nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


def without_mixture(checkpoint: Converted, layer: int) -> Converted:
    """The same with a dense MLP of zeros where a layer's mixture was."""
    config, prefix = dict(checkpoint.config), f"model.layers.{layer}.mlp."
    if "mlp_only_layers" in config:
        config["mlp_only_layers"] = [layer]
    else:
        types = config["mlp_layer_types"]
        config["mlp_layer_types"] = [*types[:layer], "dense", *types[layer + 1 :]]
    wide, hidden = config["intermediate_size"], config["hidden_size"]
    shapes = {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}
    zeros = {f"{prefix}{name}_proj.weight": shape for name, shape in shapes.items()}
    kept = {name: ref for name, ref in checkpoint.tensors.items() if not name.startswith(prefix)}
    kept |= {name: TensorRef(name, shape, "F32", "") for name, shape in zeros.items()}
    return replace(checkpoint, config=config, tensors=kept)


# Who it is


@every_case
def test_plans_and_stats_stay_the_sources(tmp_path: Path, case: str) -> None:
    checkpoint = stored(tmp_path, case)
    move = moved(checkpoint)
    assert move.digest == checkpoint.digest == read_blueprint(move).digest
    assert (move.folder, move.files, move.source) == (checkpoint.folder, checkpoint.files, checkpoint)
    before, after = read_blueprint(checkpoint).layers, read_blueprint(move).layers
    assert [(la.experts, la.top_k, la.width) for la in before if la.experts] == [
        (la.experts, la.top_k, la.width) for la in after if la.experts
    ]


@every_case
def test_the_old_words_are_gone_from_the_config(tmp_path: Path, case: str) -> None:
    checkpoint = stored(tmp_path, case)
    (equivalent,) = equivalents_of(checkpoint.config["model_type"])
    assert equivalent.gone.isdisjoint(moved(checkpoint).config)


@every_case
def test_there_is_nowhere_to_go_from_the_new_house(tmp_path: Path, case: str) -> None:
    move = moved(stored(tmp_path, case))
    assert equivalents_of(move.config["model_type"]) == ()
    assert equivalent_for(move.config) is None
    assert adopt(move) is move


def test_the_table_is_of_houses_that_transformers_can_build() -> None:
    assert {equivalent.target for equivalent in EQUIVALENTS} <= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    # A family that transformers has moves once; one that it does not have may be adopted by one that moves.
    moves = [equivalent for equivalent in EQUIVALENTS if equivalent.source in CONFIG_MAPPING]
    adopted = {equivalent.source for equivalent in EQUIVALENTS} - set(CONFIG_MAPPING)
    targets = {equivalent.target for equivalent in EQUIVALENTS}
    assert {equivalent.source for equivalent in moves}.isdisjoint(equivalent.target for equivalent in moves)
    assert adopted.isdisjoint(targets)
    factors = [rename.factor for equivalent in EQUIVALENTS for rename in equivalent.renames]
    assert all(math.frexp(factor)[0] == 0.5 for factor in factors), "a factor is no power of two"


# What stands against it


OBSTACLES: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {"sliding_window": 7}, "its attention has a sliding window"),
    ("deepseek_v3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "its rope has a partial_rotary_factor, which DeepSeek-V3 ignores"),
    ("dots1", {"n_shared_experts": None}, "it has no shared expert"),
    ("dots1", {"n_group": 4}, "its router chooses among groups"),
    ("dots1", {"norm_topk_prob": False}, "its gate weights are not renormalised"),
    ("dots1", {"sliding_window": 6, "max_window_layers": 2}, "its attention has a sliding window"),
    ("deepseek", {"n_routed_experts": None}, "it has no routed experts"),
    ("deepseek", {"scoring_func": "sigmoid"}, "its router does not score by softmax"),
    ("deepseek", {"attention_bias": True}, "its attention has an output bias"),
    ("deepseek", {"hidden_act": "gelu"}, "its experts' activation is not silu"),
    ("deepseek", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "its rope_scaling is not linear"),
    ("deepseek", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "its rope_scaling is not linear"),
]  # fmt: skip


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    if family == "deepseek":
        return TINY | changes
    config = families.FAMILIES[family].config(**(DOTS if family == "dots1" else {}))
    said = json.loads(config.to_json_string())
    return {key: value for key, value in said.items() if key != "layer_types"} | changes


@pytest.mark.parametrize(("family", "changes", "reason"), OBSTACLES)
def test_an_obstacle_is_said_in_one_clause(family: str, changes: dict[str, Any], reason: str) -> None:
    config = config_of(family, **changes)
    (equivalent,) = equivalents_of(family)
    assert obstacle(equivalent, config) == reason
    assert equivalent_for(config) is None
    assert obstacle(equivalent, config_of(family)) is None
    with pytest.raises(
        UserError, match=f"this {family} model cannot be presented as {equivalent.target} .{reason}"
    ):
        converted(Checkpoint(Path("somewhere"), config, {}), equivalent)


def test_a_family_without_a_house_has_none() -> None:
    assert equivalents_of("olmoe") == ()
    assert equivalent_for({"model_type": "olmoe"}) is None


# DeepSeek-MoE, by the equations of its paper (arXiv 2401.06066) and of rotary attention (arXiv 2104.09864)


TINY: dict[str, Any] = {
    "model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "vocab_size": 96, "hidden_size": 48,
    "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"}, "intermediate_size": 56,
    "moe_intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
    "n_shared_experts": 2, "n_routed_experts": 9, "num_experts_per_tok": 3, "moe_layer_freq": 1,
    "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax", "aux_loss_alpha": 0.001,
    "seq_aux": True, "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 500.0,
    "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32", "pretraining_tp": 1,
}  # fmt: skip
Weights = Mapping[str, Tensor]


def deepseek_logits(config: Mapping[str, Any], weights: Weights, ids: Tensor) -> Tensor:
    """Logits [N, T, V] of token ids [N, T], in float64."""
    weights = {name: weight.double() for name, weight in weights.items()}
    hidden = weights["model.embed_tokens.weight"][ids]
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}."
        hidden = hidden + attention(
            config, weights, layer, norm(config, weights[layer + "input_layernorm.weight"], hidden)
        )
        inner = norm(config, weights[layer + "post_attention_layernorm.weight"], hidden)
        sparse = index >= config["first_k_dense_replace"] and index % config["moe_layer_freq"] == 0
        hidden = hidden + (
            mixture(config, weights, layer, inner) if sparse else ffn(weights, layer + "mlp.", inner)
        )
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(config, weights["model.norm.weight"], hidden) @ head.T


def norm(config: Mapping[str, Any], weight: Tensor, x: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()


def ffn(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    gate, up, down = (weights[f"{prefix}{name}_proj.weight"].T for name in ("gate", "up", "down"))
    return (silu(x @ gate) * (x @ up)) @ down


def mixture(config: Mapping[str, Any], weights: Weights, layer: str, x: Tensor) -> Tensor:
    """Shared experts always, and the routed ones that have the largest shares of a softmax over all, so weighted."""
    shares = (x @ weights[layer + "mlp.gate.weight"].T).softmax(-1)
    least = shares.sort(-1, descending=True).values[..., config["num_experts_per_tok"] - 1, None]
    gates = torch.where(shares >= least, shares, 0)
    if config["norm_topk_prob"] and config["num_experts_per_tok"] > 1:
        gates = gates / gates.sum(-1, keepdim=True)
    answers = [ffn(weights, f"{layer}mlp.experts.{e}.", x) for e in range(config["n_routed_experts"])]
    routed = (gates.unsqueeze(-2) @ torch.stack(answers, -2)).squeeze(-2)
    return routed + ffn(weights, layer + "mlp.shared_experts.", x) if config["n_shared_experts"] else routed


def attention(config: Mapping[str, Any], weights: Weights, layer: str, x: Tensor) -> Tensor:
    heads, shared = (
        config["num_attention_heads"],
        config["num_attention_heads"] // config["num_key_value_heads"],
    )
    query, key, value = (
        (x @ weights[f"{layer}self_attn.{name}_proj.weight"].T).unflatten(-1, (count, -1)).transpose(1, 2)
        for name, count in (("q", heads), ("k", heads // shared), ("v", heads // shared))
    )
    query, key = rotated(config, query), rotated(config, key).repeat_interleave(shared, 1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ value.repeat_interleave(shared, 1)
    return mixed.transpose(1, 2).flatten(2) @ weights[layer + "self_attn.o_proj.weight"].T


def rotated(config: Mapping[str, Any], x: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of every head [N, heads, T, d] by their angle at their position."""
    half, stretch = x.shape[-1] // 2, (config["rope_scaling"] or {"factor": 1.0})["factor"]
    speeds = config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[-2])[:, None] / stretch * speeds
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def write_deepseek(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A random checkpoint under the old code's names."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {name: lively(shape, generator).to(dtype) for name, shape in deepseek_shapes(config).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def lively(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    return 1 + 0.1 * noise if len(shape) == 1 else 1.5 * shape[-1] ** -0.5 * noise


def deepseek_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    keys = (config["num_key_value_heads"] or config["num_attention_heads"]) * head
    outer = {"embed_tokens": (config["vocab_size"], hidden), "norm": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {f"model.{name}.weight": shape for name, shape in outer.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        inner: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
        }  # fmt: skip
        if index < config["first_k_dense_replace"] or index % config["moe_layer_freq"]:
            inner |= ffn_shapes("mlp", hidden, config["intermediate_size"])
        else:
            width = config["moe_intermediate_size"]
            inner["mlp.gate"] = (config["n_routed_experts"], hidden)
            for expert in range(config["n_routed_experts"]):
                inner |= ffn_shapes(f"mlp.experts.{expert}", hidden, width)
            if config["n_shared_experts"]:
                inner |= ffn_shapes("mlp.shared_experts", hidden, width * config["n_shared_experts"])
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in inner.items()}
    return shapes


def ffn_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {f"{prefix}.{name}_proj": shape for name, shape in shapes.items()}


DEEPSEEKS: dict[str, dict[str, Any]] = {
    "as the real one": {},
    "renormalised": {"norm_topk_prob": True},
    "one expert, never renormalised": {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "experts in every other layer": {"moe_layer_freq": 2, "first_k_dense_replace": 0},
    "no shared experts": {"n_shared_experts": None},
    "no dense layer, tied": {"first_k_dense_replace": 0, "tie_word_embeddings": True},
    "stretched rotary tables": {"rope_scaling": {"type": "linear", "factor": 4.0}},
}


@pytest.mark.parametrize("which", list(DEEPSEEKS))
@pytest.mark.few(3)
def test_deepseek_moe_is_adopted_and_computes_its_papers_equations(tmp_path: Path, which: str) -> None:
    config = TINY | DEEPSEEKS[which]
    adopted = adopt(write_deepseek(tmp_path / "old", config))
    model = families.reference(written(adopted, tmp_path / "new"))
    assert model.config.model_type == "qwen2_moe"
    ids = families.random_ids(model.config, 3, 17)
    wanted = deepseek_logits(config, load_file(tmp_path / "old" / "model.safetensors"), ids)
    close(families.logits_of(model, ids), wanted)
    close(streamed_logits(view_of(adopted), ids), wanted)


def test_the_equations_notice_when_a_gate_is_renormalised(tmp_path: Path) -> None:
    weights = load_file(write_deepseek(tmp_path / "old", TINY).folder / "model.safetensors")
    ids = torch.arange(12).view(1, 12)
    plain, other = (deepseek_logits(TINY | {"norm_topk_prob": on}, weights, ids) for on in (False, True))
    assert float((plain - other).abs().max()) > 0.05 * float(plain.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_joined_shared_expert_is_doubled_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    adopted = adopt(write_deepseek(tmp_path / "old", TINY, dtype))
    new = load_file(written(adopted, tmp_path / "new") / "model.safetensors")
    old = load_file(tmp_path / "old" / "model.safetensors")
    for name in ("gate_proj", "up_proj", "down_proj"):
        before = old[f"model.layers.2.mlp.shared_experts.{name}.weight"]
        after = new[f"model.layers.2.mlp.shared_expert.{name}.weight"]
        assert after.dtype == dtype
        assert torch.equal(after.double(), before.double() * (2 if name == "down_proj" else 1))
    assert not new["model.layers.2.mlp.shared_expert_gate.weight"].any()
    assert "model.layers.0.mlp.shared_expert_gate.weight" not in new


def test_zeros_never_stand_where_the_source_has_values(tmp_path: Path) -> None:
    checkpoint = write_deepseek(tmp_path / "old", TINY)
    backwards = replace(checkpoint, tensors=dict(reversed(checkpoint.tensors.items())))
    zeros = {name for name, ref in adopt(backwards).tensors.items() if not ref.file}
    assert zeros == {f"model.layers.{index}.mlp.shared_expert_gate.weight" for index in (1, 2, 3)}


def test_adoption_is_for_those_who_have_no_home(tmp_path: Path) -> None:
    adopted = adopt(write_deepseek(tmp_path / "deepseek", TINY))
    assert isinstance(adopted, Converted)
    assert adopted.digest == adopted.source.digest
    assert "auto_map" not in adopted.config
    assert adopt(adopted) is adopted
    for config in ({"model_type": "mixtral"}, {"model_type": "phixtral"}, {}):
        checkpoint = Checkpoint(tmp_path, config, {})
        assert adopt(checkpoint) is checkpoint
    with pytest.raises(UserError, match=r"cannot be presented as qwen2_moe \(its router does not score"):
        adopt(Checkpoint(tmp_path, TINY | {"scoring_func": "sigmoid"}, {}))


def test_what_a_deepseek_config_leaves_out_is_the_old_codes_default() -> None:
    config = {key: TINY[key] for key in ("model_type", "n_routed_experts", "num_experts_per_tok")}
    adopted = adopt(Checkpoint(Path("somewhere"), config, {}))
    assert (adopted.config["num_hidden_layers"], adopted.config["mlp_only_layers"]) == (30, [])
    assert adopted.config["num_key_value_heads"] == adopted.config["num_attention_heads"] == 32


# The real shapes


def described(name: str, shapes: Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]]) -> Checkpoint:
    """A published config, cut to three layers, with the tensors it asks for (which are nowhere)."""
    config = json.loads((CONFIGS / f"{name}.json").read_text()) | {"num_hidden_layers": 3}
    refs = {key: TensorRef(key, shape, "BF16", "x") for key, shape in shapes(config).items()}
    return Checkpoint(Path("somewhere"), config, refs)


def mixtral_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """As DeepSeek's without a dense layer, but for the names and the narrow key heads."""
    words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    alike = {"first_k_dense_replace": 0, "moe_layer_freq": 1, "n_shared_experts": None,
             "n_routed_experts": config["num_local_experts"], "moe_intermediate_size": config["intermediate_size"]}  # fmt: skip
    shapes = {}
    for name, shape in deepseek_shapes({**config, **alike}).items():
        key = name.replace(".mlp.", ".block_sparse_moe.")
        for old, new in words.items():
            key = key.replace(old, new) if ".experts." in key else key
        shapes[key] = shape
    return shapes


def test_deepseek_moe_16b_moves_at_its_real_size() -> None:
    blueprint = read_blueprint(adopt(described("deepseek-moe-16b", deepseek_shapes)))
    dense, *sparse = blueprint.layers
    assert (blueprint.family, dense.experts, dense.width) == ("qwen2_moe", 0, 10944)
    assert {(la.experts, la.top_k, la.width, la.shared_experts) for la in sparse} == {(64, 6, 1408, 1)}
    assert blueprint.outside == ()


def test_mixtral_8x7b_moves_at_its_real_size() -> None:
    checkpoint = described("mixtral-8x7b", mixtral_shapes)
    before, after = read_blueprint(checkpoint), read_blueprint(moved(checkpoint))
    assert {(la.experts, la.top_k, la.width) for la in after.layers} == {(8, 2, 14336)}
    grown = after.cost().bytes / before.cost().bytes
    assert 1 < grown < 1.0001  # zeros of next to no size


def test_the_published_counts_of_parameters() -> None:
    counts = {"deepseek-moe-16b": deepseek_shapes, "mixtral-8x7b": mixtral_shapes}
    sums = {}
    for name, shapes in counts.items():
        config = json.loads((CONFIGS / f"{name}.json").read_text())
        sums[name] = sum(math.prod(shape) for shape in shapes(config).values())
    assert sums == {"deepseek-moe-16b": 16_375_728_128, "mixtral-8x7b": 46_702_792_704}


# Tokenizer


def test_the_tokenizer_reads_on_as_it_did(tmp_path: Path) -> None:
    letters = ["<unk>", "<s>", "</s>", "▁", *"abcdehlorw", "▁▁", "he", "▁he"]
    merges = [("▁", "▁"), ("h", "e"), ("▁", "he")]
    bare = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=merges, unk_token="<unk>")
    )
    bare.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    says = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    found = []
    for family, words in (("mixtral", says), ("qwen2_moe", tokenizer_config(says))):
        folder = tmp_path / family
        folder.mkdir()
        bare.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(words))
        (folder / "config.json").write_text(json.dumps({"model_type": family}))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found.append([tokenizer(text)["input_ids"] for text in ("he", "  hello", "he</s> he", " ")])
    assert found[0] == found[1]


# What the reader makes of such references


def saved(folder: Path, **tensors: Tensor) -> dict[str, TensorRef]:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return open_checkpoint(folder).tensors


def piece_of(ref: TensorRef, **what: Any) -> Piece:
    return Piece(ref.name, what.pop("shape", ref.shape), Entry(ref, Unit(None)), **what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [2.0, 0.5, -4.0])
def test_a_factor_is_multiplied_in_wherever_a_tensor_is_read(
    tmp_path: Path, dtype: torch.dtype, factor: float
) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    ref = replace(saved(tmp_path, x=x)["x"], factor=factor)
    with Tensors(tmp_path) as reader:
        assert torch.equal(reader.reader.tensor(ref), x * factor)
        assert reader.reader.tensor(ref).dtype == dtype
        assert torch.equal(reader.whole(piece_of(ref)), x * factor)
        assert torch.equal(torch.cat([*reader.chunks(piece_of(ref))]), (x * factor).flatten())
        rows = piece_of(ref, shape=(2, 6), axis=0, take=(1, 3), scale=0.25)
        assert torch.equal(reader.whole(rows), x[[1, 3]] * factor * 0.25)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "I64", "U8"])
def test_a_tensor_that_lies_nowhere_is_zeros(tmp_path: Path, dtype: str) -> None:
    ref = TensorRef("z", (3, 4), dtype, "")
    with Tensors(tmp_path) as reader:  # an empty folder: nothing may be opened
        assert reader.reader.tensor(ref).shape == (3, 4)
        assert not reader.reader.tensor(ref).any()
        assert not reader.whole(piece_of(ref)).any()
        assert reader.whole(piece_of(ref, shape=(3, 1), axis=1, take=(2,))).shape == (3, 1)
        assert [*reader.ahead([piece_of(ref)])] == [piece_of(ref)]
        reader.reader.drop_pages("")


def test_an_ordinary_tensor_is_not_copied(tmp_path: Path) -> None:
    ref = saved(tmp_path, x=torch.arange(8.0))["x"]
    with Tensors(tmp_path) as reader:
        assert reader.reader.tensor(ref).data_ptr() == reader.reader.tensor(ref).data_ptr()
        assert (
            reader.reader.tensor(replace(ref, factor=2.0)).data_ptr() != reader.reader.tensor(ref).data_ptr()
        )


def test_zeros_and_factors_are_written_among_the_rest(tmp_path: Path) -> None:
    refs = saved(tmp_path, a=torch.arange(3.0), b=torch.ones(2, 2))
    pieces = [
        piece_of(refs["a"]),
        piece_of(TensorRef("z", (4,), "F32", "")),
        piece_of(replace(refs["b"], factor=2.0)),
    ]
    out = tmp_path / "out"
    out.mkdir()
    with Tensors(tmp_path) as reader:
        write_shard(out, shards_of(pieces, 1 << 20)[0], reader)
    found = load_file(out / "model.safetensors")
    assert {name: tensor.flatten().tolist() for name, tensor in found.items()} == {
        "a": [0, 1, 2], "z": [0] * 4, "b": [2] * 4,
    }  # fmt: skip


# Kimi-K2, whose code is DeepSeek-V3's


OLD_ROPE = {"rope_theta": 5e4, "rope_scaling": {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0,
    "mscale_all_dim": 1.0}}  # fmt: skip


def kimi(folder: Path) -> tuple[Path, Path]:
    """The same random weights under the name of each family, the config as such models are published with."""
    families.build("deepseek_v3").save_pretrained(folder / "deepseek_v3")
    said = json.loads((folder / "deepseek_v3" / "config.json").read_text()) | OLD_ROPE
    del said["rope_parameters"]
    said |= {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "ep_size": 1,
        "seq_aux": True,
    }
    (folder / "deepseek_v3" / "config.json").write_text(json.dumps(said))
    shutil.copytree(folder / "deepseek_v3", folder / "kimi_k2")
    code = {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}
    (folder / "kimi_k2" / "config.json").write_text(
        json.dumps(said | {"model_type": "kimi_k2", "auto_map": code})
    )
    return folder / "kimi_k2", folder / "deepseek_v3"


def test_kimi_k2_is_adopted_and_computes_what_its_code_does(tmp_path: Path) -> None:
    source, twin = kimi(tmp_path)
    adopted = adopt(open_checkpoint(source))
    assert isinstance(adopted, Converted)
    assert (adopted.config["model_type"], "auto_map" in adopted.config) == ("deepseek_v3", False)
    assert adopted.tensors == open_checkpoint(twin).tensors
    reference = families.reference(twin)
    ids = families.random_ids(reference.config, 3, 17)
    close(streamed_logits(view_of(adopted), ids), families.logits_of(reference, ids))
    for step in ("expert_drop:ratio=0.25,score=aimer", "rtn:group_size=0"):
        for folder in (source, twin):
            api.press(folder, out=tmp_path / f"{folder.name} {step}", steps=[step])
        found = api.verify(tmp_path / f"kimi_k2 {step}", against=source)
        assert found["ok"], found
        pressed, wanted = (
            tmp_path / f"{folder.name} {step}" / "model.safetensors" for folder in (source, twin)
        )
        assert pressed.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize(("changes", "reason"), [
    ({"scoring_func": "softmax"}, "its router does not score by sigmoid"),
    ({"topk_method": "greedy"}, "its router selects in another way"),
    ({"moe_layer_freq": 2}, "not every layer behind the dense ones has experts"),
    ({"n_group": None}, "its n_group is not a whole number of at least 1"),
])  # fmt: skip
def test_what_kimi_k2_may_not_say_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    config = json.loads((kimi(tmp_path)[0] / "config.json").read_text())
    with pytest.raises(UserError, match=f"cannot be presented as deepseek_v3 .{reason}"):
        adopt(Checkpoint(tmp_path, config | changes, {}))
    for key in ("rope_theta", "routed_scaling_factor"):
        less = {name: value for name, value in config.items() if name != key}
        with pytest.raises(UserError, match=f"its config does not say {key}"):
            adopt(Checkpoint(tmp_path, less, {}))


def test_kimi_k2_reads_text_and_moves_on_where_layers_lose_their_mixture(tmp_path: Path, text: Path) -> None:
    """Its family is unknown to the tokenizer's loader too, and DeepSeek-V3 has an equivalent of its own."""
    source, _ = kimi(tmp_path)
    tiny_tokenizer().save_pretrained(source)
    api.press(source, out=tmp_path / "out", texts=[text], steps=["layer_drop"], samples=4, length=16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "glm4_moe_lite"
    assert api.verify(tmp_path / "out", against=source)["ok"]
