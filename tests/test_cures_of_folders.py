"""Cures of what is wrong with folders, files, plans and texts: each is done as the sentence says, and does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import families
from conftest import Zoo, tiny_tokenizer
from moespresso import api
from moespresso.build import open_view
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan
from moespresso.effect import validated
from test_slim import OPTIONS

INDEX = "model.safetensors.index.json"


def rewritten(
    source: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any
) -> Path:
    """A copy of a checkpoint in one file, with its tensors and its config changed."""
    folder.mkdir()
    for file in source.glob("*.json"):
        if file.name != INDEX:
            shutil.copy(file, folder)
    said = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(said))
    tensors = {
        name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    save_file(change(tensors), folder / "model.safetensors")
    return folder


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items() if change(name)}


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        open_view(folder)
    return str(error.value)


def by_words(pairs: dict[str, str]) -> Callable[[str], str]:
    """Words of experts' names for others."""
    return lambda name: re.sub(r"(?<=\.)\w+(?=\.weight)", lambda found: pairs.get(found[0], found[0]), name) \
        if re.search(r"experts\.\d", name) else name  # fmt: skip


@pytest.mark.parametrize(
    ("family", "pairs"),
    [("mixtral", {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}),
     ("minimax_m2", {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}),
     ("qwen3_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
     ("deepseek_v3", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"})],
)  # fmt: skip
def test_names_of_another_writer_are_renamed_as_it_says(
    family: str, pairs: dict[str, str], zoo: Zoo, tmp_path: Path
):
    folder = rewritten(zoo(family), tmp_path / "other", renamed(by_words(pairs)))
    said = refused(folder)
    assert "random numbers" in said
    assert "download" not in said
    back = dict(re.findall(r"(\w+) to (\w+)", said.partition("names of experts: ")[2]))
    assert back == {new: old for old, new in pairs.items()}
    mended = rewritten(folder, tmp_path / "mended", renamed(by_words(back)))
    assert open_view(mended).source.cost() == open_view(zoo(family)).source.cost()


def test_a_front_is_taken_off(zoo: Zoo, tmp_path: Path):
    folder = rewritten(zoo("mixtral"), tmp_path / "wrapped", renamed(lambda name: f"language_model.{name}"))
    found = re.search(r"take (\S+) off the front", refused(folder))
    assert found
    open_view(rewritten(folder, tmp_path / "mended", renamed(lambda name: name.removeprefix(found[1]))))


def test_an_adapter_is_merged_first(zoo: Zoo, tmp_path: Path):
    tensors = rewritten(
        zoo("mixtral"), tmp_path / "lora", renamed(lambda name: name.replace("q_proj.", "q_proj.base_layer."))
    )
    assert "merge it into its model first" in refused(tensors)
    open_view(rewritten(tensors, tmp_path / "merged", renamed(lambda name: name.replace(".base_layer", ""))))


@pytest.mark.parametrize(
    ("lost", "config"),
    [("layers.1.input_layernorm", {}), ("experts.3.w2", {}), ("", {"num_hidden_layers": 5}), ("", {"num_local_experts": 9}),
     ("lm_head", {})],
)  # fmt: skip
def test_whole_files_are_not_to_be_fetched_again(lost: str, config: dict[str, Any], zoo: Zoo, tmp_path: Path):
    keep = renamed(lambda name: "" if lost and lost in name else name)
    folder = rewritten(zoo("mixtral"), tmp_path / "other", keep, **config)
    said = refused(folder)
    assert "take config.json and the files from one place" in said
    assert "download" not in said
    source = zoo("mixtral")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    for file in [*source.glob("*.safetensors"), source / INDEX, source / "config.json"]:
        shutil.copy(file, folder)
    open_view(folder)


def test_what_is_cut_short_or_gone_is_fetched_again(zoo: Zoo, tmp_path: Path):
    source = zoo("mixtral")
    first = min(file.name for file in source.glob("*.safetensors"))

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-100])

    def emptied(file: Path) -> None:
        file.write_bytes(b"")

    for number, harm in enumerate((cut, emptied, Path.unlink)):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        harm(folder / first)
        assert re.search(rf"download (it|{first}) again", refused(folder))
        shutil.copy(source / first, folder)
        open_view(folder)


@pytest.mark.parametrize(
    "step",
    ["expert_drop:keep=5,score=reap", "expert_drop:keep=5,score=aimer,renormalise=compensate",
     "expert_drop:keep=5,score=ean,replace=novice", "gptq:group_size=32", "wanda", "low_rank",
     "channel_prune:score=magnitude,refit=none,ratio=0.5"],
)  # fmt: skip
@pytest.mark.few(2)
def test_steps_that_see_text_name_what_sees_none(step: str, source: Path, text: Path, tmp_path: Path):
    target = "plugin" if "novice" in step or "low_rank" in step else "transformers"
    with pytest.raises(UserError, match="give --text FILE") as error:
        api.press(source, out=tmp_path / "out", steps=[step], target=target)
    found = re.search(r"\(or use (?:another step, )?(.+), which needs none\)", str(error.value))
    assert found
    for said in found[1].split(" or "):
        kind, _, before = step.partition(":")
        settings = dict(pair.split("=") for pair in before.split(",") if pair)
        other = f"{said}:group_size=32" if said in ("rtn", "hqq") else said
        if "=" in said:
            settings |= dict(pair.split("=") for pair in said.split(","))
            other = f"{kind}:{','.join(f'{name}={value}' for name, value in settings.items())}"
        api.press(source, out=tmp_path / said, steps=[other], target=target)
    api.press(source, out=tmp_path / "text", steps=[step], target=target, texts=[text], **OPTIONS)


def test_plans_and_texts_are_mended_as_told(source: Path, text: Path, zoo: Zoo, tmp_path: Path):
    made = tmp_path / "plan.json"
    api.plan(source, steps=["gptq:group_size=32"], texts=[text], out=made, **OPTIONS)
    other = zoo("mixtral")
    with pytest.raises(UserError, match="make a new plan for this one"):
        api.build(other, plan=made, out=tmp_path / "other")
    api.plan(other, steps=["gptq:group_size=0"], texts=[text], out=tmp_path / "new.json", **OPTIONS)
    api.build(other, plan=tmp_path / "new.json", out=tmp_path / "other", texts=[text])
    with pytest.raises(UserError, match="give --text FILE or --dataset NAME, as it was made with"):
        api.build(source, plan=made, out=tmp_path / "out")
    wrong = tmp_path / "wrong.txt"
    wrong.write_text(text.read_text()[::-1])
    with pytest.raises(UserError, match="give the same files in the same order"):
        api.build(
            source,
            plan=made,
            out=tmp_path / "out",
            texts=[wrong],
        )
    api.build(
        source,
        plan=made,
        out=tmp_path / "out",
        texts=[text],
    )


def test_a_plan_by_hand_names_what_fits_all(zoo: Zoo, tmp_path: Path):
    model = zoo("mixtral")
    api.plan(model, steps=["rtn:group_size=8"], out=tmp_path / "plan.json")
    body = (tmp_path / "plan.json").read_text().replace('"group_size": 8', '"group_size": 32')
    with pytest.raises(UserError) as error:
        validated(Plan.from_json(body), open_view(model).source)
    found = re.search(r"use group_size=(\d+)", str(error.value))
    assert found
    mended = body.replace('"group_size": 32', f'"group_size": {found[1]}')
    validated(Plan.from_json(mended), open_view(model).source)


@pytest.mark.parametrize(
    ("bits", "to", "cure"),
    [(8, "awq", "use bits=4, or the layout"), (3, "gptq", "use the layout"), (4, "awq", "use the layout")],
)
@pytest.mark.few(1)
def test_an_export_that_does_not_fit_says_what_does(bits: int, to: str, cure: str, tmp_path: Path):
    width = {8: 96, 3: 112, 4: 100}[bits]
    families.build("mixtral", hidden_size=48, intermediate_size=width).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    packed = tmp_path / "packed"
    api.press(tmp_path / "model", out=packed, steps=[f"rtn:bits={bits},group_size=0"])
    with pytest.raises(UserError, match=cure):
        api.export(packed, to=to, out=tmp_path / "exported")
    api.export(packed, to="compressed-tensors", out=tmp_path / "same")
    if "bits=4" in cure:
        api.press(tmp_path / "model", out=tmp_path / "four", steps=["rtn:bits=4,group_size=0"])
        api.export(tmp_path / "four", to=to, out=tmp_path / "exported")


def test_folders_to_write_to(source: Path, zoo: Zoo, tmp_path: Path):
    steps = ["expert_drop:keep=6,score=aimer"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for out, cure in ((tmp_path / "full", "choose an empty or new folder"), (source / "out", "choose another"),
                      (tmp_path / "full" / "mine.txt", "give a folder")):  # fmt: skip
        with pytest.raises(UserError, match=cure):
            api.press(source, out=out, steps=steps)
    out = tmp_path / "new"
    api.press(source, out=out, steps=steps)
    with pytest.raises(UserError, match="choose another --out, or add --no-resume to replace it"):
        api.press(source, out=out, steps=["expert_drop:keep=5,score=aimer"])
    api.press(source, out=out, steps=["expert_drop:keep=5,score=aimer"], runtime=api.Runtime(resume=False))
    with pytest.raises(UserError, match="press it with gptq or another step"):
        api.export(out, to="gptq", out=tmp_path / "exported")
