"""Packed sources of others: every key of their section and every tensor beside their matrices is understood, and then
decoded as the library decodes it, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

import moespresso
from conftest import write_wide
from moespresso import api
from moespresso.build import Tensors, open_view
from moespresso.checkpoint import hoisted
from moespresso.checkpoint.reader import Reader
from moespresso.core.errors import UserError

KEEP = "expert_drop:keep=4,score=aimer"
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
W8 = W4 | {"num_bits": 8}
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2"
Weights = dict[str, Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral even smaller than others' (24 matrices of experts): there are many variants."""
    return write_wide(tmp_path_factory.mktemp("small") / "mixtral", num_hidden_layers=2, num_local_experts=4)


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, with its experts rounded to 4 bits in groups of 32."""
    out = tmp_path_factory.mktemp("packed") / "out"
    api.press(source, out=out, steps=["rtn:group_size=32"])
    return out


def section_of(*groups: tuple[list[str], Weights], **more: Any) -> dict[str, Any]:
    rows = {
        f"group_{number}": {"targets": targets, "weights": weights}
        for number, (targets, weights) in enumerate(groups)
    }
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": rows, "ignore": ["lm_head", "re:.*gate$", "re:.*self_attn.*"]} | more  # fmt: skip


def configured(folder: Path, **more: Any) -> Path:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | more))
    return folder


def said_by(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def packed_by_library(
    source: Path, folder: Path, section: dict[str, Any], bits_of: Callable[[str], Weights]
) -> dict[str, Tensor]:
    """Write `source` with its experts packed by the library, by `bits_of` their names, and return what it decodes them to."""
    shutil.copytree(source, folder)
    stored: dict[str, Tensor] = {}
    truth: dict[str, Tensor] = {}
    codec: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, weight in load_file(source / "model.safetensors").items():
        if ".experts." not in name:
            stored[name] = weight
            continue
        stem = name.removesuffix(".weight")
        scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": bits_of(stem)})
        parts = codec.compress({"weight": weight} | grid(weight, scheme), scheme)
        stored |= {f"{stem}.{suffix}": part for suffix, part in parts.items()}
        truth[name] = codec.decompress(parts, scheme)["weight"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    configured(folder, quantization_config=section)
    return truth


def grid(weight: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
    args = scheme.weights
    assert args is not None
    grouped = weight.view(
        weight.shape[0], -1, args.group_size if args.strategy == "group" else weight.shape[1]
    )
    levels = 2 ** (args.num_bits or 8) - 1
    if args.symmetric:
        return {
            "weight_scale": grouped.abs().amax(-1) * 2 / levels,
            "weight_zero_point": torch.zeros(grouped.shape[:2], dtype=torch.int8),
        }
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = (high - low) / levels
    return {
        "weight_scale": scale,
        "weight_zero_point": (-(levels // 2 + 1) - low / scale)
        .round()
        .clamp(-(levels // 2) - 1, levels // 2)
        .to(torch.int8),
    }


def same_experts(folder: Path, truth: dict[str, Tensor]) -> None:
    """The loaded model's experts are those of `truth`, value by value."""
    model: Any = moespresso.load(folder)
    for name, weight in truth.items():
        layer, expert, matrix = re.findall(r"layers\.(\d+)\..*experts\.(\d+)\.(w\d)", name)[0]
        experts = model.model.layers[int(layer)].mlp.experts
        stack = (
            experts.down_proj
            if matrix == "w2"
            else experts.gate_up_proj.unflatten(1, (2, -1))[:, int(matrix == "w3")]
        )
        assert torch.equal(stack[int(expert)].detach(), weight.to(stack.dtype)), name


def proven(folder: Path, out: Path, truth: dict[str, Tensor], **options: Any) -> str:
    """Press all experts on, and compare what is loaded with what the library decodes; the detail of the check of packed matrices."""
    same_experts(api.press(folder, out=out, steps=[KEEP], **options) and out, truth)
    found = api.verify(out, against=folder)
    assert found["ok"], found
    return next(
        check["detail"] for check in found["checks"] if check["name"] == "every packed matrix decodes"
    )


