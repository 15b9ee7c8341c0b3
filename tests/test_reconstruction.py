"""The search by reconstruction: is the set it finds the best one, with the router really cut?

Brute force cuts a stock model's experts and router by hand for every candidate set and compares the block's output on
the same tokens. The product never cuts: it makes the router blind (`_only`), which must be the same thing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from families import (
    FAMILIES,
    cut_by_hand,
    experts_of,
    moe_blocks,
    random_ids,
    random_kept,
    reference,
    routers,
)
from moespresso.build import Tensors, View, open_view
from moespresso.core.blueprint import LayerSpec
from moespresso.core.layer import Call, Layer, Routed, Taps
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.data import Batches
from moespresso.fit import Job, measure
from moespresso.methods import ExpertDrop
from moespresso.statistics import Measurer, reconstruction
from moespresso.statistics.reconstruction import _only, search
from moespresso.statistics.sample import Sample
from moespresso.stream import sweep

Zoo = Callable[[str], Path]
GROUPED = ["deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"]
UNGROUPED = [name for name in FAMILIES if name not in GROUPED]


# The product's search, and the same by hand


def searched(view: View, ids: Tensor, layers: Sequence[int]) -> dict[int, dict[str, list[float]]]:
    """Search the given layers on all tokens of `ids`."""
    found: dict[int, dict[str, list[float]]] = {}

    def visit(layer: Layer, taps: Taps) -> None:
        if layer.spec.index in layers:
            sample = Sample(layer.spec.experts, view.source.hidden, ids.numel())
            for call in taps:
                sample.add(call)
            found[layer.spec.index] = search(layer, sample)

    with Tensors(view.checkpoint.folder) as reader:
        meta = view.meta_model(reader, torch.float32, torch.device("cpu"))
        sweep(meta, ids, torch.ones_like(ids, dtype=torch.bool), visit)
    return found


class ByHand:
    """One MoE layer of a stock model: how far its block's output moves when only some experts are left."""

    def __init__(self, model: PreTrainedModel, layer: int, ids: Tensor) -> None:
        self.model, self.layer = model, layer
        self.experts, self.top_k = experts_of(model)[layer]
        observed: list[Tensor] = []
        block = moe_blocks(model)[layer]
        handle = block.register_forward_pre_hook(lambda _, args: observed.append(args[0]))
        with torch.no_grad():
            model(ids, use_cache=False)
            handle.remove()
            self.hidden = observed[0]
            self.whole = _output(block, self.hidden)
        # Cutting copies the model: leave in it only what is cut.
        self.bare = _only_layer(model, layer)

    def error(self, kept: Sequence[int]) -> float:
        block = moe_blocks(cut_by_hand(self.bare, {self.layer: sorted(kept)}))[self.layer]
        with torch.no_grad():
            return float((_output(block, self.hidden) - self.whole).square().mean())


def _output(block: nn.Module, hidden: Tensor) -> Tensor:
    """What a block adds to the residual stream (gpt_oss returns its scores beside it)."""
    output = block(hidden)
    return output[0] if isinstance(output, tuple) else output


