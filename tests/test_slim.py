"""Rounding as a step: what is written loads in stock transformers with our own values, weighs what the plan said, and is a
checkpoint like any other: it can be trimmed, read, measured and laid out for other engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import families
import moespresso
from conftest import Zoo, tiny_tokenizer, write_wide
from moespresso import api
from moespresso.build import Tensors, open_view
from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.core.runtime import Runtime
from moespresso.data import Source
from moespresso.effect import price
from moespresso.formats import QuantizedWeights, codec_in
from test_depth_kl import LENGTH, SAMPLES
from test_depth_steps import plan_of
from test_resume import same

OPTIONS: dict[str, Any] = {"samples": SAMPLES, "length": LENGTH}
FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "qwen2_moe", "glm4_moe"]
STEPS = ["rtn:group_size=0", "hqq:group_size=0,bits=3", "gptq:group_size=0,bits=2"]


def press(source: Path, out: Path, *steps: str, text: Path | None = None, **options: Any) -> Path:
    texts = [text] if text else []
    api.press(
        source, out=out, steps=list(steps), texts=texts, **({**OPTIONS, **options} if text else options)
    )
    return out


def proven(out: Path, source: Path) -> dict[str, str]:
    """What each check of `verify` found; all must hold."""
    found = api.verify(out, against=source)
    assert found["ok"], found
    return {check["name"]: check["detail"] for check in found["checks"]}


def disk(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


# What is written


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.few(2)
def test_stock_transformers_loads_what_is_written_with_our_values(
    family: str, step: str, zoo: Zoo, text: Path, tmp_path: Path
):
    out = press(zoo(family), tmp_path / "out", step, text=text)
    assert "logits within" in proven(out, zoo(family))["stock transformers loads it and agrees"]
    view, tensors = open_view(zoo(family)), disk(out)
    priced = price(plan_of(out), view.source)
    assert priced.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert priced == open_view(out).source.cost()
    assert priced.params == view.source.cost().params
    plain = {name for name in tensors if "weight_" not in name}
    assert not any(".experts." in name for name in plain)
    for name in plain:  # routers, norms, attention, embedding, shared experts
        torch.testing.assert_close(tensors[name], disk_of(zoo(family))[name], rtol=0, atol=0)


def disk_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_experts_in_memory_are_what_our_reader_decodes(packed: Path):
    view = open_view(packed)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype="auto")
    state = model.state_dict()
    with Tensors(packed) as reader:
        for piece in view.pieces:
            if piece.unit.part != "experts" or piece.unit.matrix != "down":
                continue
            stack = state[f"model.layers.{piece.unit.layer}.mlp.experts.down_proj"]
            torch.testing.assert_close(stack[piece.unit.expert], reader.whole(piece), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("step", ["rtn", "hqq", "gptq"])
@pytest.mark.few(1)
def test_more_bits_come_closer(step: str, bits: int, source: Path, text: Path, tmp_path: Path):
    out = press(source, tmp_path / "out", f"{step}:bits={bits},group_size=32", text=text)
    whole, pressed = families.reference(source), api.load(out, dtype="float32")
    ids = families.random_ids(whole.config, 2, 20)
    logits = families.logits_of(whole, ids)
    error = float((families.logits_of(pressed, ids) - logits).norm() / logits.norm())
    assert error < {8: 0.03, 4: 0.25, 3: 0.5, 2: 1.2}[bits]
    assert error > 0


def test_parts_beside_the_experts(text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source", "deepseek_v3", moe_intermediate_size=32, num_attention_heads=4, v_head_dim=16,
                  q_lora_rank=None, kv_lora_rank=32)  # fmt: skip
    steps = ("gptq:group_size=32,parts=experts+shared+attention+dense,bits=4+attention:8+shared:8",)
    out = press(source, tmp_path / "out", *steps, text=text)
    proven(out, source)
    kinds = {packed.bits for packed in open_view(out).formats.values()}
    assert kinds == {4, 8}
    plain = {name for name in disk(out) if name.endswith(".weight")}
    assert all(
        "norm" in name or "gate.weight" in name or "embed" in name or "lm_head" in name for name in plain
    )


def test_the_head_can_be_rounded_where_it_is_its_own(source: Path, tmp_path: Path):
    out = press(source, tmp_path / "out", "rtn:group_size=32,parts=experts+head,bits=4+head:8")
    proven(out, source)
    assert open_view(out).formats["lm_head"].bits == 8


@pytest.mark.parametrize(
    ("steps", "target"),
    [
        (
            ["expert_drop:keep=6", "gptq:group_size=32", "rtn:bits=8,group_size=32,parts=attention"],
            "transformers",
        ),
        (
            ["awq:group_size=32", "expert_drop:keep=6", "layer_drop"],
            "transformers",
        ),  # in another family's name
        (["layer_drop:repair=linear", "gptq:group_size=32"], "transformers"),
        (["expert_drop:keep=6,replace=novice", "gptq:group_size=32"], "plugin"),
        (["expert_drop:keep=6,scope=global", "gptq:group_size=32"], "plugin"),
        (["gptq:layers=0:8,group_size=32", "block_drop"], "plugin"),
    ],
)
@pytest.mark.few(1)
def test_trimming_and_rounding_in_one_recipe(
    steps: list[str], target: Any, source: Path, text: Path, tmp_path: Path
):
    proven(press(source, tmp_path / "out", *steps, text=text, target=target), source)


def test_other_mixers_than_attention_are_left_alone(zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo("jamba"), tmp_path / "out", "gptq:group_size=0,parts=experts+attention", text=text)
    proven(out, zoo("jamba"))
    packed = open_view(out).formats
    assert any("self_attn" in name for name in packed)
    assert not any("mamba" in name for name in packed)


@pytest.mark.breadth
def test_one_recipe_is_its_steps_one_after_the_other(source: Path, tmp_path: Path):
    drop, rounding = "expert_drop:keep=6,score=aimer", "rtn:group_size=32"
    at_once = press(source, tmp_path / "at_once", drop, rounding)
    first = press(source, tmp_path / "first", drop)
    second = press(first, tmp_path / "second", rounding)
    same_tensors(at_once, second)
    proven(at_once, source)
    other = press(source, tmp_path / "other", rounding, drop)
    proven(other, source)
    slim = press(source, tmp_path / "slim", rounding)
    same_tensors(other, press(slim, tmp_path / "slim_trim", "expert_drop:keep=6,score=aimer"), config=True)


def same_tensors(one: Path, other: Path, *, config: bool = True) -> None:
    left, right = disk(one), disk(other)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
    if config:
        assert json.loads((one / "config.json").read_text()) == json.loads(
            (other / "config.json").read_text()
        )


def test_later_layers_see_what_the_rounded_ones_before_let_through(source: Path, text: Path, tmp_path: Path):
    """Layer 1 comes out as if layer 0 had been rounded by an earlier step."""
    whole = disk(press(source, tmp_path / "whole", "gptq:group_size=32", text=text))
    apart = ["gptq:group_size=32,exclude=L1.*+L2.*", "gptq:group_size=32,exclude=L0.*+L2.*"]
    parted = disk(press(source, tmp_path / "parted", *apart, text=text, target="plugin"))
    blind = disk(press(source, tmp_path / "blind", "gptq:group_size=32,sequential=false", text=text))
    packed = [
        name for name in whole if "experts" in name and name.endswith(("weight_packed", "weight_scale"))
    ]
    for layer, alike in ((0, True), (1, False)):
        names = [name for name in packed if f"layers.{layer}." in name]
        assert all(torch.equal(whole[name], parted[name]) for name in names)
        assert all(torch.equal(whole[name], blind[name]) for name in names) == alike


def numbers(tensors: Tensors, ref: TensorRef) -> QuantizedWeights:
    """What a packed matrix of integers is stored as."""
    assert ref.packed is not None
    return codec_in(ref).numbers(tensors.reader.parts(ref), ref.packed.format, ref.shape)


@pytest.mark.parametrize("step", ["gptq:group_size=0", "rtn:group_size=0"])
@pytest.mark.few(1)
def test_a_scale_that_comes_later_goes_into_the_scales(step: str, zoo: Zoo, text: Path, tmp_path: Path):
    """DeepSeek-V2 does not renormalise, so dropping experts scales its routed part."""
    drop = "expert_drop:keep=6,renormalise=compensate"
    rounded = open_view(press(zoo("deepseek_v2"), tmp_path / "rounded", step, text=text))
    both = press(zoo("deepseek_v2"), tmp_path / "both", step, drop, text=text)
    proven(both, zoo("deepseek_v2"))
    made, after = plan_of(both), open_view(both)
    with Tensors(rounded.checkpoint.folder) as old, Tensors(both) as new:
        for layer in rounded.source.moe_layers:
            scale = made.routed_scale(layer.index)
            assert scale != 1
            expert = made.kept_experts(layer.index, layer.experts)[0]
            for matrix, factor in (("down", scale), ("up", 1.0)):
                name = f"model.layers.{layer.index}.mlp.experts.{{}}.{matrix}_proj.weight"
                before = numbers(old, rounded.checkpoint.tensors[name.format(expert)])
                found = numbers(new, after.checkpoint.tensors[name.format(0)])
                assert torch.equal(found.values, before.values)
                wanted = (before.scale.float() * factor).to(before.scale.dtype)
                torch.testing.assert_close(found.scale, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2"])
@pytest.mark.few(1)
def test_plain_experts_beside_what_is_packed_stop_stock_transformers(family: str, zoo: Zoo, tmp_path: Path):
    step = "rtn:parts=attention,group_size=8"
    with pytest.raises(
        UserError, match=r"leaves experts plain, at which transformers stops.*parts=experts\+"
    ):
        press(zoo(family), tmp_path / "out", step)
    for target in ("plugin", "vllm") if family == "qwen3_moe" else ("plugin",):
        out = press(zoo(family), tmp_path / target, step, target=target)
        assert "moespresso.load loads it and agrees" in proven(out, zoo(family))
        with pytest.raises(RuntimeError, match="conversion"):  # should it load one day, the refusal can go
            AutoModelForCausalLM.from_pretrained(out)
        moespresso.load(out)


# A packed folder is a checkpoint like any other


@pytest.mark.parametrize(
    ("step", "target"),
    [
        ("expert_drop:keep=6", "transformers"),
        ("expert_drop:keep=6,replace=novice", "plugin"),
        ("expert_merge:keep=6", "transformers"),
        ("layer_drop", "transformers"),
        ("layer_drop:part=attention", "plugin"),
        ("block_drop:repair=scale", "transformers"),
        ("block_drop:score=kl,rows=2", "transformers"),
        ("rtn:bits=8,group_size=32,parts=attention", "transformers"),
        ("gptq:bits=3,group_size=32", "transformers"),
    ],
)
@pytest.mark.few(1)
def test_a_packed_folder_can_be_pressed_on(step: str, target: Any, packed: Path, text: Path, tmp_path: Path):
    out = press(packed, tmp_path / "out", step, text=text, target=target)
    proven(out, packed)
    assert open_view(out).formats


def test_what_is_not_touched_keeps_its_bytes(packed: Path, tmp_path: Path):
    out = press(packed, tmp_path / "out", "expert_drop:keep=6,score=aimer")
    before, after = open_view(packed), open_view(out)
    with Tensors(packed) as old, Tensors(out) as new:
        plan = plan_of(out)
        for layer in before.source.moe_layers:
            for place, expert in enumerate(plan.kept_experts(layer.index, layer.experts)):
                name = "model.layers.{}.block_sparse_moe.experts.{}.w2.weight"
                a, b = (view.checkpoint.tensors[name.format(layer.index, number)]
                        for view, number in ((before, expert), (after, place)))  # fmt: skip
                for suffix, part in a.stored().items():
                    assert torch.equal(old.reader.tensor(part), new.reader.tensor(b.stored()[suffix]))


def test_new_values_of_packed_matrices_are_rounded_aloud(packed: Path, text: Path, tmp_path: Path):
    report = api.press(packed, out=tmp_path / "out", steps=["expert_merge:keep=6"], texts=[text], **OPTIONS)
    assert any("rounded to nearest in their old format" in note for note in report.notes)


# Different bits


MIXED = ["rtn:bits=gate_up:3+down:4,group_size=32", "rtn:layers=0:8,group_size=32", "rtn:symmetric=false,group_size=32",
         "rtn:exclude=L1.*,group_size=32"]  # fmt: skip


@pytest.mark.parametrize("step", MIXED)
@pytest.mark.few(1)
def test_what_engines_would_read_wrongly_is_refused_and_loads_by_us(step: str, source: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"loads without an error and computes wrong; the nearest plan .* --target plugin"
    ):
        press(source, tmp_path / "stock", step)
    assert not (tmp_path / "stock").exists()
    out = press(source, tmp_path / "out", step, target="plugin")
    assert "moespresso.load loads it and agrees" in proven(out, source)
    with pytest.raises(Exception, match=r"issues during automatic conversion|moespresso-packed"):
        AutoModelForCausalLM.from_pretrained(out)  # stock loaders stop instead
    model, plain = api.load(out), tmp_path / "plain"
    ids = families.random_ids(model.config, 2, 12)
    api.export(out, to="plain", out=plain)
    whole = AutoModelForCausalLM.from_pretrained(plain)
    torch.testing.assert_close(
        families.logits_of(model, ids), families.logits_of(whole, ids), rtol=1e-5, atol=1e-5
    )
    assert model.generate(ids[:1], max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize(
    ("step", "target", "words"),
    [
        ("rtn:group_size=32", "transformers", "package `compressed-tensors`"),
        ("rtn:group_size=32,symmetric=false", "plugin", "model = moespresso.load(folder)"),
    ],
)
def test_the_card_says_how_it_is_loaded(step: str, target: Any, words: str, source: Path, tmp_path: Path):
    out = press(source, tmp_path / "out", step, target=target)
    card = (out / "README.md").read_text()
    assert words in card
    assert ("AutoModelForCausalLM.from_pretrained" in card) == (target == "transformers")


def test_bits_by_place_and_layer(source: Path, tmp_path: Path):
    out = press(
        source, tmp_path / "out", "rtn:bits=gate_up:3+down:4,layers=1-2:8,group_size=32", target="plugin"
    )
    bits = {
        name.removeprefix("model.layers."): format.bits for name, format in open_view(out).formats.items()
    }
    assert {bits[f"0.block_sparse_moe.experts.{e}.w1"] for e in range(8)} == {3}
    assert {bits[f"0.block_sparse_moe.experts.{e}.w2"] for e in range(8)} == {4}
    assert {value for name, value in bits.items() if name.startswith(("1.", "2."))} == {8}


# Experts without tokens


def test_experts_without_tokens_are_rounded_without_them(text: Path, tmp_path: Path):
    model = families.build("mixtral", hidden_size=64, intermediate_size=96)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[3] = 0
            layer.mlp.gate.weight[5] = 0
            layer.mlp.gate.weight[:3].add_(2.0)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    report = api.press(
        tmp_path / "source", out=out, steps=["gptq:group_size=32"], texts=[text], samples=1, length=4
    )
    proven(out, tmp_path / "source")
    coverage = json.loads((out / "moespresso.json").read_text())["coverage"]
    helped = {(layer, expert) for layer, row in coverage.items() for expert in row["remedies"]}
    empty = {
        (layer, str(expert))
        for layer, row in coverage.items()
        for expert, count in enumerate(row["tokens"])
        if not count
    }
    assert empty
    assert helped == empty
    assert all(sum(row["tokens"]) == 4 * 3 for row in coverage.values())
    assert any("without any were treated by hqq" in note for note in report.notes)


# Layouts


@pytest.mark.parametrize("layout", ["gptq", "awq"])
@pytest.mark.few(1)
def test_other_layouts_hold_the_same_values(layout: str, packed: Path, tmp_path: Path):
    api.export(packed, to=layout, out=tmp_path / "out")
    proven(tmp_path / "out", packed)
    before, after = open_view(packed), open_view(tmp_path / "out")
    with Tensors(packed) as old, Tensors(tmp_path / "out") as new:
        for one, other in zip(before.pieces, after.pieces, strict=True):
            assert one.name == other.name
            torch.testing.assert_close(
                new.whole(other).float(), old.whole(one).float(), rtol=2e-3 if one.ref.packed else 0, atol=0
            )
    again = tmp_path / "again"
    api.export(tmp_path / "out", to="compressed-tensors", out=again)
    assert open_view(again).source.cost().params == before.source.cost().params


def test_a_layout_that_cannot_hold_it_is_refused(source: Path, tmp_path: Path):
    out = press(source, tmp_path / "three", "rtn:bits=3,group_size=32")
    with pytest.raises(UserError, match="awq cannot store values of 3 bits"):
        api.export(out, to="awq", out=tmp_path / "out")
    mixed = press(source, tmp_path / "mixed", "rtn:layers=0:8,group_size=32", target="plugin")
    with pytest.raises(UserError, match="gptq has one format for all matrices"):
        api.export(mixed, to="gptq", out=tmp_path / "out")
    with pytest.raises(UserError, match="holds no packed matrices"):
        api.export(source, to="gptq", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Twice


def test_the_same_recipe_gives_the_same_bytes(source: Path, packed: Path, text: Path, tmp_path: Path):
    again = press(source, tmp_path / "again", "gptq:group_size=32", text=text)
    assert same(
        {p.name: p.read_bytes() for p in again.iterdir()}, {p.name: p.read_bytes() for p in packed.iterdir()}
    )


def test_a_plan_is_built_again_to_the_same_bytes(source: Path, packed: Path, text: Path, tmp_path: Path):
    plan_of(packed).save(tmp_path / "plan.json")
    with pytest.raises(UserError, match="fitted on real text"):
        api.build(source, plan=tmp_path / "plan.json", out=tmp_path / "none")
    api.build(source, plan=tmp_path / "plan.json", out=tmp_path / "out", texts=(Source(str(text)),))
    same_tensors(tmp_path / "out", packed)


def test_a_size_is_met_by_bits(source: Path, tmp_path: Path):
    eight = open_view(press(source, tmp_path / "eight", "rtn:group_size=32,bits=8")).source.cost().bytes
    for size, bits in ((eight, 8), (eight - 1, 4)):
        out = press(source, tmp_path / f"{bits}", "rtn:group_size=32", size=size)
        assert open_view(out).source.cost().bytes <= size
        assert {format.bits for format in open_view(out).formats.values()} == {bits}


def test_spilled_hidden_states_give_the_same_bytes(
    source: Path, packed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("moespresso.fit.job.must_spill", lambda *_: True)
    same_tensors(press(source, tmp_path / "out", "gptq:group_size=32", text=text), packed)


def test_too_little_memory_for_a_layer_is_refused(source: Path, text: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"--max-memory 100 MiB is too little to measure: one layer takes about"
    ):
        press(
            source, tmp_path / "out", "gptq:group_size=32", text=text, runtime=Runtime(max_memory=100 << 20)
        )
    assert not (tmp_path / "out").exists()
