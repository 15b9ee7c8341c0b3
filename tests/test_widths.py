"""Experts of one layer that differ in width: planned, written, read by transformers with moespresso, and changed again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import families
import moespresso
from conftest import Zoo, write_wide
from moespresso import api
from moespresso.build import open_view
from moespresso.core.blueprint import LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.unit import Unit
from moespresso.effect import price
from moespresso.kernels import RoutedExperts, allocation
from moespresso.run import Recipe
from moespresso.runtime.widths import Ragged
from moespresso.statistics import Measurement, Removal, grid
from test_channel_prune import PLAIN, SHARED
from test_depth_steps import plan_of
from test_slim import OPTIONS, disk, disk_of, press, proven

OWN = "channel_prune:ratio=0.5,per_expert=true"


def widths_of(folder: Path) -> list[tuple[int, ...]]:
    return [layer.widths or (layer.width,) * layer.experts for layer in open_view(folder).source.moe_layers]


def built(source: Path, out: Path, text: Path, widths: dict[Unit, int]) -> Path:
    """A folder whose experts have the widths that a plan says by hand."""
    recipe = Recipe().with_options(
        model=source, steps=["channel_prune:width=8"], texts=[text], target="plugin", **OPTIONS
    )
    view, plan = open_view(source), out.with_suffix(".json")
    method = api.plan(source, recipe=recipe).stages[0].method
    stage = Stage(method, {unit: Treatment(channels=width) for unit, width in widths.items()})
    Plan(view.source.digest, (stage,)).save(plan)
    api.build(source, plan=plan, out=out, recipe=recipe)
    return out


def ragged(source: Path, out: Path, text: Path) -> Path:
    """The same with widths of 8, 16, 24, ... in turn, the widest being as wide as before."""
    layers = open_view(source).source.moe_layers
    return built(source, out, text, {
        Unit(layer.index, "experts", expert): min(8 * (expert % 5 + 1), layer.width) if expert else layer.width
        for layer in layers for expert in range(layer.experts)
    })  # fmt: skip


# Written and read


@pytest.mark.parametrize("family", [*PLAIN, *SHARED, "jamba", "hunyuan_v1_moe"])
@pytest.mark.few(1)
def test_every_family_loads_experts_of_any_width(family: str, zoo: Zoo, text: Path, tmp_path: Path):
    out = ragged(zoo(family), tmp_path / "out", text)
    assert "logits within" in proven(out, zoo(family))["transformers with moespresso loads it and agrees"]
    assert all(len(set(each)) > 1 for each in widths_of(out))
    assert price(plan_of(out), open_view(zoo(family)).source).bytes == sum(
        t.nbytes for t in disk(out).values()
    )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
@pytest.mark.few(1)
def test_in_memory_they_are_as_narrow_as_on_disk(family: str, zoo: Zoo, text: Path, tmp_path: Path):
    out = ragged(zoo(family), tmp_path / "out", text)
    stored = sum(tensor.numel() for name, tensor in disk(out).items() if ".experts." in name)
    models: list[Any] = [
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16),
        moespresso.load(out),
    ]
    ids = families.random_ids(models[0].config, 2, 9)
    answers: list[Tensor] = []
    for model in models:
        mixtures = [module for module in model.modules() if isinstance(module, Ragged)]
        assert sum(p.numel() for module in mixtures for p in module.parameters()) == stored
        answers.append(model.float().eval()(input_ids=ids).logits)
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)
        model.save_pretrained(tmp_path / "saved")
        families.same_model(families.reference(tmp_path / "saved"), model, ids)
    torch.testing.assert_close(*answers)


def test_it_equals_the_original_with_channels_cut_by_hand(zoo: Zoo, text: Path, tmp_path: Path):
    source = zoo("mixtral")
    step = f"{OWN},refit=none,score=magnitude"
    out = press(source, tmp_path / "out", step, text=text, target="plugin")
    before, after = disk_of(source), disk(out)
    model: Any = families.reference(source)
    for name in (name for name in after if name.endswith("w2.weight")):
        parts = name.split(".")
        gone = torch.tensor(
            [not any(torch.equal(column, kept) for kept in after[name].T) for column in before[name].T]
        )
        assert int((~gone).sum()) == after[name].shape[1]
        down = model.model.layers[int(parts[2])].mlp.experts.down_proj
        down.data[int(parts[5])][:, gone] = 0
    ids = families.random_ids(model.config, 2, 9)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        pressed: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        torch.testing.assert_close(pressed(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.breadth
def test_without_moespresso_transformers_stops(zoo: Zoo, text: Path, tmp_path: Path):
    out = ragged(zoo("mixtral"), tmp_path / "out", text)
    code = f"from transformers import AutoModelForCausalLM as A\nA.from_pretrained({str(out)!r})"
    stopped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert stopped.returncode
    assert "AmbiguousGlobalPerLayerAttributeError: 'num_local_experts' is a per-layer" in stopped.stderr


def test_experts_that_are_gone_behind_a_whole_router(text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    for replaced in ("none", "novice"):
        steps = [f"expert_drop:keep=6,replace={replaced},router=preserve", OWN]
        proven(press(source, tmp_path / replaced, *steps, text=text, target="plugin"), source)


def test_gradients_flow(zoo: Zoo, text: Path, tmp_path: Path):
    model: Any = AutoModelForCausalLM.from_pretrained(
        ragged(zoo("mixtral"), tmp_path / "out", text), dtype=torch.float32
    )
    ids = families.random_ids(model.config, 2, 9)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for module in model.modules() if isinstance(module, Ragged) for p in module.parameters()]
    assert grads
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads)


# Changed again


@pytest.mark.parametrize(
    "steps",
    [
        ["expert_drop:keep=6"],
        ["channel_prune:ratio=0.25,per_expert=true"],
        ["channel_prune:ratio=0.25,per_expert=true,scope=global"],
        ["layer_drop"],
        ["block_drop"],
        ["rtn:group_size=8,bits=4"],
        ["gptq:group_size=8,bits=4"],
        ["gptq:group_size=0,bits=3"],
        ["wanda:sparsity=0.5"],
        ["sparsegpt:sparsity=2:4"],
        ["magnitude:sparsity=0.5,pack=true"],
        [],
    ],
)  # fmt: skip
@pytest.mark.few(1)
def test_a_ragged_folder_is_a_source_like_any_other(steps: list[str], text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    first = ragged(source, tmp_path / "first", text)
    out = press(first, tmp_path / "out", *steps, text=text, target="plugin")
    proven(out, first)
    if not steps:
        assert disk(out).keys() == disk(first).keys()
        assert all(torch.equal(disk(out)[name], disk(first)[name]) for name in disk(out))
    moespresso.load(out)


@pytest.mark.parametrize(
    "steps",
    [
        ["expert_drop:keep=6", OWN],
        [OWN, "expert_drop:keep=6"],
        [OWN, "gptq:group_size=8"],
        [f"{OWN},multiple=32", "rtn:group_size=32"],
        [OWN, "channel_prune:ratio=0.25,per_expert=true"],
        ["block_drop", OWN],
        [f"{OWN},scope=global", "wanda:sparsity=0.5"],
    ],
)
@pytest.mark.few(1)
def test_in_one_recipe_with_other_steps(steps: list[str], text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    proven(press(source, tmp_path / "out", *steps, text=text, target="plugin"), source)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (
            "channel_prune:ratio=0.25",
            "have 8 to 96 channels, so that one number does not fit.*per_expert=true",
        ),
        ("expert_merge:keep=4", "differ in width"),
        ("low_rank:ratio=0.25", "differ in width"),
    ],
)
@pytest.mark.few(1)
def test_what_needs_equal_experts_is_refused(step: str, reason: str, text: Path, tmp_path: Path):
    first = ragged(write_wide(tmp_path / "source"), tmp_path / "first", text)
    with pytest.raises(UserError, match=reason):
        press(first, tmp_path / "out", step, text=text, target="plugin")


# Chosen


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("ratio=0.25,scope=global,multiple=64", "channels go instead of 25.0%, since widths are multiples of 64"),
        ("ratio=0.2,multiple=64", "20.8% of the channels go instead of 20."),
        ("ratio=0.3,scope=global,multiple=128", "0.0% of the channels go instead of 30.0%, since widths are multiples of 128 and none is "
         "under least=8"),
    ],
)  # fmt: skip
def test_widths_of_their_own_are_multiples_and_what_that_takes_is_said(
    settings: str, told: str, text: Path, tmp_path: Path
):
    source = write_wide(tmp_path / "source")
    per_expert = "" if "global" in settings else ",per_expert=true"
    report = api.press(source, out=tmp_path / "out", steps=[f"channel_prune:{settings}{per_expert}"], target="plugin", texts=[text],
                       **OPTIONS)  # fmt: skip
    assert any(told in note for note in report.notes), report.notes
    plan = plan_of(tmp_path / "out")
    for treatment in plan.stages[0].treatments.values():
        assert treatment.channels in (64, 96)


def test_the_share_is_met_and_stock_engines_are_refused(zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(
        UserError,
        match=r"per_expert=true leaves experts of unequal width.*per_expert=false,ratio=0.4, or say --target plugin",
    ):
        press(zoo("mixtral"), tmp_path / "stock", OWN.replace("0.5", "0.4"), text=text)
    whole = open_view(zoo("mixtral")).source.moe_layers
    for scope in ("layer", "global"):
        out = press(zoo("mixtral"), tmp_path / scope, f"{OWN},scope={scope}", text=text, target="plugin")
        proven(out, zoo("mixtral"))
        found = widths_of(out)
        assert all(width % 8 == 0 for each in found for width in each)
        sums = [sum(each) for each in found]
        assert sum(sums) == sum(
            20 * layer.experts for layer in whole
        )  # the half, though 20 is no multiple of 8
        if scope == "layer":
            assert len(set(sums)) == 1


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=4), st.integers(0, 16)
)
def test_no_other_choice_loses_less(rows: list[list[float]], steps: int):
    # Losses that grow ever faster: then the greedy walk is the optimum, which all choices are compared with.
    curves = {
        (n,): [(8 * k, sum(sum(sorted(row)[:i]) for i in range(k + 1))) for k in range(5)]
        for n, row in enumerate(rows)
    }
    goal = min(steps, 4 * len(rows)) * 8
    found = allocation.allocate(curves, dict.fromkeys(curves, 32), dict.fromkeys(curves, 1), goal, 8)
    assert sum(found.values()) == goal
    best = {0: 0.0}
    for points in curves.values():
        best = {
            total: min(best[total - gone] + loss for gone, loss in points if total - gone in best)
            for total in {had + gone for had in best for gone, _ in points}
        }
    assert sum(dict(curves[key])[gone] for key, gone in found.items()) <= best[goal] * (1 + 1e-9) + 1e-9


def test_a_curve_that_bends_upwards_is_taken_as_a_line():
    curves = {(0,): [(0, 0.0), (8, 10.0), (16, 10.0)], (1,): [(0, 0.0), (8, 6.0), (16, 14.0)]}
    assert allocation.allocate(curves, {(0,): 16, (1,): 16}, {(0,): 1, (1,): 1}, 16, 8) == {(0,): 16, (1,): 0}


def test_what_is_left_is_a_multiple_wherever_something_goes():
    curves = {(n,): [(0, 0.0), (44, 44.0 * (n + 1))] for n in range(2)}
    widths, ones = {(0,): 52, (1,): 48}, {(0,): 1, (1,): 1}
    assert allocation.allocate(curves, widths, ones, 4, 16) == {(0,): 4, (1,): 0}
    assert allocation.allocate(curves, widths, ones, 30, 16) == {(0,): 36, (1,): 0}
    assert allocation.allocate(curves, widths, ones, 80, 16) == {
        (0,): 36,
        (1,): 32,
    }  # 16 channels each are the fewest that can stay


def test_layers_count_as_often_as_they_have_experts():
    curves = {(0,): [(0, 0.0), (8, 9.0)], (1,): [(0, 0.0), (8, 4.0)]}
    assert allocation.allocate(curves, {(0,): 8, (1,): 8}, {(0,): 3, (1,): 1}, 24, 8) == {(0,): 8, (1,): 0}


@given(st.integers(8, 20_000))
def test_few_widths_are_told_all_of_them_narrower(width: int):
    told = grid(width)
    assert len(told) <= 32
    assert all(0 < kept < width for kept in told)
    assert told == sorted(told)


def test_what_is_told_to_be_lost_is_the_error_of_the_best_refit():
    torch.manual_seed(0)
    width, hidden, tokens = 24, 6, 200
    module = SimpleNamespace(has_gate=False, is_transposed=False, act_fn=torch.relu, up_proj=torch.randn(2, width, hidden),
                             down_proj=torch.randn(2, hidden, width))  # fmt: skip
    index = torch.tensor([[0], [1]]).repeat(tokens // 2, 1)
    inputs, gates = torch.randn(tokens, hidden), torch.rand(tokens, 1) + 0.5
    routed = SimpleNamespace(hidden=inputs, index=index, weights=gates)
    stream = torch.randn(1, tokens, hidden)
    call: Any = SimpleNamespace(routed=routed, valid=torch.ones(1, tokens, dtype=torch.bool), output=stream)
    layer: Any = SimpleNamespace(experts=module, spec=LayerSpec(0, "attention", 2))
    removals = Removal().begin(layer, Measurement(tokens))
    removals.add(call)
    rows = removals.values()
    experts = RoutedExperts.of(module, removals._fed)
    for expert in range(2):
        mine, weights = experts.rows(expert)
        inner = torch.relu(inputs[mine] @ module.up_proj[expert].T) * weights[:, None]
        wanted = inner @ module.down_proj[expert].T
        told = rows[Unit(0, "experts", expert)]
        assert list(told) == ["removal@16", "removal@8"]
        for kept in (16, 8):
            best = min(
                float((wanted - part @ torch.linalg.lstsq(part, wanted).solution).square().sum())
                for seed in range(50)
                for part in [
                    inner[:, torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:kept]]
                ]
            )
            # Damped and in turns of eight, yet better than any of many draws.
            assert told[f"removal@{kept}"] * float(stream.square().sum()) < best


# Bad plans


@pytest.mark.parametrize(
    ("unit", "channels", "reason"),
    [
        ("L0.E1", 400, "leaves 400 channels to L0.E1, which has 40"),
        ("L0.E99", 8, "E99"),
        ("L0.E1", 0, "leaves 0 channels"),
    ],
)
def test_bad_widths(unit: str, channels: int, reason: str, zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match=reason):
        built(zoo("mixtral"), tmp_path / "out", text, {Unit.parse(unit): channels})


def test_a_plan_says_of_all_experts_of_a_layer_or_of_none(zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"narrows experts of L0 but says nothing of L0.E0"):
        built(zoo("mixtral"), tmp_path / "out", text, {Unit(0, "experts", 1): 8})


@pytest.mark.parametrize("change", [[8], "all", [8] * 8, [0] * 8])
@pytest.mark.few(1)
def test_a_config_that_says_other_widths_is_refused(change: Any, zoo: Zoo, text: Path, tmp_path: Path):
    out = ragged(zoo("mixtral"), tmp_path / "out", text)
    path = out / "config.json"
    config = json.loads(path.read_text())
    said = next(iter(config["per_layer_config"].values()))
    said["expert_widths"] = [40] * 8 if change == "all" else change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"expert_widths .* are not the widths|which does not make"):
        open_view(out)


@pytest.mark.parametrize("settings", ["per_expert=true", "per_expert=true,scope=global", "scope=global"])
@pytest.mark.few(1)
def test_a_byte_budget_is_kept(settings: str, zoo: Zoo, text: Path, tmp_path: Path):
    whole = open_view(zoo("mixtral")).source.cost().bytes
    size = round(whole * 0.9)
    out = press(
        zoo("mixtral"), tmp_path / "out", f"channel_prune:{settings}", text=text, target="plugin", size=size
    )
    assert whole * 0.8 < sum(tensor.nbytes for tensor in disk(out).values()) <= size


def test_layouts_of_other_engines_need_experts_of_one_width(text: Path, tmp_path: Path):
    source = write_wide(tmp_path / "source")
    out = press(
        source, tmp_path / "out", f"{OWN},multiple=32", "rtn:group_size=32", text=text, target="plugin"
    )
    assert all(len(set(each)) > 1 for each in widths_of(out))
    with pytest.raises(UserError, match="which no engine that reads gptq can load"):
        api.export(out, to="gptq", out=tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_no_expert_becomes_narrower_than_the_least_and_what_could_not_go_is_told(
    zoo: Zoo, text: Path, tmp_path: Path
):
    for least, ratio in ((16, 0.4), (32, 0.5)):
        step = f"channel_prune:ratio={ratio},per_expert=true,least={least}"
        report = api.press(
            zoo("mixtral"), out=tmp_path / str(least), steps=[step], texts=[text], target="plugin", **OPTIONS
        )
        assert min(width for each in widths_of(tmp_path / str(least)) for width in each) == least
        told = any("20.0% of the channels go instead of 50.0%" in note for note in report.notes)
        assert told == (least == 32)


@pytest.mark.parametrize(
    "step", ["channel_prune:per_expert=true", "channel_prune:scope=global", "expert_drop:scope=global"]
)
@pytest.mark.few(1)
def test_one_measurement_serves_every_ratio(step: str, zoo: Zoo, text: Path, tmp_path: Path):
    stats, plan, out = tmp_path / "stats.json", tmp_path / "plan.json", tmp_path / "out"
    asked: Any = {"texts": [text], **OPTIONS}
    api.measure(zoo("mixtral"), out=stats, steps=[f"{step},ratio=0.25"], **asked)
    joined = f"{step},ratio=0.5" if "drop" not in step else f"{step},ratio=0.4"
    api.plan(zoo("mixtral"), stats=stats, steps=[joined], target="plugin", out=plan, **asked)
    made = Plan.load(plan)
    assert made.stages[0].treatments
    recipe = Recipe().with_options(model=zoo("mixtral"), texts=[text], target="plugin")
    api.build(zoo("mixtral"), plan=plan, out=out, recipe=recipe)
    proven(out, zoo("mixtral"))
