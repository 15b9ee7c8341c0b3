"""What transformers joins as it reads is stored joined beside packed matrices, where it could not join it any more."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moespresso
from conftest import tiny_tokenizer
from families import instantiate, logits_of, random_ids, reference
from moespresso.core.errors import UserError
from moespresso.core.runtime import Runtime
from moespresso.model.names import Names
from test_own_layers import FIELDS

COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "shared_expert_intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
KINDS = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
# Three short convolutions a layer; the same under shorter names; shards of a table.
FAMILIES: dict[str, dict[str, Any]] = {
    "kimi_linear": LATENT | {"num_local_experts": 4, "q_lora_rank": None, "linear_head_dim": 16, "linear_num_heads": 4, "layer_types": KINDS},
    "bailing_hybrid": LATENT | {"num_local_experts": 4, "n_group": 1, "topk_group": 1, "head_dim": 16, "layer_group_size": 2, "num_mtp_layers": 0, "first_k_dense_replace": 1},
    "qwen4_exp_text": {"num_key_value_heads": 2, "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
                       "linear_num_key_heads": 2, "linear_num_value_heads": 4, "layer_types": KINDS, "hc_count": 2,
                       "hc_lowrank": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                       "indexer_budget": 16, "indexer_compress_ratio": 4, "ple_layer_ids": [1], "ple_embed_dim": 64,
                       "heads_per_ngram": 2, "ngram_vocab_size_base": 512, "split_ngram_parts": 4},
}  # fmt: skip
PART = {"kimi_linear": "q_conv1d", "bailing_hybrid": "q_conv1d", "qwen4_exp_text": "shard_"}


def written(family: str, folder: Path) -> Path:
    """A tiny checkpoint of one of them."""
    kind = CONFIG_MAPPING[family]
    known = {each.name for each in dataclasses.fields(kind)} | kind.attribute_map.keys()
    instantiate(
        kind(**{key: value for key, value in (COMMON | FAMILIES[family]).items() if key in known})
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("joined")
    return {name: written(name, root / name) for name in FAMILIES}


def checks(folder: Path, model: Path) -> list[str]:
    return [
        check["detail"] for check in moespresso.verify(folder, against=model)["checks"] if not check["ok"]
    ]


def names_of(folder: Path) -> list[str]:
    return sorted(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(1)
def test_packed_experts_load_where_a_conversion_stands_beside_them(family, models, tmp_path: Path):
    model, out = models[family], tmp_path / "out"
    assert any(PART[family] in name for name in names_of(model))
    report = moespresso.press(model, out=out, steps=["rtn:group_size=32"])
    assert any("are stored in one piece" in note for note in report.notes)
    assert not any(PART[family] in name for name in names_of(out))
    assert checks(out, model) == []


def test_what_was_joined_is_a_source_again(models, tmp_path: Path):
    out, again = tmp_path / "out", tmp_path / "again"
    moespresso.press(
        models["kimi_linear"], out=out, steps=["expert_drop:ratio=0.25,score=aimer", "rtn:group_size=32"]
    )
    moespresso.press(out, out=again, steps=["expert_drop:ratio=0.34,score=aimer"])
    assert checks(again, out) == []


def test_bytes_are_the_parts_end_to_end(models, tmp_path: Path):
    moespresso.press(models["kimi_linear"], out=tmp_path / "out", steps=["rtn:group_size=32"])
    parts, whole = (
        load_file(folder / "model.safetensors") for folder in (models["kimi_linear"], tmp_path / "out")
    )
    stem = "model.layers.2.self_attn."
    apart = [parts[f"{stem}{letter}_conv1d.weight"] for letter in "qkv"]
    assert torch.equal(whole[f"{stem}conv1d.weight"], torch.cat(apart))


def test_nothing_is_joined_where_nothing_is_packed(models, tmp_path: Path):
    model = models["bailing_hybrid"]
    moespresso.press(model, out=tmp_path / "out", steps=["expert_drop:ratio=0,score=aimer"])
    assert names_of(tmp_path / "out") == names_of(model)


def test_values_that_are_not_finite_are_counted_in_every_part(models, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    for file in models["kimi_linear"].iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.v_conv1d.weight"][0, 0, :2] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="v_conv1d"):
        moespresso.press(model, out=tmp_path / "out", steps=["rtn:group_size=32"])
    report = moespresso.press(
        model, out=tmp_path / "out", steps=["rtn:group_size=32"], runtime=Runtime(allow_nonfinite=True)
    )
    assert any("v_conv1d" in line or "conv1d" in line for line in report.warnings)
    assert checks(tmp_path / "out", model) == []


def test_what_is_converted_otherwise_is_refused_and_the_cure_works(models, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Names, "only_lays_end_to_end", lambda self, pattern: False)
    model = models["kimi_linear"]
    with pytest.raises(UserError, match=r"packs matrices beside .*conv1d.* say --target plugin"):
        moespresso.press(model, out=tmp_path / "out", steps=["rtn:group_size=32"])
    moespresso.press(model, out=tmp_path / "out", steps=["rtn:group_size=32"], target="plugin")
    assert checks(tmp_path / "out", model) == []
    ids = random_ids(reference(model).config, 1, 8)
    distance = (
        (logits_of(moespresso.load(tmp_path / "out").float(), ids) - logits_of(reference(model), ids))
        .abs()
        .max()
    )
    assert 0 < float(distance) < 1


# Beside the language model


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dots3_note as it is downloaded: its vision tower holds experts too."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    }
    kind = CONFIG_MAPPING["dots3_note"]
    config = kind(
        text_config={**COMMON, **FIELDS, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 3, "num_experts": 8},
        vision_config=sizes | {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "pyramid_num_routed": [-1, 4], "adapter_in_dim": 32, "adapter_out_dim": 64},
        audio_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "downsample_hidden_size": 8, "feature_size": 16,
                      "adapter_input_size": 32, "adapter_out_dim": 64},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wrapper") / "model"
    transformers.Dots3NoteForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_experts_of_a_vision_tower_are_no_place_beside_packed_ones(wrapper: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"beside vision_encoder.*experts.*drop the rounding step, or say --target plugin"
    ):
        moespresso.press(wrapper, out=tmp_path / "out", steps=["rtn:group_size=32"])
    assert not (tmp_path / "out").exists()
    moespresso.press(wrapper, out=tmp_path / "out", steps=["rtn:group_size=32"], target="plugin")
    assert checks(tmp_path / "out", wrapper) == []
    ids = torch.arange(3, 11).unsqueeze(0)
    assert moespresso.load(tmp_path / "out")(input_ids=ids).logits.isfinite().all()
    moespresso.press(wrapper, out=tmp_path / "dropped", steps=["expert_drop:ratio=0.25,score=aimer"])
    assert checks(tmp_path / "dropped", wrapper) == []


def test_a_folder_that_the_class_of_its_config_cannot_read_does_not_pass(
    wrapper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as before:
        before.setattr(Names, "of_weights", lambda self, pattern: False)
        moespresso.press(wrapper, out=tmp_path / "out", steps=["rtn:group_size=32"])
    with pytest.raises(RuntimeError, match="conversion"):
        transformers.Dots3NoteForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert [line for line in checks(tmp_path / "out", wrapper) if "it stops at vision_encoder" in line]
