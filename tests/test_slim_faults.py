"""Rounding that cannot be, and packed folders that are damaged: one sentence before any work, or a check that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import Zoo
from moespresso import api
from moespresso.build import open_view
from moespresso.core.errors import UserError
from test_slim import disk, press


@pytest.mark.parametrize(
    ("step", "complaint"),
    [
        ("rtn:bits=5", r"bits '5' are unknown: use 2, 3, 4 or 8"),
        ("rtn:bits=up:4", r"there is no place 'up'"),
        ("rtn:bits=down:4", r"says nothing of gate_up"),
        ("rtn:layers=9:4", r"layers names L9, but .* has 3 layers"),
        ("rtn:layers=one", r"layers 'one' are not LAYER:BITS"),
        ("rtn:parts=router", r"parts='router' is unknown"),
        ("rtn:parts=shared", r"has no matrices in its shared to round"),
        ("rtn:group_size=128", r"has 64 inputs, which groups of 128 do not divide: use group_size=32"),
        ("rtn:bits=4+attention:8", r"bits=4\+attention:8 names attention, but parts=experts leaves it alone"),
        ("rtn:bits=down:4+attention:8,parts=attention", r"names down, but parts=attention leaves it alone"),
        ("rtn:exclude=L9.*", r"exclude='L9.\*' matches no part of .* that is rounded"),
        (
            "rtn:exclude=L0.E3*",
            r"exclude='L0.E3\*' matches no part .*single experts share their layer's format",
        ),
        ("rtn:exclude=*", r"exclude=\* leaves nothing of its experts to round"),
        (
            "gptq:exclude=L1.experts.down,group_size=32",
            r"treats gate, up and down of a layer's experts together",
        ),
        (
            "gptq:parts=experts+head",
            r"gptq rounds experts and shared and attention and dense only, not head: use rtn",
        ),
        ("awq:parts=attention", r"awq rounds experts only, not attention: use rtn"),
        ("rtn:rescore=false", r"rtn has no setting 'rescore'"),
        ("rtn:group_size=5", r"group_size=5 must be 0 or a multiple of 8"),
        ("hqq:p=2", r"p=2.0 must lie between 0 and 1"),
        ("gptq:damping=-1", r"damping=-1.0 must not be negative"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    step: str, complaint: str, source: Path, text: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=complaint):
        press(source, tmp_path / "out", step, text=text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_experts_stored_as_one_tensor_are_refused(family: str, zoo: Zoo, tmp_path: Path):
    with pytest.raises(UserError, match="stores all experts of a layer in one tensor"):
        press(zoo(family), tmp_path / "out", "rtn:group_size=0")


def test_llama_cpp_reads_no_packed_integers(source: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"packs integers, which llama.cpp does not read"):
        press(source, tmp_path / "out", "rtn:group_size=32", target="llama.cpp")


def test_values_are_not_changed_after_they_were_rounded(source: Path, text: Path, tmp_path: Path):
    for later in ("expert_merge:keep=6", "block_drop:repair=scale"):
        with pytest.raises(UserError, match="after a step that rounds or prunes weights: put that step last"):
            press(source, tmp_path / "out", "rtn:group_size=32", later, text=text)


def test_text_is_asked_for(source: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"see real text: give --text FILE .*\(or use rtn or hqq, which needs none\)"
    ):
        press(source, tmp_path / "out", "gptq:group_size=32")


def damaged(packed: Path, folder: Path, name: str, tensor: torch.Tensor | None) -> Path:
    """A copy in which one tensor is another, or gone."""
    folder.mkdir()
    for file in packed.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = disk(packed)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2"


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("weight_scale", None, "lacks a part of its packed weight"),
        ("weight_shape", None, "weight_shape is missing"),
        ("weight_scale", torch.ones(64, 2), r"weight_packed is I32 \[64, 12\], not I32 \[64, 8\]"),
        (
            "weight_packed",
            torch.zeros(64, 5, dtype=torch.int32),
            r"weight_packed is I32 \[64, 5\], not I32 \[64, 12\]",
        ),
        (
            "weight_zero_point",
            torch.zeros(8, 3, dtype=torch.int32),
            "has a weight_zero_point, which its format does not know",
        ),
    ],
)
def test_a_damaged_packed_folder_is_refused(
    name: str, tensor: torch.Tensor | None, complaint: str, packed: Path, tmp_path: Path
):
    folder = damaged(packed, tmp_path / "folder", f"{EXPERT}.{name}", tensor)
    with pytest.raises(UserError, match=complaint):
        open_view(folder)


def test_verify_sees_a_wrong_shape_and_a_dead_scale(packed: Path, tmp_path: Path):
    wrong = damaged(packed, tmp_path / "wrong", f"{EXPERT}.weight_shape", torch.tensor([96, 64]))
    assert not api.verify(wrong)["ok"]
    scales = disk(packed)[f"{EXPERT}.weight_scale"]
    dead = damaged(packed, tmp_path / "dead", f"{EXPERT}.weight_scale", torch.zeros_like(scales))
    assert any("scales that are zero" in check["detail"] for check in api.verify(dead)["checks"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"L1.norm": {"repair": "rescale"}},
            "rescales L1.norm in a step that does not round weights on text",
        ),
        (
            {"L9.experts": {"format": {"kind": "integer", "bits": 4}}},
            "gives L9.experts a format, but .* no matrices there",
        ),
        (
            {"L1.norm": {"format": {"kind": "integer", "bits": 4}}},
            "gives L1.norm a format by rtn, which treats experts, shared, attention, dense or head only: leave it out",
        ),
        ({"L1.experts": {"format": {"kind": "integer", "bits": 5}}}, "integers of 2, 3, 4 or 8 bits are"),
        (
            {"L1.experts": {"format": {"kind": "integer", "bits": 4}, "keep": [0, 1, 2]}},
            "a format and something else as well",
        ),
    ],
)
def test_a_plan_by_hand_that_rounds_what_it_cannot_is_refused(
    changes: dict[str, Any], complaint: str, source: Path, tmp_path: Path
):
    body = {"blueprint": open_view(source).source.digest,
            "stages": [{"method": {"kind": "rtn"}, "treatments": changes}]}  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=complaint):
        api.build(source, plan=tmp_path / "plan.json", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
