"""AutoRound for experts: it starts from the searched grid, never ends worse, and its slopes are the true ones.

One layer with random experts and tokens is enough for that; pressed checkpoints are verified as any others.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Zoo
from moespresso import api
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats import decode, round_nearest, searched
from moespresso.kernels import RoutedExperts, autoround, hqq
from moespresso.methods import AutoRound, LayerContext, LayerResult

DTYPE = torch.bfloat16


def gated(mixed: Tensor) -> Tensor:
    gate, up = mixed.chunk(2, -1)
    return nn.functional.silu(gate) * up


def shown_layer(
    *, experts: int = 4, used: int | None = None, symmetric: bool = True, gate: bool = True, tokens: int = 400
) -> LayerContext:
    """Random experts of which the first `used` get correlated tokens."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    module = SimpleNamespace(has_gate=gate, _apply_gate=gated, act_fn=nn.functional.silu)
    index = torch.rand(tokens, used or experts, generator=generator).argsort(1)[:, :2]
    hidden = random(tokens, 16) + random(tokens, 1) * random(16)
    up, down = random(experts, 48 if gate else 24, 16) / 4, random(experts, 16, 24) / 5
    routed = RoutedExperts(up, down, module, hidden, index, torch.rand(tokens, 2, generator=generator))
    formats = dict.fromkeys(("up", "down"), Format("integer", 2, 8, symmetric))
    return LayerContext(3, nn.Identity(), formats, dict.fromkeys(formats, DTYPE), routed)


def error(shown: LayerContext, up: Tensor, down: Tensor) -> float:
    """Mean squared error of the routed sum over all tokens."""
    experts = shown.experts
    assert experts is not None
    tokens = torch.arange(len(experts.hidden))
    right = autoround.routed_sum(experts, experts.up.unbind(), experts.down.unbind(), tokens)
    found = autoround.routed_sum(experts, up.float().unbind(), down.float().unbind(), tokens)
    return float((found - right).square().mean())


def error_of(shown: LayerContext, answer: LayerResult) -> float:
    return error(shown, decode(answer.numbers["up"]), decode(answer.numbers["down"]))


def quick(**settings: Any) -> AutoRound:
    return AutoRound(**{"iterations": 40, "batch": 128, "unbiased": False} | settings)


def test_the_routed_sum_is_that_of_all_experts_token_by_token():
    shown = shown_layer()
    experts = shown.experts
    tokens = torch.tensor([5, 0, 7])
    found = autoround.routed_sum(experts, experts.up.unbind(), experts.down.unbind(), tokens)
    for row, token in zip(found, tokens, strict=True):
        parts = [gate * experts.down[expert] @ gated(experts.up[expert] @ experts.hidden[token])
                 for expert, gate in zip(experts.index[token], experts.weights[token], strict=True)]  # fmt: skip
        assert torch.allclose(row, sum(parts), atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_steps_it_is_rounding_to_nearest(symmetric: bool):
    shown = shown_layer(symmetric=symmetric)
    answer = quick(iterations=0).solve(shown)
    for name in ("up", "down"):
        found, wanted = (
            answer.numbers[name],
            round_nearest(getattr(shown.experts, name), shown.formats[name], DTYPE, unbiased=False),
        )
        for part in ("values", "scale", "zero"):
            assert torch.equal(getattr(found, part), getattr(wanted, part)), part


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("gate", [True, False])
def test_the_error_falls_well_below_that_of_its_start(symmetric: bool, gate: bool):
    shown = shown_layer(symmetric=symmetric, gate=gate)
    start = error_of(shown, quick(iterations=0).solve(shown))
    assert error_of(shown, quick().solve(shown)) < 0.6 * start


@pytest.mark.parametrize(
    "settings", [{"rate": 50.0}, {"range_rate": 50.0}, {"iterations": 1, "batch": 8, "rate": 3.0}]
)
def test_it_never_ends_worse_than_it_starts(settings: dict[str, Any]):
    shown = shown_layer(tokens=64)  # so few that all of them are what it is judged on
    start = error_of(shown, quick(iterations=0).solve(shown))
    assert error_of(shown, quick(**settings).solve(shown)) <= start


def test_the_answer_is_as_long_as_it_was_in_the_direction_of_what_it_was():
    shown = shown_layer()
    experts, tokens = shown.experts, torch.arange(400)
    wanted = autoround.routed_sum(experts, experts.up.unbind(), experts.down.unbind(), tokens)
    lengths = []
    for unbiased in (False, True):
        answer = quick(unbiased=unbiased).solve(shown)
        found = autoround.routed_sum(
            experts,
            *(decode(codes).float().unbind() for codes in (answer.numbers["up"], answer.numbers["down"])),
            tokens,
        )
        lengths.append((wanted * found).sum(0) / wanted.square().sum(0))
    assert float(lengths[0].mean()) < 0.97
    assert float((lengths[1] - 1).abs().max()) < 0.01


def test_the_same_layer_is_always_rounded_alike():
    one, other = quick().solve(shown_layer()), quick().solve(shown_layer())
    assert torch.equal(one.numbers["up"].values, other.numbers["up"].values)
    assert torch.equal(one.numbers["down"].scale, other.numbers["down"].scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_decoded_while_learning_is_what_the_codes_say(symmetric: bool):
    shown = shown_layer(symmetric=symmetric)
    weights, format = shown.experts.up, shown.formats["up"]
    learned = autoround.LearnedRounding(weights, searched(weights, format, DTYPE), format)
    for seed in range(3):
        learned.step(torch.randn(weights.shape, generator=torch.Generator().manual_seed(seed)), 0.3, 0.2)
    assert torch.equal(learned.decoded(), decode(learned.codes()).float())
    assert learned.codes().scale.dtype == DTYPE
    assert float(learned.offsets.push.abs().max()) <= 0.5


@pytest.mark.parametrize("symmetric", [True, False])
def test_steps_follow_the_slopes_that_autograd_finds_with_rounding_passed_through(symmetric: bool):
    shown = shown_layer(symmetric=symmetric)
    weights, format = shown.experts.up, Format("integer", 2, 8, symmetric)
    learned = autoround.LearnedRounding(weights, searched(weights, format, torch.float32), format)
    learned.step(torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)), 0.3, 0.2)
    slope = torch.randn(weights.shape, generator=torch.Generator().manual_seed(2))
    before = learned.offsets.copy()
    wanted = by_autograd(weights, searched(weights, format, torch.float32), format, before, slope)
    learned.step(slope, 1e-3, 1e-3)
    for name, expected in wanted.items():
        moved = getattr(learned.offsets, name) - getattr(before, name)
        free = (getattr(before, name) - (0 if name == "push" else 1)).abs() < 0.49
        assert torch.equal(moved.sign()[free], -expected.sign()[free]), name


