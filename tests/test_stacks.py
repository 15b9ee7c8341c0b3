"""Experts of which a layer has one tensor (Granite): narrowed, pruned and refitted as others are, for stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import families
from conftest import Zoo
from moespresso import api
from moespresso.build import open_view
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.unit import Unit
from moespresso.data import Source
from moespresso.effect import price
from moespresso.run import Recipe
from test_depth_steps import plan_of
from test_slim import OPTIONS, disk, disk_of, press, proven

GATE_UP, DOWN = "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"


@pytest.fixture
def granite(zoo: Zoo) -> Path:
    return zoo("granitemoe")


@pytest.mark.parametrize(
    "steps",
    [
        ["channel_prune:ratio=0.4"],
        ["channel_prune:width=16,score=heapr,refit=expert"],
        ["magnitude:sparsity=2:4"],
        ["wanda"],
        ["sparsegpt:sparsity=2:4"],
        ["expert_drop:keep=6", "refit"],
        ["expert_merge:keep=6", "refit", "channel_prune:width=16"],
        ["expert_drop:keep=6", "channel_prune:ratio=0.4", "wanda"],
        ["channel_prune:ratio=0.4", "expert_drop:keep=6,renormalise=compensate"],
        ["channel_prune:width=24", "channel_prune:width=16"],
        ["magnitude", "expert_drop:keep=6"],
        ["block_drop", "sparsegpt"],
    ],
)
@pytest.mark.few(1)
def test_stock_transformers_loads_it(steps: list[str], granite: Path, text: Path, tmp_path: Path):
    out = press(granite, tmp_path / "out", *steps, text=text)
    assert "logits within" in proven(out, granite)["stock transformers loads it and agrees"]
    assert price(plan_of(out), open_view(granite).source).bytes == sum(t.nbytes for t in disk(out).values())
    for name, tensor in disk(out).items():
        if "sparsity=2:4" in steps[0] and name.endswith((GATE_UP, DOWN)):
            groups = (tensor != 0).unflatten(-1, (-1, 4)).sum(-1)
            assert bool((groups == 2).all())


def test_it_equals_the_original_with_channels_cut_by_hand(granite: Path, text: Path, tmp_path: Path):
    out = press(granite, tmp_path / "out", "channel_prune:width=16,refit=none,score=magnitude", text=text)
    before, after = disk_of(granite), disk_of(out)
    model: Any = families.reference(granite)
    for name in (name for name in after if name.endswith(DOWN)):
        above = name.replace(DOWN, GATE_UP)
        down = model.model.layers[int(name.split(".")[2])].block_sparse_moe.experts.down_proj
        for expert, (was, now) in enumerate(zip(before[name], after[name], strict=True)):
            kept = _kept(was, now)
            assert len(kept) == 16
            rows = torch.cat([kept, kept + was.shape[1]])
            assert torch.equal(before[above][expert][rows], after[above][expert])
            gone = torch.ones(was.shape[1], dtype=torch.bool)
            gone[kept] = False
            down.data[expert][:, gone] = 0
    ids = families.random_ids(model.config, 2, 9)
    with torch.no_grad():
        pressed: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        wanted = model(input_ids=ids).logits
        torch.testing.assert_close(pressed(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-4)


def _kept(before: Tensor, after: Tensor) -> Tensor:
    """Which columns stayed."""
    found = [any(torch.equal(column, other) for other in after.T) for column in before.T]
    return torch.tensor(found).nonzero().flatten()


def test_a_refit_is_nearer_than_none(granite: Path, text: Path, tmp_path: Path):
    kls: dict[str, float] = {}
    for refit in ("none", "expert", "layer"):
        out = press(granite, tmp_path / refit, f"channel_prune:width=16,refit={refit}", text=text)
        kls[refit] = api.evaluate(out, against=granite, texts=[Source(str(text))], length=16)["kl"]["mean"]
    assert kls["layer"] < kls["none"]
    assert kls["expert"] < kls["none"]


def test_layers_of_their_own_width_are_for_the_plugin(granite: Path, text: Path, tmp_path: Path):
    out = press(granite, tmp_path / "out", "channel_prune:ratio=0.3,scope=global", text=text, target="plugin")
    proven(out, granite)
    assert len({layer.width for layer in open_view(out).source.moe_layers}) > 1


@pytest.mark.parametrize(
    ("step", "cure"),
    [
        ("channel_prune:ratio=0.4,per_expert=true", "use per_expert=false"),
        ("wanda:pack=true", "say pack=false"),
        ("sparsegpt:pack=true", "say pack=false"),
        ("sparsegpt:bits=4,group_size=8", "say bits=0"),
        ("rtn:group_size=8", "use parts=attention, or drop experts"),
        ("low_rank", "use parts=attention with --target plugin, or drop experts"),
        ("low_rank:method=shared_basis", "cannot decompose: drop experts"),
    ],
)
def test_what_one_tensor_cannot_hold_is_refused(
    step: str, cure: str, granite: Path, text: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=f"input_linear.weight.*{cure}"):
        press(granite, tmp_path / "out", step, text=text, target="plugin")
    assert not (tmp_path / "out").exists()


def test_a_plan_cannot_ask_for_widths_of_their_own(granite: Path, text: Path, tmp_path: Path):
    recipe = Recipe().with_options(
        model=granite, steps=["channel_prune:width=8"], texts=[text], target="plugin", **OPTIONS
    )
    widths = {Unit(0, "experts", expert): Treatment(channels=8 if expert else 16) for expert in range(8)}
    method = api.plan(granite, recipe=recipe).stages[0].method
    Plan(open_view(granite).source.digest, (Stage(method, widths),)).save(tmp_path / "plan.json")
    with pytest.raises(UserError, match=r"in one tensor .*no widths of their own"):
        api.build(granite, plan=tmp_path / "plan.json", out=tmp_path / "out", recipe=recipe)
