"""Configs of fewer layers, and of mixtures turned dense: by hand, on meta against stock models, and really loaded.

The reference knows nothing of the product: stock models are built from both configs and their layers compared here,
and checkpoints whose tensors were dropped and renumbered by hand must give the logits of the stock model whose layers
were taken out in memory.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import families
from moespresso.core.errors import UserError
from moespresso.model.depth import STUB_WIDTH, with_dense, with_layers
from test_more_families import DENSE, LATENT, MIXTURES, ROUTED

Config = dict[str, Any]
quickly = settings(max_examples=30, deadline=None, derandomize=True, database=None)

# Families whose layers are not all alike, with enough of them to be cut in many ways.
MIXED: dict[str, Config] = {
    "qwen2_moe": {},
    "qwen3_moe": {},
    "deepseek_v3": {},
    "ernie4_5_moe": {},
    "gpt_oss": {},
    "dots1": {},
    "jamba": {},
    "nemotron_h": MIXTURES["nemotron_h"],
    "hy_v4": MIXTURES["hy_v4"] | {"num_hidden_layers": 6},
    "exaone_moe": MIXTURES["exaone_moe"] | {"num_hidden_layers": 5, "sliding_window_pattern": 2},
    "glm4_moe_lite": LATENT | ROUTED | {"num_hidden_layers": 5,
                                        "mlp_layer_types": ["dense", "sparse", "dense", "sparse", "sparse"]},
    "afmoe": MIXTURES["afmoe"] | {"num_hidden_layers": 5, "num_dense_layers": 2, "global_attn_every_n_layers": 3},
    "gemma2": DENSE["gemma2"] | {"num_hidden_layers": 5},
}  # fmt: skip
PLAIN = DENSE | {"qwen3": {}}
EVERY = [*families.FAMILIES, *MIXTURES, *PLAIN]


def text_config(family: str, **fields: Any) -> Any:
    """A config object of any family in the tests, with `fields` on top of the zoo's common ones."""
    if family in families.FAMILIES:
        return families.FAMILIES[family].config(**fields)
    given = {**(MIXTURES | PLAIN).get(family, {}), **fields}
    common = {**families.COMMON, "num_attention_heads": 4, "num_experts_per_tok": 2}
    return CONFIG_MAPPING[family](**{k: v for k, v in (common | given).items() if v is not None})


def raw_config(family: str, *, without: Iterable[str] = (), **fields: Any) -> Config:
    """What config.json says of `text_config`; `without` some fields, as older files are."""
    raw = json.loads(text_config(family, **fields).to_json_string())
    return {key: value for key, value in raw.items() if key not in without}


@cache
def mixed(family: str) -> Config:
    return raw_config(family, **MIXED[family])


# The reference: stock models on meta, compared layer by layer


def stock_layers(raw: Mapping[str, Any]) -> list[nn.Module]:
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(
        {key: value for key, value in raw.items() if key != "time_step_limit"}
    )
    with torch.device("meta"):
        return list(AutoModelForCausalLM.from_config(config).model.layers)


def looks(layer: nn.Module, *, beside: str = "\0") -> Config:
    """What is to be seen of a layer, but for its number and the submodule `beside`."""
    seen: Config = {}
    for name, module in layer.named_modules():
        if name == beside or name.startswith(f"{beside}."):
            continue
        seen[name] = (
            type(module).__name__,
            {key: tuple(p.shape) for key, p in module.named_parameters()} if name else {},
        )
        plain = {
            key: value for key, value in vars(module).items() if isinstance(value, int | float | str | tuple)
        }
        if name or beside == "\0":
            seen[name + "."] = {k: v for k, v in plain.items() if k not in ("layer_idx", "num_hidden_layers")}
    return seen


def same_layers(raw: Mapping[str, Any], edited: Mapping[str, Any], kept: Sequence[int]) -> bool:
    old, new = stock_layers(raw), stock_layers(edited)
    assert len(new) == len(kept)
    return all(looks(old[number]) == looks(layer) for number, layer in zip(kept, new, strict=True))


def rest(count: int, gone: Iterable[int]) -> list[int]:
    return [layer for layer in range(count) if layer not in set(gone)]


def changed(raw: Mapping[str, Any], edited: Mapping[str, Any]) -> Config:
    """The fields that differ, but for the number of layers."""
    return {
        key: value for key, value in edited.items() if raw.get(key) != value and key != "num_hidden_layers"
    }


# Every family

