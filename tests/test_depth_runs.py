"""Layer Drop and Block Drop as runs: interrupted anywhere, done again from the plan, or refused before any work.

A repair is fitted on text, so the plan alone is not enough to build from; the text it was made on is, and no other.
What cannot be done, or not be loaded by the target, is said in one sentence that names the nearest plan that can.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import families
from conftest import Zoo, tiny_tokenizer
from driver import Driver
from moespresso import api
from moespresso.build import open_view
from moespresso.cli import main
from moespresso.core.errors import UserError
from test_depth_kl import LENGTH, SAMPLES, other_folder
from test_depth_steps import GONE, OPTIONS, by_hand, weights_and_config
from test_resume import KILLED, Press, contents, same

# Interrupted, and by plan


LINEAR = "layer_drop:drop=1,repair=linear"


@pytest.fixture(scope="module")
def undisturbed(driver: Driver, zoo: Zoo, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixtral that lost a layer, repaired, in the form of a qwen2_moe."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    outcome = Press(driver, zoo("mixtral"), text, out)(LINEAR)
    assert outcome.code == 0, outcome.stderr
    return out


@pytest.mark.parametrize(
    "line",
    ["end remember 0", "begin rename stats.json", "begin rename fit.safetensors", "end rename fit.safetensors",
     "begin rename model-00002-of-00006.safetensors", "end record model-00004-of-00006.safetensors",
     "begin rename config.json", "begin rename moespresso.json"],
)  # fmt: skip
@pytest.mark.breadth
def test_killed_and_run_again_it_writes_the_same_bytes(
    line: str, driver: Driver, undisturbed: Path, zoo: Zoo, text: Path, tmp_path: Path
):
    press = Press(driver, zoo("mixtral"), text, tmp_path / "out")
    first = press(LINEAR, kill=line)
    assert first.code == KILLED
    assert not (tmp_path / "out" / "moespresso.json").exists()
    second = press(LINEAR)
    assert second.code == 0, second.stderr
    assert same(contents(tmp_path / "out"), contents(undisturbed))
    done = {"measure": "end rename stats.json", "rename fit": "end rename fit.safetensors"}
    again = [what for what, end in done.items() if end in first.events and second.numbers(f"begin {what}")]
    assert again == []
    assert not set(second.numbers("begin shard")) & set(first.numbers("end record"))


@pytest.mark.parametrize("step", [LINEAR, "block_drop:drop=1,score=kl,rows=3,repair=scale"])
@pytest.mark.few(1)
def test_a_plan_and_its_text_give_the_same_bytes_again(step: str, zoo: Zoo, text: Path, tmp_path: Path):
    run = ["--text", str(text), "--samples", str(SAMPLES), "--length", str(LENGTH), "--step", step]
    source = str(zoo("mixtral"))
    assert main(["press", source, "--out", str(tmp_path / "pressed"), *run]) == 0
    assert main(["plan", source, "--out", str(tmp_path / "plan.json"), *run]) == 0
    build = ["build", source, "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "built")]
    assert main([*build, "--text", str(text)]) == 0
    assert same(weights_and_config(tmp_path / "built"), weights_and_config(tmp_path / "pressed"))


def test_a_fitted_plan_wants_its_text_and_no_other(
    zoo: Zoo, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    api.plan(zoo("mixtral"), out=tmp_path / "plan.json", texts=[text], steps=[LINEAR], **OPTIONS)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    build = ["build", zoo("mixtral"), "--plan", tmp_path / "plan.json", "--out", tmp_path / "out"]
    said = refused(capsys, build)
    assert said == "this plan is fitted on real text: give --text FILE or --dataset NAME, as it was made with"
    assert "is not the one the plan was calibrated on" in refused(capsys, [*build, "--text", other])
    assert not (tmp_path / "out").exists()


def test_another_target_is_another_result(zoo: Zoo, tmp_path: Path):
    out = by_hand(zoo("qwen2_moe"), tmp_path / "out", {"L2.experts": GONE}, target="transformers")
    with pytest.raises(UserError, match="holds another finished result"):
        by_hand(zoo("qwen2_moe"), out, {"L2.experts": GONE}, target="plugin")


# Refused


def refused(capsys: pytest.CaptureFixture[str], argv: list[Any]) -> str:
    """The one sentence of a command that must not be carried out."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    *earlier, sentence = said.err.rstrip("\n").split("\n")
    assert earlier == []
    return sentence.removeprefix("moespresso: ")


