"""Models that transformers saved with the experts of a layer in one tensor: taken apart where a request needs that, and only there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import families
from conftest import tiny_tokenizer
from moespresso import api
from moespresso.build import Tensors, apart_view, open_view
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan
from moespresso.model import is_apart
from test_more_families import LINEAR, MIXTURES, _random_model
from test_slim import disk

# Families whose own layout has stacks.
IN_STACKS = {"gpt_oss", "granitemoe", "granitemoeshared", "granitemoehybrid", "hy_v4"}
MORE: dict[str, dict[str, Any]] = {**MIXTURES, "qwen3_5_moe_text": LINEAR}
Twins = Callable[[str], tuple[Path, Path]]


def save_both(model: PreTrainedModel, folder: Path) -> tuple[Path, Path]:
    """One model in its family's own layout, and as it lies in memory."""
    own, stacked = folder / "own", folder / "stacked"
    model.save_pretrained(own)
    model.save_pretrained(stacked, save_original_format=False)
    for each in (own, stacked):
        tiny_tokenizer().save_pretrained(each)
    return own, stacked


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """`twins(family)` are the folders of one tiny model in both layouts."""
    made: dict[str, tuple[Path, Path]] = {}

    def find(family: str) -> tuple[Path, Path]:
        if family not in made:
            model = _random_model(family, MORE[family]) if family in MORE else families.build(family)
            made[family] = save_both(model.to(torch.bfloat16), tmp_path_factory.mktemp(family))
        return made[family]

    return find


def press(folder: Path, out: Path, *steps: str, text: Path | None = None, **more: Any) -> Path:
    texts = [] if text is None else [text]
    api.press(folder, out=out, steps=steps, texts=texts, samples=4, length=16, **more)
    found = api.verify(out, against=folder)
    assert found["ok"], found
    return out


def same(one: Path, other: Path) -> bool:
    first, second = disk(one), disk(other)
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("family", [*families.FAMILIES, *MORE])
@pytest.mark.few(5)
def test_every_matrix_is_found_where_it_lies_in_its_stack(family: str, twins: Twins):
    own, stacked = twins(family)
    view = open_view(stacked)
    apart = apart_view(view)
    assert (apart is None) == (family in IN_STACKS)
    assert apart_view(open_view(own)) is None
    if apart is None:
        return
    wanted = disk(own)
    assert apart.checkpoint.tensors.keys() == wanted.keys()
    with Tensors(stacked) as reader:
        for name, ref in apart.checkpoint.tensors.items():
            assert torch.equal(reader.reader.tensor(ref), wanted[name]), name
    assert apart.source.digest == view.source.digest
    assert apart.source.cost() == view.source.cost()


@pytest.mark.parametrize(
    ("family", "step"),
    [("mixtral", "rtn:group_size=8"), ("nemotron_h", "rtn:group_size=0,bits=3"), ("qwen3_5_moe_text", "rtn:group_size=0"),
     ("deepseek_v3", "gptq:group_size=0"), ("phimoe", "gptq:group_size=8"), ("jamba", "low_rank")],
)  # fmt: skip
@pytest.mark.few(1)
def test_what_needs_experts_apart_gives_what_the_own_layout_gives(
    family: str, step: str, twins: Twins, text: Path, tmp_path: Path
):
    own, stacked = twins(family)
    outs = [press(each, tmp_path / each.name, step, text=text, target="plugin") for each in (own, stacked)]
    assert same(*outs)
    manifests = [json.loads((out / "moespresso.json").read_text()) for out in outs]
    assert [manifest.get("apart") for manifest in manifests] == [None, True]
    assert any("written apart" in note for note in manifests[1]["notes"])
    assert not any("written apart" in note for note in manifests[0]["notes"])


@pytest.mark.parametrize(
    "step",
    ["channel_prune:ratio=0.4,per_expert=true,score=magnitude,refit=expert", "wanda:pack=true",
     "sparsegpt:bits=4,group_size=0", "magnitude:sparsity=0.4"],
)  # fmt: skip
@pytest.mark.few(1)
def test_so_does_every_other_step_that_needs_them(step: str, twins: Twins, text: Path, tmp_path: Path):
    own, stacked = twins("olmoe")
    outs = [press(each, tmp_path / each.name, step, text=text, target="plugin") for each in (own, stacked)]
    assert same(*outs)


@pytest.mark.parametrize(
    "steps", [["channel_prune:ratio=0.4"], ["magnitude:sparsity=2:4"], ["expert_drop:keep=7,score=aimer"]]
)
@pytest.mark.few(1)
def test_what_stacks_can_hold_stays_in_stacks(steps: list[str], twins: Twins, text: Path, tmp_path: Path):
    own, stacked = twins("mixtral")
    outs = [press(each, tmp_path / each.name, *steps, text=text) for each in (own, stacked)]
    assert "apart" not in json.loads((outs[1] / "moespresso.json").read_text())
    assert disk(outs[1]).keys() == disk(stacked).keys()
    apart = apart_view(open_view(outs[1]))
    assert apart is not None
    wanted = disk(outs[0])
    with Tensors(outs[1]) as reader:
        assert all(
            torch.equal(reader.reader.tensor(ref), wanted[name])
            for name, ref in apart.checkpoint.tensors.items()
        )