REFUSED = {
    "jamba": {(2,)},  # experts in 0, 1 and 3 of what stays: no period
    "ernie4_5_moe": {(0,), (0, 5)},  # an odd number of layers before experts that stand in every second one
}


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.few(8)
def test_first_middle_last_or_both_ends_can_go(family: str):
    raw = raw_config(family)
    before = copy.deepcopy(raw)
    count = len(stock_layers(raw))
    for gone in [(0,), (count // 2,), (count - 1,), (0, count - 1)]:
        kept = rest(count, gone)
        if gone in REFUSED.get(family, ()):
            with pytest.raises(UserError, match="cannot say which layers hold experts without L"):
                with_layers(raw, kept, "m")
            continue
        edited = with_layers(raw, kept, "m")
        assert edited["num_hidden_layers"] == len(kept)
        assert same_layers(raw, edited, kept), gone
    assert raw == before


@pytest.mark.parametrize("family", EVERY)
def test_all_layers_kept_is_the_config_itself(family: str):
    raw = raw_config(family)
    same = with_layers(raw, range(len(stock_layers(raw))), "m")
    assert same == raw
    assert same is not raw


# Families with structure, by hand

W, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("gone", "fields"),
    [
        ([0], {"layer_types": [W, W, F], "mlp_only_layers": [0], "max_window_layers": 3}),
        ([1], {"layer_types": [F, W, F], "mlp_only_layers": [], "max_window_layers": 3}),
        ([3], {"layer_types": [F, W, W], "max_window_layers": 3}),
        ([0, 2], {"layer_types": [W, F], "mlp_only_layers": [0], "max_window_layers": 2}),
    ],
)
def test_qwen2_moe_renumbers_its_dense_layers_and_windows(gone: list[int], fields: Config):
    raw = raw_config("qwen2_moe")
    assert changed(raw, with_layers(raw, rest(4, gone), "m")) == fields


@pytest.mark.parametrize(
    ("gone", "fields"),
    [
        ([4], {}),
        ([1, 2], {}),
        ([0], {"decoder_sparse_step": 1, "mlp_only_layers": [1, 3]}),
        ([2], {"decoder_sparse_step": 1, "mlp_only_layers": [0, 3]}),
        ([0, 2, 4], {"decoder_sparse_step": 1}),
        ([1, 3], {"mlp_only_layers": [1]}),
    ],
)
def test_qwen3_moe_says_any_pattern_by_a_list_of_dense_layers(gone: list[int], fields: Config):
    raw = raw_config("qwen3_moe")
    assert changed(raw, with_layers(raw, rest(5, gone), "m")) == fields


@pytest.mark.parametrize(
    ("family", "count", "gone", "prefix"),
    [
        ("deepseek_v2", 3, [0], 0),
        ("deepseek_v2", 3, [2], 1),
        ("deepseek_v3", 4, [0], 1),
        ("deepseek_v3", 4, [0, 1], 0),
        ("deepseek_v3", 4, [2, 3], 2),
        ("deepseek_v3", 4, [1, 3], 1),
        ("glm4_moe", 3, [0], 0),
    ],
)
def test_a_dense_prefix_is_counted_anew(family: str, count: int, gone: list[int], prefix: int):
    edited = with_layers(raw_config(family), rest(count, gone), "m")
    assert edited["first_k_dense_replace"] == prefix


@pytest.mark.parametrize(
    ("gone", "start", "end", "step"),
    [
        ([5], 1, 4, 2),
        ([0, 1], 0, 2, 2),
        ([1, 2], 1, 2, 2),
        ([3], 1, 1, 2),
        ([0, 2, 4], 0, 1, 1),
        ([1, 3], 4, 4, 2),
    ],
)
def test_ernie_says_where_its_mixtures_start_and_end(gone: list[int], start: int, end: int, step: int):
    raw = raw_config("ernie4_5_moe")
    kept = rest(6, gone)
    edited = with_layers(raw, kept, "m")
    # Several borders say the same, so what they say is compared.
    fields = [edited[f"moe_layer_{key}"] for key in ("start_index", "end_index", "interval")]
    assert mixtures_of_ernie(len(kept), *fields) == mixtures_of_ernie(len(kept), start, end, step)
    assert mixtures_of_ernie(len(kept), *fields) == [new for new, old in enumerate(kept) if old in (1, 3)]


def mixtures_of_ernie(count: int, start: int, end: int, step: int) -> list[int]:
    return [layer for layer in range(count) if (layer + 1) % step == 0 and start <= layer <= end]


def test_a_mixture_to_the_last_layer_stays_so():
    raw = raw_config("ernie4_5_moe") | {
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
    }
    assert changed(raw, with_layers(raw, [0, 2, 3], "m")) == {}
    assert changed(raw, with_layers(raw, [0], "m")) == {}
    assert changed(raw, with_layers(raw, [1, 2], "m")) == {"moe_layer_start_index": 0}


@pytest.mark.parametrize(
    ("gone", "fields"),
    [
        ([4], {}),
        ([0], {"attn_layer_offset": 0, "expert_layer_offset": 0}),
        ([1, 2], {"attn_layer_offset": 2}),
        ([2, 3, 4], {"attn_layer_offset": 1}),
        ([1, 3], {"expert_layer_period": 4, "expert_layer_offset": 3, "attn_layer_offset": 2}),
    ],
)
def test_jamba_finds_other_periods(gone: list[int], fields: Config):
    raw = raw_config("jamba")
    edited = with_layers(raw, rest(5, gone), "m")
    assert changed(raw, edited).items() <= fields.items()
    assert same_layers(raw, edited, rest(5, gone))


@pytest.mark.parametrize(
    ("period", "gone", "message"),
    [
        (2, [2], "expert_layer_period and expert_layer_offset of jamba cannot say which layers hold experts without L2"),
        (1, [2, 3], "attn_layer_period and attn_layer_offset of jamba cannot say which layers hold attention "
                    "without L2 and L3"),
    ],
)  # fmt: skip
def test_jamba_names_layers_that_can_go_instead(period: int, gone: list[int], message: str):
    raw = raw_config("jamba", expert_layer_period=period, expert_layer_offset=period - 1)
    with pytest.raises(UserError) as refused:
        with_layers(raw, rest(5, gone), "m")
    reason, cure = str(refused.value).split(": drop ")
    assert reason == f"m: {message}"
    assert cure == "L1 and L2 instead" if period == 2 else "L1, L2 and L3 instead"
    instead = rest(5, [int(number) for number in re.findall(r"L(\d)", cure)])
    assert same_layers(raw, with_layers(raw, instead, "m"), instead)


def test_lists_are_cut():
    raw = raw_config("gpt_oss")
    assert changed(raw, with_layers(raw, [1, 3], "m")) == {"layer_types": [W, F]}
    raw = raw_config("hunyuan_v1_moe")
    assert changed(raw, with_layers(raw, [1, 2], "m")) == {"moe_topk": [3, 2]}
    raw = raw_config("glm4_moe_lite")
    assert changed(raw, with_layers(raw, [1, 2], "m")) == {"mlp_layer_types": ["sparse", "sparse"]}
    raw = raw_config("lfm2_moe")
    assert changed(raw, with_layers(raw, [1, 2], "m")) == {"layer_types": [F, "conv"], "num_dense_layers": 0}
    raw = raw_config("nemotron_h")
    assert with_layers(raw, [0, 3, 4], "m")["layers_block_type"] == ["linear_attention", "moe", "mlp"]


def test_letters_for_layers_are_cut():
    raw = raw_config("nemotron_h", without=["layers_block_type"]) | {"hybrid_override_pattern": "ME*E-"}
    edited = with_layers(raw, [0, 2, 3], "m")
    assert changed(raw, edited) == {"hybrid_override_pattern": "M*E"}
    assert same_layers(raw, edited, [0, 2, 3])


def test_entries_beyond_the_last_layer_stay_behind_it():
    raw = raw_config("qwen3_moe") | {"compress_ratios": [0, 1, 2, 3, 4, 99]}
    assert with_layers(raw, [0, 1, 3, 4], "m")["compress_ratios"] == [0, 1, 3, 4, 99]


def test_lists_of_other_things_stay():
    raw = raw_config("granitemoehybrid", num_hidden_layers=2, layer_types=[F, "linear_attention"])
    raw |= {"eos_token_id": [1, 2]}
    edited = with_layers(raw, [1], "m")
    assert changed(raw, edited) == {"layer_types": ["linear_attention"]}


@pytest.mark.parametrize(
    ("family", "fields", "derived", "wanted"),
    [
        ("gemma2", {"num_hidden_layers": 4}, "layer_types", [W, W, F]),
        (
            "qwen3_next",
            {"num_hidden_layers": 4, "layer_types": None},
            "layer_types",
            ["linear_attention"] * 2 + [F],
        ),
        ("smollm3", {"num_hidden_layers": 4}, "no_rope_layers", [1, 1, 0]),
        ("exaone4", {"num_hidden_layers": 4, "sliding_window": 6}, "layer_types", [W, W, F]),
        ("olmo3", {"num_hidden_layers": 4, "sliding_window": 6}, "layer_types", [W, W, F]),
    ],
)
def test_a_list_left_to_its_class_is_written_where_it_no_longer_follows(
    family: str, fields: Config, derived: str, wanted: list[Any]
):
    raw = raw_config(family, without=[derived, "layer_types"], **fields)
    assert derived not in with_layers(raw, [0, 1, 2], "m")
    edited = with_layers(raw, [0, 2, 3], "m")
    assert edited[derived] == wanted
    assert same_layers(raw, edited, [0, 2, 3])


def test_lists_that_count_from_one_and_lie_one_level_down():
    inner = {"kda_layers": [1, 2, 4], "full_attn_layers": [3, 5], "head_dim": 16, "num_heads": 4,
             "short_conv_kernel_size": 3}  # fmt: skip
    fields = LATENT | {"num_experts": 8, "num_hidden_layers": 5, "moe_intermediate_size": 28}
    raw = raw_config("kimi_linear", without=["layer_types", "mlp_layer_types"], **fields)
    raw |= {"linear_attn_config": inner, "first_k_dense_replace": 1}
    edited = with_layers(raw, [0, 2, 3, 4], "m")
    assert edited["linear_attn_config"] == inner | {"kda_layers": [1, 3], "full_attn_layers": [2, 4]}
    assert same_layers(raw, edited, [0, 2, 3, 4])


def test_the_kinds_of_layers_of_a_minimal_kimi_file_follow_the_prefix():
    fields = LATENT | {"num_experts": 8, "num_hidden_layers": 5, "moe_intermediate_size": 28}
    raw = raw_config("kimi_linear", without=["layer_types", "mlp_layer_types"], **fields) | {
        "first_k_dense_replace": 2
    }
    edited = with_layers(raw, [1, 2, 4], "m")
    assert edited["layer_types"] == ["linear_attention", "linear_attention", F]
    assert edited["mlp_layer_types"] == ["dense", "sparse", "sparse"]


def test_overrides_of_single_layers_move_with_them():
    """Gemma 4 gives its layers of full attention wider heads."""
    raw = raw_config("gemma4_text", num_hidden_layers=5, layer_types=[W, F, W, F, F], head_dim=16, global_head_dim=24,
                     hidden_size_per_layer_input=0, num_kv_shared_layers=0, num_experts_per_tok=None)  # fmt: skip
    wide = {"head_dim": 24}
    assert raw["per_layer_config"] == {"1": wide, "3": wide, "4": wide}
    edited = with_layers(raw, [0, 2, 3], "m")
    assert changed(raw, edited) == {"layer_types": [W, W, F], "per_layer_config": {"2": wide}}
    assert same_layers(raw, edited, [0, 2, 3])


def test_a_list_that_the_family_would_not_take_as_it_is():
    """Gemma 4 makes its last layer one of full attention, whatever the list says."""
    raw = raw_config("gemma4_text", layer_types=[F, W, F], head_dim=16, hidden_size_per_layer_input=0,
                     num_kv_shared_layers=0, num_experts_per_tok=None)  # fmt: skip
    with pytest.raises(
        UserError, match=r"^m: no config of gemma4_text .* without L2 \(.*: drop L1 and L2 instead$"
    ):
        with_layers(raw, [0, 1], "m")


def test_a_composite_model_is_cut_where_its_language_model_is():
    text = raw_config("qwen3_5_moe_text", num_hidden_layers=4, layer_types=["linear_attention", F, F, "linear_attention"],
                      num_experts=8, moe_intermediate_size=28, linear_num_key_heads=2, linear_num_value_heads=4,
                      linear_key_head_dim=8, linear_value_head_dim=8, head_dim=16)  # fmt: skip
    vision = {"depth": 2, "num_hidden_layers": 2}
    raw = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": vision, "num_hidden_layers": 4}
    edited = with_layers(raw, [1, 3], "m")
    assert edited["vision_config"] == vision
    assert edited["num_hidden_layers"] == edited["text_config"]["num_hidden_layers"] == 2
    assert edited["text_config"]["layer_types"] == [F, "linear_attention"]


def test_fields_that_say_nothing_in_a_family_are_in_nobodys_way():
    """A leftover of another family's config, which the model does not read."""
    raw = raw_config("mixtral") | {
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "decoder_sparse_step": 2,
    }
    assert changed(raw, with_layers(raw, [0, 2], "m")) == {}


# What no config can say


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [0, 3], [-1, 0]])
def test_layers_that_are_not_there_cannot_be_kept(kept: list[int]):
    with pytest.raises(UserError, match="name some of 0 to 2 in ascending order"):
        with_layers(raw_config("mixtral"), kept, "m")