VARIANTS: dict[str, tuple[dict[str, Any], Callable[[str], Weights]]] = {
    "as the library writes it": (
        section_of((["Linear"], W4 | {"dynamic": False, "observer": "mse", "observer_kwargs": {"maxshrink": 0.2}, "block_structure": None,
                                      "zp_dtype": None, "scale_dtype": "torch.float32", "actorder": "static"}),
                   version="0.20.0", sparsity_config={}, transform_config={"config_groups": {}}, kv_cache_scheme=None,
                   global_compression_ratio=1.5, moe_sparsity_config=None), lambda stem: W4),
    "hardly anything said": (section_of((["Linear"], {"group_size": -1})), lambda stem: {"group_size": -1}),
    "a channel": (section_of((["re:.*experts.*"], {"num_bits": 8, "strategy": "channel"})), lambda stem: {"num_bits": 8, "strategy": "channel"}),
    "three bits by order": (section_of((["Linear"], W4 | {"num_bits": 3, "actorder": "weight"})), lambda stem: W4 | {"num_bits": 3}),
    "groups of 16 under an old status": (
        section_of((["Linear"], W4 | {"group_size": 16}), quantization_status="frozen"), lambda stem: W4 | {"group_size": 16}),
    "a class and all names": (
        section_of((["Linear"], W8), (["re:.*block_sparse_moe.*"], W4)), lambda stem: W4),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.few(2)
def test_what_is_understood_is_decoded_as_the_library_does(name: str, source: Path, tmp_path: Path):
    section, bits_of = VARIANTS[name]
    truth = packed_by_library(source, tmp_path / "model", section, bits_of)
    assert "24 of 24 as its own library decodes them" in proven(
        tmp_path / "model", tmp_path / "out", truth, target="transformers"
    )


def by_end(**bits: Weights) -> Callable[[str], Weights]:
    return lambda stem: bits[stem.rpartition(".")[2]]


def only(module: str) -> Callable[[str], Weights]:
    return lambda stem: W8 if stem == module else W4


MIXED: dict[str, tuple[dict[str, Any], Callable[[str], Weights]]] = {
    "a pattern before a class": (section_of((["Linear"], W4), (["re:.*w2$"], W8)), by_end(w1=W4, w2=W8, w3=W4)),
    "a name before a pattern": (section_of((["re:.*experts.*"], W4), ([EXPERT], W8)), only(EXPERT)),
    "a name before all": (section_of((["Linear", "re:.*w2"], W4), ([EXPERT], W8)), only(EXPERT)),
    "patterns by the alphabet": (section_of((["re:.*w[23]$"], W4), (["re:.*w2$", "re:.*w1$"], W8)), by_end(w1=W8, w2=W8, w3=W4)),
    "a target named twice": (section_of((["re:.*w1$", "re:.*w[23]$"], W4), (["re:.*w1$"], W8)), by_end(w1=W8, w2=W4, w3=W4)),
    "all classes": (section_of((["Module"], W8), (["re:.*w1$", "re:.*w3$"], W4)), by_end(w1=W4, w2=W8, w3=W4)),
    "zeros": (section_of((["Linear"], W4 | {"symmetric": False})), lambda stem: W4 | {"symmetric": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.few(1)
def test_targets_are_looked_up_in_the_librarys_order(name: str, source: Path, tmp_path: Path):
    section, bits_of = MIXED[name]
    truth = packed_by_library(source, tmp_path / "model", section, bits_of)
    QuantizationConfig.model_validate(section)
    same_experts(
        tmp_path / "model", truth
    )  # by ours: transformers would take one group for all experts, without a word
    assert "24 of 24 as its own library" in proven(
        tmp_path / "model", tmp_path / "out", truth, target="plugin"
    )


# Groups of columns


def ordered_by_hand(
    source: Path, folder: Path, *, symmetric: bool, word: Any = "group", uneven: bool = False
) -> dict[str, Tensor]:
    """Groups of inputs in an order of their own, as llm-compressor wrote them; the library has no writer for them any more."""
    weights = W4 | {"actorder": word, "symmetric": symmetric}
    truth = packed_by_library(
        source, folder, section_of((["Linear"], weights)), lambda stem: W4 | {"symmetric": symmetric}
    )
    tensors = load_file(folder / "model.safetensors")
    for number, name in enumerate(truth):
        stem, width = name.removesuffix("weight"), truth[name].shape[1]
        shuffle = torch.Generator().manual_seed(number)
        order = torch.randperm(width, generator=shuffle) // 32
        order = torch.randint(width // 32, (width,), generator=shuffle) if uneven else order
        weight, shape = load_file(source / "model.safetensors")[name], (truth[name].shape[0], width)
        scale = tensors[stem + "weight_scale"]
        codes = torch.randint(-8, 8, shape, generator=shuffle, dtype=torch.int8)
        zero = torch.randint(-8, 8, scale.shape, generator=shuffle, dtype=torch.int8)
        tensors |= {stem + "weight_packed": pack_to_int32(codes, 4), stem + "weight_g_idx": order.int()}
        if not symmetric:
            tensors[stem + "weight_zero_point"] = pack_to_int32(zero, 4, packed_dim=0)
        truth[name] = (
            codes.to(weight.dtype) - (0 if symmetric else zero[:, order].to(weight.dtype))
        ) * scale[:, order]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return truth


@pytest.mark.parametrize(
    ("symmetric", "word", "uneven"),
    [(True, "group", False), (False, "group", False), (True, "DYNAMIC", False), (True, True, True)],
)
@pytest.mark.few(1)
def test_groups_of_columns_are_decoded_and_kept(
    symmetric: bool, word: Any, uneven: bool, source: Path, tmp_path: Path
):
    truth = ordered_by_hand(source, tmp_path / "model", symmetric=symmetric, word=word, uneven=uneven)
    same_experts(tmp_path / "model", truth)
    assert "as its own library" not in proven(tmp_path / "model", tmp_path / "out", truth, target="plugin")
    assert said_by(tmp_path / "out")["config_groups"]["group_0"]["weights"]["actorder"] == "group"
    before, after = (
        load_file(tmp_path / "model/model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert before.keys() == after.keys()
    with pytest.raises(
        UserError, match=r"order of their own .* transformers stops at them; .* say --target plugin"
    ):
        api.press(tmp_path / "model", out=tmp_path / "no", steps=[KEEP])
    assert api.press(tmp_path / "model", out=tmp_path / "anew", steps=["rtn:group_size=32"])
    assert not any("g_idx" in name for name in load_file(tmp_path / "anew/model.safetensors"))


def test_an_order_that_was_never_filled_in_counts_off(source: Path, tmp_path: Path):
    truth = packed_by_library(
        source, tmp_path / "model", section_of((["Linear"], W4 | {"actorder": "group"})), lambda stem: W4
    )
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors |= {name.removesuffix("weight") + "weight_g_idx": torch.full((weight.shape[1],), -1, dtype=torch.int32)
                for name, weight in truth.items()}  # fmt: skip
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    same_experts(tmp_path / "model", truth)


def test_an_order_outlives_scales_and_layouts_but_not_new_values(source: Path, text: Path, tmp_path: Path):
    truth = ordered_by_hand(source, tmp_path / "model", symmetric=True)
    api.export(tmp_path / "model", to="gptq", out=tmp_path / "gptq")
    assert said_by(tmp_path / "gptq")["desc_act"] is True
    close = {name: weight.half() for name, weight in truth.items()}
    model: Any = moespresso.load(tmp_path / "gptq")
    found = model.model.layers[1].mlp.experts.down_proj[2].float()
    torch.testing.assert_close(found, close[f"{EXPERT}.weight"].float(), rtol=2e-3, atol=1e-6)
    api.export(tmp_path / "gptq", to="compressed-tensors", out=tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "back"))
    for suffix in ("weight_packed", "weight_g_idx"):
        assert torch.equal(before[f"{EXPERT}.{suffix}"], after[f"{EXPERT}.{suffix}"])
    with pytest.raises(UserError, match=r"awq counts groups off .* use the layout gptq"):
        api.export(tmp_path / "model", to="awq", out=tmp_path / "awq")
    report = api.press(tmp_path / "model", out=tmp_path / "merged", steps=["expert_merge:keep=3"], texts=[text], samples=4, length=16,
                       target="plugin")  # fmt: skip
    assert any("rounded to nearest in their old format" in note for note in report.notes)
    assert api.verify(tmp_path / "merged", against=tmp_path / "model")["ok"]


def test_gptq_in_the_order_of_activations(packed: Path, tmp_path: Path):
    """The inputs of every matrix in another order, codes and groups alike, decode to its columns in that order."""
    folder = tmp_path / "gptq"
    api.export(packed, to="gptq", out=folder)
    with Tensors(folder) as reader:
        plain = {
            name: reader.reader.tensor(ref).clone()
            for name, ref in open_view(folder).checkpoint.tensors.items()
            if ref.packed
        }
    tensors, truth = load_file(folder / "model.safetensors"), {}
    for number, (name, weight) in enumerate(plain.items()):
        stem, order = (
            name.removesuffix("weight"),
            torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(number)),
        )
        words = tensors[stem + "qweight"]
        codes = torch.stack([words >> shift & 15 for shift in range(0, 32, 4)], 1).flatten(0, 1)[order]
        parts = [
            row.int() << shift
            for row, shift in zip(codes.view(-1, 8, words.shape[1]).unbind(1), range(0, 32, 4), strict=True)
        ]
        tensors[stem + "qweight"] = torch.stack(parts).sum(0, dtype=torch.int32)
        tensors[stem + "g_idx"], truth[name] = tensors[stem + "g_idx"][order].contiguous(), weight[:, order]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"g_idx does not count groups .* set desc_act to true"):
        api.inspect(folder)
    configured(folder, quantization_config=said_by(folder) | {"desc_act": True})
    proven(folder, tmp_path / "out", truth)
    assert said_by(tmp_path / "out")["desc_act"] is True


# What is refused


def changed(**more: Any) -> Callable[[dict[str, Any]], None]:
    return lambda section: section.update(more)


def group_with(**more: Any) -> Callable[[dict[str, Any]], None]:
    return lambda section: section["config_groups"]["group_0"].update(more)


def weights_with(**more: Any) -> Callable[[dict[str, Any]], None]:
    return lambda section: section["config_groups"]["group_0"]["weights"].update(more)


ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
COMPRESSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "kv_cache_scheme": (changed(kv_cache_scheme={"num_bits": 8, "type": "float"}), r"kv_cache_scheme = .* is not read"),
    "transform_config": (changed(transform_config={"config_groups": {"u": {"type": "hadamard"}}}), r"transform_config\.config_groups = "),
    "sparsity_config": (changed(sparsity_config={"format": "sparse-24-bitmask"}), r"sparsity_config\.format = 'sparse-24-bitmask'"),
    "moe_sparsity_config": (changed(moe_sparsity_config={"method": "prune"}), "moe_sparsity_config = "),
    "quantization_status": (changed(quantization_status="calibration"), "quantization_status = 'calibration'"),
    "a new key": (changed(rotation="quarot"), r"quantization_config\.rotation = 'quarot' is not known"),
    "ignored but packed": (changed(ignore=["re:.*w2$"]), r"w2 is packed, but quantization_config\.ignore leaves it alone \(re:\.\*w2\$\)"),
    "ignored by class": (changed(ignore=["Linear"]), r"leaves it alone \(Linear\)"),
    "input_activations": (group_with(input_activations=ACTIVATIONS), r"group_0\.input_activations = "),
    "output_activations": (group_with(output_activations=ACTIVATIONS), r"group_0\.output_activations = "),
    "a format of its own": (group_with(format="int-quantized"), r"group_0\.format = 'int-quantized'"),
    "no weights": (group_with(weights=None), "no group of config.json's quantization_config means it"),
    "no target": (group_with(targets=["Conv2d"]), "no group of config.json's quantization_config means it"),
    "a broken pattern": (group_with(targets=["re:(w1"]), "config_groups has a pattern that is none"),
    "a new key of a group": (group_with(lora="x"), r"group_0\.lora = 'x' is not known"),
    "a preset": (lambda section: section["config_groups"].update(W4A4=["Linear"]), r"config_groups\.W4A4 is a preset that is not read"),
    "float": (weights_with(type="float"), r"weights\.type = 'float'"),
    "block_structure": (weights_with(block_structure=[8, 8]), r"weights\.block_structure = \[8, 8\]"),
    "strategy": (weights_with(strategy="tensor", group_size=None), r"weights\.strategy = 'tensor'"),
    "unsaid strategy": (weights_with(strategy=None, group_size=None), r"weights\.strategy = 'tensor'"),
    "strategy and size": (weights_with(strategy="channel"), "group_size = 32 does not go with the strategy channel"),
    "dynamic": (weights_with(dynamic=True), r"weights\.dynamic = True"),
    "actorder": (weights_with(actorder="hessian"), r"weights\.actorder = 'hessian'"),
    "no groups stored": (weights_with(actorder="group"), "weight_g_idx is missing"),
    "scale_dtype": (weights_with(scale_dtype="torch.float8_e4m3fn"), r"weights\.scale_dtype = "),
    "zp_dtype": (weights_with(zp_dtype="torch.bfloat16"), r"weights\.zp_dtype = "),
    "5 bits": (weights_with(num_bits=5), r"weights\.num_bits = 5"),
    "no zeros stored": (weights_with(symmetric=False), "weight_zero_point is missing"),
    "symmetric": (weights_with(symmetric="yes"), r"weights\.symmetric = 'yes'"),
    "a new key of weights": (weights_with(codebook=[1]), r"weights\.codebook = \[1\] is not known"),
}  # fmt: skip


def copied(source: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(source, folder)
    section = said_by(folder)
    change(section)
    return configured(folder, quantization_config=section)


@pytest.mark.parametrize("name", COMPRESSED)
def test_keys_that_are_not_understood_are_refused_by_name(name: str, packed: Path, tmp_path: Path):
    change, words = COMPRESSED[name]
    with pytest.raises(UserError, match=words) as told:
        api.inspect(copied(packed, tmp_path / "model", change))
    assert re.search(r": (give|compare) ", str(told.value))


TENSORS = {
    f"{EXPERT}.weight_g_idx": "has a weight_g_idx, which its format does not know",
    f"{EXPERT}.weight_zero_point": "has a weight_zero_point, which its format does not know",
    f"{EXPERT}.weight_global_scale": "is a tensor of the packed",
    f"{EXPERT}.input_scale": "is a tensor of the packed",
    f"{EXPERT}.never_seen": "is a tensor of the packed",
    f"{EXPERT}.lora_A.weight": "is a tensor of the packed",
    f"{EXPERT}.weight": "is a tensor of the packed",
    f"{EXPERT}.qweight": "is a tensor of the packed",
    "model.layers.0.self_attn.k_scale": r"as packed checkpoints have it \(k_scale\)",
    "model.layers.0.self_attn.k_proj.output_scale": r"\(output_scale\)",
    "model.layers.0.self_attn.q_proj.weight_scale": r"\(weight_scale\)",
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_beside_packed_matrices_are_refused_by_name(name: str, packed: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(packed, folder)
    tensors = load_file(folder / "model.safetensors") | {name: torch.ones(1)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=TENSORS[name]) as told:
        api.inspect(folder)
    assert name.rpartition(".")[2] in str(told.value)


@pytest.fixture(scope="module")
def others(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("others")
    for layout in ("gptq", "awq"):
        api.export(packed, to=layout, out=root / layout)
    return root


OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "v2": ("gptq", {"checkpoint_format": "gptq_v2"}, r"already quantized \(gptq gptq_v2"),
    "v2 by its new key": ("gptq", {"checkpoint_format": None, "format": "gptq_v2"}, r"already quantized \(gptq gptq_v2"),
    "other bits somewhere": ("gptq", {"dynamic": {r"+:.*\.w2$": {"bits": 8}}}, r"dynamic gives .*w2 another format .*\(\+:\.\*\\\.w2\$\)"),
    "no group here": ("gptq", {"dynamic": {r".*layers\.1\..*": {"group_size": -1}}}, "dynamic gives .*another format"),
    "left alone": ("gptq", {"dynamic": {r"-:.*w3": {}}}, r"w3 is packed, but quantization_config leaves it alone \(-:\.\*w3\)"),
    "a new override": ("gptq", {"dynamic": {r"+:.*w3": {"lut": 3}}}, r"dynamic\.\+:\.\*w3\.lut = 3 is not known"),
    "a broken override": ("gptq", {"dynamic": {r"+:(w3": {}}}, "dynamic has a pattern that is none"),
    "not in the block": ("gptq", {"modules_in_block_to_quantize": [["w1", "w2"]]}, "modules_in_block_to_quantize does not have it"),
    "an adapter": ("gptq", {"adapter": {"path": "x"}}, r"adapter = .* is not read"),
    "marlin": ("gptq", {"is_marlin_format": True}, "is_marlin_format = True is not read"),
    "words of 64 bits": ("gptq", {"pack_dtype": "int64"}, "pack_dtype = 'int64'"),
    "a new key of gptq": ("gptq", {"vptq": 1}, "vptq = 1 is not known"),
    "bits of 5": ("gptq", {"bits": 5}, "bits = 5 is not read"),
    "sym as a word": ("gptq", {"sym": "true"}, "sym = 'true' is not read"),
    "groups of nothing": ("gptq", {"group_size": 0}, "group_size = 0 is no size of groups"),
    "gemv": ("awq", {"version": "gemv"}, r"already quantized \(awq gemv"),
    "llm-awq": ("awq", {"backend": "llm-awq"}, r"already quantized \(awq llm-awq"),
    "awq in 8 bits": ("awq", {"bits": 8}, r"bits = 8 is not read by this version \(4 is\)"),
    "not converted": ("awq", {"modules_to_not_convert": ["block_sparse_moe"]}, "modules_to_not_convert has block_sparse_moe"),
    "ordered awq": ("awq", {"desc_act": True}, "desc_act = True is not read"),
    "a new key of awq": ("awq", {"smooth": {"a": 1}}, "smooth = .* is not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_keys_of_gptq_and_awq_are_refused_by_name(name: str, others: Path, tmp_path: Path):
    layout, more, words = OTHERS[name]
    with pytest.raises(UserError, match=words):
        api.inspect(copied(others / layout, tmp_path / "model", changed(**more)))


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("gptq", {"meta": {"quantizer": ["x"]}, "damp_percent": 0.1, "true_sequential": True, "static_groups": True, "v2": False,
                  "model_file_base_name": "model", "format": "GPTQ", "pack_dtype": "int32", "adapter": None, "method": "gptq",
                  "dynamic": {"-:lm_head": {}, r"+:.*w2": {"bits": 4, "group_size": 32, "damp_percent": 0.2}},
                  "modules_in_block_to_quantize": [["w1", "w2"], "w3"]}),
        ("awq", {"version": "GEMM", "backend": "autoawq", "do_fuse": False, "modules_to_not_convert": ["gate", "lm_head"], "sym": True}),
    ],
)  # fmt: skip
def test_keys_that_say_nothing_of_decoding_change_nothing(
    layout: str, more: dict[str, Any], others: Path, tmp_path: Path
):
    folder = copied(others / layout, tmp_path / "model", changed(**more))
    wanted: Any = moespresso.load(others / layout)
    api.press(folder, out=tmp_path / "out", steps=[KEEP])
    found: Any = moespresso.load(tmp_path / "out")
    assert torch.equal(
        found.model.layers[1].mlp.experts.down_proj, wanted.model.layers[1].mlp.experts.down_proj
    )


def test_zeros_that_are_not_in_the_middle_contradict_a_symmetric_section(source: Path, tmp_path: Path):
    api.press(source, out=tmp_path / "zeros", steps=["rtn:group_size=32,symmetric=false"], target="plugin")
    for layout, key, value in (("gptq", "sym", True), ("awq", "zero_point", False)):
        folder = tmp_path / layout
        api.export(tmp_path / "zeros", to=layout, out=folder)
        api.inspect(folder)
        section = said_by(folder)
        configured(folder, quantization_config=section | {key: value})
        with pytest.raises(
            UserError, match=f"other zeros than the middle, but {key} is {str(value).lower()}"
        ):
            api.inspect(folder)


def test_one_matrix_that_contradicts_its_section_is_found_when_it_is_read(others: Path, tmp_path: Path):
    folder = copied(others / "gptq", tmp_path / "model", changed())
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{EXPERT}.g_idx"] = tensors[f"{EXPERT}.g_idx"].flip(0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{EXPERT}.weight: g_idx does not count groups"):
        moespresso.load(folder)


# Where the section stands


def test_a_section_is_found_where_transformers_looks():
    section = {"quant_method": "gptq"}
    inner = {"model_type": "a", "text_config": {"x": 1, "quantization_config": section}}
    assert hoisted(inner, "here") == {
        "model_type": "a",
        "text_config": {"x": 1},
        "quantization_config": section,
    }
    assert hoisted(inner | {"quantization_config": section}, "here")["text_config"] == {"x": 1}
    with pytest.raises(UserError, match="and another one in its text_config: take out"):
        hoisted(inner | {"quantization_config": {"quant_method": "awq"}}, "here")
    with pytest.raises(UserError, match=r"vision_config\.quantization_config of config\.json is not read"):
        hoisted({"vision_config": {"quantization_config": section}}, "here")
    with pytest.raises(UserError, match=r"compression_config, which .* call it quantization_config"):
        hoisted({"compression_config": section}, "here")


def test_a_section_and_packed_tensors_come_together(packed: Path, source: Path, tmp_path: Path):
    for name, folder, section, words in (
        (
            "a",
            packed,
            None,
            "is packed, but config.json has no quantization_config .* download its config.json again",
        ),
        ("b", source, said_by(packed), "none of its tensors is packed: .* take quantization_config out"),
    ):
        shutil.copytree(folder, tmp_path / name)
        with pytest.raises(UserError, match=words):
            api.inspect(configured(tmp_path / name, quantization_config=section))


def test_a_misread_source_is_noticed(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Were our reader wrong, what it writes would be wrong alike: the library's decode of the same files is what tells."""
    api.press(packed, out=tmp_path / "out", steps=[KEEP])
    right = Reader.tensor
    monkeypatch.setattr(Reader, "tensor", lambda self, ref: right(self, ref) * (1.5 if ref.packed else 1))
    found = api.verify(tmp_path / "out", against=packed)
    assert "not what its own library decodes" in " ".join(check["detail"] for check in found["checks"])
