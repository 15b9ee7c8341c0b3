"""Rounded parts beside the experts: stock transformers reads what is written, or it is refused and the cure is followed."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moespresso
from conftest import tiny_tokenizer, write_wide
from families import build, logits_of, random_ids
from moespresso.checkpoint import open_checkpoint
from moespresso.core.errors import UserError
from moespresso.model.blueprint import read_blueprint
from test_joined import written


def wrong(out: Path, model: Path) -> list[str]:
    return [check["detail"] for check in moespresso.verify(out, against=model)["checks"] if not check["ok"]]


@pytest.mark.parametrize("bits", ["shared:8+gate_up:4+down:4", "shared:4+gate_up:8+down:8"])
@pytest.mark.few(1)
def test_experts_have_their_own_format_whatever_lies_first_in_the_files(bits, tmp_path: Path):
    model = tmp_path / "model"
    build("deepseek_v3", hidden_size=64, moe_intermediate_size=32).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    file = model / "model.safetensors"
    wide = {
        name: tensor.float() if "shared" in name else tensor.bfloat16()
        for name, tensor in load_file(file).items()
    }
    save_file(wide, file, {"format": "pt"})  # the wide dtype lies first
    moespresso.press(
        model, out=tmp_path / "out", steps=[f"rtn:group_size=0,parts=experts+shared,bits={bits}"]
    )
    assert wrong(tmp_path / "out", model) == []
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    ids = random_ids(stock.config, 1, 12)
    ours = moespresso.load(tmp_path / "out", dtype="bfloat16")
    distance = (logits_of(stock, ids) - logits_of(ours, ids)).abs().max() / logits_of(ours, ids).abs().max()
    assert float(distance) < 0.05


@pytest.mark.parametrize(("family", "parts"), [("kimi_linear", "experts+shared"), ("bailing_hybrid", "experts+attention"),
                                                ("qwen4_exp_text", "experts+dense")])  # fmt: skip
@pytest.mark.few(1)
def test_parts_that_the_library_renames_are_found_by_it(family, parts, tmp_path: Path):
    model = written(family, tmp_path / "model")
    moespresso.press(model, out=tmp_path / "out", steps=[f"rtn:group_size=0,parts={parts}"])
    assert wrong(tmp_path / "out", model) == []


def test_a_table_of_embeddings_in_a_layer_is_no_matrix_to_round(tmp_path: Path):
    blueprint = read_blueprint(open_checkpoint(written("qwen4_exp_text", tmp_path / "model")))
    tables = {
        entry.unit.part
        for entry in blueprint.entries
        if "ngram_embedding" in entry.ref.name and len(entry.ref.shape) == 2
    }
    assert tables == {"embedding"}


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "zeros of attention": ({}, "rtn:group_size=32,parts=experts+attention,symmetric=false", "symmetric=true"),
    "zeros of attention alone, then symmetric experts": (
        {},
        "rtn:group_size=32,parts=attention,symmetric=false",
        "symmetric=true",
    ),
    "a head that is tied": (
        {"tie_word_embeddings": True},
        "rtn:group_size=32,parts=experts+head",
        "leave the head out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.few(1)
def test_what_transformers_stops_at_is_refused_and_the_cures_work(case, tmp_path: Path):
    changes, step, cure = REFUSED[case]
    model = write_wide(tmp_path / "model", **changes)
    if changes:
        file = model / "model.safetensors"
        save_file(load_file(file) | {"lm_head.weight": torch.randn(96, 64) / 4}, file, {"format": "pt"})
    steps = ["rtn:group_size=32", step] if "then" in case else [step]
    with pytest.raises(UserError, match=re.escape(cure)):
        moespresso.press(model, out=tmp_path / "out", steps=steps)
    assert not (tmp_path / "out").exists()
    moespresso.press(model, out=tmp_path / "plugin", steps=steps, target="plugin")
    assert wrong(tmp_path / "plugin", model) == []
    cured = [each.replace("symmetric=false", "symmetric=true").replace("+head", "") for each in steps]
    moespresso.press(model, out=tmp_path / "cured", steps=cured)
    assert wrong(tmp_path / "cured", model) == []
