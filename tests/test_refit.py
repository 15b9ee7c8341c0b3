"""What is left makes up for what went: the layer's answer is drawn to that of the original one on the same input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import families
from conftest import Zoo
from driver import Driver
from moespresso import api
from moespresso.core.errors import UserError
from moespresso.kernels import joint_refit
from test_channels import routed
from test_depth_kl import rows_of
from test_resume import KILLED, Press, contents, same
from test_slim import disk, disk_of, press, proven

DROP = "expert_drop:keep=5"


@torch.no_grad()
def layer_errors(out: Path, source: Path, text: Path) -> list[float]:
    """By layer, how far the pressed model's blocks are from the original's on the input that the pressed model gives them."""
    pressed, whole = families.reference(out), families.reference(source)
    inputs: dict[int, tuple[Any, ...]] = {}
    found: list[float] = []
    for index, layer in enumerate(pressed.model.layers):
        layer.mlp.register_forward_hook(
            lambda _, args, answer, at=index: inputs.update({at: (args[0], answer)})
        )
    pressed(input_ids=rows_of(text).ids)
    for index, layer in enumerate(whole.model.layers):
        given, answer = inputs[index]
        found.append(float((layer.mlp(given) - answer).square().mean()))
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe"])
@pytest.mark.parametrize("step", [DROP, "expert_merge:keep=6"])
@torch.no_grad()
@pytest.mark.few(1)
def test_every_layer_comes_nearer_to_the_original(
    family: str, step: str, zoo: Zoo, text: Path, tmp_path: Path
):
    step = step if family != "deepseek_v3" else step.replace("5", "6")
    bare = press(zoo(family), tmp_path / "bare", step, text=text)
    out = press(zoo(family), tmp_path / "out", step, "refit:damping=0.0001", text=text)
    proven(out, zoo(family))
    assert {name: t.shape for name, t in disk(out).items()} == {
        name: t.shape for name, t in disk(bare).items()
    }
    changed = {name for name, tensor in disk(out).items() if not torch.equal(tensor, disk(bare)[name])}
    assert changed
    assert all("experts" in name and ("down_proj" in name or "w2" in name) for name in changed)
    before, after = layer_errors(bare, zoo(family), text), layer_errors(out, zoo(family), text)
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if b > 1e-12]
    assert pairs
    assert all(a < b for b, a in pairs)


def test_what_is_missing_is_what_the_fit_ends_at():
    experts = routed(3)
    wanted = joint_refit.outputs(experts, experts.up, torch.randn_like(experts.down))
    missing = wanted - joint_refit.outputs(experts, experts.up, experts.down)
    kept = [torch.arange(experts.down.shape[2])] * experts.count
    narrowed = joint_refit.Narrowed(experts.up, experts.down, kept)
    down, _ = joint_refit.refit(experts, narrowed, damping=[1e-7] * 4, sweeps=300, missing=missing)
    # Eight channels of four experts are more than enough for what was made by such ones.
    torch.testing.assert_close(joint_refit.outputs(experts, experts.up, down), wanted, rtol=1e-2, atol=1e-2)


def test_channels_are_fitted_to_the_original_after_a_drop(zoo: Zoo, text: Path, tmp_path: Path):
    """The target of refit=layer is the layer with all its experts, not what an earlier step left of it."""
    step = "channel_prune:ratio=0.5,damping=0.0001,refit="
    errors = {
        refit: layer_errors(
            press(zoo("mixtral"), tmp_path / refit, DROP, step + refit, text=text), zoo("mixtral"), text
        )
        for refit in ("expert", "layer")
    }
    assert all(layer < expert for layer, expert in zip(errors["layer"], errors["expert"], strict=True))


def test_a_layer_that_nothing_was_done_to_stays_as_it_is_and_is_told(zoo: Zoo, text: Path, tmp_path: Path):
    report = api.press(
        zoo("mixtral"), out=tmp_path / "out", steps=["refit"], texts=[text], samples=8, length=24
    )
    assert any(
        "L0 stays as it is: no earlier step of this recipe changed it" in line for line in report.warnings
    )
    before, after = disk_of(zoo("mixtral")), disk_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "steps",
    [
        ["layer_drop:part=attention,drop=1", "refit"],
        [DROP, "refit", "gptq:group_size=8"],
        [DROP, "refit", "channel_prune:ratio=0.25"],
        ["channel_prune:ratio=0.25,per_expert=true,refit=none,score=camera", "refit"],
        ["wanda:sparsity=0.5", "refit"],
        [DROP, "block_drop", "refit"],
    ],
)
@pytest.mark.few(1)
def test_with_other_steps(steps: list[str], zoo: Zoo, text: Path, tmp_path: Path):
    if steps[0].startswith("wanda"):  # refitted weights are no longer zero
        with pytest.raises(UserError, match="prunes single weights, which would no longer be zero"):
            press(zoo("mixtral"), tmp_path / "out", *steps, text=text, target="plugin")
        return
    proven(press(zoo("mixtral"), tmp_path / "out", *steps, text=text, target="plugin"), zoo("mixtral"))


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (["rtn:group_size=8", "refit"], "put the rounding last"),
        (["refit:damping=-1"], "damping=-1.0 must be a number of at least 0"),
        (["refit:sweeps=0"], "sweeps=0 must be a number of at least 1"),
    ],
)
def test_wishes_that_cannot_be(steps: list[str], reason: str, zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match=reason):
        press(zoo("mixtral"), tmp_path / "out", *steps, text=text)


def test_stacked_experts_are_refused(zoo: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(UserError, match="stores its experts as"):
        press(zoo("gpt_oss"), tmp_path / "out", DROP, "refit", text=text)


@pytest.mark.breadth
def test_killed_and_taken_up(driver: Driver, zoo: Zoo, text: Path, tmp_path: Path):
    whole = Press(driver, zoo("mixtral"), text, tmp_path / "whole")
    assert whole(DROP, "refit").code == 0
    press = Press(driver, zoo("mixtral"), text, tmp_path / "out")
    assert press(DROP, "refit", kill="end rename slim-00001.safetensors").code == KILLED
    assert press(DROP, "refit").code == 0
    assert same(contents(press.out), contents(whole.out))
