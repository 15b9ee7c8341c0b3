"""Layers that differ: what `per_layer_config` says is what the model computes, loads, generates with and saves.

The references are stock models that were changed by hand: weights set to zero, rows cut, vectors added by hooks.
Nothing of moespresso takes part in them.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3VLMoeConfig,
)
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import families
import test_more_families as more
from moespresso._hook import watch
from moespresso.core.errors import UserError
from moespresso.model import observing
from moespresso.model.experts import is_experts
from moespresso.runtime.guard import COUNT_KEYS
from moespresso.runtime.parts import NoNorm, Silent, SilentMixer
from moespresso.runtime.unequal import Change, changes, install

install()

Differences = dict[str, dict[str, Any]]
NO_HEADS = {"num_key_value_heads": 0}
# Layers that are no plain sum of branches: only their experts can go.
INDIVISIBLE = {"minimax", "hy_v4"}
# Stock models of these do not say the same with a cache as without.
FORGETFUL = {"minimax", "hy_v4", "glm_moe_dsa", "deepseek_v32"}
MIXTURES = [*families.FAMILIES, *more.MIXTURES]


def stock(family: str) -> PreTrainedModel:
    """A lively random stock model."""
    if family in families.FAMILIES:
        return families.build(family)
    lively = more._random_model(family, {**more.MIXTURES, **more.DENSE}[family])
    model = families.instantiate(lively.config)  # with the rotary tables that the lively one has lost
    model.load_state_dict(lively.state_dict())
    return model


def count_key(config: PreTrainedConfig) -> str:
    return next(key for key in COUNT_KEYS if hasattr(config, key) and key not in config.attribute_map)


def different(config: PreTrainedConfig, differences: Differences) -> PreTrainedConfig:
    """`config` with layers that differ."""
    return type(config).from_dict(config.to_dict() | {"per_layer_config": copy.deepcopy(differences)})


def built(reference: PreTrainedModel, differences: Differences) -> PreTrainedModel:
    """The model that `differences` make of the reference's config, with the reference's weights."""
    model = families.instantiate(different(reference.config, differences))
    state = {name: _rows(name, tensor, differences) for name, tensor in reference.state_dict().items()}
    wrong = model.load_state_dict(state, strict=False)
    assert all(re.search(r"\.(bias|novices)$", name) for name in wrong.missing_keys)
    return model.eval()


def _rows(name: str, tensor: Tensor, differences: Differences) -> Tensor:
    """A stack of experts without those that are gone."""
    layer, _, inner = name.partition("layers.")[2].partition(".")
    gone = re.findall(r"expert\.(\d+)", " ".join(differences.get(layer, {}).get("skip", ())))
    if not gone or ".experts." not in "." + inner:
        return tensor
    return tensor[[row for row in range(len(tensor)) if str(row) not in gone]]


def moe_layers(model: PreTrainedModel) -> list[int]:
    return [index for index, layer in enumerate(model.model.layers) if stacks(layer)]


def stacks(part: nn.Module) -> list[Any]:
    return [module for module in part.modules() if is_experts(module)]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def ids_for(model: PreTrainedModel) -> Tensor:
    return families.random_ids(model.config.get_text_config(), 2, 15)


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Saved and loaded again, every key in its place."""
    model.save_pretrained(folder)
    return families.reference(folder)


def said(folder: Path) -> Differences:
    return json.loads((folder / "config.json").read_text())["per_layer_config"]


def tokens(model: PreTrainedModel, ids: Tensor, **options: Any) -> list[list[int]]:
    """What greedy generation adds."""
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, **options)[:, ids.shape[1] :].tolist()


# By hand

ATTENTION = ("self_attn", "mamba", "linear_attn", "conv", "mixer")
FEED = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp", "mixer")


@torch.no_grad()
def silence(layer: nn.Module, bodies: Iterable[str]) -> None:
    """With all its weights at zero a branch adds nothing (a norm after it is RMS)."""
    for name, child in layer.named_children():
        if name in bodies:
            for parameter in child.parameters():
                parameter.zero_()


