"""AWQ for experts: factors that move without a trace, alphas that are never worse than none, and files that agree.

What the factors do is tried in double precision on whole models of the zoo; what the step makes of them, on one layer
whose inputs are uneven by construction, and on checkpoints that are pressed and verified.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import families
from conftest import Zoo
from moespresso import api
from moespresso.build import open_view
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.unit import Unit
from moespresso.formats import QuantizedWeights, decode, round_nearest
from moespresso.kernels import RoutedExperts
from moespresso.methods import Awq, LayerContext
from moespresso.methods._awq import UnknownEntrance, find_entrance, is_product
from moespresso.methods.awq import candidates, divided
from moespresso.model import experts as experts_function
from test_depth_steps import plan_of
from test_engine import streamed_logits

FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "hunyuan_v1_moe", "granitemoe", "jamba"]


def built(family: str, **changes: Any) -> nn.Module:
    """A random model of the zoo whose experts can be listened to."""
    model = families.build(family, **changes).eval()
    model.set_experts_implementation(experts_function.NAME)
    return model


def moe_layers(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Decoder layers with their experts."""
    found = []
    for layer in model.model.layers:
        found += [(layer, module) for module in layer.modules() if experts_function.is_experts(module)]
    return found


def uneven(*shape: int, seed: int) -> Tensor:
    """Positive factors over three orders of magnitude."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5).exp()


def shown_layer(family: str = "mixtral", *, tokens: int = 200, layer: int = 0, seed: int = 1) -> LayerContext:
    """A layer of a random model, with tokens of which a few channels carry most."""
    module, experts = moe_layers(built(family))[layer]
    width, generator = experts.down_proj.shape[1], torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    hidden[:, ::16] *= 20
    index = torch.rand(tokens, experts.num_experts - 1, generator=generator).argsort(1)[:, :2]
    weights = experts.gate_up_proj.detach(), experts.down_proj.detach()
    routed = RoutedExperts(*weights, experts, hidden, index, torch.rand(tokens, 2, generator=generator))
    formats = dict.fromkeys(("up", "down"), Format("integer", 3))
    return LayerContext(0, module, formats, dict.fromkeys(formats, torch.bfloat16), routed)


def output_error(shown: LayerContext, up: Tensor, down: Tensor, hidden: Tensor | None = None) -> float:
    """Mean squared error of the routed sum with other weights, on inputs that may be scaled."""
    experts = shown.experts
    assert experts is not None
    module, given = experts.module, experts.hidden
    right = experts_function.experts_forward(module, given, experts.index, experts.weights)
    kept = module.gate_up_proj.data, module.down_proj.data
    module.gate_up_proj.data, module.down_proj.data = up.float(), down.float()
    found = experts_function.experts_forward(
        module, given if hidden is None else hidden, experts.index, experts.weights
    )
    module.gate_up_proj.data, module.down_proj.data = kept
    return float((found - right).square().mean())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_factors_that_move_change_nothing_of_what_a_model_computes(family: str):
    model = built(family).double()
    ids = families.random_ids(model.config, 2, 11)
    wanted = model(ids).logits
    for number, (layer, experts) in enumerate(moe_layers(model)):
        entrance = find_entrance(layer, experts)
        norm = layer.get_parameter(entrance.norm)
        stored, factors = divided(norm, uneven(len(norm), seed=number))
        assert torch.equal(stored, stored.to(torch.bfloat16).float())
        norm.copy_(stored)
        for reader in (layer.get_parameter(name) for name in entrance.readers):
            reader.mul_(factors)
        experts.gate_up_proj.mul_(factors)
        assert is_product(experts, experts.down_proj.shape[-1])
        own = uneven(len(experts.down_proj), 1, experts.down_proj.shape[-1], seed=9)
        experts.gate_up_proj[:, own.shape[-1] :].div_(own.mT)
        experts.down_proj.mul_(own)
    # The factors of a stored norm are quotients in single precision.
    assert float((model(ids).logits - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@torch.no_grad()
def test_what_lets_no_factor_through_is_told():
    layer, experts = moe_layers(built("phimoe"))[0]  # a norm with a bias
    with pytest.raises(UnknownEntrance, match="does more than multiply"):
        find_entrance(layer, experts)
    assert not is_product(moe_layers(built("gpt_oss"))[0][1], 40)  # cut off, with biases

    class Greedy(nn.Module):
        """Adds the inputs of the mixture once more."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.inner(hidden_states) + hidden_states

    layer, experts = moe_layers(built("qwen2_moe"))[0]
    layer.mlp = Greedy(layer.mlp)
    with pytest.raises(UnknownEntrance, match="in a way of its own"):
        find_entrance(layer, experts)


@torch.no_grad()
def test_a_layer_that_takes_no_factors_is_rounded_without_and_says_so():
    answer = Awq().solve(shown_layer("phimoe"))
    assert not answer.replaced
    assert answer.warnings == [
        "L0: the inputs of its experts are not scaled: post_attention_layernorm does more than multiply by its weight"
    ]


@torch.no_grad()
def test_without_factors_and_weights_it_is_rounding_to_nearest():
    shown = shown_layer()
    answer = Awq(inputs=False, inner=False, clip=False, unbiased=False).solve(shown)
    for name in ("up", "down"):
        found: QuantizedWeights = answer.numbers[name]
        wanted = round_nearest(
            getattr(shown.experts, name), shown.formats[name], torch.bfloat16, unbiased=False
        )
        assert torch.equal(found.values, wanted.values)
        assert torch.equal(found.scale, wanted.scale)