def by_autograd(weights: Tensor, grid: Any, format: Format, offsets: Any, slope: Tensor) -> dict[str, Tensor]:
    """Slopes of sum(slope * decoded) in V and the ranges, by autograd."""

    def through(x: Tensor) -> Tensor:
        return x + (x.round() - x).detach()

    push, low, high = (getattr(offsets, name).clone().requires_grad_() for name in ("push", "low", "high"))
    scale, zero = grid[0], grid[1].float()
    if format.symmetric:
        scale = scale * high
    else:
        bottom, top = -zero * scale * low, (3 - zero) * scale * high
        scale = (top - bottom) / 3
        zero = through(-bottom / scale)
    grouped = weights.view(push.shape)
    values = through(grouped / scale[..., None] + zero[..., None] + push).clamp(0, 3)
    decoded = (values - zero[..., None]) * scale[..., None]
    named = {"push": push, "high": high} | ({} if format.symmetric else {"low": low})
    found = torch.autograd.grad((decoded * slope.view(push.shape)).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


def test_slopes_are_found_in_a_run_that_wants_none():
    shown = shown_layer()
    with torch.inference_mode():
        experts = shown.experts
        held = RoutedExperts(*(x.clone() for x in (experts.up, experts.down)), experts.module,
                             experts.hidden.clone(), experts.index.clone(), experts.weights.clone())  # fmt: skip
        made = quick().solve(LayerContext(3, shown.module, shown.formats, shown.dtypes, held))
    assert torch.equal(made.numbers["up"].values, quick().solve(shown).numbers["up"].values)
    up, down = autoround.gradients(experts, experts.up, experts.down, torch.arange(9), torch.zeros(9, 16))
    assert up.shape == experts.up.shape
    assert down.shape == experts.down.shape


def test_an_expert_that_no_token_reaches_is_helped():
    shown = shown_layer(experts=5, used=3)
    answer = quick().solve(shown)
    assert answer.remedies == {3: "hqq", 4: "hqq"}
    wanted = hqq.quantize(shown.experts.down[3:], shown.formats["down"], DTYPE)
    assert torch.equal(answer.numbers["down"].values[3:], wanted.values)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.few(1)
def test_a_pressed_checkpoint_verifies(family: str, zoo: Zoo, text: Path, tmp_path: Path):
    steps = ["autoround:bits=4,group_size=8,iterations=4,batch=64"]
    api.press(zoo(family), out=tmp_path / "out", steps=steps, texts=[text], samples=4, length=32)
    found = api.verify(tmp_path / "out", against=zoo(family))
    assert found["ok"], found


@pytest.mark.parametrize(
    "settings",
    [{"iterations": -1}, {"batch": 0}, {"rate": -1.0}, {"range_rate": float("nan")}, {"parts": "dense"}],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]):
    with pytest.raises(UserError, match="autoround"):
        AutoRound(**settings)