def add_before(layer: nn.Module, vector: Tensor) -> None:
    layer.register_forward_pre_hook(lambda _, args: (args[0] + vector, *args[1:]))


def add_after(layer: nn.Module, vector: Tensor) -> None:
    layer.register_forward_hook(
        lambda _, __, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector
    )


def lose(layer: nn.Module, gone: Mapping[int, Tensor | None]) -> None:
    """Experts answer with zeros, or with a vector."""
    (experts,) = stacks(layer)
    for expert in gone:
        for name in ("down_proj", "down_proj_bias"):
            if hasattr(experts, name):
                getattr(experts, name).data[expert] = 0

    def replace(_: nn.Module, args: tuple[Tensor, Tensor, Tensor], out: Tensor) -> Tensor:
        _, index, weights = args
        for expert, vector in gone.items():
            if vector is not None:
                out = out + (weights * (index == expert)).sum(1, keepdim=True) * vector
        return out

    experts.register_forward_hook(replace)


# Counts


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.few(4)
def test_the_same_smaller_count_in_every_layer_is_stock(family: str, tmp_path: Path) -> None:
    small, key = stock(family), count_key(stock(family).config)
    count = getattr(small.config, key)
    large = {key: count + (getattr(small.config, "n_group", None) or 1)}
    config = type(small.config).from_dict(small.config.to_dict() | large)
    config.per_layer_config = {index: {key: count} for index in moe_layers(small)}
    model = families.instantiate(config)
    model.load_state_dict(small.state_dict())
    ids = ids_for(model)
    families.same_model(model, small, ids)
    families.same_model(reloaded(model, tmp_path), small, ids)


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.few(4)
def test_a_count_of_its_own_in_one_layer(family: str, tmp_path: Path) -> None:
    whole = families.build(family)
    layer = list(families.moe_blocks(whole))[-1]
    kept = {layer: families.random_kept(whole)[layer]}
    differences = {str(layer): {families.FAMILIES[family].count_key: len(kept[layer])}}
    reference = families.cut_by_hand(whole, kept)
    reference.config = whole.config
    model = built(reference, differences)
    ids = ids_for(model)
    close(families.logits_of(model, ids), families.logits_of(reference, ids))
    families.same_model(reloaded(model, tmp_path), model, ids)
    assert said(tmp_path) == differences
    assert tokens(model, ids) == tokens(model, ids, use_cache=False)


def test_qwen3_moe_knows_its_count_by_two_names() -> None:
    config = different(
        families.FAMILIES["qwen3_moe"].config(), {"3": {"num_experts": 5, "num_local_experts": 5}}
    )
    model = families.instantiate(config)
    assert [(index, stacks(model.model.layers[index])[0].num_experts) for index in moe_layers(model)] == [
        (1, 8),
        (3, 5),
    ]


# Branches and experts


def everything(model: PreTrainedModel) -> Differences:
    """A layer of each kind: no attention, a bias for each branch, experts gone with and without a novice."""
    last, zero = model.config.num_hidden_layers - 1, {count_key(model.config): 0}
    if model.config.model_type == "nemotron_h":  # one branch a layer
        return {"0": {"skip": ["attention"], **NO_HEADS}, "1": {"skip": ["mlp"], **zero},
                "2": {"skip": ["attention+bias"], **NO_HEADS}, "3": {"skip": ["expert.1", "expert.4+novice"]},
                "4": {"skip": ["mlp+bias"], **zero}}  # fmt: skip
    thin, *_ = moe_layers(model)
    empty = 1 if thin == 0 else 0
    return {str(thin): {"skip": ["expert.1", "expert.4+novice", "expert.6+novice"]},
            str(empty): {"skip": ["attention", "mlp+bias"], **NO_HEADS, **zero},
            str(last): {"skip": ["attention+bias"], **NO_HEADS}}  # fmt: skip


