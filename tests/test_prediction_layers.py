"""Layers that predict tokens further ahead: cut like the trunk, kept, dropped, and loaded from what is written.

The references: AIMER's formula, transformers' own `MtpModel`, and the files themselves.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import families
from conftest import Zoo, tiny_tokenizer, write_model
from moespresso import api
from moespresso.cli import main
from moespresso.core.errors import UserError
from moespresso.core.plan import Ahead, Plan
from moespresso.report import Report
from test_more_families import MIXTURES

DROP = "expert_drop:ratio=0.34,score=random"
NUMBERED = {"deepseek_v3": "model.layers.4.", "glm4_moe": "model.layers.3."}
PREFIX = NUMBERED | {"qwen3_next": "mtp.layers.0."}
LEFT = {"deepseek_v3": 9, "glm4_moe": 8, "qwen3_next": 5}
GROUPS = {"deepseek_v3": 3, "glm4_moe": 2, "qwen3_next": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """`source(family)` is its checkpoint with a prediction layer, written when first asked for."""
    root = tmp_path_factory.mktemp("ahead")

    def folder(family: str) -> Path:
        path = root / family
        if path.exists():
            return path
        if family in NUMBERED:
            return families.with_prediction_layer(write_model(family, path, shards=1))
        fields = families.COMMON | {"num_attention_heads": 4, "num_experts_per_tok": 2} | MIXTURES[family]
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**fields)).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        return families.with_mtp_module(path)

    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def press(source: Path, out: Path, *steps: str, **options: Any) -> Report:
    """Press and verify against the source."""
    report = api.press(source, out=out, steps=steps, **options)
    verdict = api.verify(out, against=source)
    assert verdict["ok"], [check for check in verdict["checks"] if not check["ok"]]
    return report


def aimer(held: dict[str, Tensor], prefix: str, expert: int) -> float:
    """- mean|W| / rms(W) over the three matrices of one expert (arXiv 2603.18492)."""
    start = f"{prefix}mlp.experts.{expert}."
    weights = torch.cat(
        [tensor.double().flatten() for name, tensor in held.items() if name.startswith(start)]
    )
    return float(-weights.abs().mean() / weights.square().mean().sqrt())


def mtp_model(folder: Path, layer: int) -> MtpModel:
    """transformers' own, which knows the layer numbers of the published models only."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\..*"]
    return MtpModel.from_pretrained(model)