def test_the_first_layer_cannot_take_its_index_from_an_earlier_one():
    raw = raw_config("hy_v4")
    assert raw["indexer_types"] == ["full", "full", "shared"]
    with pytest.raises(
        UserError, match=r"first layer would be L2, which takes indexer_types from an earlier one: drop "
    ):
        with_layers(raw, [2], "m")


@pytest.mark.parametrize(
    ("family", "fields", "kept", "reason"),
    [
        ("diffllama", {}, [0, 2], r"without L1 \(self_attn\.lambda_init of L2 would be .*: drop L1 and L2 instead$"),
        ("gemma3n_text", {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 96,
                          "hidden_size_per_layer_input": 8, "laurel_rank": 4}, [0, 1],
         r"tensors outside the layers change their shape\): keep them, or drop others$"),
        ("modernbert-decoder", {}, [1, 2], r"attn_norm of L1 would be Identity instead of LayerNorm\): drop L1"),
    ],
)  # fmt: skip
def test_layers_that_depend_on_their_number_are_refused(
    family: str, fields: Config, kept: list[int], reason: str
):
    raw = raw_config(family, **fields)
    with pytest.raises(UserError, match=reason) as refused:
        with_layers(raw, kept, "m")
    assert "\n" not in str(refused.value)


def test_few_models_are_built(monkeypatch: pytest.MonkeyPatch):
    built: list[str] = []
    skeletons = importlib.import_module("moespresso.model.skeleton")
    real = skeletons.build_meta
    monkeypatch.setattr(
        skeletons,
        "build_meta",
        lambda config, dtype, place: built.append(place) or real(config, dtype, place),
    )
    raw = raw_config("qwen3_moe", num_hidden_layers=7)
    with_layers(raw, [0, 1, 2, 4, 5, 6], "few")
    assert len(built) == 2
    with_layers(raw, [0, 1, 2, 4, 5, 6], "few")
    with_dense(raw, [1], "few")
    assert len(built) == 4
    with pytest.raises(UserError):
        with_layers(raw_config("jamba", num_hidden_layers=8), rest(8, [3]), "few")
    assert len(built) == 6


