"""Hybrids keep an attention layer: a cache counts tokens by that, and without any no model of theirs generates.

Which block goes is tested on made-up scores and losses, where the right answer is read off; that it matters at all on
a folder that was made without attention against all advice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moespresso import api
from moespresso.build import open_view
from moespresso.core.blueprint import Blueprint
from moespresso.core.errors import UserError
from moespresso.core.method import Candidate
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.methods import BlockDrop
from test_depth_kl import other_folder
from test_depth_steps import GONE, OPTIONS, by_hand, plan_of

HYBRIDS = ["qwen3_next", "granitemoehybrid"]  # each with attention in L1 of three layers only
SPARED = "L1 would go by its score, but is the last block with attention, so it stays"


def hybrid(tmp_path: Path, family: str = HYBRIDS[0]) -> Blueprint:
    return open_view(other_folder(family, tmp_path)).source


def similar(name: str, values: Sequence[float]) -> Stats:
    return Stats("", "", 0, {Unit(layer): {name: value} for layer, value in enumerate(values)})


@pytest.mark.parametrize(
    ("values", "drop", "stays", "notes"),
    [
        ([0.1, 0.9, 0.2], 1, {0, 1}, [SPARED]),
        ([0.1, 0.9, 0.2], 2, {1}, [SPARED]),
        ([0.3, 0.1, 0.2], 2, {1}, []),
        ([0.3, 0.1, 0.2], 1, {1, 2}, []),
    ],
)
def test_the_last_attention_stays_whatever_its_score(
    values: list[float], drop: int, stays: set[int], notes: list[str], tmp_path: Path
):
    decision = BlockDrop(drop=drop).decide(similar("cosine", values), hybrid(tmp_path))
    assert {0, 1, 2} - {unit.layer for unit in decision.treatments} == stays
    assert list(decision.notes) == notes


def test_runs_that_hold_all_attention_are_passed_over(tmp_path: Path):
    source = hybrid(tmp_path)
    step = BlockDrop(drop=1, contiguous=True)
    decision = step.decide(similar("run@1", [0.1, 0.9, 0.2]), source)
    assert list(decision.treatments) == [Unit(2)]
    assert decision.notes == ("the run from L1 would go by its score, but holds all blocks with attention",)
    with pytest.raises(UserError, match=r"every run of 2 blocks takes all with attention.*or drop=1$"):
        BlockDrop(drop=2, contiguous=True).check(source)
    for cure in (step, BlockDrop(drop=2)):
        cure.check(source)
    assert [other.drop for other in step.amounts(source)] == [1]


@pytest.mark.parametrize("contiguous", [False, True])
def test_a_search_does_not_try_what_may_not_go(contiguous: bool, tmp_path: Path):
    """Every loss says that attention should go first."""
    tried: list[set[int]] = []

    def judge(candidates: Sequence[Candidate]) -> list[float]:
        tried.extend({unit.layer or 0 for unit in candidate} for candidate in candidates)
        return [0.0 if Unit(1) in candidate else 1.0 for candidate in candidates]

    step = BlockDrop(drop=1, score="kl", contiguous=contiguous)
    decision = step.search(hybrid(tmp_path), judge)
    assert tried
    assert not any(1 in blocks for blocks in tried)
    assert Unit(1) not in decision.treatments
    assert len(decision.notes) == 1


def test_without_other_mixers_any_block_may_go(tmp_path: Path):
    decision = BlockDrop(drop=2).decide(similar("cosine", [0.1, 0.9, 0.2]), hybrid(tmp_path, "flex_olmo"))
    assert set(decision.treatments) == {Unit(1), Unit(2)}
    assert decision.notes == ()


@pytest.mark.parametrize("family", HYBRIDS)
def test_what_is_left_of_a_hybrid_generates(family: str, text: Path, tmp_path: Path):
    source, out = other_folder(family, tmp_path), tmp_path / "out"
    api.press(source, out=out, texts=[text], steps=["block_drop:drop=2"], **OPTIONS)
    assert set(plan_of(out).stages[0].treatments) == {Unit(0), Unit(2)}
    assert api.verify(out, against=source)["ok"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 5)


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_without_attention_is_refused_and_does_not_pass(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = other_folder(family, tmp_path)
    with pytest.raises(UserError, match="the plan drops L1, and so every block with attention"):
        by_hand(source, tmp_path / "out", {"L1": GONE}, target="transformers")
    monkeypatch.setattr(Blueprint, "counting", frozenset())
    out = by_hand(source, tmp_path / "out", {"L1": GONE}, target="transformers")
    wrong = [check for check in api.verify(out, against=source)["checks"] if not check["ok"]]
    assert [check["name"] for check in wrong] == ["stock transformers loads it and agrees"]
    assert "get_seq_length" in wrong[0]["detail"]