def by_hand(reference: PreTrainedModel, model: PreTrainedModel, differences: Differences) -> None:
    """Change the reference as `differences` say, with random vectors that the model gets too."""
    for index, layer in enumerate(reference.model.layers):
        mine, words = model.model.layers[index], differences.get(str(index), {}).get("skip", ())
        vectors = [vector for name, vector in mine.named_parameters() if name.endswith("novices")]
        novices = iter(vectors[0].data.normal_()) if vectors else iter(())
        if any(word.startswith("expert") for word in words):
            lose(
                layer, {int(word.split(".")[1][0]): next(novices) if "+" in word else None for word in words}
            )
        for word in words:
            if word.startswith(("attention", "mlp")):
                silence(layer, ATTENTION if word.startswith("attention") else FEED)
            if word.endswith("+bias"):
                (bias,) = [
                    child.bias
                    for child in mine.children()
                    if isinstance(child, Silent) and child.bias is not None
                ]
                (add_before if word.startswith("attention") else add_after)(layer, bias.data.normal_())


@pytest.mark.parametrize("family", [family for family in MIXTURES if family not in INDIVISIBLE])
@pytest.mark.few(4)
def test_branches_and_experts_that_are_gone(family: str, tmp_path: Path) -> None:
    reference = stock(family)
    differences = everything(reference)
    model = built(reference, differences)
    by_hand(reference, model, differences)
    ids = ids_for(model)
    close(families.logits_of(model, ids), families.logits_of(reference, ids))
    again = reloaded(model, tmp_path)
    families.same_model(again, model, ids)
    assert said(tmp_path) == {
        layer: {**what, "skip": sorted(what["skip"])} for layer, what in differences.items()
    }
    if family not in FORGETFUL:
        assert tokens(again, ids) == tokens(model, ids, use_cache=False)


@pytest.mark.parametrize("family", more.DENSE)
@pytest.mark.few(3)
def test_dense_layers_without_a_branch(family: str, tmp_path: Path) -> None:
    reference = stock(family)
    differences = {"0": {"skip": ["attention"], **NO_HEADS}, "1": {"skip": ["mlp"], "intermediate_size": 0},
                   "2": {"skip": ["attention+bias", "mlp+bias"], **NO_HEADS, "intermediate_size": 0}}  # fmt: skip
    model = built(reference, differences)
    for index, what in differences.items():
        silence(reference.model.layers[int(index)], ATTENTION if "attention" in what["skip"] else FEED)
    silence(reference.model.layers[2], ATTENTION)
    parts = model.model.layers[2]
    add_before(reference.model.layers[2], parts.self_attn.bias.data.normal_() + parts.mlp.bias.data.normal_())
    ids = ids_for(model)
    close(families.logits_of(model, ids), families.logits_of(reference, ids))
    families.same_model(reloaded(model, tmp_path), model, ids)
    assert tokens(model, ids) == tokens(model, ids, use_cache=False)


@pytest.mark.parametrize("family", sorted(INDIVISIBLE))
def test_experts_can_go_where_branches_cannot(family: str) -> None:
    reference = stock(family)
    differences = {str(moe_layers(reference)[-1]): {"skip": ["expert.0+novice", "expert.5"]}}
    model = built(reference, differences)
    by_hand(reference, model, differences)
    close(families.logits_of(model, ids_for(model)), families.logits_of(reference, ids_for(model)))
    with pytest.raises(UserError, match=r"layer 0 cannot be changed as per_layer_config says: it"):
        built(reference, {"0": {"skip": ["attention"]}})


# Experts


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe", "nemotron_h", "deepseek_v3"])
@pytest.mark.parametrize("function", ["grouped_mm", "batched_mm", "moespresso"])
def test_every_function_of_experts_leaves_out_the_same(family: str, function: str) -> None:
    whole = stock(family)
    layer = moe_layers(whole)[-1]
    model = built(whole, {str(layer): {"skip": ["expert.0+novice", "expert.3", "expert.7"]}})
    stacks(model.model.layers[layer])[0].novices.data.normal_()
    ids = ids_for(model)
    eager = families.logits_of(model, ids)
    model.set_experts_implementation(function)
    close(families.logits_of(model, ids), eager)