def subsets(count: int) -> Iterable[list[int]]:
    return ([n for n in range(count) if mask >> n & 1] for mask in range(1, 2**count))


def test_jamba_is_refused_only_where_no_periods_would_do():
    raw = raw_config("jamba")
    for kept in subsets(5):
        count = len(kept)
        periods = [[layer for layer in range(count) if layer % every == first]
                   for every in range(1, count + 2) for first in range(every)]  # fmt: skip
        sayable = all([kept.index(n) for n in held if n in kept] in periods for held in ([1, 3], [1, 4]))
        assert sayable == accepted(raw, kept), kept


def test_ernie_is_refused_only_where_no_borders_would_do():
    raw = raw_config("ernie4_5_moe")
    for kept in subsets(6):
        borders = itertools.product(range(7), range(7), range(1, 8))
        sayable = [new for new, old in enumerate(kept) if old in (1, 3)] in (
            mixtures_of_ernie(len(kept), *values) for values in borders
        )
        assert sayable == accepted(raw, kept), kept


def accepted(raw: Mapping[str, Any], kept: list[int]) -> bool:
    try:
        with_layers(raw, kept, "m")
    except UserError:
        return False
    return True


# Properties


@quickly
@given(st.data())
def test_any_choice_is_described_or_refused(data: st.DataObject):
    raw = mixed(data.draw(st.sampled_from(sorted(MIXED))))
    count = len(stock_layers(raw))
    kept = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    try:
        edited = with_layers(raw, kept, "m")
    except UserError:
        assert raw["model_type"] in ("jamba", "ernie4_5_moe", "hy_v4")
    else:
        assert same_layers(raw, edited, kept)


