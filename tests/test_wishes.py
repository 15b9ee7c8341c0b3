"""Wishes that cannot be followed to the letter: what is done instead is said, and the cure that an error names works."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Zoo, write_wide
from moespresso import api
from moespresso.build import Tensors, open_view
from moespresso.core.errors import UserError
from moespresso.methods.channel_prune import ChannelPrune
from moespresso.methods.sparsegpt import SparseGpt
from test_depth_steps import plan_of
from test_slim import OPTIONS, disk, press, proven


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("wide") / "source")


def zeros(folder: Path) -> float:
    """The share of routed experts' weights that decode to zero."""
    with Tensors(folder) as reader:
        weights = [reader.whole(piece) for piece in open_view(folder).pieces if piece.unit.part == "experts"]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


# What is not there


@pytest.mark.parametrize("step", ["magnitude:parts=shared", "rtn:parts=experts+shared", "low_rank:parts=shared",
                                  "wanda:parts=experts+shared,exclude=L0.shared*"])  # fmt: skip
def test_another_familys_form_brings_no_parts_to_treat(step: str, source: Path, text: Path, tmp_path: Path):
    # Mixtral under the name of Qwen2-MoE would have shared experts, of zeros.
    with pytest.raises(UserError, match=r"has no matrices in its shared|matches no part of"):
        press(source, tmp_path / "out", step, text=text, target="plugin")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("step", "more"),
    [
        ("magnitude", ""),
        ("magnitude:pack=true", " with --target plugin"),
        ("sparsegpt", ""),
        ("sparsegpt:bits=4", ",group_size=16"),
        ("wanda:pack=true", " with --target plugin"),
    ],
)
def test_stacks_that_cannot_be_treated_are_refused_with_what_can(
    step: str, more: str, zoo: Zoo, text: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=f"use parts=attention{more}, or drop experts"):
        press(zoo("gpt_oss"), tmp_path / "out", step, text=text, target="plugin")
    press(zoo("gpt_oss"), tmp_path / "cured", "magnitude:parts=attention")


# Text


def test_stats_are_planned_from_with_the_text_they_were_measured_on(source: Path, text: Path, tmp_path: Path):
    steps = ["expert_drop:keep=6", "channel_prune:ratio=0.4,per_expert=true,scope=global"]
    api.measure(source, out=tmp_path / "stats.json", steps=steps, texts=[text], target="plugin", **OPTIONS)
    other = tmp_path / "other.txt"
    other.write_text("quite another text " * 2000)
    with pytest.raises(UserError, match="not the one these stats were measured on"):
        api.plan(source, stats=tmp_path / "stats.json", steps=steps, texts=[other], target="plugin")
    # How much of it is what the stats say, though other numbers are the default.
    made = api.plan(source, stats=tmp_path / "stats.json", steps=steps, texts=[text], target="plugin")
    pressed = press(source, tmp_path / "out", *steps, text=text, target="plugin")
    assert made == plan_of(pressed)


@pytest.mark.parametrize("step", ["attention_rank", "low_rank", "wanda:pack=true", "expert_drop:scope=global",
                                  "low_rank:method=modegpt"])  # fmt: skip
@pytest.mark.few(2)
def test_measuring_is_no_matter_of_who_loads_the_result(step: str, source: Path, text: Path, tmp_path: Path):
    api.measure(source, out=tmp_path / "stats.json", steps=[step], texts=[text], **OPTIONS)
    assert (tmp_path / "stats.json").is_file()


# How much


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ("magnitude:sparsity=0.995", "98.61% of the weights go instead of 99.50%"),
        ("magnitude:sparsity=0.01", "1.39% of the weights go instead of 1.00%"),
        ("sparsegpt:sparsity=0.995,bits=4,group_size=32", "98.61% of the weights go instead of 99.50%"),
        ("low_rank:ratio=0.97", "97.4% of the bytes of these matrices go, 97.0% were asked for"),
    ],
)
@pytest.mark.few(2)
def test_another_share_than_asked_for_is_said(step: str, told: str, source: Path, text: Path, tmp_path: Path):
    report = api.press(source, out=tmp_path / "out", steps=[step], texts=[text], target="plugin", **OPTIONS)
    assert any(told in note for note in report.notes), report.notes
    if "sparsity" in step:
        assert zeros(tmp_path / "out") == pytest.approx(float(told.split("%")[0]) / 100, abs=5e-3)


def test_nothing_is_said_where_the_share_is_met(source: Path, tmp_path: Path):
    report = api.press(source, out=tmp_path / "out", steps=["magnitude:sparsity=0.5"])
    assert not any("instead of" in note for note in report.notes)


