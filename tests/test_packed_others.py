"""Packed sources as older tools left them: a router that is packed too, and a section that stands in a file of its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

import moespresso
from conftest import write_wide
from moespresso import api
from moespresso.build import open_view
from moespresso.core.errors import UserError
from test_packed_source import W4, W8, configured, grid, said_by, section_of

ROUTERS = "block_sparse_moe.gate.weight"
SMALL = {"num_hidden_layers": 2, "num_local_experts": 4}
W8_ZEROS = W8 | {"symmetric": False}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("small") / "mixtral", **SMALL)


def packed_whole(source: Path, folder: Path, weights: dict[str, Any], parts: str) -> dict[str, Tensor]:
    """Write `source` with all matrices whose names match packed by the library; what it decodes the routers to."""
    shutil.copytree(source, folder)
    stored: dict[str, Tensor] = {}
    truth: dict[str, Tensor] = {}
    codec: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    for name, weight in load_file(source / "model.safetensors").items():
        if not re.search(parts, name):
            stored[name] = weight
            continue
        made = codec.compress({"weight": weight} | grid(weight, scheme), scheme)
        stored |= {
            f"{name.removesuffix('weight')}{suffix}": part.contiguous() for suffix, part in made.items()
        }
        if name.endswith(ROUTERS):
            truth[name] = codec.decompress(made, scheme)["weight"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    configured(folder, quantization_config=section_of((["Linear"], weights), ignore=["lm_head"]))
    return truth


def routers(folder: Path) -> list[Tensor]:
    model: Any = moespresso.load(folder)
    return [layer.mlp.gate.weight.detach() for layer in model.model.layers]


PARTS = {
    "with experts": r"experts|gate\.weight",
    "alone": r"gate\.weight",
    "with all": r"layers.*(experts|gate|proj)",
}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("weights", [W4, W8, W8_ZEROS], ids=["4 bits", "8 bits", "zeros"])
@pytest.mark.few(2)
def test_a_packed_router_loses_rows(parts: str, weights: dict[str, Any], source: Path, tmp_path: Path):
    truth = packed_whole(source, tmp_path / "model", weights, PARTS[parts])
    report = api.press(tmp_path / "model", out=tmp_path / "out",
                       steps=["expert_drop:keep=3,score=aimer"], target="plugin")  # fmt: skip
    assert any("2 matrices that were packed lose rows" in note for note in report.notes)
    stored = load_file(tmp_path / "out/model.safetensors")
    for found, (name, whole) in zip(routers(tmp_path / "out"), truth.items(), strict=True):
        assert torch.equal(found, stored[name])
        kept = [row for row in whole if any(torch.equal(row, each) for each in found)]
        assert torch.equal(torch.stack(kept), found)
    assert api.verify(tmp_path / "out", against=tmp_path / "model")["ok"]


def test_stock_loaders_read_what_lost_rows(source: Path, tmp_path: Path):
    packed_whole(source, tmp_path / "model", W4, PARTS["with experts"])
    api.press(tmp_path / "model", out=tmp_path / "out", steps=["expert_drop:keep=3,score=aimer"])
    found = api.verify(tmp_path / "out", against=tmp_path / "model")
    assert found["ok"], found
    assert any("stock transformers" in check["name"] for check in found["checks"])


@pytest.mark.parametrize("step", ["expert_merge:keep=3", "expert_merge:keep=3,router=mean"])
def test_averages_of_packed_rows_are_stored_plainly(step: str, source: Path, text: Path, tmp_path: Path):
    packed_whole(source, tmp_path / "model", W4, PARTS["with experts"])
    report = api.press(
        tmp_path / "model", out=tmp_path / "out", steps=[step], texts=[str(text)], samples=4, length=32
    )
    assert any("lose rows" in note for note in report.notes)
    assert api.verify(tmp_path / "out", against=tmp_path / "model")["ok"]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.few(1)
def test_routers_that_stay_packed_are_not_for_stock_loaders(
    parts: str, source: Path, text: Path, tmp_path: Path
):
    model = tmp_path / "model"
    truth = packed_whole(source, model, W4, PARTS[parts])
    asked: Any = {"steps": ["block_drop:drop=1"], "texts": [str(text)], "samples": 4, "length": 32}
    with pytest.raises(
        UserError, match=r"keeps packed routers .* export DIR --to plain\) and press that"
    ) as told:
        api.press(model, out=tmp_path / "out", **asked)
    assert ROUTERS in str(told.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"routers are packed here .* export it as plain"):
        api.export(model, to="gptq", out=tmp_path / "gptq")
    api.export(model, to="plain", out=tmp_path / "plain")  # the cure
    api.press(tmp_path / "plain", out=tmp_path / "out", **asked)
    api.press(model, out=tmp_path / "plugin", target="plugin", **asked)  # the other cure
    assert said_by(tmp_path / "plugin")["format"] == "moespresso-packed"
    for folder, original in (("out", tmp_path / "plain"), ("plugin", model)):
        assert api.verify(tmp_path / folder, against=original)["ok"]
        assert torch.equal(routers(tmp_path / folder)[0], next(iter(truth.values()))) or torch.equal(
            routers(tmp_path / folder)[0], [*truth.values()][1]
        )


def test_packed_attention_is_for_stock_loaders(source: Path, tmp_path: Path):
    packed_whole(source, tmp_path / "model", W4, "experts|self_attn")
    assert open_view(tmp_path / "model").packed_alone == []


# A section of its own

AUTOGPTQ = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
            "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None}  # fmt: skip
AUTOAWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}


@pytest.fixture(scope="module")
def bare(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gptq` and `awq`, without the section."""
    root = tmp_path_factory.mktemp("bare")
    api.press(source, out=root / "packed", steps=["rtn:group_size=32"])
    for layout in ("gptq", "awq"):
        api.export(root / "packed", to=layout, out=root / layout)
        shutil.copytree(root / layout, root / f"{layout}-whole")
        said = json.loads((root / layout / "config.json").read_text())
        del said["quantization_config"]
        (root / layout / "config.json").write_text(json.dumps(said))
    return root


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as told:
        api.inspect(folder)
    return str(told.value)