@quickly
@given(st.data())
def test_two_cuts_are_one(data: st.DataObject):
    raw = mixed(data.draw(st.sampled_from(sorted(MIXED.keys() - {"jamba", "ernie4_5_moe", "hy_v4"}))))
    count = len(stock_layers(raw))
    first = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=2)))
    second = sorted(data.draw(st.sets(st.integers(0, len(first) - 1), min_size=1)))
    twice = with_layers(with_layers(raw, first, "m"), second, "m")
    assert same_layers(with_layers(raw, [first[number] for number in second], "m"), twice, range(len(second)))


@quickly
@given(st.data())
def test_any_mixtures_turn_dense_or_are_refused(data: st.DataObject):
    raw = mixed(data.draw(st.sampled_from(sorted(MIXED.keys() - {"gemma2"}))))
    mixtures = mixtures_in(stock_layers(raw))
    dense = data.draw(st.sets(st.sampled_from(sorted(mixtures)), min_size=1))
    try:
        edited, width = with_dense(raw, dense, "m")
    except UserError:
        assert raw["model_type"] in ("gpt_oss", "deepseek_v3", "dots1", "afmoe", "ernie4_5_moe", "jamba")
    else:
        assert_dense(raw, edited, dense)
        assert width == edited["intermediate_size"]


