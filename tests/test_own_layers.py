"""Families whose own code reads `per_layer_config` (dots3_note): theirs is told from ours.

Theirs is part of an ordinary checkpoint, which stock transformers loads: nothing about it is noted, refused or guarded,
an empty one stays, since defaults would come back, and what is wrong with a config is said as the family says it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import families
from conftest import tiny_tokenizer
from depth_by_hand import silenced
from moespresso import api
from moespresso.core.errors import UserError
from test_depth_kl import gone
from test_depth_steps import GONE, OPTIONS, by_hand, plan_of
from test_engine import close
from test_more_families import INDEXED, ROUTED, _random_model

OF_LAYER = {"kv_lora_rank": 20, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16}
FIELDS = (INDEXED | ROUTED | {
    "shared_experts_intermediate_size": 24, "sliding_window": 6, "head_dim": 20,
    "layer_types": ["indexed_attention", "indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "per_layer_config": {"2": OF_LAYER},
})  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = _random_model("dots3_note_text", FIELDS)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    assert config_of(tmp_path / "source")["per_layer_config"] == {"2": OF_LAYER}
    return tmp_path / "source"


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("step", ["expert_drop", "block_drop", "channel_prune:ratio=0.25"])
def test_a_family_with_layers_of_its_own_is_an_ordinary_one(
    step: str, source: Path, text: Path, tmp_path: Path
):
    assert not any("differ" in note for note in api.inspect(source)["notes"])
    report = api.press(source, out=tmp_path / "out", texts=[text], steps=[step], **OPTIONS)
    assert not report.plugin
    config, lost = config_of(tmp_path / "out"), gone(plan_of(tmp_path / "out"))
    assert config["architectures"] == ["Dots3NoteForCausalLM"]
    own = {} if "L2" in lost else {"1" if lost else "2": OF_LAYER}
    assert config["per_layer_config"] == own
    found = api.verify(tmp_path / "out", against=source)
    assert found["ok"], found
    assert "stock transformers loads it and agrees" in [check["name"] for check in found["checks"]]


def test_an_empty_one_stays_where_defaults_would_come_back(source: Path, tmp_path: Path):
    """With the last layer that is unlike the others goes the last entry."""
    out = by_hand(source, tmp_path / "out", {"L2": GONE}, target="transformers")
    assert config_of(out)["per_layer_config"] == {}
    reference, ids = families.reference(source), families.random_ids(families.reference(source).config, 2, 17)
    close(families.logits_of(families.reference(out), ids),
          families.logits_of(silenced(reference, (2, "block")), ids))  # fmt: skip
    again = by_hand(out, tmp_path / "again", {"L1": GONE}, target="transformers")
    assert config_of(again)["per_layer_config"] == {}
    assert api.verify(again, against=out)["ok"]


def test_layers_that_its_config_cannot_tell_apart_are_refused_before_any_work(
    source: Path, text: Path, tmp_path: Path
):
    step = "channel_prune:ratio=0.25,scope=global,per_expert=false"
    with pytest.raises(UserError, match="is not homogeneous across layers"):
        api.press(source, out=tmp_path / "out", texts=[text], steps=[step], target="plugin", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_what_a_family_finds_wrong_with_its_config_is_said(source: Path):
    """Strict config classes put the reason on their second line."""
    (source / "config.json").write_text(json.dumps(config_of(source) | {"n_shared_experts": 0}))
    with pytest.raises(
        UserError, match=r"not a valid dots3_note_text config .*at least one shared expert\)$"
    ) as refused:
        api.inspect(source)
    assert "\n" not in str(refused.value)
