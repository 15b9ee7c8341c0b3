"""Sources in FP8, with a scale for every block: what is only moved keeps its bytes, and what is computed is what transformers decodes."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import moespresso
from conftest import write_model
from families import cut_by_hand, logits_of, random_ids, reference
from moespresso import api
from moespresso.build import open_view
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.plan import Plan
from moespresso.formats import Fp8Blocks

SIZE = 4
SECTION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [SIZE, SIZE],
}
MATRICES = r"(proj|_with_mqa)\.weight$"
FORMAT = Format("fp8", bits=8, group_size=SIZE)
DROP = "expert_drop:keep=9,score=aimer"


def blocks_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales by the published formula, block by block."""
    rows, columns = (range(0, side, SIZE) for side in weight.shape)
    codes, scale = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(len(rows), len(columns))
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        block = weight[row : row + SIZE, column : column + SIZE].float()
        scale[i, j] = block.abs().max() / 448
        codes[row : row + SIZE, column : column + SIZE] = (block / scale[i, j]).to(torch.float8_e4m3fn)
    return codes, scale


def theirs(codes: Tensor, scale: Tensor) -> Tensor:
    """What transformers decodes, in float32."""
    return Fp8Dequantize(None)._dequantize_one(codes, scale, torch.float32)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def configured(folder: Path, **more: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def said_by(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("deepseek_v3", tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def models(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """DeepSeek-V3 in FP8, and the same decoded by transformers, in float32."""
    root = tmp_path_factory.mktemp("fp8")
    packed, decoded = (shutil.copytree(plain, root / name) for name in ("packed", "decoded"))
    for file in packed.glob("*.safetensors"):
        stored, truth = {}, {}
        for name, tensor in load_file(file).items():
            stored[name] = truth[name] = tensor
            if re.search(MATRICES, name):
                codes, scale = blocks_of(tensor)
                stored |= {name: codes, f"{name}_scale_inv": scale}
                truth[name] = theirs(codes, scale)
        save_file(stored, file, {"format": "pt"})
        save_file(truth, decoded / file.name, {"format": "pt"})
    for index in packed.glob("*.index.json"):
        said, files = json.loads(index.read_text()), sorted(packed.glob("*.safetensors"))
        said["weight_map"] = {name: file.name for file in files for name in load_file(file)}
        index.write_text(json.dumps(said))
    configured(packed, quantization_config=SECTION)
    return packed, decoded


@pytest.fixture(scope="module")
def pressed(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pressed") / "out"
    api.press(models[0], out=out, steps=[DROP])
    return out


def kept_by(folder: Path) -> dict[int, list[int]]:
    """The experts that the plan in a folder keeps, by layer."""
    view = open_view(folder)
    plan = Plan.from_json(json.dumps(json.loads((folder / "moespresso.json").read_text())["plan"]))
    assert view.blueprint.moe_layers
    return {layer.index: list(plan.kept_experts(layer.index, 12)) for layer in view.blueprint.moe_layers}


def test_every_code_is_decoded_as_transformers_does():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    scale = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1e-30, 1e-3, 1.0, 1e30]
    )
    scale[1, 1] = 0.0
    ours = Fp8Blocks().decode({"weight": codes[None], "weight_scale_inv": scale[None]}, FORMAT, (16, 16))[0]
    wanted = theirs(codes, scale)
    assert torch.equal(ours.nan_to_num(12.5), wanted.nan_to_num(12.5))
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.signbit(), wanted.signbit())
    assert int(ours.isnan().sum()) == 2
    assert int((codes.float().abs() < 2**-6).sum()) == 16


def test_a_block_that_the_matrix_ends_in_has_a_scale_too():
    weights = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(0))
    weights[0, 4:, 8:] = 0
    numbers = Fp8Blocks().nearest(weights, FORMAT, torch.bfloat16)
    codes, scale = blocks_of(weights[0, :, :8])
    assert torch.equal(numbers.scale[0, :, :2], scale)
    assert torch.equal(numbers.codes[0, :, :8].float(), codes.float())
    assert float(numbers.scale[0, 1, 2]) == 1
    found = Fp8Blocks().values(numbers, FORMAT)
    assert float((found - weights).abs().max()) <= float(weights.abs().max()) / 16
    assert torch.equal(found[0, 4:, 8:], torch.zeros(2, 2))


def test_kept_experts_keep_their_bytes(models: tuple[Path, Path], pressed: Path):
    before, after, kept = tensors_of(models[0]), tensors_of(pressed), kept_by(pressed)
    experts = [name for name in after if ".mlp.experts." in name]
    assert len(experts) == 2 * 9 * 3 * 2
    for name in after:
        found = re.search(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.", name)
        old = name if not found else name.replace(
            f"experts.{found[2]}.", f"experts.{kept[int(found[1])][int(found[2])]}.")  # fmt: skip
        if ".mlp.gate." not in name:
            assert torch.equal(after[name].view(torch.uint8), before[old].view(torch.uint8)), name
    assert {name for name in after if "experts.0." in name} <= before.keys()


def test_the_section_stays_and_the_result_is_verified(models: tuple[Path, Path], pressed: Path):
    verdict = api.verify(pressed, against=models[0])
    assert verdict["ok"], verdict
    section = said_by(pressed)
    left = section.pop("modules_to_not_convert")
    assert section == SECTION
    assert {"lm_head", "model.layers.2.mlp.gate"} <= {*left}
    assert not any("experts" in name for name in left)
    assert any("FP8" in note for note in api.inspect(pressed)["notes"])


def test_it_computes_as_the_decoded_model_cut_by_hand(models: tuple[Path, Path], pressed: Path):
    whole = reference(models[1])
    cut, ids = cut_by_hand(whole, kept_by(pressed)), random_ids(whole.config, 2, 16)
    for folder, wanted in ((models[0], whole), (pressed, cut)):
        found = moespresso.load(folder, dtype="float32")
        state = wanted.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
        answers = logits_of(wanted, ids)  # with other kernels of attention and experts
        assert float((logits_of(found, ids) - answers).abs().max()) <= 1e-5 * float(answers.abs().max())


def test_stock_transformers_loads_the_result_as_the_source(
    models: tuple[Path, Path], pressed: Path, monkeypatch: pytest.MonkeyPatch
):
    # Without a GPU it decodes what is packed, and leaves the rest in the dtype of its files; it asks for accelerate in vain.
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True
    )
    for folder in (models[0], pressed):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        model, info = loaded
        assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys"))
        ids = random_ids(model.config, 2, 16)
        ours = logits_of(moespresso.load(folder, dtype="float32"), ids)
        assert float((logits_of(model.eval().float(), ids) - ours).abs().max()) <= 1e-5 * float(
            ours.abs().max()
        )


def test_blocks_that_go_leave_the_rest_as_it_is(models: tuple[Path, Path], text: Path, tmp_path: Path):
    api.press(
        models[0], out=tmp_path / "out", steps=["block_drop:drop=1"], texts=[text], samples=4, length=16
    )
    assert api.verify(tmp_path / "out", against=models[0])["ok"]
    after = tensors_of(tmp_path / "out")
    before = {
        tensor.view(torch.uint8).numpy().tobytes()
        for tensor in tensors_of(models[0]).values()
        if tensor.ndim == 2
    }
    assert all(
        tensor.view(torch.uint8).numpy().tobytes() in before for tensor in after.values() if tensor.ndim == 2
    )
    section = said_by(tmp_path / "out")
    assert not any("layers.3." in name for name in section["modules_to_not_convert"])


def test_what_changes_is_rounded_anew_or_written_plainly(
    models: tuple[Path, Path], text: Path, tmp_path: Path
):
    options: dict[str, Any] = {"texts": [text], "samples": 4, "length": 16}
    report = api.press(models[0], out=tmp_path / "merged", steps=["expert_merge:keep=9"], **options)
    assert any("rounded to nearest in their old format" in note for note in report.notes)
    assert api.verify(tmp_path / "merged", against=models[0])["ok"]
    api.export(models[0], to="plain", out=tmp_path / "plain")
    written, truth = tensors_of(tmp_path / "plain"), tensors_of(models[1])
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    for name, tensor in written.items():
        assert tensor.dtype != torch.float8_e4m3fn, name
        assert torch.equal(tensor, truth[name].to(tensor.dtype)), name


@pytest.mark.parametrize("step", ["rtn:group_size=0", "gptq:group_size=0", "channel_prune:width=16"])
def test_what_is_slimmed_is_decoded_first(step: str, models: tuple[Path, Path], text: Path, tmp_path: Path):
    report = api.press(
        models[0], out=tmp_path / "out", steps=[step], texts=[] if step.startswith("rtn") else [text],
        samples=4, length=16, target="plugin",
    )  # fmt: skip
    verdict = api.verify(tmp_path / "out", against=models[0])
    assert verdict["ok"], verdict
    view = open_view(tmp_path / "out")
    assert len({piece.ref.packed.layout for piece in view.pieces if piece.ref.packed}) <= 1
    if step.startswith("channel"):
        return
    assert any("config.json can name one packing" in note for note in report.notes)
    truth, written = tensors_of(models[1]), tensors_of(tmp_path / "out")
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert torch.equal(written[name], truth[name].bfloat16())
    model = moespresso.load(tmp_path / "out", dtype="float32").state_dict()
    name = "model.layers.2.mlp.experts.down_proj"
    wanted = torch.stack(
        [truth[f"model.layers.2.mlp.experts.{expert}.down_proj.weight"] for expert in range(12)]
    )
    assert float((model[name] - wanted).abs().max()) <= 0.3 * float(wanted.abs().max())


def test_cut_blocks_are_not_made_since_transformers_misreads_them(models: tuple[Path, Path], tmp_path: Path):
    codes, scale = torch.ones(6, 4).to(torch.float8_e4m3fn), torch.tensor([[1.0], [2.0]])
    assert float(theirs(codes, scale)[3, 0]) == 2  # a row of the first block of four
    with pytest.raises(UserError, match=r"up would have 6 x 4 new values.*--to plain"):
        Fp8Blocks().check_anew(FORMAT, (6, 4), "up")
    Fp8Blocks().check_anew(FORMAT, (8, 3), "up")
    cut = shutil.copytree(models[0], tmp_path / "cut")
    for file in cut.glob("*.safetensors"):  # blocks of 16, which matrices of 20 rows end in
        tensors = load_file(file)
        save_file(
            {
                name: tensor[::4, ::4].contiguous() if name.endswith("_inv") else tensor
                for name, tensor in tensors.items()
            },
            file,
            {"format": "pt"},
        )
    configured(cut, quantization_config=SECTION | {"weight_block_size": [16, 16]})
    step: dict[str, Any] = {"steps": ["magnitude:sparsity=0.5,pack=false"], "target": "plugin"}
    with pytest.raises(UserError, match=r"FP8 blocks of 16 do not divide"):
        api.press(cut, out=tmp_path / "out", **step)
    api.press(cut, out=tmp_path / "dropped", steps=[DROP])
    api.export(cut, to="plain", out=tmp_path / "plain")
    api.press(tmp_path / "plain", out=tmp_path / "out", **step)


@pytest.mark.parametrize("method", ["bitsandbytes", "mxfp4", "modelopt"])
def test_other_methods_are_named_with_what_to_give(method: str, models: tuple[Path, Path], tmp_path: Path):
    configured(shutil.copytree(models[0], tmp_path / "model"), quantization_config={"quant_method": method})
    words = (
        "give the checkpoint that it was made from"
        if method == "bitsandbytes"
        else "give the unquantized one"
    )
    with pytest.raises(UserError, match=rf"\({method}\).* fp8 by blocks only: {words}"):
        api.inspect(tmp_path / "model")


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def holding(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1).__setitem__(0, value)


MATRIX = "model.layers.2.mlp.experts.3.up_proj.weight"
SCALES = f"{MATRIX}_scale_inv"
DAMAGES = {
    "no scale": (without(SCALES), rf"{MATRIX} holds floats of eight bits without the scales"),
    "no codes": (without(MATRIX), "lacks a part of its packed weight"),
    "negative": (holding(SCALES, -1.0), rf"{MATRIX}.*weight_scale_inv holds -1, which is no scale"),
    "nan": (holding(SCALES, float("nan")), rf"{MATRIX}.*weight_scale_inv holds nan"),
    "cut": (lambda tensors: tensors.update({SCALES: tensors[SCALES][:-1].clone()}), rf"{SCALES} is F32 .* as its format says"),
    "codes in bfloat16": (lambda tensors: tensors.update({MATRIX: tensors[MATRIX].bfloat16()}), rf"{MATRIX} is BF16"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_tensors_are_named(name: str, models: tuple[Path, Path], tmp_path: Path):
    damage, words = DAMAGES[name]
    shutil.copytree(models[0], tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors"):
        file.unlink()
    for file in (tmp_path / "model").glob("*.index.json"):
        file.unlink()
    tensors = tensors_of(models[0])
    damage(tensors)
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=words):
        api.press(tmp_path / "model", out=tmp_path / "out", steps=[DROP])


SECTIONS = {
    "static": ({"activation_scheme": "static"}, "activation_scheme = 'static' is not read"),
    "oblong": ({"weight_block_size": [1, 128]}, "which knows square blocks"),
    "none": ({"weight_block_size": None}, "which knows square blocks"),
    "five": ({"fmt": "e5m2"}, "fmt = 'e5m2' is not read"),
    "unknown": ({"rotation": True}, "rotation = True is not read"),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_keys_that_are_not_understood_are_refused_by_name(
    name: str, models: tuple[Path, Path], tmp_path: Path
):
    changes, words = SECTIONS[name]
    configured(shutil.copytree(models[0], tmp_path / "model"), quantization_config=SECTION | changes)
    with pytest.raises(UserError, match=f"quantization_config: .*{words}"):
        api.inspect(tmp_path / "model")


def test_floats_of_eight_bits_without_a_section_are_refused(models: tuple[Path, Path], tmp_path: Path):
    configured(shutil.copytree(models[0], tmp_path / "model"), quantization_config=None)
    with pytest.raises(UserError, match="holds floats of eight bits without the scales"):
        api.inspect(tmp_path / "model")