def test_an_observer_sees_the_experts_that_are_there() -> None:
    whole = stock("mixtral")
    model = built(whole, {"1": {"skip": ["expert.2", "expert.5+novice"]}})
    model.set_experts_implementation("moespresso")
    (experts,) = stacks(model.model.layers[1])
    calls: list[tuple[Tensor, ...]] = []
    answers: list[Tensor] = []
    experts.register_forward_hook(lambda _, __, out: answers.append(out))
    with observing(experts, after=lambda *call: calls.append(call)):
        families.logits_of(model, ids_for(model))
    ((_, index, weights, outputs),) = calls
    gone = index == 6
    assert gone.any()
    assert int(index.max()) == 6
    assert not weights[gone].any()
    assert not outputs[gone].any()
    close(answers[0], (weights.unsqueeze(-1) * outputs).sum(1))  # the novice is still a vector of zeros


def test_a_rebuilt_mixture_follows_the_models_function() -> None:
    model = families.instantiate(different(stock("mixtral").config, {"1": {"num_local_experts": 5}}))
    model.set_experts_implementation("batched_mm")
    assert {part.config._experts_implementation for part in stacks(model)} == {"batched_mm"}


# Caches


@pytest.mark.parametrize(
    "family", ["mixtral", "gpt_oss", "qwen2_moe", "jamba", "lfm2_moe", "deepseek_v2", "gemma2"]
)
@pytest.mark.parametrize("layers", ["first", "last", "all"])
@pytest.mark.few(5)
def test_generation_counts_tokens_past_lost_attention(family: str, layers: str) -> None:
    whole = stock(family)
    every = [str(index) for index in range(whole.config.num_hidden_layers)]
    lost = {"first": every[:1], "last": every[-1:], "all": every}[layers]
    model = built(whole, {layer: {"skip": ["attention"], **NO_HEADS} for layer in lost})
    ids = ids_for(model)
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    assert tokens(model, ids) == tokens(model, ids, use_cache=False)
    assert tokens(model, ids, attention_mask=padding) == tokens(
        model, ids, attention_mask=padding, use_cache=False
    )


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_other_caches_count_too(family: str) -> None:
    model = built(stock(family), {"0": {"skip": ["attention"], **NO_HEADS}})
    ids = ids_for(model)
    assert tokens(model, ids, cache_implementation="static") == tokens(model, ids)
    assert tokens(model, ids, num_beams=3) == tokens(model, ids, num_beams=3, use_cache=False)
    bare = DynamicCache()
    with torch.inference_mode():
        parts = [
            model(part, past_key_values=bare, use_cache=True).logits for part in ids.split([9, 1, 5], dim=1)
        ]
    assert bare.get_seq_length() == 15
    close(torch.cat(parts, dim=1), families.logits_of(model, ids))


# On disk and in memory