def test_a_row_keeps_a_weight_whatever_is_asked_for(source: Path, text: Path, tmp_path: Path):
    out = press(source, tmp_path / "out", "wanda:sparsity=0.999,pack=true", text=text, target="plugin")
    proven(out, source)
    with Tensors(out) as reader:
        for piece in open_view(out).pieces:
            if piece.unit.part == "experts":
                assert bool(((reader.whole(piece) != 0).sum(1) == 1).all())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ratio": 0.5, "alpha": 0.5}, "alpha=0.5 is a setting of score=camera"),
        ({"ratio": 0.5, "alpha": 2.0, "score": "camera"}, "alpha=2.0 must be at most 1"),
    ],
)
def test_settings_without_effect_or_sense(settings: dict[str, object], reason: str):
    with pytest.raises(UserError, match=reason):
        ChannelPrune(**settings)  # pyright: ignore[reportArgumentType]


# Budgets


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("channel_prune:scope=global,least=64", "cannot be reached by channel_prune alone"),
        ("wanda:pack=true,sparsity=2:4", "in a pattern has one size: use pack=true with a plain sparsity"),
        ("wanda", "leaves zeros in place of weights, which take as many bytes"),
    ],
)
def test_sizes_that_cannot_be(step: str, reason: str, source: Path, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match=reason):
        press(source, tmp_path / "out", step, text=text, size="50%", target="plugin")


def test_sizes_that_can_be(source: Path, text: Path, tmp_path: Path):
    size = round(0.6 * open_view(source).source.cost().bytes)
    for step in ("sparsegpt:bits=4,group_size=32", "channel_prune:multiple=32", "channel_prune:scope=global"):
        out = press(source, tmp_path / step[:20], step, text=text, size=size, target="plugin")
        assert sum(tensor.nbytes for tensor in disk(out).values()) <= size
    assert SparseGpt(bits=4).amounts(open_view(source).source) == [SparseGpt(bits=4)]


# One step after another


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (["wanda", "low_rank"], "would no longer be zero"),
        (["wanda", "low_rank:method=shared_basis"], "would no longer be zero"),
        (["wanda:parts=attention", "attention_rank:pack=false,modules=vo"], "would no longer be zero"),
        (["channel_prune:ratio=0.3,per_expert=true", "low_rank"], "use method=shared_basis"),
        (
            ["rtn:group_size=32", "channel_prune:ratio=0.5"],
            "use multiple=32, and put this step before any that rounds",
        ),
    ],
)
def test_orders_that_undo_what_was_done(
    steps: list[str], reason: str, source: Path, text: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=reason):
        press(source, tmp_path / "out", *steps, text=text, target="plugin")


@pytest.mark.parametrize(
    "steps",
    [
        ["low_rank", "wanda:parts=attention"],
        ["channel_prune:ratio=0.3,per_expert=true", "low_rank:method=shared_basis"],
        ["channel_prune:ratio=0.3,multiple=32", "rtn:group_size=32"],
        ["attention_rank:modules=qk", "attention_rank:modules=vo"],
    ],
)
@pytest.mark.few(1)
def test_orders_that_do_not(steps: list[str], source: Path, text: Path, tmp_path: Path):
    proven(press(source, tmp_path / "out", *steps, text=text, target="plugin"), source)


def test_zeros_that_gptq_fills_are_counted(source: Path, text: Path, tmp_path: Path):
    report = api.press(
        source, out=tmp_path / "out", steps=["wanda", "gptq:group_size=32"], texts=[text], **OPTIONS
    )
    told = [line for line in report.warnings if "had been pruned are no longer zero" in line]
    assert len(told) == 6  # gate and up, down, of three layers
    assert zeros(tmp_path / "out") < 0.49
    whole = api.press(
        source, out=tmp_path / "rtn", steps=["wanda", "rtn:group_size=32"], texts=[text], **OPTIONS
    )
    assert not any("no longer zero" in line for line in whole.warnings)
    assert zeros(tmp_path / "rtn") >= 0.5


# Where it is to be loaded


@pytest.mark.parametrize(
    ("step", "cured"),
    [("magnitude:pack=true", "magnitude:pack=false"), ("low_rank", "channel_prune:ratio=0.25"),
     ("attention_rank", "attention_rank:pack=false")],
)  # fmt: skip
@pytest.mark.parametrize("target", ["llama.cpp", "vllm", "transformers"])
@pytest.mark.few(2)
def test_the_nearest_plan_loads_there(
    target: str, step: str, cured: str, source: Path, text: Path, tmp_path: Path
):
    with pytest.raises(
        UserError,
        match=f"{target} does not read; the nearest plan that it can is {cured.split(':')[-1].split('=')[0] if 'pack' in cured else 'channel_prune'}",
    ):
        press(source, tmp_path / "out", step, text=text, target=target)
    press(source, tmp_path / "cured", cured, text=text, target=target)