# Mixtures that become dense


def mixtures_in(layers: Sequence[nn.Module]) -> dict[int, str]:
    """Numbers of the layers that hold experts, and the name of the block that does."""
    return {number: name.removesuffix(".experts") for number, layer in enumerate(layers)
            for name, _ in layer.named_modules() if re.search(r"(?<!shared_)experts$", name)}  # fmt: skip


def assert_dense(raw: Mapping[str, Any], edited: Mapping[str, Any], dense: Iterable[int]) -> None:
    old, new = stock_layers(raw), stock_layers(edited)
    blocks = mixtures_in(old)
    assert mixtures_in(new).keys() == blocks.keys() - set(dense)
    for number, (before, after) in enumerate(zip(old, new, strict=True)):
        beside = blocks[number] if number in dense else "\0"
        assert looks(before, beside=beside) == looks(after, beside=beside), number


@pytest.mark.parametrize(
    ("family", "dense", "fields", "width"),
    [
        ("qwen2_moe", [0], {"mlp_only_layers": [0, 1]}, 56),
        ("qwen2_moe", [0, 2, 3], {"mlp_only_layers": [0, 1, 2, 3]}, 56),
        ("qwen3_moe", [3], {"mlp_only_layers": [3]}, 72),
        ("qwen3_next", [1], {"mlp_only_layers": [1], "intermediate_size": 8}, 8),
        ("qwen3_next", [0, 2], {"mlp_only_layers": [0, 2], "intermediate_size": 8}, 8),
        ("glm4_moe_lite", [2], {"mlp_layer_types": ["dense", "sparse", "dense"]}, 40),
        ("exaone_moe", [2], {"mlp_layer_types": ["dense", "sparse", "dense"]}, 40),
        (
            "deepseek_v32",
            [1],
            {"mlp_layer_types": ["dense", "dense", "sparse"], "first_k_dense_replace": 2},
            40,
        ),
        ("hy_v4", [1], {"mlp_layer_types": ["dense", "dense", "sparse"]}, 40),
        ("glm_moe_dsa", [2], {"mlp_layer_types": ["dense", "sparse", "dense"]}, 40),
        ("nemotron_h", [3], {"layers_block_type": ["linear_attention", "moe", F, "mlp", "mlp"]}, 40),
        ("deepseek_v2", [1], {"first_k_dense_replace": 2}, 64),
        ("deepseek_v3", [2, 3], {"first_k_dense_replace": 4}, 64),
        ("glm4_moe", [1], {"first_k_dense_replace": 2}, 72),
        ("dots1", [1, 2], {"first_k_dense_replace": 3}, 72),
        ("lfm2_moe", [1], {"num_dense_layers": 2}, 40),
        ("afmoe", [1], {"num_dense_layers": 2}, 40),
        ("ernie4_5_moe", [3], {"moe_layer_end_index": 1}, 72),
        ("ernie4_5_moe", [1], {"moe_layer_start_index": 3, "moe_layer_end_index": 3}, 72),
        ("jamba", [3], {"expert_layer_period": 4}, 40),
    ],
)
def test_mixtures_turn_dense_by_each_familys_own_field(
    family: str, dense: list[int], fields: Config, width: int
):
    raw = raw_config(family)
    edited, found = with_dense(raw, dense, "m")
    assert (changed(raw, edited), found) == (fields, width)
    assert_dense(raw, edited, dense)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "mellum"])
def test_where_no_layer_is_dense_the_stub_is_narrow(family: str):
    none = {"qwen2_moe": {"mlp_only_layers": []}, "qwen3_moe": {"decoder_sparse_step": 1}, "mellum": {
        "num_experts": 8, "moe_intermediate_size": 28}}  # fmt: skip
    raw = raw_config(family, **none.get(family, {"first_k_dense_replace": 0}))
    edited, width = with_dense(raw, [0], "m")
    assert width == edited["intermediate_size"] == STUB_WIDTH
    assert_dense(raw, edited, [0])


