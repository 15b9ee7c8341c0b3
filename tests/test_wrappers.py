"""Wrappers: the language model is found and compressed, all else travels as it is, and images are answered as before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moespresso
from conftest import tiny_tokenizer
from families import read_tensor
from moespresso import api
from moespresso.build import open_view
from moespresso.core.errors import UserError
from test_depth_steps import plan_of
from test_engine import close, streamed_logits
from test_slim import disk_of as disk
from wrappers import WHOLE, WRAPPERS, cut_by_hand, language_model, picture, wrapper_config, write_wrapper

Wrapped = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="session")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Wrapped:
    """`wrapped(name)` is the folder of a tiny wrapper, and the model that was written."""
    made: dict[str, tuple[Path, PreTrainedModel]] = {}

    def write(name: str) -> tuple[Path, PreTrainedModel]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, write_wrapper(name, folder)
            tiny_tokenizer().save_pretrained(folder)
        return made[name]

    return write


def tokens() -> torch.Tensor:
    return torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.few(3)
def test_what_is_streamed_is_what_the_whole_answers(name: str, wrapped: Wrapped):
    folder, model = wrapped(name)
    with torch.no_grad():
        wanted = model(input_ids=tokens(), use_cache=False).logits
    close(streamed_logits(open_view(folder), tokens()), wanted)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.few(3)
def test_all_but_the_language_model_travels_and_is_counted(
    name: str, wrapped: Wrapped, text: Path, tmp_path: Path
):
    folder, model = wrapped(name)
    out = tmp_path / "out"
    pressed = api.press(folder, out=out, steps=["expert_drop:keep=6"], texts=[text], samples=4, length=16)
    assert api.verify(out, against=folder)["ok"]
    before, after = disk(folder), disk(out)
    beside = [name for name in before if "vis" in name or "projector" in name]
    assert beside
    assert all(torch.equal(read_tensor(folder, name), read_tensor(out, name)) for name in beside)
    assert (out / "preprocessor_config.json").read_bytes() == (
        folder / "preprocessor_config.json"
    ).read_bytes()
    weights = [sum(tensor.nbytes for tensor in each.values()) for each in (before, after)]
    assert [cost.bytes for cost in (pressed.before, pressed.after)] == weights
    assert "AutoModelForMultimodalLM.from_pretrained(folder)" in (out / "README.md").read_text()
    assert type(transformers.AutoModelForMultimodalLM.from_pretrained(out)) is type(model)
    config, old = (json.loads((place / "config.json").read_text()) for place in (out, folder))
    assert config["vision_config"] == old["vision_config"]
    assert config["architectures"] == old["architectures"] == [type(moespresso.load(out)).__name__]


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe"])
def test_an_image_is_answered_as_by_the_model_cut_by_hand(name: str, wrapped: Wrapped, tmp_path: Path):
    folder, model = wrapped(name)
    out = tmp_path / "out"
    api.press(folder, out=out, steps=["expert_drop:keep=6,score=aimer"])
    pressed = moespresso.load(out)
    kept = {
        unit.layer: list(treatment.keep or ())
        for unit, treatment in plan_of(out).stages[0].treatments.items()
    }
    asked = picture(model)
    with torch.no_grad():
        whole = model(**asked).logits
        wanted = cut_by_hand(
            moespresso.load(folder), {layer: kept[layer] for layer in kept if layer is not None}
        )(**asked).logits
        found = pressed(**asked).logits
        blind = pressed(input_ids=asked["input_ids"]).logits
    close(found, wanted)
    assert float((found - whole).abs().max()) > 1e-3  # experts that are gone were used
    assert float((found - blind).abs().max()) > 1e-3  # and the image was seen


@pytest.mark.parametrize(
    "step", ["block_drop:drop=1", "channel_prune:ratio=0.25", "gptq:bits=4,group_size=8", "layer_drop:drop=1"]
)
@pytest.mark.parametrize("name", ["glm4v_moe", "kimi_k25", "internvl"])
@pytest.mark.few(4)
def test_every_kind_of_step_comes_out_as_the_class_of_the_whole(
    name: str, step: str, wrapped: Wrapped, text: Path, tmp_path: Path
):
    folder, model = wrapped(name)
    target = "plugin" if step.startswith("layer_drop") else "transformers"
    api.press(folder, out=tmp_path / "out", steps=[step], texts=[text], samples=4, length=16, target=target)
    verified = api.verify(tmp_path / "out", against=folder)
    assert verified["ok"], [check for check in verified["checks"] if not check["ok"]]
    loaded = moespresso.load(tmp_path / "out")
    assert type(loaded) is type(model)
    assert len(language_model(loaded).layers) == 3 - step.startswith("block_drop")


def test_two_sets_of_experts_are_left_whole(wrapped: Wrapped, text: Path, tmp_path: Path):
    folder, model = wrapped(WHOLE)
    with torch.no_grad():
        wanted = model(input_ids=tokens(), use_cache=False).logits
    close(streamed_logits(open_view(folder), tokens()), wanted)
    with pytest.raises(UserError, match=r"leaves whole .*2 sets of experts"):
        api.press(folder, out=tmp_path / "out", steps=["expert_drop:keep=6,score=aimer"])
    api.press(folder, out=tmp_path / "out", steps=["block_drop:drop=1"], texts=[text], samples=4, length=16)
    verified = api.verify(tmp_path / "out", against=folder)
    assert verified["ok"], [check for check in verified["checks"] if not check["ok"]]


@pytest.mark.parametrize("harm", ["gone", "cut"])
@pytest.mark.parametrize(
    "tensor",
    ["moe_statics.e_score_correction_bias", "experts.3.down_proj.weight", "experts.14.down_proj.weight"],
)
def test_a_tensor_that_several_parameters_are_made_of_is_looked_for(
    tensor: str, harm: str, wrapped: Wrapped, tmp_path: Path
):
    folder = tmp_path / "damaged"
    shutil.copytree(wrapped(WHOLE)[0], folder)
    name = f"model.layers.2.mlp.{tensor}"
    state = disk(folder)
    whole = state.pop(name)
    if harm == "cut":
        state[name] = whole[:-1].clone()
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.2\.mlp"):
        api.inspect(folder)


def test_what_is_joined_beside_packed_parts_has_the_name_that_the_whole_has(wrapped: Wrapped, tmp_path: Path):
    folder, model = wrapped("qwen4_exp")
    api.press(folder, out=tmp_path / "out", steps=["rtn:bits=4,group_size=8"])
    verified = api.verify(tmp_path / "out", against=folder)
    assert verified["ok"], [check for check in verified["checks"] if not check["ok"]]
    joined = [name for name in disk(tmp_path / "out") if "ngram" in name and name not in disk(folder)]
    assert joined
    assert set(joined) <= model.state_dict().keys()


def test_blocks_that_images_are_added_behind_are_said_to_move(wrapped: Wrapped, text: Path, tmp_path: Path):
    folder, _ = wrapped("qwen3_vl_moe")
    pressed = api.press(
        folder, out=tmp_path / "out", steps=["block_drop:drop=1"], texts=[text], samples=4, length=16
    )
    assert any("deepstack" in note for note in pressed.notes)
    pressed = api.press(folder, out=tmp_path / "experts", steps=["expert_drop:keep=6,score=aimer"])
    assert not any("deepstack" in note for note in pressed.notes)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "glm4v_moe"])
def test_a_config_alone_has_a_price(family: str, tmp_path: Path):
    """Where it says nothing of its language model, that has the defaults of its class."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    inspected = api.inspect(tmp_path / "config.json")
    default = CONFIG_MAPPING[family]().text_config
    assert inspected["num_layers"] == default.num_hidden_layers
    assert inspected["bytes"]["other"] > 0


def test_a_wrapped_dense_model_has_no_experts_to_drop(tmp_path: Path):
    config = wrapper_config("qwen3_vl_moe").to_dict()
    text = {key: value for key, value in config["text_config"].items() if "experts" not in key}
    text["model_type"] = "qwen3_vl_text"
    vision = {**config["vision_config"], "model_type": "qwen3_vl_vision"}
    dense = CONFIG_MAPPING["qwen3_vl"](text_config=text, vision_config=vision)
    transformers.Qwen3VLForConditionalGeneration._from_config(dense).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="is dense"):
        api.press(tmp_path / "dense", out=tmp_path / "out", steps=["expert_drop:keep=6,score=aimer"])
