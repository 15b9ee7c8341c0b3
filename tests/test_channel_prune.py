"""Channel pruning as a step: the result is an ordinary narrower model, in stock transformers where its config can say so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
from conftest import Zoo, write_wide
from driver import Driver
from moespresso import api
from moespresso.build import open_view
from moespresso.core.errors import UserError
from moespresso.effect import price
from moespresso.run import Recipe
from test_depth_steps import plan_of
from test_resume import KILLED, Press, contents, same
from test_slim import OPTIONS, disk, disk_of, press, proven

HALF = "channel_prune:ratio=0.5"  # rounded up to a multiple of eight
# One width says all in these; in those of the second row it also counts shared experts.
PLAIN = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "minimax_m2", "phimoe"]
SHARED = ["deepseek_v2", "deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe"]


@pytest.mark.parametrize("family", PLAIN + SHARED)
@pytest.mark.parametrize(
    "step", [HALF, "channel_prune:width=8,score=camera,refit=expert", "channel_prune:width=8,score=heapr"]
)
@pytest.mark.few(2)
def test_stock_transformers_loads_it_with_our_values(
    family: str, step: str, zoo: Zoo, text: Path, tmp_path: Path
):
    out = press(zoo(family), tmp_path / "out", step, text=text)
    assert "logits within" in proven(out, zoo(family))["stock transformers loads it and agrees"]
    width = open_view(zoo(family)).source.moe_layers[0].width
    wanted = 8 if "width" in step else -(-width // 16) * 8
    assert {layer.width for layer in open_view(out).source.moe_layers} == {wanted}
    priced = price(plan_of(out), open_view(zoo(family)).source)
    experts = sum(t.nbytes for name, t in disk(out).items() if ".experts." in name)
    before = sum(t.nbytes for name, t in disk_of(zoo(family)).items() if ".experts." in name)
    assert experts == before * wanted // width
    if family in PLAIN:
        assert priced.bytes == sum(tensor.nbytes for tensor in disk(out).values())
    for name, tensor in disk(out).items():
        if ".experts." not in name and "shared" not in name:
            torch.testing.assert_close(tensor, disk_of(zoo(family))[name], rtol=0, atol=0)


@pytest.mark.parametrize("family", SHARED)
@pytest.mark.few(2)
def test_shared_experts_keep_their_channels_and_gain_zeros(family: str, zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo(family), tmp_path / "out", "channel_prune:width=8", text=text)
    before, after = disk_of(zoo(family)), disk(out)
    for name in (name for name in before if "shared" in name):
        inside = tuple(slice(size) for size in before[name].shape)
        torch.testing.assert_close(after[name][inside], before[name], rtol=0, atol=0)
        assert float(after[name].float().abs().sum()) == float(after[name][inside].float().abs().sum())


@pytest.mark.parametrize("family", ["jamba", "hunyuan_v1_moe"])
@pytest.mark.few(1)
def test_a_config_that_cannot_say_it_needs_the_plugin(family: str, zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot say without changing its dense layers.*--target plugin"):
        press(zoo(family), tmp_path / "stock", HALF, text=text)
    assert not (tmp_path / "stock").exists()
    out = press(zoo(family), tmp_path / "out", HALF, text=text, target="plugin")
    proven(out, zoo(family))


def test_what_stays_is_a_part_of_what_was_and_every_expert_keeps_as_much(
    zoo: Zoo, text: Path, tmp_path: Path
):
    out = press(zoo("qwen3_moe"), tmp_path / "out", f"{HALF},refit=none,score=magnitude", text=text)
    before, after = disk_of(zoo("qwen3_moe")), disk(out)
    for name in (name for name in after if ".experts." in name and "down" in name):
        rows = {tuple(column.tolist()) for column in before[name].T}
        assert all(tuple(column.tolist()) in rows for column in after[name].T)
        gate, up = (name.replace("down", other) for other in ("gate", "up"))
        pairs = {(*g.tolist(), *u.tolist()) for g, u in zip(before[gate], before[up], strict=True)}
        assert all((*g.tolist(), *u.tolist()) in pairs for g, u in zip(after[gate], after[up], strict=True))


def test_nothing_to_remove_changes_nothing(zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo("mixtral"), tmp_path / "out", "channel_prune:ratio=0", text=text)
    before, after = disk_of(zoo("mixtral")), disk_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "steps",
    [
        ["expert_drop:keep=6", HALF],
        [HALF, "expert_drop:keep=6"],
        [HALF, "channel_prune:ratio=0.25,refit=layer"],
        ["expert_merge:ratio=0.25", HALF],
        [HALF, "layer_drop"],
        [HALF, "block_drop"],
        ["channel_prune:width=32", "gptq:group_size=32"],
        ["channel_prune:width=32", "rtn:group_size=32"],
    ],
)
@pytest.mark.few(1)
def test_before_and_after_other_steps(steps: list[str], text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    proven(press(source, tmp_path / "out", *steps, text=text), source)


@pytest.mark.few(1)
def test_a_packed_folder_is_narrowed_and_packed_again(packed: Path, text: Path, tmp_path: Path):
    out = press(packed, tmp_path / "out", "channel_prune:width=64", text=text)
    proven(out, packed)
    assert any(name.endswith("weight_packed") for name in disk(out))
    with pytest.raises(UserError, match=r"groups of 32, which do not divide 48.*multiple=32"):
        press(packed, tmp_path / "other", HALF, text=text)


def test_the_plugin_loads_and_generates_with_layers_of_their_own_width(zoo: Zoo, text: Path, tmp_path: Path):
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    recipe = Recipe().with_options(model=zoo("mixtral"), steps=[HALF], texts=[text], **OPTIONS)
    made = api.press(zoo("mixtral"), out=tmp_path / "even", recipe=recipe).plan
    unit, narrow = next(iter(made.stages[0].treatments.items()))
    stage = replace(
        made.stages[0], treatments={**made.stages[0].treatments, unit: replace(narrow, channels=16)}
    )
    replace(made, stages=(stage,)).save(plan)
    with pytest.raises(UserError, match="unequal width"):
        api.build(zoo("mixtral"), plan=plan, out=out, recipe=recipe)
    api.build(zoo("mixtral"), plan=plan, out=out, recipe=recipe, target="plugin")
    proven(out, zoo("mixtral"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert [layer.mlp.experts.down_proj.shape[-1] for layer in model.model.layers].count(16) == 1
    ids = families.random_ids(model.config, 1, 5)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 8)


def test_channels_go_where_they_cost_least(zoo: Zoo, text: Path, tmp_path: Path):
    step = "channel_prune:ratio=0.4,scope=global"
    with pytest.raises(
        UserError, match=r"scope=global leaves unequal layers.*scope=layer,ratio=0.4, or say --target plugin"
    ):
        press(zoo("mixtral"), tmp_path / "stock", step, text=text)
    out = press(zoo("mixtral"), tmp_path / "out", step, text=text, target="plugin")
    proven(out, zoo("mixtral"))
    widths = [layer.width for layer in open_view(out).source.moe_layers]
    before = [layer.width for layer in open_view(zoo("mixtral")).source.moe_layers]
    assert sum(widths) == sum(24 for _ in before)
    assert all(width % 8 == 0 for width in widths)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("channel_prune", "say how much: ratio=0.25"),
        ("channel_prune:ratio=1", "ratio=1.0 must be at least 0 and below 1"),
        ("channel_prune:ratio=-0.1", "ratio=-0.1 must be at least 0"),
        ("channel_prune:width=0", "width=0 must be a multiple of 8"),
        ("channel_prune:width=20", "width=20 must be a multiple of 8.*use 16"),
        ("channel_prune:ratio=0.5,multiple=3", "multiple=3 must be a multiple of 8"),
        ("channel_prune:width=4000", "width=4000, but experts have 40 channels"),
        ("channel_prune:ratio=0.5,width=8", "ratio=0.5 and width=8 both say how much: leave one out"),
        ("channel_prune:width=64,multiple=24", "width=64 is no multiple of multiple=24: use 72, or leave"),
        ("channel_prune:ratio=0.5,damping=-1", "damping=-1.0 must be a number of at least 0"),
        ("channel_prune:ratio=0.5,score=best", "score"),
    ],
)
def test_wishes_that_cannot_be(step: str, reason: str, zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match=reason):
        press(zoo("mixtral"), tmp_path / "out", step, text=text)
    assert not (tmp_path / "out").exists()


def test_experts_with_biases_in_one_tensor_are_refused(zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match="stores its experts as"):
        press(zoo("gpt_oss"), tmp_path / "out", HALF, text=text)


def test_the_width_can_be_a_multiple(zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo("mixtral"), tmp_path / "out", "channel_prune:ratio=0.5,multiple=32", text=text)
    assert {layer.width for layer in open_view(out).source.moe_layers} == {32}  # 20 of 40, rounded up


def test_a_byte_budget_finds_the_width(zoo: Zoo, text: Path, tmp_path: Path):
    whole = open_view(zoo("mixtral")).source.cost().bytes
    size = round(whole * 0.9)
    out = press(zoo("mixtral"), tmp_path / "out", "channel_prune", text=text, size=size)
    assert whole * 0.8 < sum(tensor.nbytes for tensor in disk(out).values()) <= size


def test_only_experts_with_few_tokens_are_told(zoo: Zoo, text: Path, tmp_path: Path):
    report = api.press(
        zoo("mixtral"), out=tmp_path / "out", steps=[HALF], texts=[text], samples=24, length=24
    )
    coverage = json.loads((tmp_path / "out" / "moespresso.json").read_text())["coverage"]
    for layer, row in coverage.items():
        few = [count for count in row["tokens"] if 0 < count < 24]
        assert any(f"{layer}: " in line and "saw fewer tokens" in line for line in report.warnings) == bool(
            few
        )
    assert any(
        min(row["tokens"]) >= 24 for row in coverage.values()
    )  # a layer of which nothing is to be told


def test_few_tokens_are_told(zoo: Zoo, tmp_path: Path):
    few = tmp_path / "few.txt"
    few.write_text("red green blue")
    for damping, told in ((0, "damping raised"), (0.003, "saw fewer tokens than they keep channels")):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        report = api.press(zoo("mixtral"), out=tmp_path / "out", steps=[f"{HALF},damping={damping}"], texts=[few], samples=1,
                           length=8)  # fmt: skip
        assert any(told in line for line in report.warnings)
    assert any("without any were treated by magnitude" in note for note in report.notes)
    proven(tmp_path / "out", zoo("mixtral"))


@pytest.mark.parametrize("line", ["end rename slim-00001.safetensors", "end remember 2", "begin rename moespresso.json"])  # fmt: skip
@pytest.mark.breadth
def test_killed_and_taken_up(line: str, driver: Driver, zoo: Zoo, text: Path, tmp_path: Path):
    whole = Press(driver, zoo("mixtral"), text, tmp_path / "whole")
    assert whole(HALF).code == 0
    press = Press(driver, zoo("mixtral"), text, tmp_path / "out")
    assert press(HALF, kill=line).code == KILLED
    assert press(HALF).code == 0
    assert same(contents(press.out), contents(whole.out))
