"""What stands in for layers and blocks that go, without a new weight: is it the best there is, and does it lie right?

Where the truth can be built, it is: branches that add exactly what a repair can make up for leave no trace when they
go. Everywhere else numpy solves for the repair, on what hooks observe in stock models, and a hook puts it in place.
A linear map is solved for as a change D of the identity: the smallest |Y - h - M - D M|^2 + a |D|^2.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import depth_by_hand
import families
from conftest import Zoo, tiny_tokenizer
from depth_by_hand import Array, Cut, mapped, observe, parts, silenced, stream
from moespresso import api
from moespresso.build import open_view
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.unit import Unit
from moespresso.data import Source
from moespresso.effect import validated
from moespresso.fit import Job, unrepaired
from moespresso.fit.repairs import fit
from moespresso.run import Recipe
from moespresso.statistics import folds
from test_depth_kl import LENGTH, SAMPLES, other_folder, rows_of
from test_engine import tensors
from test_scores import tokens_for

RIDGE = 32  # tokens for each channel that ask for no change


def between(start: Tensor, now: Tensor, then: Tensor, repair: str) -> Array:
    """What a branch that made `now` of `start` ([T, H] each) must be mapped by to make the best of `then` instead."""
    if repair != "linear":
        return depth_by_hand.between(start, now, then, repair)
    added, missing = (now - start).numpy(), (then - now).numpy()
    # Ordinary least squares, with a row for each channel that asks for no change and weighs as much as all its tokens.
    pull = np.sqrt(RIDGE * np.square(added).sum(1).mean()) * np.eye(added.shape[1])
    change, *_ = np.linalg.lstsq(
        np.vstack([added, pull]), np.vstack([missing, np.zeros_like(pull)]), rcond=None
    )
    return np.eye(len(pull)) + change.T


def solved(
    model: PreTrainedModel, cuts: list[Cut], repair: str, ids: Tensor, mask: Tensor | None = None
) -> Array:
    """What stands in for neighbouring branches that go: [H, H] for linear, [H] for scale and bias."""
    gone = sorted(2 * layer + (branch == "mlp") for cut in cuts for layer, branch in parts(cut))
    states = stream(model, ids, mask)
    return between(states[max(0, gone[0] - 1)], states[gone[0]], states[gone[-1] + 1], repair)


def repaired(model: PreTrainedModel, cuts: list[Cut], repair: str, ids: Tensor) -> PreTrainedModel:
    """A copy without some neighbouring branches, the last one before them repaired (a bias goes where they were)."""
    values = solved(model, cuts, repair, ids)
    first = min(2 * layer + (branch == "mlp") for cut in cuts for layer, branch in parts(cut))
    # Zeros are put in first: the hook that adds a bias to a silent branch must not be silenced with it.
    return mapped(silenced(model, *cuts), first if repair == "bias" else first - 1, repair, values)


# Repairs: where the truth is built


LOUD, WRITTEN = 47, range(16, 40)


def overlooked(folder: Path, effect: Tensor) -> Path:
    """A mixtral whose attention in layer 1 adds `effect` [24, 24] times what the experts of layer 0 added.

    A window of one token leaves attention no choice. One channel is so loud, and so little heeded, that every norm is
    the same constant. Channels 16 to 39 are written by the experts of layer 0 first, and only they are observed then.
    """
    model = families.build("mixtral", sliding_window=1)
    written, (first, second, *_) = list(WRITTEN), model.model.layers
    with torch.no_grad():
        model.model.embed_tokens.weight[:, written] = 0
        model.model.embed_tokens.weight[:, LOUD] = 1e5
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1e5 / 48**0.5)[LOUD] = 0
        first.self_attn.o_proj.weight[written] = 0
        others = [channel for channel in range(48) if channel not in WRITTEN]
        first.mlp.experts.down_proj[:, others] = 0
        second.self_attn.v_proj.weight.zero_()
        second.self_attn.o_proj.weight.zero_()
        for row, channel in enumerate(written):
            second.self_attn.v_proj.weight[row, channel] = 1
        # Two key heads of 16 serve three query heads each: rows 0 to 15 come back in head 0, the others in head 3.
        back = [row if row < 16 else 48 + row - 16 for row in range(len(written))]
        second.self_attn.o_proj.weight[torch.tensor(written)[:, None], torch.tensor(back)] = effect
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def every_letter(path: Path) -> Path:
    """Where attention sees one token, only other tokens are other examples."""
    letters = random.Random(0).choices(ascii_lowercase + digits + ".,;:!?'()-_=+*/", k=2000)
    path.write_text("".join(letters))
    return path


def built(
    folder: Path, text: Path, out: Path, *stages: Mapping[str, Treatment], target: Any = "plugin"
) -> Path:
    """What a plan by hand makes of a checkpoint, fitted on the text."""
    made = tuple(
        Stage({"kind": "by hand"}, {Unit.parse(unit): what for unit, what in stage.items()})
        for stage in stages
    )
    Plan(open_view(folder).source.digest, made).save(out.with_suffix(".json"))
    recipe = Recipe().with_options(texts=(Source(str(text)),), samples=SAMPLES, length=LENGTH, target=target)
    api.build(folder, plan=out.with_suffix(".json"), out=out, recipe=recipe)
    return out


def drop(repair: str | None = None) -> Treatment:
    return Treatment(drop=True, repair=repair)


def worst(found: PreTrainedModel, wanted: PreTrainedModel, ids: Tensor) -> float:
    """The largest difference of logits, as a share of the largest logit."""
    logits = families.logits_of(wanted, ids)
    return float((families.logits_of(found, ids) - logits).abs().max() / logits.abs().max())


@pytest.mark.parametrize(
    ("repair", "ridge", "error"), [("linear", 1e-10, 1e-5), ("linear", 1e-3, 3e-2), ("scale", 0, 1e-5)]
)
@pytest.mark.few(2)
def test_what_is_a_map_of_what_came_before_leaves_no_trace(
    repair: str, ridge: float, error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = every_letter(tmp_path / "text.txt")
    generator = torch.Generator().manual_seed(5)
    effect = torch.randn(24, 24, generator=generator) / 5 + torch.eye(24)
    folder = overlooked(tmp_path / "source", effect if repair == "linear" else torch.diag(effect.diagonal()))
    monkeypatch.setattr(folds, "RIDGE", ridge)
    plain = built(folder, text, tmp_path / "plain", {"L1.attention": drop()})
    out = built(folder, text, tmp_path / "out", {"L1.attention": drop(repair)})
    whole = families.reference(folder)
    ids = families.random_ids(whole.config, 3, 20)
    assert worst(families.reference(plain), whole, ids) > 0.1
    assert worst(families.reference(out), whole, ids) < error


@pytest.mark.parametrize(
    ("family", "unit", "branch", "stub"),
    [
        ("gpt_oss", "L1.experts", "mlp", False),  # into the bias of the attention before it
        (
            "gpt_oss",
            "L2.attention",
            "attention",
            True,
        ),  # experts before it: a router stands between, so a place is made
        ("granitemoe", "L1.attention", "attention", True),
        ("qwen3_moe", "L2.attention", "attention", True),
        ("ernie4_5_moe", "L3.attention", "attention", False),  # into the bias of the dense part before it
    ],
)
@pytest.mark.few(2)
def test_what_is_a_constant_leaves_no_trace(
    family: str, unit: str, branch: str, stub: bool, text: Path, tmp_path: Path
):
    model = families.build(family)
    layer = int(unit[1])
    constant(model, layer, branch)
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    plain = built(tmp_path / "source", text, tmp_path / "plain", {unit: drop()})
    out = built(tmp_path / "source", text, tmp_path / "out", {unit: drop("bias")})
    whole = families.reference(tmp_path / "source")
    ids = families.random_ids(whole.config, 3, 20)
    assert worst(families.reference(plain), whole, ids) > 1e-2
    assert worst(families.reference(out), whole, ids) < 1e-5
    new = tensors(out).keys() - tensors(plain).keys()
    assert new == ({f"model.layers.{layer}.self_attn.bias"} if stub else set())


@torch.no_grad()
def constant(model: PreTrainedModel, layer: int, branch: str) -> None:
    """Only the bias of what a branch ends with is left."""
    feed = model.model.layers[layer].mlp if branch == "mlp" else None
    if feed is None:
        end = model.model.layers[layer].self_attn.o_proj
        end.weight.zero_()
        end.bias.normal_()
    else:  # gates sum to one
        feed.experts.down_proj.zero_()
        feed.experts.down_proj_bias.copy_(torch.randn(48).expand_as(feed.experts.down_proj_bias))


# Repairs: against numpy


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """The zoo in float32, so that what is written is what was fitted."""
    root = tmp_path_factory.mktemp("plain")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            families.write_checkpoint(name, root / name, dtype=torch.float32, mixed_dtypes=False)
            tiny_tokenizer().save_pretrained(root / name)
        return root / name

    return folder


CUTS: list[tuple[str, list[Cut], dict[str, None]]] = [
    ("mixtral", [(1, "mlp")], {"L1.experts": None}),
    ("mixtral", [(1, "attention")], {"L1.attention": None}),
    ("mixtral", [(1, "block")], {"L1": None}),
    ("qwen2_moe", [(1, "block"), (2, "block")], {"L1": None, "L2": None}),
    ("qwen3_moe", [(3, "mlp")], {"L3.experts": None}),
    ("deepseek_v2", [(1, "block")], {"L1": None}),
    ("granitemoe", [(1, "mlp")], {"L1.experts": None}),
    ("granitemoe", [(2, "attention")], {"L2.attention": None}),
    ("gpt_oss", [(1, "mlp"), (2, "attention")], {"L1.experts": None, "L2.attention": None}),
    ("phimoe", [(1, "mlp")], {"L1.experts": None}),
    ("jamba", [(3, "mlp")], {"L3.experts": None}),
    ("jamba", [(4, "block")], {"L4": None}),
    ("mixtral", [(2, "mlp")], {"L2.experts": None}),  # behind it is no other layer
]


@pytest.mark.parametrize("repair", ["linear", "scale"])
@pytest.mark.parametrize(
    ("family", "cuts", "units"), CUTS, ids=[f"{name}-{'+'.join(units)}" for name, _, units in CUTS]
)
@pytest.mark.few(2)
def test_a_repair_is_the_published_solution_and_adds_no_tensor(
    family: str, cuts: list[Cut], units: dict[str, None], repair: str, plain: Zoo, text: Path, tmp_path: Path
):
    out = built(plain(family), text, tmp_path / "out", {unit: drop(repair) for unit in units})
    bare = built(plain(family), text, tmp_path / "bare", {unit: drop() for unit in units})
    assert {name: row[:2] for name, row in tensors(out).items()} == {
        name: row[:2] for name, row in tensors(bare).items()
    }
    whole, pressed, ids = families.reference(plain(family)), families.reference(out), rows_of(text).ids
    wanted = repaired(whole, cuts, repair, ids)
    fresh = families.random_ids(whole.config, 2, 20)
    for some in (ids, fresh):
        assert worst(pressed, wanted, some) < (1e-3 if repair == "linear" else 1e-4)
    assert worst(families.reference(bare), wanted, ids) > 1e-2
    assert api.verify(out, against=plain(family))["ok"]


def test_the_written_weights_are_the_map_times_the_old_ones(plain: Zoo, text: Path, tmp_path: Path):
    out = built(plain("mixtral"), text, tmp_path / "out", {"L1.experts": drop("linear")})
    name = "model.layers.1.self_attn.o_proj.weight"
    old, new = (families.read_tensor(folder, name).double().numpy() for folder in (plain("mixtral"), out))
    wanted = solved(families.reference(plain("mixtral")), [(1, "mlp")], "linear", rows_of(text).ids) @ old
    np.testing.assert_allclose(new, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())
    changed = {key for key, row in tensors(out).items() if row != tensors(plain("mixtral"))[key]}
    assert changed == {name}


@pytest.mark.parametrize(
    ("family", "unit", "cut", "tensor"),
    [
        ("qwen3_moe", "L1.experts", (1, "mlp"), "model.layers.1.self_attn.o_proj.bias"),
        ("gpt_oss", "L1.experts", (1, "mlp"), "model.layers.1.self_attn.o_proj.bias"),
        ("granitemoe", "L1.experts", (1, "mlp"), "model.layers.1.self_attn.o_proj.bias"),
        ("ernie4_5_moe", "L1", (1, "block"), "model.layers.0.mlp.down_proj.bias"),
    ],
)
def test_a_bias_goes_where_there_already_is_one(
    family: str, unit: str, cut: Cut, tensor: str, plain: Zoo, text: Path, tmp_path: Path
):
    out = built(plain(family), text, tmp_path / "out", {unit: drop("bias")})
    wanted = solved(families.reference(plain(family)), [cut], "bias", rows_of(text).ids)
    multiplier = 0.6 if family == "granitemoe" else 1.0
    old, new = (families.read_tensor(folder, tensor).double().numpy() for folder in (plain(family), out))
    np.testing.assert_allclose((new - old) * multiplier, wanted, atol=1e-5)
    bare = built(plain(family), text, tmp_path / "bare", {unit: drop()})
    assert [name for name, row in tensors(out).items() if row != tensors(bare)[name]] == [tensor]


def test_a_bias_without_a_place_needs_the_plugin_or_is_refused(plain: Zoo, text: Path, tmp_path: Path):
    out = built(plain("mixtral"), text, tmp_path / "out", {"L1.experts": drop("bias")})
    whole, ids = families.reference(plain("mixtral")), rows_of(text).ids
    assert worst(families.reference(out), repaired(whole, [(1, "mlp")], "bias", ids), ids) < 1e-5
    with pytest.raises(
        UserError, match=r"leaves a constant where L1 lost a part, which transformers cannot load; .*linear"
    ):
        built(plain("mixtral"), text, tmp_path / "stock", {"L1.experts": drop("bias")}, target="transformers")
    with pytest.raises(
        UserError, match=r"repair=bias has no place where L1 was: .*use repair=linear or scale"
    ):
        built(plain("mixtral"), text, tmp_path / "block", {"L1": drop("bias")})
    assert not (tmp_path / "stock").exists()
    assert not (tmp_path / "block").exists()


@pytest.mark.parametrize("repair", ["linear", "scale", "bias"])
@pytest.mark.parametrize(("family", "cut"), [("mixtral", (1, "mlp")), ("gpt_oss", (2, "mlp")), ("granitemoe", (1, "mlp")),
                                             ("deepseek_v2", (2, "attention")), ("jamba", (1, "mlp"))])  # fmt: skip
@pytest.mark.few(3)
def test_a_repair_brings_the_stream_no_farther_from_what_it_was(
    family: str, cut: Cut, repair: str, plain: Zoo, text: Path, tmp_path: Path
):
    """Mean squared error right behind the cut, on the text that was fitted."""
    layer, branch = cut
    unit = f"L{layer}.{'experts' if branch == 'mlp' else branch}"
    ids, behind = rows_of(text).ids, 2 * layer + 1 + (branch == "mlp")
    whole = families.reference(plain(family))
    truth = stream(whole, ids)[behind]

    def error(model: PreTrainedModel) -> float:
        return float((stream_behind(model, layer, branch, ids) - truth).square().mean())

    out = built(plain(family), text, tmp_path / "out", {unit: drop(repair)})
    assert error(families.reference(out)) < error(silenced(whole, cut))


def stream_behind(model: PreTrainedModel, layer: int, branch: str, ids: Tensor) -> Tensor:
    """The stream behind a branch that may have lost its norm: before the next layer, or the feed-forward part."""
    if branch == "mlp":
        observed: list[Tensor] = []
        handle = model.model.layers[layer].register_forward_hook(
            lambda _, __, out: observed.append(out[0] if isinstance(out, tuple) else out)
        )
        families.logits_of(model, ids)
        handle.remove()
        return observed[0].flatten(0, 1).double()
    return observe(model, ids)[layer].middle


def test_padding_has_no_part_in_what_is_fitted(plain: Zoo, tmp_path: Path):
    view = open_view(plain("mixtral"))
    batches = tokens_for(view, 6, 24, short=(15, 9))
    stage = Stage({"kind": "by hand"}, {Unit(1, "experts"): drop("linear")})
    plan = validated(Plan(view.source.digest, (stage,)), view.source)
    (found,) = fit(Job(view, tmp_path, batches), view, plan).values()
    wanted = solved(families.reference(plain("mixtral")), [(1, "mlp")], "linear", batches.ids, batches.mask)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())


def test_what_the_text_does_not_show_is_left_as_it_is(plain: Zoo, tmp_path: Path):
    """Fewer tokens than channels: the map is the identity for whatever no token moved."""
    view = open_view(plain("mixtral"))
    batches = tokens_for(view, 1, 8)
    stage = Stage({"kind": "by hand"}, {Unit(1, "experts"): drop("linear")})
    plan = validated(Plan(view.source.digest, (stage,)), view.source)
    (found,) = fit(Job(view, tmp_path, batches), view, plan).values()
    before, behind = stream(families.reference(plain("mixtral")), batches.ids)[2:4]
    _, sizes, directions = np.linalg.svd((behind - before).numpy())
    assert len(sizes) == 8
    np.testing.assert_allclose(found.numpy() @ directions[8:].T, directions[8:].T, rtol=0, atol=1e-5)
    assert np.abs(found.numpy() @ directions[:8].T - directions[:8].T).max() > 1e-2


# Repairs: several, and beside other steps


def keep(*experts: int) -> Treatment:
    return Treatment(keep=experts)


def test_what_comes_later_is_fitted_to_what_it_will_see(plain: Zoo, text: Path, tmp_path: Path):
    """Two cuts of one stage, one behind the other: the second is made on the stream that the first leaves."""
    stage = {"L0.experts": drop("linear"), "L2.experts": drop("linear")}
    out = built(plain("gpt_oss"), text, tmp_path / "out", stage)
    ids = rows_of(text).ids
    wanted = repaired(families.reference(plain("gpt_oss")), [(0, "mlp")], "linear", ids)
    wanted = repaired(wanted, [(2, "mlp")], "linear", ids)
    assert worst(families.reference(out), wanted, ids) < 1e-3


def test_a_cut_without_repair_is_made_before_another_is_repaired(plain: Zoo, text: Path, tmp_path: Path):
    """As a plan edited by hand may say."""
    out = built(
        plain("gpt_oss"), text, tmp_path / "out", {"L0.experts": drop(), "L2.experts": drop("linear")}
    )
    ids = rows_of(text).ids
    wanted = silenced(families.reference(plain("gpt_oss")), (0, "mlp"))
    wanted = repaired(wanted, [(2, "mlp")], "linear", ids)
    assert worst(families.reference(out), wanted, ids) < 1e-3


@pytest.mark.parametrize("repair", ["linear", "scale"])
@pytest.mark.few(1)
def test_one_branch_may_make_up_for_two_steps(repair: str, plain: Zoo, text: Path, tmp_path: Path):
    """The attention of layer 1 comes before the experts of layer 1, and once they are gone before what follows them."""
    stages = {"L1.experts": drop(repair)}, {"L2.attention": drop(repair)}
    out = built(plain("mixtral"), text, tmp_path / "out", *stages)
    ids = rows_of(text).ids
    wanted = repaired(families.reference(plain("mixtral")), [(1, "mlp")], repair, ids)
    # What has gone is a branch of zeros here, and the map of the one before it is put on top of the first.
    states = stream(wanted, ids)
    values = between(states[2], states[3], states[5], repair)
    wanted = mapped(silenced(wanted, (2, "attention")), 2, repair, values)
    assert worst(families.reference(out), wanted, ids) < 2e-3
    assert api.verify(out, against=plain("mixtral"))["ok"]


def test_a_constant_that_an_earlier_step_left_is_part_of_the_stream(plain: Zoo, text: Path, tmp_path: Path):
    stages = {"L1.experts": drop("bias")}, {"L2.attention": drop("linear")}
    out = built(plain("mixtral"), text, tmp_path / "out", *stages)
    ids = rows_of(text).ids
    wanted = repaired(families.reference(plain("mixtral")), [(1, "mlp")], "bias", ids)
    states = stream(wanted, ids)
    left = states[4] - states[3]
    assert float((left - left[0]).abs().max()) < 1e-5
    values = between(states[2], states[3], states[5] - left, "linear")
    wanted = mapped(silenced(wanted, (2, "attention")), 2, "linear", values)
    assert worst(families.reference(out), wanted, ids) < 1e-3


@pytest.mark.parametrize("first", ["repair", "experts"])
def test_experts_go_before_or_behind_a_repair_that_lies_in_them(
    first: str, plain: Zoo, text: Path, tmp_path: Path
):
    fewer, cut = {"L1.experts": keep(0, 2, 3, 5, 7)}, {"L2.attention": drop("linear")}
    stages = (cut, fewer) if first == "repair" else (fewer, cut)
    out = built(plain("mixtral"), text, tmp_path / "out", *stages)
    ids, model = rows_of(text).ids, families.reference(plain("mixtral"))
    if first == "repair":
        model = repaired(model, [(2, "attention")], "linear", ids)
    model = families.cut_by_hand(model, {1: [0, 2, 3, 5, 7]})
    if first == "experts":
        model = repaired(model, [(2, "attention")], "linear", ids)
    assert worst(families.reference(out), model, ids) < 1e-3


def test_a_repair_lies_in_the_stock_form_too(plain: Zoo, text: Path, tmp_path: Path):
    """In a mixtral that is written as a qwen2_moe, and in the zeros beside the experts."""
    out = built(
        plain("mixtral"), text, tmp_path / "out", {"L1.experts": drop("linear")}, target="transformers"
    )
    ids, whole = rows_of(text).ids, families.reference(plain("mixtral"))
    assert worst(families.reference(out), repaired(whole, [(1, "mlp")], "linear", ids), ids) < 1e-3
    report = built(plain("mixtral"), text, tmp_path / "again", {"L1": drop("linear")}, target="transformers")
    assert worst(families.reference(report), repaired(whole, [(1, "block")], "linear", ids), ids) < 1e-3


# Repairs that cannot be


def test_before_the_first_branch_there_is_nothing_to_repair(plain: Zoo, text: Path, tmp_path: Path):
    view = open_view(plain("mixtral"))
    plan = Plan(view.source.digest, (Stage({}, {Unit(0, "attention"): drop("linear")}),))
    (note,) = unrepaired(plan, view)
    assert note == "L0 goes without repair=linear: no output weights come before it that could hold it"
    out = built(plain("mixtral"), text, tmp_path / "out", {"L0.attention": drop("linear")})
    assert note in json.loads((out / "moespresso.json").read_text())["notes"]
    bare = built(plain("mixtral"), text, tmp_path / "bare", {"L0.attention": drop()})
    assert tensors(out) == tensors(bare)
    out = built(plain("mixtral"), text, tmp_path / "bias", {"L0.attention": drop("bias")})
    ids, whole = rows_of(text).ids, families.reference(plain("mixtral"))
    assert worst(families.reference(out), repaired(whole, [(0, "attention")], "bias", ids), ids) < 1e-5


def test_where_nothing_can_be_fitted_nothing_is_run(
    plain: Zoo, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("moespresso.fit.repairs.sweep", lambda *_, **__: pytest.fail("the model was run"))
    out = built(plain("mixtral"), text, tmp_path / "out", {"L0": drop("linear")})
    assert api.verify(out, against=plain("mixtral"))["ok"]


@pytest.mark.parametrize("family", ["gemma2", "afmoe", "flex_olmo"])
@pytest.mark.parametrize("repair", ["linear", "scale"])
@pytest.mark.few(2)
def test_no_map_is_put_before_a_norm_that_would_undo_it(family: str, repair: str, text: Path, tmp_path: Path):
    """These families norm what a branch answers, so no weight of theirs can hold a repair but one with a place of its own."""
    folder = other_folder(family, tmp_path)
    view = open_view(folder)
    unit = view.source.layers[1].unit("mlp")
    plan = Plan(view.source.digest, (Stage({}, {unit: drop(repair)}),))
    assert unrepaired(plan, view) != []
    out, bare, bias = (
        built(folder, text, tmp_path / str(word), {str(unit): drop(word)}) for word in (repair, None, "bias")
    )
    assert tensors(out) == tensors(bare)
    assert [name for name in tensors(bias) if name not in tensors(bare)] == ["model.layers.1.mlp.bias"]


def test_what_is_no_plain_sum_of_branches_cannot_be_repaired(text: Path, tmp_path: Path):
    folder = other_folder("minimax", tmp_path)
    with pytest.raises(UserError, match=r"what L1 leaves cannot be repaired in .*: leave the repair out"):
        built(folder, text, tmp_path / "out", {"L1": drop("linear")})
    with pytest.raises(UserError, match=r"cannot be repaired in .*: leave the repair out"):
        api.press(
            folder,
            out=tmp_path / "out",
            texts=[text],
            samples=4,
            length=16,
            steps=["block_drop:repair=scale"],
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["liner", "novice", "mean"])
def test_a_repair_that_is_not_known_is_not_passed_over(word: str, plain: Zoo, text: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=f"repairs the cut of L1.experts by '{word}': choose from bias, scale, linear"
    ):
        built(plain("mixtral"), text, tmp_path / "out", {"L1.experts": drop(word)})