REFUSED = [
    ("mixtral", "layer_drop:drop=4", "plugin", "drop=4, but .* has only 3 layers with experts to drop"),
    ("qwen3_moe", "layer_drop:drop=3", "plugin", "has only 2 layers with experts to drop"),
    ("jamba", "layer_drop:part=attention,drop=3", "plugin", "has only 2 layers with attention to drop"),
    ("llama", "layer_drop:drop=4", "plugin", "has only 3 layers with a dense feed-forward part to drop"),
    ("mixtral", "block_drop:drop=3", "transformers", "has 3 blocks and one must stay, .*: drop at most 2"),
    ("mixtral", "block_drop:drop=3,contiguous=true", "transformers", "no such run of them exists: drop at most 2"),
    ("mixtral", "block_drop:contiguous=true,rescore=false", "transformers", "leave rescore=false out"),
    ("mixtral", "layer_drop:part=attention", "transformers",
     r"leaves L2 without attention, which transformers cannot load; .* is block_drop:drop=1, or say --target plugin"),
    ("mixtral", "layer_drop:part=attention,drop=2", "vllm", r"L1, L2 without attention, .* is block_drop:drop=2"),
    ("olmoe", "layer_drop", "transformers",
     r"leaves L2 without a feed-forward part \(.*olmoe cannot say.*\), which .* is block_drop:drop=1"),
    ("gpt_oss", "layer_drop:drop=2", "transformers", r"L2, L3 without a feed-forward part .* is block_drop:drop=2"),
    ("deepseek_v2", "layer_drop", "transformers", r"take L1, or drop whole layers .* is block_drop:drop=1"),
    ("deepseek_v2", "layer_drop", "vllm", r"without a feed-forward part, which vllm cannot load; .*block_drop:drop=1"),
    ("mixtral", "layer_drop", "llama.cpp", r"which llama.cpp cannot load; the nearest plan .* is block_drop:drop=1"),
    ("llama", "layer_drop", "transformers", r"a dense model has one width for all layers, .* is block_drop:drop=1"),
    ("mixtral", "layer_drop:repair=bias", "transformers",
     r"leaves a constant where L2 lost a part, .* is repair=linear or repair=scale"),
    ("mixtral", "block_drop:repair=bias", "plugin", "repair=bias has no place where L2 was: .* use repair=linear or scale"),
    ("glm_moe_dsa", "layer_drop:score=kl", "plugin", "cannot be compared on .*hand on more .*: use score=cosine"),
    ("glm_moe_dsa", "block_drop:score=kl", "transformers", "cannot be compared on .*: use score=cosine"),
    ("minimax", "layer_drop", "plugin", r"cannot lose a part \(.*\); drop whole blocks \(block_drop\) or experts"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "step", "target", "words"), REFUSED, ids=[" ".join(row[:3]) for row in REFUSED]
)
@pytest.mark.few(6)
def test_what_cannot_be_is_refused_before_any_work(
    family: str, step: str, target: str, words: str, zoo: Zoo, text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    def measuring(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("something was measured")

    for place in ("measured", "repairs", "searching", "sequential", "layerwise"):
        monkeypatch.setattr(f"moespresso.fit.{place}.sweep", measuring)
    monkeypatch.setattr("moespresso.fit.searching.sweep_variants", measuring)
    folder = zoo(family) if family in families.FAMILIES else other_folder(family, tmp_path)
    run = [
        folder,
        "--text",
        text,
        "--samples",
        SAMPLES,
        "--length",
        LENGTH,
        "--step",
        step,
        "--target",
        target,
    ]
    for verb in ("press", "plan"):
        said = refused(capsys, [verb, *run, "--out", tmp_path / "out"])
        assert re.search(words, said), said
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layers", "step", "cure"),
    [
        (5, "block_drop", "drop experts or layers"),
        (8, "block_drop", "say block_drop:drop=4,contiguous=true"),
        (12, "block_drop:drop=7", "say block_drop:drop=8,contiguous=true"),
        (8, "block_drop:drop=4", "say block_drop:drop=4,contiguous=true"),
        (8, "block_drop:drop=3,contiguous=true", "say block_drop:drop=4,contiguous=true"),
    ],
)
def test_blocks_out_of_a_pattern_are_refused_before_anything_is_measured(
    layers: int, step: str, cure: str, text: Path, tmp_path: Path
):
    """Which block goes shows only when it is measured, and jamba can say where experts are by a period alone."""
    run: Any = {"texts": [text], "steps": [step], **OPTIONS}
    with pytest.raises(UserError, match=rf"repeats a pattern of \d unlike blocks.*: {cure}"):
        api.press(patterned(tmp_path / "source", layers), out=tmp_path / "out", **run)
    assert not (tmp_path / "out").exists()


def patterned(folder: Path, layers: int) -> Path:
    """A jamba in which blocks repeat every fourth (every sixth in the five layers of the ordinary tiny one)."""
    fourth = {"attn_layer_period": 4, "attn_layer_offset": 1, "num_hidden_layers": layers}
    families.build("jamba", **({} if layers == 5 else fourth)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_whole_patterns_in_a_row_go(text: Path, tmp_path: Path):
    source = patterned(tmp_path / "source", 8)
    run: Any = {"texts": [text], "steps": ["block_drop:drop=4,contiguous=true"], **OPTIONS}
    api.press(source, out=tmp_path / "out", **run)
    found = api.verify(tmp_path / "out", against=source)
    assert found["ok"], found
    assert len(open_view(tmp_path / "out").source.layers) == 4


def test_a_plan_that_leaves_no_block_is_refused(zoo: Zoo, tmp_path: Path):
    with pytest.raises(UserError, match="drops all 3 blocks: at least one must stay"):
        by_hand(zoo("mixtral"), tmp_path / "out", {f"L{layer}": GONE for layer in range(3)})
    with pytest.raises(UserError, match=r"drops L0.dense, but .* has no such part to drop"):
        by_hand(zoo("mixtral"), tmp_path / "out", {"L0.dense": GONE})
    assert not (tmp_path / "out").exists()