@pytest.mark.parametrize(
    ("layout", "file", "said"),
    [
        ("gptq", "quantize_config.json", AUTOGPTQ),
        ("gptq", "quantize_config.json", AUTOGPTQ | {"quant_method": "gptq", "checkpoint_format": "gptq"}),
        ("awq", "quant_config.json", AUTOAWQ),
        ("awq", "quant_config.json", AUTOAWQ | {"modules_to_not_convert": None}),
        (
            "awq",
            "quantize_config.json",
            {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True},
        ),
    ],
)
def test_what_a_tool_keeps_in_its_own_file_is_told_in_the_names_of_the_config(
    layout: str, file: str, said: dict[str, Any], bare: Path, tmp_path: Path
):
    model = Path(shutil.copytree(bare / layout, tmp_path / "model"))
    (model / file).write_text(json.dumps(said))
    cure = re.search(r'add "quantization_config": (\{.*\}) \(what ' + file, refused(model))
    assert cure is not None
    configured(model, quantization_config=json.loads(cure[1]))
    found, wanted = (moespresso.load(folder).state_dict() for folder in (model, bare / f"{layout}-whole"))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_without_a_file_the_keys_to_write_are_told(layout: str, bare: Path, tmp_path: Path):
    model = Path(shutil.copytree(bare / layout, tmp_path / "model"))
    cure = re.search(r"(\{.*\}) with the values", refused(model))
    assert cure is not None
    words = cure[1].replace("BITS", "4").replace("SIZE", "32").replace("DESC_ACT", "false")
    words = words.replace("SYM", "true").replace("ZERO_POINT", "true")
    api.inspect(configured(model, quantization_config=json.loads(words)))


def test_a_tools_own_file_as_it_is_is_no_section_yet(bare: Path, tmp_path: Path):
    for layout, said in (("gptq", AUTOGPTQ), ("awq", AUTOAWQ)):
        model = Path(shutil.copytree(bare / layout, tmp_path / layout))
        words = refused(configured(model, quantization_config=said))
        assert f'"quant_method": "{layout}"' in words
        configured(model, quantization_config=said | {"quant_method": layout})
        for key, name in (("w_bit", "bits"), ("q_group_size", "group_size")) if layout == "awq" else ():
            assert f"{key} is AutoAWQ's own name" in refused(model)
            assert f"call it {name}" in refused(model)
            section = said_by(model)
            section[name] = section.pop(key)
            configured(model, quantization_config=section)
        api.inspect(model)