@pytest.mark.parametrize(
    ("family", "fields", "width_field"),
    [
        ("cohere2_moe", {"num_experts": 8, "sliding_window": 6, "prefix_dense_sliding_window_pattern": 2},
         "prefix_dense_intermediate_size"),
        ("minimax_m3_vl_text", {"num_local_experts": 8, "head_dim": 16}, "dense_intermediate_size"),
    ],
)  # fmt: skip
def test_the_width_of_stubs_may_be_a_field_of_its_own(family: str, fields: Config, width_field: str):
    raw = raw_config(family, **fields)
    edited, width = with_dense(raw, [1], "m")
    assert width == STUB_WIDTH
    assert changed(raw, edited) == {width_field: STUB_WIDTH, "mlp_layer_types": ["sparse", "dense", "sparse"]}
    assert_dense(raw, edited, [1])


def test_earlier_stubs_stay_as_they_are():
    raw = raw_config("qwen3_moe", decoder_sparse_step=1)
    once, _ = with_dense(raw, [3], "m")
    twice, width = with_dense(once, [0], "m")
    assert width == STUB_WIDTH
    assert changed(once, twice) == {"mlp_only_layers": [0, 3]}
    cut = with_layers(twice, [1, 3, 4], "m")
    assert changed(twice, cut) == {"mlp_only_layers": [1]}


def test_real_dense_layers_keep_their_width_beside_stubs():
    edited, width = with_dense(raw_config("qwen2_moe"), [3], "m")
    assert width == edited["intermediate_size"] == 56
    assert with_dense(edited, [0], "m")[1] == 56


def test_a_pattern_of_letters_turns_dense_too():
    raw = raw_config("nemotron_h", without=["layers_block_type"]) | {"hybrid_override_pattern": "ME*E-"}
    edited, _ = with_dense(raw, [1], "m")
    assert edited["hybrid_override_pattern"] == "M-*E-"
    assert_dense(raw, edited, [1])


@pytest.mark.parametrize(
    "family", ["mixtral", "olmoe", "gpt_oss", "granitemoe", "granitemoeshared", "granitemoehybrid", "minimax",
               "minimax_m2", "phimoe", "hunyuan_v1_moe", "flex_olmo"])  # fmt: skip
def test_a_family_of_mixtures_alone_cannot_say_dense(family: str):
    with pytest.raises(
        UserError, match=rf"^m: the config of {family} cannot say that L1 is dense .*: drop whole layers"
    ):
        with_dense(raw_config(family), [1], "m")


@pytest.mark.parametrize(
    ("family", "dense", "cure"),
    [
        ("deepseek_v3", [3], "take L2, or drop whole layers instead"),
        ("dots1", [2, 3], "take L1 and L2, or drop whole layers instead"),
        ("afmoe", [2], "take L1, or drop whole layers instead"),
    ],
)
def test_a_prefix_says_which_layers_can_be_dense(family: str, dense: list[int], cure: str):
    with pytest.raises(UserError, match=rf"cannot say that L.* dense and all else stays what it is: {cure}$"):
        with_dense(raw_config(family), dense, "m")


def test_a_dense_layer_that_differs_beside_its_mlp_is_refused():
    """Cohere's dense layers rotate where its mixtures do not."""
    fields = {"num_experts": 8, "num_hidden_layers": 3, "layer_types": [W, F, F], "sliding_window": 6}
    with pytest.raises(
        UserError, match=r"drop whole layers instead \(self_attn\.force_rope of L1 would be True"
    ):
        with_dense(raw_config("cohere2_moe", **fields), [1], "m")


@pytest.mark.parametrize(("family", "dense"), [("deepseek_v3", [0]), ("qwen2_moe", [0, 1]), ("llama", [1])])
def test_what_holds_no_experts_cannot_become_dense(family: str, dense: list[int]):
    with pytest.raises(UserError, match=rf"L{dense[-1]} holds no experts, so it cannot become dense"):
        with_dense(raw_config(family), dense, "m")


