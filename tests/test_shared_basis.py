"""Bases that experts share as a step: stored once, decoded by all, and handed on when experts go."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import moespresso
from conftest import Zoo, write_wide
from driver import Driver
from moespresso import api
from moespresso.build import Tensors, open_view
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.plan import Plan, Stage
from moespresso.core.unit import Unit
from moespresso.effect import price
from moespresso.run import Recipe
from test_channel_prune import PLAIN, SHARED
from test_depth_steps import plan_of
from test_resume import KILLED, Press, contents, same
from test_slim import OPTIONS, disk, disk_of, press, proven

STEP = "low_rank:method=shared_basis,ratio=0.25"
PLUGIN = ("--target", "plugin")
OWN = "channel_prune:ratio=0.25,per_expert=true"


def shared_parts(folder: Path) -> list[str]:
    return sorted(name for name in disk(folder) if name.endswith("weight_bases"))


def stored_experts(folder: Path) -> int:
    return sum(tensor.nbytes for name, tensor in disk_of(folder).items() if ".experts." in name)


@pytest.mark.parametrize("family", [*PLAIN, *SHARED, "jamba", "hunyuan_v1_moe"])
@pytest.mark.few(1)
def test_every_family_shares_bases(family: str, zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo(family), tmp_path / "out", STEP, text=text, target="plugin")
    proven(out, zoo(family))
    assert price(plan_of(out), open_view(zoo(family)).source).bytes == sum(
        t.nbytes for t in disk(out).values()
    )
    before = stored_experts(zoo(family))
    assert 0.65 * before < stored_experts(out) <= 0.76 * before  # some are stored in float32
    experts = {layer.experts for layer in open_view(out).source.moe_layers}
    tensors = disk(out)
    for name in shared_parts(out):
        assert ".experts.0." in name
        own = [
            each
            for each in tensors
            if each.endswith("weight_own") and name.split(".experts.")[0] + "." in each
        ]
        assert len(own) == 2 * max(experts)


@pytest.mark.breadth
def test_what_is_stored_is_what_is_loaded(zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo("mixtral"), tmp_path / "out", STEP, text=text, target="plugin")
    tensors = disk(out)
    with Tensors(out) as reader:
        whole = {piece.name: reader.whole(piece) for piece in open_view(out).pieces}
    state = moespresso.load(out).state_dict()
    for layer, expert, matrix in itertools.product(range(2), range(8), ("w1", "w3")):
        stem = f"model.layers.{layer}.block_sparse_moe.experts."
        own, shares = (
            tensors[f"{stem}{expert}.{matrix}.weight_{part}"].float() for part in ("own", "shares")
        )
        bases = tensors[f"{stem}0.{matrix}.weight_bases"].float()
        made = own @ sum(share * basis for share, basis in zip(shares, bases, strict=True))
        torch.testing.assert_close(
            whole[f"{stem}{expert}.{matrix}.weight"].float(), made, rtol=2**-7, atol=1e-4
        )
        loaded = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"][expert].chunk(2)[matrix == "w3"]
        torch.testing.assert_close(loaded.float(), made, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize(
    "steps",
    [
        ["expert_drop:keep=6", STEP],
        [STEP, "expert_drop:keep=6"],
        ["expert_merge:keep=6", STEP],
        [OWN, STEP],
        [OWN, STEP, "expert_drop:keep=6"],
        ["block_drop", STEP],
        [STEP, "layer_drop"],
        ["expert_drop:keep=6,replace=novice,router=preserve", STEP],
        [f"{STEP},bases=1"],
        [f"{STEP},exclude=L0.experts"],
        [f"{STEP},sequential=false,damping=0"],
    ],
)
@pytest.mark.few(1)
def test_in_one_recipe_with_other_steps(steps: list[str], text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    out = press(source, tmp_path / "out", *steps, text=text, target="plugin")
    proven(out, source)
    assert price(plan_of(out), open_view(source).source).bytes == sum(t.nbytes for t in disk(out).values())
    moespresso.load(out)


@pytest.mark.parametrize(
    ("steps", "still"),
    [
        (["expert_drop:keep=6"], True),
        (["expert_drop:keep=6,renormalise=compensate"], True),
        (["layer_drop"], True),
        (["block_drop"], True),
        ([], True),
        (["expert_merge:keep=6"], True),
        (["magnitude"], False),
        (["channel_prune:width=64"], False),
        ([OWN], False),
        (["gptq:group_size=32"], False),
        ([STEP], True),
    ],
)
@pytest.mark.few(1)
def test_a_folder_with_bases_is_a_source_like_any_other(
    steps: list[str], still: bool, text: Path, tmp_path: Path
):
    source = write_wide(tmp_path / "source")
    first = press(source, tmp_path / "first", STEP, text=text, target="plugin")
    out = press(first, tmp_path / "out", *steps, text=text, target="plugin")
    proven(out, first)
    assert bool(shared_parts(out)) == still
    if not steps:
        assert all(torch.equal(disk(out)[name], tensor) for name, tensor in disk(first).items())


@pytest.mark.parametrize("at", ["folder", "recipe"])
@pytest.mark.breadth
def test_the_first_that_is_left_stores_what_all_need(at: str, text: Path, tmp_path: Path):
    source, options = write_wide(tmp_path / "source"), {"texts": [text], "target": "plugin", **OPTIONS}
    first = press(source, tmp_path / "first", STEP, text=text, target="plugin")
    start = first if at == "folder" else source
    steps = ["expert_drop:keep=6"] if at == "folder" else [STEP, "expert_drop:keep=6"]
    made = api.plan(start, steps=steps, **options)
    gone = Stage(made.stages[-1].method, {
        unit: replace(treatment, keep=(2, 3, 5)) for unit, treatment in made.stages[-1].treatments.items()
    })  # fmt: skip
    Plan(made.blueprint, (*made.stages[:-1], gone), made.calibration).save(tmp_path / "plan.json")
    out = tmp_path / "out"
    api.build(start, plan=tmp_path / "plan.json", out=out, **options)
    proven(out, start)
    before, after = disk(first), disk(out)
    assert shared_parts(out) == shared_parts(first)
    for name in shared_parts(out):
        assert torch.equal(after[name], before[name])
        for new, old in enumerate((2, 3, 5)):
            for part in ("weight_own", "weight_shares"):
                mine = name.replace("weight_bases", part).replace(".experts.0.", ".experts.{}.")
                assert torch.equal(after[mine.format(new)], before[mine.format(old)])


@pytest.mark.breadth
def test_experts_of_widths_of_their_own_share_bases(text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    first = press(source, tmp_path / "first", OWN, text=text, target="plugin")
    for start, steps in ((source, [OWN, STEP]), (first, [STEP])):
        out = press(start, tmp_path / f"out{len(steps)}", *steps, text=text, target="plugin")
        proven(out, start)
        assert stored_experts(out) <= 0.75 * stored_experts(first)
        assert len({len(t) for name, t in disk(out).items() if name.endswith("w1.weight_own")}) > 1


@pytest.mark.breadth
def test_more_bases_of_fewer_ranks_and_shares_of_bytes(zoo: Zoo, text: Path, tmp_path: Path):
    made: dict[int, Format] = {}
    for bases in (1, 3, 6):
        out = press(
            zoo("mixtral"), tmp_path / str(bases), f"{STEP},bases={bases}", text=text, target="plugin"
        )
        made[bases] = plan_of(out).stages[0].treatments[Unit(0, "experts", None, "gate")].format or Format()
        assert made[bases].bases == bases
    assert made[1].rank > made[3].rank > made[6].rank


@pytest.mark.breadth
def test_a_byte_budget_is_kept(zoo: Zoo, text: Path, tmp_path: Path):
    whole = open_view(zoo("mixtral")).source.cost().bytes
    out = press(zoo("mixtral"), tmp_path / "out", "low_rank:method=shared_basis", text=text, target="plugin",
                size=round(0.85 * whole))  # fmt: skip
    assert 0.8 * whole < sum(tensor.nbytes for tensor in disk(out).values()) <= 0.85 * whole
    with pytest.raises(UserError, match="cannot be reached by low_rank alone"):
        press(zoo("mixtral"), tmp_path / "no", "low_rank:method=shared_basis", text=text, target="plugin",
              size=round(0.2 * whole))  # fmt: skip


@pytest.mark.parametrize("line", ["end rename slim-00001.safetensors", "end remember 2"])
@pytest.mark.breadth
def test_killed_and_taken_up(line: str, driver: Driver, zoo: Zoo, text: Path, tmp_path: Path):
    whole = Press(driver, zoo("mixtral"), text, tmp_path / "whole")
    assert whole(STEP, more=PLUGIN).code == 0
    again = Press(driver, zoo("mixtral"), text, tmp_path / "out")
    assert again(STEP, more=PLUGIN, kill=line).code == KILLED
    assert again(STEP, more=PLUGIN).code == 0
    assert same(contents(again.out), contents(whole.out))


# Bad input


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (f"{STEP},parts=attention", "parts=attention has no layer-mates"),
        (f"{STEP},parts=experts+shared", "use method=svd for all but experts"),
        (f"{STEP},bases=0", "bases=0 must be 1 or more"),
        ("low_rank:bases=4", "bases=4 is a setting of method=shared_basis"),
        (
            STEP.replace("0.25", "0.7"),
            r"ratio=0.7 leaves nothing of gate and up of L0: use 0\.[456]\d* or less$",
        ),
        (f"{STEP},bases=100", "bases=100 is more than the 8 experts of L0"),
        (f"{STEP},damping=-1", "must not be negative"),
        (f"{STEP},exclude=L0.experts.down", "exclude=L0.experts.down leaves some"),
    ],
)
def test_wishes_that_cannot_be(step: str, reason: str, zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match=reason):
        press(zoo("mixtral"), tmp_path / "out", step, text=text, target="plugin")
    assert not (tmp_path / "out").exists()


def test_stock_engines_and_steps_that_would_undo_it_are_refused(text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    with pytest.raises(UserError, match=r"bases that experts share, which transformers does not read"):
        press(source, tmp_path / "out", STEP, text=text)
    for step in ("gptq:group_size=32", "refit", "channel_prune:width=64", "magnitude"):
        with pytest.raises(UserError, match="after a step that stores matrices"):
            press(source, tmp_path / "out", STEP, step, text=text, target="plugin")


@pytest.mark.parametrize(
    ("unit", "format", "reason"),
    [
        (
            "L0.experts.down",
            {"kind": "bases", "rank": 4, "bases": 2},
            "has no bases to share: only gate and up",
        ),
        ("L0.experts.gate", {"kind": "bases", "rank": 4, "bases": 0}, "no 0 bases of rank 4"),
        ("L0.experts.gate", {"kind": "bases", "rank": 900, "bases": 2}, "no 2 bases of rank 900"),
        (
            "L0.experts.gate",
            {"kind": "bases", "rank": 3, "bases": 2},
            "different formats: give both the same",
        ),
        (
            "L0.experts.down",
            {"kind": "integer", "bits": 4},
            "the format integer, which low_rank as it is set",
        ),
        ("L0.experts.up", {"kind": "factors", "rank": 3}, "the format factors, which low_rank as it is set"),
        ("L0.experts.down", None, "gives some matrices of L0's experts a format, but down none"),
        ("L0.experts.gate", None, "gives some matrices of L0's experts a format, but gate none"),
    ],
)
@pytest.mark.few(1)
def test_bad_plans(
    unit: str, format: dict[str, Any] | None, reason: str, zoo: Zoo, text: Path, tmp_path: Path
):
    recipe = Recipe().with_options(
        model=zoo("mixtral"), steps=[STEP], texts=[text], target="plugin", **OPTIONS
    )
    body = json.loads(api.plan(zoo("mixtral"), recipe=recipe).to_json())
    body["stages"][0]["treatments"] |= {unit: {"format": format}}
    if format is None:
        del body["stages"][0]["treatments"][unit]
    (tmp_path / "plan.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=reason):
        api.build(zoo("mixtral"), plan=tmp_path / "plan.json", out=tmp_path / "out", recipe=recipe)


@pytest.mark.parametrize("method", ["rtn", "gptq", "magnitude", "channel_prune"])
@pytest.mark.breadth
def test_a_plan_whose_method_makes_other_formats(method: str, zoo: Zoo, text: Path, tmp_path: Path):
    recipe = Recipe().with_options(
        model=zoo("mixtral"), steps=[STEP], texts=[text], target="plugin", **OPTIONS
    )
    body = json.loads(api.plan(zoo("mixtral"), recipe=recipe).to_json())
    body["stages"][0]["method"] = {"kind": method} | ({"width": 8} if method == "channel_prune" else {})
    (tmp_path / "plan.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=f"which {method} as it is set does not make"):
        api.build(zoo("mixtral"), plan=tmp_path / "plan.json", out=tmp_path / "out", recipe=recipe)


@pytest.mark.parametrize("damage", ["gone", "shape", "shares", "scalar", "twice", "orphan"])
@pytest.mark.few(1)
def test_damaged_bases_are_told(damage: str, zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo("mixtral"), tmp_path / "out", STEP, text=text, target="plugin")
    tensors = disk(out)
    name = shared_parts(out)[0]
    if damage == "gone":
        del tensors[name]
    elif damage == "scalar":
        tensors[name] = tensors[name].flatten()[0].clone()
    elif damage in ("twice", "orphan"):
        tensors[name.replace(".0.w", ".3.w" if damage == "twice" else ".77.w")] = tensors[name].clone()
    elif damage == "shape":
        tensors[name] = tensors[name][:, :-1].contiguous()
    else:
        own = name.replace(".0.", ".1.").replace("bases", "shares")
        tensors[own] = tensors[own][:-1].contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"weight_bases is|weight_shares is|lacks a part|is not the one that"):
        moespresso.load(out)
    assert not api.verify(out, against=zoo("mixtral"))["ok"]


@pytest.mark.breadth
def test_experts_without_tokens_are_told_and_kept(zoo: Zoo, text: Path, tmp_path: Path):
    few: Any = OPTIONS | {"samples": 1, "length": 3}
    out = tmp_path / "out"
    api.press(zoo("mixtral"), out=out, steps=[STEP], texts=[text], target="plugin", **few)
    proven(out, zoo("mixtral"))
    coverage = json.loads((out / "moespresso.json").read_text())["coverage"]
    for row in coverage.values():
        silent = {str(at) for at, tokens in enumerate(row["tokens"]) if not tokens}
        assert silent
        assert row["remedies"] == dict.fromkeys(sorted(silent), "what the others were given, and no refit")


def changed(folder: Path, ends: Sequence[str], change: Callable[[Tensor], Tensor]) -> Path:
    """A checkpoint with other values or dtypes in the tensors whose names end so."""
    tensors = disk_of(folder)
    for name in (each for each in tensors if each.endswith(tuple(ends))):
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("ends", "dtype"),
    [
        ([".w1.weight", ".w3.weight"], torch.float32),
        ([".w2.weight"], torch.float32),
        ([".experts.3.w2.weight"], torch.float32),
        ([".experts.3.w2.weight"], torch.float16),
    ],
)
@pytest.mark.breadth
def test_matrices_of_several_dtypes(ends: list[str], dtype: torch.dtype, text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    changed(source, ["weight"], Tensor.bfloat16)
    changed(source, ends, lambda tensor: tensor.to(dtype))
    out = press(source, tmp_path / "out", STEP, text=text, target="plugin")
    proven(out, source)
    assert price(plan_of(out), open_view(source).source).bytes == sum(t.nbytes for t in disk(out).values())
    assert stored_experts(out) <= 0.75 * stored_experts(source)
    moespresso.load(out)


@pytest.mark.parametrize("matrix", ["w2", "w3"])
@pytest.mark.breadth
def test_experts_that_answer_nothing(matrix: str, text: Path, tmp_path: Path):
    ends = [f"layers.1.block_sparse_moe.experts.{expert}.{matrix}.weight" for expert in range(8)]
    source = changed(write_wide(tmp_path / "source"), ends, torch.zeros_like)
    proven(press(source, tmp_path / "out", STEP, text=text, target="plugin"), source)


def test_one_expert_alone_is_not_spoilt(text: Path, tmp_path: Path):
    ends = [f"experts.{expert}.{matrix}.weight" for expert in range(7) for matrix in ("w1", "w3")]
    source = changed(write_wide(tmp_path / "source"), ["weight"], Tensor.bfloat16)
    changed(source, ends, torch.zeros_like)
    out = press(source, tmp_path / "out", STEP, text=text, target="plugin")
    proven(out, source)
    before, state = disk_of(source), moespresso.load(out).state_dict()
    for layer in range(2):
        found = state[f"model.layers.{layer}.mlp.experts.gate_up_proj"].float()
        stem = f"model.layers.{layer}.block_sparse_moe.experts.7"
        wanted = torch.cat([before[f"{stem}.{matrix}.weight"].float() for matrix in ("w1", "w3")])
        assert float((found[7] - wanted).norm()) < 0.7 * float(wanted.norm())
        assert not bool(found[:7].any())


@pytest.mark.parametrize(
    "steps",
    [
        ["attention_rank", "channel_prune:width=64"],
        ["low_rank:parts=attention", "channel_prune:ratio=0.25,per_expert=true", "refit"],
        ["attention_rank", "expert_drop:keep=6", "refit"],
        ["low_rank:parts=attention", STEP],
        [STEP, "attention_rank"],
        ["rtn:parts=attention,group_size=32", "channel_prune:width=64"],
    ],
)
@pytest.mark.few(1)
def test_what_another_part_is_stored_as_is_in_nobodys_way(steps: list[str], text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    proven(press(source, tmp_path / "out", *steps, text=text, target="plugin"), source)


def test_formats_without_bases_say_nothing_of_them(zoo: Zoo, text: Path, tmp_path: Path):
    out = press(zoo("mixtral"), tmp_path / "out", "low_rank:ratio=0.25", text=text, target="plugin")
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert all("bases" not in group["weights"] for group in groups.values())