def _only_layer(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """The model without its embedding, head and other layers."""
    for index in range(len(model.model.layers)):
        if index != layer:
            model.model.layers[index] = nn.ModuleDict(
                {FAMILIES[model.config.model_type].block: nn.Identity()}
            )
    model.model.embed_tokens = model.lm_head = nn.Identity()
    return model


def by_hand(name: str, zoo: Zoo, ids: Tensor) -> ByHand:
    model = reference(zoo(name))
    return ByHand(model, list(experts_of(model))[-1], ids)


def tokens_for(name: str, rows: int = 2, length: int = 20) -> Tensor:
    return random_ids(FAMILIES[name].config(), rows, length)


@pytest.mark.parametrize("name", UNGROUPED)
@pytest.mark.few(3)
def test_the_best_set_is_the_best_of_all_sets_by_brute_force(name: str, zoo: Zoo):
    ids = tokens_for(name)
    truth = by_hand(name, zoo, ids)
    found = searched(open_view(zoo(name)), ids, [truth.layer])[truth.layer]
    keep = truth.experts - 2
    errors = {kept: truth.error(kept) for kept in itertools.combinations(range(truth.experts), keep)}
    assert members(found[f"reconstruction@{keep}"]) == min(errors, key=lambda kept: errors[kept])


def test_every_size_is_searched_down_to_the_floor(zoo: Zoo):
    ids = tokens_for("mixtral", 1, 24)
    truth = by_hand("mixtral", zoo, ids)
    found = searched(open_view(zoo("mixtral")), ids, [truth.layer])[truth.layer]
    assert set(found) == {"reconstruction", *(f"reconstruction@{keep}" for keep in range(3, 8))}
    for keep in range(3, 8):
        sets = itertools.combinations(range(8), keep)
        assert members(found[f"reconstruction@{keep}"]) == min(sets, key=truth.error)


def members(flags: Sequence[float]) -> tuple[int, ...]:
    assert set(flags) <= {0.0, 1.0}
    return tuple(expert for expert, flag in enumerate(flags) if flag)


@pytest.mark.parametrize("name", ["olmoe", "minimax_m2"])
def test_the_greedy_order_removes_what_is_missed_least_each_time(name: str, zoo: Zoo):
    ids = tokens_for(name)
    truth = by_hand(name, zoo, ids)
    ranks = searched(open_view(zoo(name)), ids, [truth.layer])[truth.layer]["reconstruction"]
    kept = set(range(truth.experts))
    for step in range(truth.experts - truth.top_k):
        least = min(sorted(kept), key=lambda expert: truth.error(kept - {expert}))
        assert ranks[least] == step
        kept.discard(least)
    assert all(ranks[expert] >= truth.experts - truth.top_k for expert in kept)


@pytest.mark.parametrize("name", GROUPED)
def test_groups_lose_one_each_in_turn(name: str, zoo: Zoo):
    view = open_view(zoo(name))
    layer = view.source.moe_layers[-1]
    found = searched(view, tokens_for(name), [layer.index])[layer.index]
    assert list(found) == ["reconstruction"]
    ranks, size = found["reconstruction"], layer.experts // layer.groups
    assert sorted(ranks) == list(range(layer.experts))
    removed = sorted(range(layer.experts), key=lambda expert: ranks[expert])[: layer.experts - layer.floor]
    rounds = [removed[start : start + layer.groups] for start in range(0, len(removed), layer.groups)]
    assert rounds
    assert all([expert // size for expert in turn] == list(range(layer.groups)) for turn in rounds)


def test_a_grouped_search_takes_what_is_missed_least_of_its_group(zoo: Zoo):
    view, ids = open_view(zoo("deepseek_v2")), tokens_for("deepseek_v2")
    truth = by_hand("deepseek_v2", zoo, ids)
    ranks = searched(view, ids, [truth.layer])[truth.layer]["reconstruction"]
    kept = set(range(12))
    for step, group in enumerate([0, 1, 2]):
        inside = [expert for expert in sorted(kept) if expert // 4 == group]
        errors = {expert: grouped_error(truth, kept - {expert}) for expert in inside}
        least = min(errors, key=lambda expert: errors[expert])
        assert ranks[least] == step
        kept.discard(least)
    assert grouped_error(truth, kept) == pytest.approx(truth.error(sorted(kept)), rel=1e-4)


def grouped_error(truth: ByHand, kept: set[int]) -> float:
    """The same for DeepSeek-V2's router written out, since groups of unequal size cannot be cut out of the stock one."""
    block = moe_blocks(truth.model)[truth.layer]
    hidden = truth.hidden.reshape(-1, truth.hidden.shape[-1])
    gone = [expert for expert in range(12) if expert not in kept]
    with torch.no_grad():
        logits = (hidden @ block.gate.weight.T).index_fill(1, torch.tensor(gone), -math.inf)
        scores = logits.softmax(-1)
        best = scores.view(-1, 3, 4).amax(-1).topk(2).indices
        live = torch.zeros(len(hidden), 3).scatter(1, best, 1.0).repeat_interleave(4, 1)
        gates, index = (scores * live).topk(3)
        output = block.experts(hidden, index, 1.5 * gates).view_as(truth.hidden)
        return float((output + block.shared_experts(truth.hidden) - truth.whole).square().mean())


def measured(view: View, ids: Tensor) -> Stats:
    measurer = Measurer(["reconstruction"], ids.numel())
    with Tensors(view.checkpoint.folder) as reader:
        meta = view.meta_model(reader, torch.float32, torch.device("cpu"))
        sweep(meta, ids, torch.ones_like(ids, dtype=torch.bool), measurer)
    return Stats("key", view.source.digest, values=measurer.values)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v2"])
def test_what_is_kept_is_nested_and_the_same_in_every_group(
    name: str, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reconstruction, "EXHAUSTIVE", 0)
    view = open_view(zoo(name))
    stats, layer = measured(view, tokens_for(name)), view.source.moe_layers[0]
    kept: list[set[int]] = []
    for keep in range(layer.floor, layer.experts + 1, layer.groups):
        step = ExpertDrop(score="reconstruction", keep=keep, protect_super=False)
        kept.append(set(step.decide(stats, view.source).treatments[Unit(layer.index, "experts")].keep or ()))
        size = layer.experts // layer.groups
        counts = [sum(expert // size == group for expert in kept[-1]) for group in range(layer.groups)]
        assert counts == [keep // layer.groups] * layer.groups
    assert all(small < large for small, large in itertools.pairwise(kept))


def test_the_best_set_is_what_expert_drop_keeps(zoo: Zoo):
    view = open_view(zoo("mixtral"))
    stats = measured(view, tokens_for("mixtral"))
    step = ExpertDrop(score="reconstruction", keep=5, protect_super=False)
    for unit, treatment in step.decide(stats, view.source).treatments.items():
        assert treatment.keep == members(stats.of(unit.layer or 0, 8, "reconstruction@5"))
    ranks = stats.of(0, 8, "reconstruction")
    first_to_go = sorted(range(8), key=lambda expert: ranks[expert])[:5]
    worst = ExpertDrop(score="reconstruction", keep=5, reverse=True, protect_super=False)
    assert worst.decide(stats, view.source).treatments[Unit(0, "experts")].keep == tuple(sorted(first_to_go))


# A blind router is a cut router


def dense(gates: Tensor, index: Tensor, numbers: Sequence[int], experts: int) -> Tensor:
    """Gates [T, k] of selected experts as a table [T, E]; `numbers` say which expert an index means."""
    table = torch.zeros(len(gates), experts)
    return table.scatter(1, torch.tensor(numbers)[index], gates.float())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_router_made_blind_answers_as_one_that_was_cut(name: str, zoo: Zoo):
    model = reference(zoo(name))
    generator = torch.Generator().manual_seed(1)
    for layer, router in routers(model).items():
        experts = experts_of(model)[layer][0]
        for seed in range(3):
            kept = random_kept(model, seed=seed)[layer]
            cut = cut_by_hand(model, {layer: kept})
            hidden = torch.randn(64, model.config.hidden_size, generator=generator)
            before = [value.clone() for value in router.state_dict().values()]
            with torch.no_grad():
                _, gates, index = routers(cut)[layer](hidden, *beside(cut, layer))
                with _only(router, tuple(kept), experts, hidden, beside(model, layer)) as (widened, extra):
                    _, blind_gates, blind_index = router(widened, *extra)
            expected, got = (dense(gates, index, kept, experts),
                             dense(blind_gates, blind_index, range(experts), experts))  # fmt: skip
            assert torch.equal(expected > 0, got > 0)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            assert all(map(torch.equal, before, router.state_dict().values())), "the router is not as it was"


def beside(model: PreTrainedModel, layer: int) -> tuple[Tensor, ...]:
    """What the router is called with beside the hidden states."""
    block = moe_blocks(model)[layer]
    return (block.e_score_correction_bias,) if hasattr(block, "e_score_correction_bias") else ()


def test_a_router_sees_again_even_after_a_failure(zoo: Zoo):
    router = routers(reference(zoo("gpt_oss")))[0]
    width, before = router.hidden_dim, [value.clone() for value in router.state_dict().values()]
    hidden = torch.randn(4, width)
    with pytest.raises(RuntimeError, match="stop"), _only(router, (0, 1, 2), 8, hidden, ()):
        raise RuntimeError("stop")
    assert router.hidden_dim == width
    assert all(map(torch.equal, before, router.state_dict().values()))


# Which tokens are looked at


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tokens [T, H] of each search, which then finds all sets equally good."""
    seen: list[Tensor] = []

    class Blank:
        def __init__(self, _: Layer, sample: Sample) -> None:
            seen.append(sample.hidden)

        def error(self, _: tuple[int, ...]) -> float:
            return 0.0

    monkeypatch.setattr(reconstruction, "_Problem", Blank)
    return seen


@pytest.mark.parametrize(("rows", "length"), [(16, 16), (40, 8), (3, 100)])
def test_a_text_shorter_than_the_sample_is_looked_at_as_a_whole(
    rows: int, length: int, zoo: Zoo, looked_at: list[Tensor], tmp_path: Path
):
    view = open_view(zoo("deepseek_v2"))
    ids = random_ids(FAMILIES["deepseek_v2"].config(), rows, length)
    batches = Batches(ids, torch.ones_like(ids, dtype=torch.bool), {})
    measure(Job(view, tmp_path, batches), [ExpertDrop(score="reconstruction")], view)
    assert [len(hidden) for hidden in looked_at] == [rows * length] * 2


def test_padding_is_not_looked_at(zoo: Zoo, looked_at: list[Tensor], tmp_path: Path):
    view = open_view(zoo("deepseek_v2"))
    ids = random_ids(FAMILIES["deepseek_v2"].config(), 1, 20)
    mask = torch.arange(20)[None] < 13
    measure(Job(view, tmp_path, Batches(ids, mask, {})), [ExpertDrop(score="reconstruction")], view)
    assert [len(hidden) for hidden in looked_at] == [13, 13]


@pytest.mark.parametrize("tokens", [1100, 1500, 2000, 5000])
def test_the_sample_is_spread_over_the_whole_batch(tokens: int, looked_at: list[Tensor]):
    numbers = torch.arange(tokens, dtype=torch.float32).unsqueeze(1)
    routed = Routed(numbers, numbers, numbers.long(), numbers, numbers.unsqueeze(2), (numbers,))
    sample = Sample(8, 16, tokens)
    sample.add(Call(numbers[None], numbers[None], torch.ones(1, tokens, dtype=torch.bool), routed))
    search(Layer(LayerSpec(0, "attention", 8, top_k=2, floor=8), nn.Identity()), sample)
    (taken,) = looked_at
    assert 500 < len(taken) <= 1024
    assert taken.max() > 0.95 * tokens
    assert taken.squeeze(1).diff().max() < 3 * tokens / len(taken)