@pytest.mark.parametrize("clip", [True, False])
@torch.no_grad()
def test_the_alpha_that_is_taken_is_the_best_of_all_and_so_never_worse_than_none(
    clip: bool, monkeypatch: pytest.MonkeyPatch
):
    shown, step, errors = shown_layer(), Awq(clip=clip), []
    measured = Awq._errors
    monkeypatch.setattr(Awq, "_errors", lambda *args: errors.append(measured(*args)) or errors[0])
    answer = step.solve(shown)
    assert len(errors[0]) == 21
    assert errors[0].min() <= errors[0][0]
    best = int(errors[0].argmin())
    scale = candidates(shown.experts.hidden.square().mean(0), step.alphas())[best]
    norm = shown.module.post_attention_layernorm.weight
    found = answer.replaced.get("post_attention_layernorm.weight", norm)
    assert torch.equal(found, divided(norm, scale)[0])
    if not clip:
        assert best > 0


@pytest.mark.parametrize("clip", [True, False])
@torch.no_grad()
def test_on_inputs_with_outliers_the_output_is_nearer_than_with_rounding_to_nearest(clip: bool):
    shown = shown_layer()
    plain = Awq(inputs=False, inner=False, clip=False, unbiased=False).solve(shown)
    nearest = output_error(shown, decode(plain.numbers["up"]), decode(plain.numbers["down"]))
    answer = Awq(clip=clip).solve(shown)
    norm = shown.module.post_attention_layernorm.weight
    factors = norm / answer.replaced.get("post_attention_layernorm.weight", norm)
    assert torch.equal(
        answer.replaced.get("mlp.gate.weight", shown.module.mlp.gate.weight),
        shown.module.mlp.gate.weight * factors,
    )
    assert (
        output_error(
            shown,
            decode(answer.numbers["up"]),
            decode(answer.numbers["down"]),
            shown.experts.hidden / factors,
        )
        < 0.9 * nearest
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
@pytest.mark.few(1)
def test_a_pressed_checkpoint_agrees_with_the_original(family: str, zoo: Zoo, text: Path, tmp_path: Path):
    out = tmp_path / "out"
    api.press(zoo(family), out=out, steps=["awq:bits=8,group_size=0"], texts=[text], samples=4, length=32)
    verified = api.verify(out, against=zoo(family))
    assert verified["ok"], verified
    ids = families.random_ids(families.reference(zoo(family)).config, 2, 13)
    wanted = families.logits_of(families.reference(zoo(family)), ids)
    found = streamed_logits(open_view(out), ids)
    assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    assert (
        changed_parts(zoo(family), out)
        == {
            "mixtral": {"gate", "post_attention_layernorm"},
            "qwen2_moe": {"gate", "post_attention_layernorm", "gate_proj", "up_proj", "shared_expert_gate"},
            "deepseek_v3": {"gate", "post_attention_layernorm", "gate_proj", "up_proj"},
        }[family]
    )


def changed_parts(old: Path, new: Path) -> set[str]:
    """Modules whose weight is stored plainly in both folders, but with other values."""
    before = {name: tensor for file in old.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = {name: tensor for file in new.glob("*.safetensors") for name, tensor in load_file(file).items()}
    both = before.keys() & after.keys()
    return {name.split(".")[-2] for name in both if not torch.equal(before[name], after[name])}


@pytest.mark.breadth
def test_experts_that_go_afterwards_take_their_scaled_rows_along(zoo: Zoo, text: Path, tmp_path: Path):
    out, steps = tmp_path / "out", ["awq:bits=8,group_size=0", "expert_drop:keep=6"]
    api.press(zoo("mixtral"), out=out, steps=steps, texts=[text], samples=4, length=32)
    assert api.verify(out, against=zoo("mixtral"))["ok"]


def test_after_an_earlier_drop_they_take_the_rows_that_are_theirs(zoo: Zoo, text: Path, tmp_path: Path):
    """What awq found for the router has the rows that were left by then."""
    steps = ["expert_drop:keep=6", "awq:bits=8,group_size=0,grid=4", "expert_drop:keep=4"]
    for name, some in (("two", steps[:2]), ("three", steps)):
        api.press(zoo("mixtral"), out=tmp_path / name, steps=some, texts=[text], samples=4, length=32)
    first, _, last = (stage.treatments for stage in plan_of(tmp_path / "three").stages)
    shifted = 0
    for layer in range(3):
        there, kept = (stage[Unit(layer, "experts")].keep or () for stage in (first, last))
        rows = [there.index(expert) for expert in kept]
        shifted += rows != list(kept)
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        two, three = (families.read_tensor(tmp_path / folder, name) for folder in ("two", "three"))
        assert torch.equal(three, two[rows])
    assert shifted


@pytest.mark.parametrize("settings", [{"grid": 0}, {"parts": "attention"}])
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]):
    with pytest.raises(UserError, match="awq"):
        Awq(**settings)


def test_readers_that_are_packed_already_are_refused_in_time(zoo: Zoo, text: Path, tmp_path: Path):
    steps = ["rtn:bits=8,parts=shared,group_size=8", "awq:bits=8,group_size=0"]
    with pytest.raises(UserError, match="packed already"):
        api.press(zoo("qwen2_moe"), out=tmp_path / "out", steps=steps, texts=[text], samples=4, length=32)