def test_names_on_disk_are_the_familys(tmp_path: Path) -> None:
    differences = {"0": {"skip": ["mlp+bias"], "num_local_experts": 0}, "1": {"skip": ["expert.2", "expert.7+novice"]},
                   "2": {"num_local_experts": 4, "skip": ["attention+bias"], **NO_HEADS}}  # fmt: skip
    families.instantiate(different(families.FAMILIES["mixtral"].config(), differences)).save_pretrained(
        tmp_path
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    layer = [{name.removeprefix(f"model.layers.{index}."): shape for name, shape in shapes.items()
              if name.startswith(f"model.layers.{index}.")} for index in range(3)]  # fmt: skip
    assert {name: shape for name, shape in layer[0].items() if "self_attn" not in name} == {
        "block_sparse_moe.bias": [48],
        "input_layernorm.weight": [48],
    }
    assert layer[1]["block_sparse_moe.gate.weight"] == [8, 48]
    assert layer[1]["block_sparse_moe.experts.novices"] == [1, 48]
    assert [f"block_sparse_moe.experts.{expert}.w1.weight" in layer[1] for expert in range(7)] == [
        True
    ] * 6 + [False]
    assert layer[2]["block_sparse_moe.gate.weight"] == [4, 48]
    assert layer[2]["self_attn.bias"] == [48]
    assert "input_layernorm.weight" not in layer[2]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_new_has_the_dtype_and_device_of_the_rest(device: str) -> None:
    config = different(families.FAMILIES["gpt_oss"].config(), {
        "0": {"skip": ["mlp+bias", "attention+bias"]}, "1": {"num_local_experts": 5}, "2": {"skip": ["expert.1+novice"]}})  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert {(tensor.dtype, tensor.device.type) for tensor in model.parameters()} == {(torch.bfloat16, device)}


def test_composite_models_keep_it_in_their_language_model(tmp_path: Path) -> None:
    differences = {"0": {"skip": ["expert.2+novice", "expert.7"]}, "1": {"num_local_experts": 5},
                   "2": {"skip": ["attention+bias"], **NO_HEADS}}  # fmt: skip
    text = families.COMMON | {"num_attention_heads": 4, "num_experts": 8, "moe_intermediate_size": 28, "head_dim": 16,
                              "num_experts_per_tok": 2, "per_layer_config": differences,
                              "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
              "out_hidden_size": 48, "num_position_embeddings": 16, "deepstack_visual_indexes": []}  # fmt: skip
    model = AutoModelForImageTextToText.from_config(
        Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    ).eval()
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert isinstance(again.model.language_model.layers[2].self_attn, SilentMixer)
    ids = ids_for(model)
    families.same_model(again.eval(), model, ids)


# Left alone, or refused


def test_ordinary_models_and_a_second_install_change_nothing() -> None:
    before = PreTrainedModel.__init__, PreTrainedModel.post_init
    install()
    watch()
    assert (PreTrainedModel.__init__, PreTrainedModel.post_init) == before
    model = stock("mixtral")
    assert not any(isinstance(part, Silent | NoNorm) for part in model.modules())
    assert "_moespresso" not in model.model.__dict__
    assert not model.config.is_heterogeneous


def test_families_that_look_after_it_themselves_are_left_alone() -> None:
    fields, _ = more.OPAQUE["gemma4_text"]
    settings = families.COMMON | fields | {"global_head_dim": 32, "num_attention_heads": 4}
    config = CONFIG_MAPPING["gemma4_text"](**settings)
    config.per_layer_config = {0: {"head_dim": 8, "num_experts": 4}}
    assert changes(config) == {0: Change(4, {}, {})}
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError, match="num_experts"):
        families.instantiate(config).model.config.num_experts  # noqa: B018
    assert config.per_layer_attributes == {"head_dim", "num_experts"}


def test_what_is_not_ours_stays_an_error_of_transformers() -> None:
    config = different(stock("mixtral").config, {"0": {"num_key_value_heads": 1}, "1": {"skip": ["mlp"]}})
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError, match="num_key_value_heads"):
        families.instantiate(config)


@pytest.mark.parametrize(
    ("family", "own", "reason"),
    [
        ("mixtral", {"skip": ["mlp", "mlp.bias"]}, r"does not know in layer 1: \['mlp', 'mlp.bias'\]"),
        ("mixtral", {"skip": ["expert.8"]}, r"layer 1 .*experts \[8\] cannot go where there are 8"),
        ("mixtral", {"skip": [f"expert.{n}" for n in range(8)]}, "cannot go where there are 8"),
        ("llama", {"skip": ["expert.0"]}, "it has no mixture of experts"),
        ("nemotron_h", {"skip": ["attention"]}, "NemotronHModel: layer 1 .*it has no attention"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_one_sentence(
    family: str, own: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        families.instantiate(different(stock(family).config, {"1": own}))
    assert "\n" not in str(refused.value)


def test_parallel_branches_and_unknown_models_are_refused() -> None:
    small = {
        "vocab_size": 96,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 0,
    }
    config = CONFIG_MAPPING["phi"](**small, per_layer_config={"1": {"skip": ["attention"]}})
    with pytest.raises(UserError, match=r"PhiModel: layer 1 .* self_attn and mlp stand side by side"):
        families.instantiate(config)
    config = CONFIG_MAPPING["bert"](**small, is_decoder=True, per_layer_config={"1": {"skip": ["mlp"]}})
    with pytest.raises(UserError, match="BertModel has no list of decoder layers"):
        families.instantiate(config)