@pytest.mark.parametrize("family", PREFIX)
def test_experts_go_like_the_trunks_by_their_own_weights(source: Zoo, tmp_path: Path, family: str) -> None:
    report = press(source(family), tmp_path / "out", DROP)
    prefix, before, after = PREFIX[family], tensors(source(family)), tensors(tmp_path / "out")
    router = before[f"{prefix}mlp.gate.weight"]
    size, groups = len(router), GROUPS[family]
    scores = [aimer(before, prefix, expert) for expert in range(size)]
    kept = [expert for start in range(0, size, size // groups)
            for expert in sorted(sorted(range(start, start + size // groups), key=lambda e: -scores[e])[: LEFT[family] // groups])]  # fmt: skip
    trunk = report.plan.stages[0].treatments
    assert report.plan.mtp.keep == {0: tuple(kept)}
    assert tuple(kept) not in {treatment.keep for treatment in trunk.values()}
    assert torch.equal(after[f"{prefix}mlp.gate.weight"], router[kept])
    for new, old in enumerate(kept):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            there, was = (f"{prefix}mlp.experts.{number}.{matrix}.weight" for number in (new, old))
            assert torch.equal(after[there], before[was])
    assert f"{prefix}mlp.experts.{len(kept)}.up_proj.weight" not in after
    rest = [name for name in before if name.startswith(("mtp.", prefix)) and "mlp." not in name]
    assert len(rest) > 8
    assert all(torch.equal(after[name], before[name]) for name in rest)
    assert any("AIMER" in note and "not run on text" in note for note in report.notes)


@pytest.mark.parametrize("family", NUMBERED)
def test_correction_biases_go_with_the_rows(source: Zoo, tmp_path: Path, family: str) -> None:
    report = press(source(family), tmp_path / "out", DROP)
    name = f"{PREFIX[family]}mlp.gate.e_score_correction_bias"
    kept = list(report.plan.mtp.keep[0])
    assert torch.equal(tensors(tmp_path / "out")[name], tensors(source(family))[name][kept])


@pytest.mark.parametrize("family", NUMBERED)
def test_transformers_loads_what_is_left(source: Zoo, text: Path, tmp_path: Path, family: str) -> None:
    """Fewer experts, narrower ones, fewer blocks; the layer follows the new last one."""
    layer = int(PREFIX[family].split(".")[2])
    assert mtp_model(source(family), layer).num_mtp_layers == 1
    notes: dict[str, bool] = {}
    for name, step, last in (
        ("drop", DROP, layer),
        ("narrow", "channel_prune:width=8", layer),
        ("block", "block_drop:drop=1", layer - 1),
    ):
        report = press(source(family), tmp_path / name, step, texts=[text], samples=4, length=24)
        notes[name] = any("under their published numbers only" in note for note in report.notes)
        state = mtp_model(tmp_path / name, last).state_dict()
        experts = tensors(tmp_path / name)[f"model.layers.{last}.mlp.experts.1.down_proj.weight"]
        assert torch.equal(state["layers.0.mtp_block.mlp.experts.down_proj"][1], experts.to(torch.bfloat16))
    assert not any(name.startswith(PREFIX[family]) for name in tensors(tmp_path / "block"))
    assert notes == {"drop": False, "narrow": False, "block": True}
    with pytest.raises(RuntimeError, match="missing"):
        MtpModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "block"))


def test_narrowed_experts_keep_their_strongest_channels(source: Zoo, text: Path, tmp_path: Path) -> None:
    press(source("glm4_moe"), tmp_path / "out", "channel_prune:width=8", texts=[text], samples=4, length=24)
    before, after = tensors(source("glm4_moe")), tensors(tmp_path / "out")
    for expert in range(12):
        names = [f"model.layers.3.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
        gate, up, down = (before[name].double() for name in names)
        strength = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
        kept = strength.argsort(descending=True)[:8].sort().values
        assert torch.equal(after[names[0]], before[names[0]][kept])
        assert torch.equal(after[names[2]], before[names[2]][:, kept])


@pytest.mark.parametrize("family", PREFIX)
def test_dropped_layers_are_gone_from_files_sizes_and_config(
    source: Zoo, tmp_path: Path, family: str
) -> None:
    report = press(source(family), tmp_path / "out", DROP, mtp="drop")
    assert not any(name.startswith(("mtp.", PREFIX[family])) for name in tensors(tmp_path / "out"))
    assert config(tmp_path / "out").get("num_nextn_predict_layers", 0) == 0
    stored = sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values())
    assert report.after.bytes == stored == api.inspect(tmp_path / "out")["bytes"]["total"]
    assert any("prediction layers are left out" in note for note in report.notes)


def test_a_count_that_only_the_class_says_becomes_zero_too(zoo: Zoo, tmp_path: Path) -> None:
    source = families.with_prediction_layer(write_model("deepseek_v3", tmp_path / "source", shards=1))
    said = config(source)
    del said["num_nextn_predict_layers"]
    (source / "config.json").write_text(json.dumps(said))
    press(source, tmp_path / "out", mtp="drop")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_mtp_layers == 0


def test_kept_layers_are_the_same_bytes_where_they_still_fit(source: Zoo, tmp_path: Path) -> None:
    press(source("glm4_moe"), tmp_path / "out", "magnitude:sparsity=0.5", mtp="keep")
    before, after = tensors(source("glm4_moe")), tensors(tmp_path / "out")
    names = [name for name in before if name.startswith(PREFIX["glm4_moe"])]
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert mtp_model(tmp_path / "out", 3).num_mtp_layers == 1


@pytest.mark.parametrize("step", [DROP, "channel_prune:width=8"])
def test_keeping_what_no_longer_fits_is_refused_with_cures_that_work(
    source: Zoo, text: Path, tmp_path: Path, step: str
) -> None:
    more = {"texts": [text], "samples": 4, "length": 24}
    with pytest.raises(UserError, match="mtp=keep leaves prediction layers with 12 experts of 24") as refused:
        api.press(source("glm4_moe"), out=tmp_path / "out", steps=[step], mtp="keep", **more)
    for number, wish in enumerate(re.findall(r"--mtp (\w+)", str(refused.value))):
        press(source("glm4_moe"), tmp_path / str(number), step, mtp=wish, **more)


def test_experts_in_one_tensor_lose_whole_experts_only(source: Zoo, text: Path, tmp_path: Path) -> None:
    """As Qwen3.5 stores those of its trunk: gate above up, one entry an expert."""
    folder = tmp_path / "source"
    shutil.copytree(source("qwen3_next"), folder)
    held, block = tensors(folder), "mtp.layers.0.mlp.experts."
    apart = {
        part: [held.pop(f"{block}{expert}.{part}_proj.weight") for expert in range(8)]
        for part in ("gate", "up", "down")
    }
    held[f"{block}gate_up_proj"] = torch.stack(
        [torch.cat(pair) for pair in zip(apart["gate"], apart["up"], strict=True)]
    )
    held[f"{block}down_proj"] = torch.stack(apart["down"])
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    kept = list(press(folder, tmp_path / "out", DROP).plan.mtp.keep[0])
    assert kept == list(press(source("qwen3_next"), tmp_path / "apart", DROP).plan.mtp.keep[0])
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(tensors(tmp_path / "out")[block + name], held[block + name][kept])
    more = {"texts": [text], "samples": 4, "length": 24}
    with pytest.raises(UserError, match=r"in one tensor.*whole experts only.*--mtp drop"):
        api.press(folder, out=tmp_path / "no", steps=["channel_prune:width=8"], **more)
    press(folder, tmp_path / "no", "channel_prune:width=8", mtp="drop", **more)


@pytest.mark.parametrize("change", ["lacks an expert", "odd names", "lacks its router"])
def test_layers_that_cannot_be_cut_are_refused(tmp_path: Path, change: str) -> None:
    source = families.with_prediction_layer(write_model("glm4_moe", tmp_path / "source", shards=1))
    held = tensors(source)
    prefix = f"{PREFIX['glm4_moe']}mlp."
    if change == "odd names":
        held = {name.replace(f"{prefix}experts.", f"{prefix}moe.experts."): held[name] for name in held}
    else:
        lost = "experts.3." if change == "lacks an expert" else "gate."
        held = {name: held[name] for name in held if not name.startswith(prefix + lost)}
    save_file(held, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"prediction layer 0 .* cannot follow the trunk: say --mtp drop"):
        api.press(source, out=tmp_path / "out", steps=[DROP])
    press(source, tmp_path / "out", DROP, mtp="drop")
    # A step that changes no number leaves them as they are, and whether that fits is told as far as it is known.
    api.press(source, out=tmp_path / "whole", steps=["magnitude:sparsity=0.5"])
    wrong = [check["name"] for check in api.verify(tmp_path / "whole")["checks"] if not check["ok"]]
    assert wrong == ([] if change == "odd names" else ["prediction layers are as the config says"])


def test_verify_sees_a_layer_that_the_config_does_not_fit(source: Zoo, tmp_path: Path) -> None:
    press(source("glm4_moe"), tmp_path / "out", DROP)
    held = tensors(tmp_path / "out")
    lost = [name for name in held if name.startswith("model.layers.3.mlp.experts.7.")]
    save_file(
        {name: held[name] for name in held.keys() - set(lost)},
        tmp_path / "out" / "model.safetensors",
        {"format": "pt"},
    )
    checks = {check["name"]: check for check in api.verify(tmp_path / "out")["checks"]}
    found = checks["prediction layers are as the config says"]
    assert not found["ok"]
    assert "experts" in found["detail"]


def test_a_saved_plan_builds_the_same(source: Zoo, tmp_path: Path) -> None:
    plan = api.plan(source("glm4_moe"), out=tmp_path / "plan.json", steps=[DROP])
    assert plan == Plan.load(tmp_path / "plan.json")
    assert plan.mtp.keep
    press(source("glm4_moe"), tmp_path / "pressed", DROP)
    api.build(source("glm4_moe"), plan=tmp_path / "plan.json", out=tmp_path / "built")
    pressed, built = tensors(tmp_path / "pressed"), tensors(tmp_path / "built")
    assert all(torch.equal(pressed[name], built[name]) for name in pressed.keys() | built.keys())
    assert api.verify(tmp_path / "built", against=source("glm4_moe"))["ok"]


@pytest.mark.parametrize(
    ("mtp", "said"),
    [
        ({"wish": "keap"}, "mtp: wish 'keap' is unknown .did you mean 'keep'"),
        ({"keep": {"0": [0, 1]}}, "keeps 2 experts of prediction layer 0"),
        ({"keep": {"0": [0, 1, 2, 3, 4, 5, 6, 7]}}, "the same number in every group"),
        ({"keep": {"3": [0, 1]}}, "experts of prediction layer 3, but .* has no mixture there"),
    ],
)
def test_plans_that_do_not_fit_are_refused(source: Zoo, tmp_path: Path, mtp: Any, said: str) -> None:
    body = api.plan(source("glm4_moe"), steps=[DROP]).as_dict() | {"mtp": mtp}
    (tmp_path / "plan.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=said):
        api.build(source("glm4_moe"), plan=tmp_path / "plan.json", out=tmp_path / "out")


def test_plans_of_models_without_such_layers_say_nothing_of_them(zoo: Zoo) -> None:
    plan = api.plan(zoo("mixtral"), steps=[DROP])
    assert plan.mtp == Ahead()
    assert "mtp" not in plan.as_dict()


def test_an_uneven_trunk_leaves_them_with_the_number_that_the_config_says(
    source: Zoo, tmp_path: Path
) -> None:
    """Layers that differ say so themselves, and the number for all is that which most have."""
    body = api.plan(source("deepseek_v3"), steps=[DROP]).as_dict()
    body["stages"][0]["treatments"] = {"L2.experts": {"keep": [0, 1, 4, 5, 8, 9]}}
    body.pop("mtp")
    (tmp_path / "plan.json").write_text(json.dumps(body))
    api.build(source("deepseek_v3"), plan=tmp_path / "plan.json", out=tmp_path / "out", target="plugin")
    assert api.verify(tmp_path / "out", against=source("deepseek_v3"))["ok"]
    rows = len(tensors(tmp_path / "out")["model.layers.4.mlp.gate.weight"])
    assert rows == config(tmp_path / "out")["n_routed_experts"] == 12


def test_beside_packed_experts_they_stay_plain_and_it_is_said(tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "moe_intermediate_size": 32}
    families.build("glm4_moe", **wide).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    source = families.with_prediction_layer(tmp_path / "source")
    report = press(source, tmp_path / "out", "rtn:bits=4,group_size=32")
    name = "model.layers.3.mlp.experts.0.up_proj"
    assert torch.equal(tensors(tmp_path / "out")[f"{name}.weight"], tensors(source)[f"{name}.weight"])
    assert name in config(tmp_path / "out")["quantization_config"]["ignore"]
    assert any("stay unrounded" in note and "--mtp drop" in note for note in report.notes)
    with pytest.raises(RuntimeError, match="missing"):
        mtp_model(tmp_path / "out", 3)


def test_inspect_counts_them(source: Zoo) -> None:
    found = api.inspect(source("glm4_moe"))
    assert found["bytes"]["total"] == sum(tensor.nbytes for tensor in tensors(source("glm4_moe")).values())
    note = next(note for note in found["notes"] if "prediction layers" in note)
    assert "12 experts of 24 channels" in note


def test_the_option_on_the_command_line(
    source: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["press", str(source("glm4_moe")), "--out"]
    assert main([*words, str(tmp_path / "out"), "--mtp", "drop"]) == 0
    assert config(tmp_path / "out")["num_nextn_predict_layers"] == 0
    assert main([*words, str(tmp_path / "no"), "--mtp", "drp"]) == 2
    assert "did you mean 'drop'" in capsys.readouterr().err