def test_names_keep_what_a_wrapper_put_before_them(twins: Twins, tmp_path: Path):
    folders = twins("qwen3_5_moe_text")
    found: list[set[str]] = []
    for folder in folders:
        wrapped = tmp_path / folder.name
        wrapped.mkdir()
        for file in folder.glob("*.json"):
            (wrapped / file.name).write_bytes(file.read_bytes())
        tensors = {
            name.replace("model.", "model.language_model.", 1): each for name, each in disk(folder).items()
        }
        save_file(tensors, wrapped / "model.safetensors")
        view = open_view(wrapped)
        found.append(set((apart_view(view) or view).checkpoint.tensors))
    assert found[0] == found[1]
    assert len(found[0]) == len(disk(folders[0]))


def test_an_empty_plan_leaves_every_byte(twins: Twins, tmp_path: Path):
    _, stacked = twins("mixtral")
    made = Plan(open_view(stacked).source.digest)
    made.save(tmp_path / "plan.json")
    api.build(stacked, plan=tmp_path / "plan.json", out=tmp_path / "out")
    assert same(stacked, tmp_path / "out")


@pytest.mark.breadth
def test_a_plan_and_a_size_are_met_as_in_the_own_layout(twins: Twins, tmp_path: Path):
    own, stacked = twins("glm4_moe")
    outs = [press(each, tmp_path / each.name, "rtn:group_size=8", size="60%") for each in (own, stacked)]
    assert same(*outs)
    api.plan(stacked, steps=["rtn:group_size=8"], size="60%", out=tmp_path / "plan.json")
    api.build(stacked, plan=tmp_path / "plan.json", out=tmp_path / "built")
    assert same(outs[1], tmp_path / "built")
    assert api.verify(tmp_path / "built", against=stacked)["ok"]


def test_stock_transformers_loads_what_was_taken_apart(twins: Twins, tmp_path: Path):
    _, stacked = twins("mixtral")
    out = press(stacked, tmp_path / "out", "rtn:group_size=8")
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found = model(input_ids=ids).logits
        original: Any = AutoModelForCausalLM.from_pretrained(stacked, dtype=torch.float32).eval()
        wanted = original(input_ids=ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.4


@pytest.mark.breadth
def test_apart_and_under_another_name_at_once(twins: Twins, text: Path, tmp_path: Path):
    own, stacked = twins("mixtral")
    steps = ["layer_drop:drop=1", "rtn:group_size=8"]
    outs = [press(each, tmp_path / each.name, *steps, text=text) for each in (own, stacked)]
    assert json.loads((outs[1] / "config.json").read_text())["model_type"] == "qwen2_moe"
    assert same(*outs)


def test_layers_may_differ_in_form_and_lie_in_several_files(twins: Twins, tmp_path: Path):
    own, stacked = twins("olmoe")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in own.glob("*.json"):
        (mixed / file.name).write_bytes(file.read_bytes())
    apart, whole = disk(own), disk(stacked)
    first = {name: tensor for name, tensor in apart.items() if "layers.1." not in name}
    second = {name: tensor for name, tensor in whole.items() if "layers.1." in name}
    files = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    for name, tensors in files.items():
        save_file(tensors, mixed / name)
    index = {name: file for file, tensors in files.items() for name in tensors}
    (mixed / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    outs = [press(each, tmp_path / f"out-{each.name}", "rtn:group_size=0") for each in (own, mixed)]
    assert same(*outs)


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "hy_v4"])
def test_families_that_have_stacks_themselves_are_refused_as_before(
    family: str, twins: Twins, tmp_path: Path
):
    _, stacked = twins(family)
    with pytest.raises(UserError, match="all experts of a layer in one tensor"):
        api.press(stacked, out=tmp_path / "out", steps=["rtn:group_size=8"], target="plugin")


def test_what_cannot_be_done_in_either_form_is_told_of_the_one_that_could(twins: Twins, tmp_path: Path):
    _, stacked = twins("mixtral")
    with pytest.raises(UserError, match=r"which groups of 32 do not divide: use group_size="):
        api.press(stacked, out=tmp_path / "out", steps=["rtn:group_size=32"])


def test_a_stacked_result_is_not_taken_for_one_apart(twins: Twins, tmp_path: Path):
    _, stacked = twins("mixtral")
    out = press(stacked, tmp_path / "out", "rtn:group_size=8")
    manifest = json.loads((out / "moespresso.json").read_text())
    del manifest["apart"]
    (out / "moespresso.json").write_text(json.dumps(manifest))
    failed = [check for check in api.verify(out, against=stacked)["checks"] if not check["ok"]]
    assert len(failed) == 1
    assert not is_apart(open_view(out).checkpoint)