# Really loaded


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(family)` is the folder of a tiny random checkpoint in float32."""
    root = tmp_path_factory.mktemp("depth")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists() and family in families.FAMILIES:
            families.write_checkpoint(family, path, dtype=torch.float32, mixed_dtypes=False)
        elif not path.exists():
            random_model(family).save_pretrained(path)
        return path

    return folder


def random_model(family: str) -> PreTrainedModel:
    model = families.instantiate(text_config(family))
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.data += 1.5 * tensor.shape[-1] ** -0.5 * noise if tensor.dim() > 1 else 0.1 * noise
    return model


def read_all(folder: Path) -> dict[str, Tensor]:
    return {name: families.read_tensor(folder, name) for name in families.tensor_files(folder)}


def write_all(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(folder: Path) -> Config:
    return json.loads((folder / "config.json").read_text())


def cut_in_memory(model: PreTrainedModel, kept: Sequence[int], by_hand: Mapping[str, Any]) -> PreTrainedModel:
    """The stock model with only the layers `kept`; `by_hand` are config fields that its forward reads by position."""
    model.model.layers = nn.ModuleList(model.model.layers[number] for number in kept)
    for key, value in {"num_hidden_layers": len(kept), **by_hand}.items():
        setattr(model.config, key, value)
    return model


def close(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).abs().max()) <= 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("family", "kept", "by_hand"),
    [
        ("mixtral", [0, 2], {}),
        ("qwen2_moe", [1, 3], {"layer_types": [W, F]}),
        ("qwen3_moe", [1, 2, 4], {}),
        ("deepseek_v2", [1, 2], {}),
        ("deepseek_v3", [1, 3], {}),
        ("gpt_oss", [1, 3], {"layer_types": [W, F]}),
        ("ernie4_5_moe", [2, 3, 5], {}),
        ("dots1", [1, 2], {"layer_types": [W, F]}),
        ("hunyuan_v1_moe", [1, 2], {}),
        ("jamba", [1, 2, 3], {"attn_layer_offset": 0}),
        ("granitemoe", [2], {}),
        ("qwen3_next", [1, 2], {"layer_types": [F, "linear_attention"]}),
        ("glm4_moe_lite", [0, 2], {}),
        ("lfm2_moe", [1, 2], {"layer_types": [F, "conv"]}),
        ("nemotron_h", [0, 2, 3], {"layers_block_type": ["linear_attention", F, "moe"]}),
        ("minimax", [1, 2], {"layer_types": [F, "linear_attention"]}),
        ("hy_v4", [1, 2], {}),
        ("afmoe", [1, 2], {"layer_types": [W, W]}),
        ("gemma2", [1, 2], {"layer_types": [F, W]}),
    ],
)
@pytest.mark.few(4)
def test_the_cut_checkpoint_loads_and_agrees(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str, kept: list[int], by_hand: Config
):
    folder = checkpoint(family)
    tensors = {}
    for name, tensor in read_all(folder).items():
        number = families.layer_of(name)
        if number is None:
            tensors[name] = tensor
        elif number in kept:
            tensors[name.replace(f"layers.{number}.", f"layers.{kept.index(number)}.")] = tensor
    out = write_all(tmp_path / "out", with_layers(config_of(folder), kept, str(folder)), tensors)
    wanted = cut_in_memory(families.reference(folder), kept, by_hand)
    ids = families.random_ids(wanted.config, 2, 17)
    close(families.logits_of(families.reference(out), ids), families.logits_of(wanted, ids))


@pytest.mark.parametrize(
    ("family", "dense"),
    [
        ("qwen2_moe", [2]),
        ("qwen3_moe", [3]),
        ("deepseek_v3", [2]),
        ("ernie4_5_moe", [1]),
        ("jamba", [3]),
        ("qwen3_next", [0, 1]),
        ("glm4_moe_lite", [2]),
        ("hy_v4", [1]),
        ("lfm2_moe", [1]),
        ("nemotron_h", [1]),
    ],
)
@pytest.mark.few(3)
def test_a_dense_mlp_of_zeros_is_a_mixture_that_says_nothing(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str, dense: list[int]
):
    folder = checkpoint(family)
    raw = config_of(folder)
    edited, width = with_dense(raw, dense, str(folder))
    blocks = mixtures_in(stock_layers(raw))
    tensors = read_all(folder)
    for number in dense:
        inside = re.compile(rf"\.layers\.{number}\.{blocks[number]}\.")
        prefix = next(name[: found.end()] for name in tensors if (found := inside.search(name)))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
        mlp = stock_layers(edited)[number].get_submodule(blocks[number])
        zeros = {prefix + name: torch.zeros(tensor.shape) for name, tensor in mlp.state_dict().items()}
        assert {min(z.shape) for z in zeros.values() if z.dim() == 2} == {min(width, raw["hidden_size"])}
        tensors |= zeros
    silenced = families.reference(folder)
    for number in dense:
        block = silenced.model.layers[number].get_submodule(blocks[number])
        block.register_forward_hook(lambda _, __, answer: torch.zeros_like(answer))
    ids = families.random_ids(silenced.config, 2, 17)
    out = families.reference(write_all(tmp_path / "out", edited, tensors))
    close(families.logits_of(out, ids), families.logits_of(silenced, ids))
