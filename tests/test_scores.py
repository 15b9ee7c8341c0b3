"""Expert Drop: does every score say what its formula says, and is what is decided what was asked for?

The truth is a stock transformers model, eager everywhere, observed by hooks: its routers' logits and gates, and its
own experts asked for one token and one expert at a time. From that the formulas are written out again here, in plain
loops. How many and which are kept is tested on made-up scores, where the right answer can be counted.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from families import (
    FAMILIES,
    cut_by_hand,
    expert_on_disk,
    experts_of,
    is_router,
    moe_blocks,
    random_ids,
    reference,
    routers,
    tensor_files,
)
from moespresso.build import Tensors, View, open_view
from moespresso.core.blueprint import Blueprint, LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.plan import Decision, Plan
from moespresso.core.progress import Silent
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.data import Batches
from moespresso.fit import Job
from moespresso.methods import ExpertDrop
from moespresso.methods.expert_drop import expert_scores, super_experts
from moespresso.run import Decided, decide
from moespresso.statistics import Measurer, Weights
from moespresso.stream import sweep

Zoo = Callable[[str], Path]
every_family = pytest.mark.parametrize("name", list(FAMILIES))
quickly = settings(max_examples=40, deadline=None, derandomize=True, database=None)

# Routers that score by a sigmoid (their modeling files); the rest by a softmax.
SIGMOID = {"deepseek_v3", "glm4_moe", "dots1", "minimax_m2"}
FROM_TEXT = ["routing", "routing_topk", "frequency", "reap", "ean", "man", "msan", "easy_ep"]


# Measuring, and the same by hand


def tokens_for(
    view: View, rows: int = 3, length: int = 16, *, short: Sequence[int] = (11,), seed: int = 0
) -> Batches:
    """Random rows; the first ones are padded after as many tokens as `short` says."""
    ids = random_ids(FAMILIES[view.source.family].config(), rows, length, seed)
    mask = torch.ones_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(short):
        mask[row, tokens:] = False
    return Batches(ids, mask, {})


def measured(view: View, batches: Batches, *needs: str) -> Stats:
    """What the product measures, in float64 so that only formulas can differ."""
    measurer = Measurer(needs or ["routing"], batches.num_tokens)
    with Tensors(view.checkpoint.folder) as reader:
        meta = view.meta_model(reader, torch.float64, torch.device("cpu"))
        sweep(meta, batches.ids, batches.mask, measurer)
        values = measurer.values
        if "weights" in needs:
            for unit, row in Weights().measure(view, reader, Silent()).items():
                values[unit].update(row)
    return Stats("key", view.source.digest, batches.num_tokens, values, tuple(measurer.warnings))


@dataclass
class Observed:
    """What the stock modules of one layer said: `hidden` [T, H] into the experts, `logits` [T, E], `gates` and
    `index` [T, k], the experts' `routed` sum and the layer's output `after` [T, H]."""

    hidden: Tensor
    logits: Tensor
    gates: Tensor
    index: Tensor
    routed: Tensor
    after: Tensor


def observe(model: PreTrainedModel, batches: Batches) -> dict[int, Observed]:
    """Run a stock model and listen to its own routers, experts and layers, valid tokens only."""
    said: dict[int, dict[str, Any]] = {layer: {} for layer in moe_blocks(model)}

    def listen(module: torch.nn.Module, layer: int, take: Callable[..., dict[str, Any]]) -> Any:
        return module.register_forward_hook(lambda _, args, out: said[layer].update(take(args, out)))

    handles = []
    for layer, block in moe_blocks(model).items():
        router = routers(model)[layer]
        handles.append(
            listen(router, layer, lambda _, out: dict(zip(("logits", "gates", "index"), out, strict=True)))
        )
        handles.append(listen(block.experts, layer, lambda args, out: {"hidden": args[0], "routed": out}))
        handles.append(listen(model.model.layers[layer], layer, lambda _, out: {"after": out}))
    with torch.no_grad():
        model(batches.ids, attention_mask=batches.mask.long(), use_cache=False)
    for handle in handles:
        handle.remove()
    valid = batches.mask.reshape(-1)
    return {layer: Observed(**{key: rows.reshape(len(valid), -1)[valid] for key, rows in row.items()})
            for layer, row in said.items()}  # fmt: skip


def answer(model: PreTrainedModel, layer: int, expert: int, hidden: Tensor) -> Tensor:
    """One stock expert's answer [H] to one token [H]: the eager experts module, asked for a single slot."""
    slot, one = torch.tensor([[expert]]), torch.ones(1, 1, dtype=hidden.dtype)
    with torch.no_grad():
        return moe_blocks(model)[layer].experts(hidden[None], slot, one)[0]


def slow_scores(model: PreTrainedModel, layer: int, observed: Observed) -> dict[str, list[float]]:
    """Every score of one layer by its formula: token by token, expert by expert."""
    count = experts_of(model)[layer][0]
    sigmoid = model.config.model_type in SIGMOID
    scores = observed.logits.double().sigmoid() if sigmoid else observed.logits.double().softmax(-1)
    multiplier = getattr(model.model.layers[layer], "residual_multiplier", 1.0)
    sums = {name: [0.0] * count for name in ("s", "s_topk", "n", "g|f|", "s|f|", "|f|", "|f|2", "cg|f|")}
    for token, hidden in enumerate(observed.hidden):
        after = observed.after[token]
        change = 1 - float(torch.cosine_similarity(after - multiplier * observed.routed[token], after, dim=0))
        for expert in range(count):
            sums["s"][expert] += float(scores[token, expert])
        for slot, expert in enumerate(observed.index[token].tolist()):
            norm, gate = (
                float(answer(model, layer, expert, hidden).norm()),
                float(observed.gates[token, slot]),
            )
            score = float(scores[token, expert])
            adds = {"n": 1, "s_topk": score, "g|f|": gate * norm, "s|f|": score * norm, "|f|": norm,
                    "|f|2": norm**2, "cg|f|": change * gate * norm}  # fmt: skip
            for name, value in adds.items():
                sums[name][expert] += value
    total = len(observed.hidden)

    def mean(name: str) -> list[float]:
        return [value / n if n else -math.inf for value, n in zip(sums[name], sums["n"], strict=True)]

    return {
        "routing": [value / total for value in sums["s"]],
        "routing_topk": [value / total for value in sums["s_topk"]],
        "frequency": [value / total for value in sums["n"]],
        "reap": mean("g|f|"),
        "reap, gates=softmax": mean("s|f|"),
        "ean": sums["|f|"],
        "man": mean("|f|"),
        "msan": mean("|f|2"),
        "easy_ep": sums["cg|f|"],
    }


@every_family
@pytest.mark.few(4)
def test_every_score_is_its_formula(name: str, zoo: Zoo):
    view = open_view(zoo(name))
    batches = tokens_for(view)
    stats, model = measured(view, batches), reference(zoo(name), torch.float64)
    observed = observe(model, batches)
    assert stats.tokens == batches.num_tokens == 3 * 16 - 5
    assert list(observed) == [layer.index for layer in view.source.moe_layers]
    for layer in view.source.moe_layers:
        for label, expected in slow_scores(model, layer.index, observed[layer.index]).items():
            score, _, gates = label.partition(", gates=")
            got = expert_scores(ExpertDrop(score=score, gates=gates or "model"), stats, layer)
            # The product subtracts a cosine from one in float32, which costs easy_ep a digit.
            tolerance = 3e-5 if score == "easy_ep" else 1e-6
            assert got == pytest.approx(expected, rel=tolerance, abs=0), f"{label} in L{layer.index}"


@every_family
def test_aimer_is_its_formula(name: str, zoo: Zoo):
    view = open_view(zoo(name))
    with Tensors(view.checkpoint.folder) as reader:
        stats = Stats("key", view.source.digest, values=Weights().measure(view, reader, Silent()))
    for layer in view.source.moe_layers:
        expected = []
        for expert in range(layer.experts):
            parts = expert_on_disk(name, zoo(name), layer.index, expert).values()
            weights = torch.cat([part.double().reshape(-1) for part in parts])
            expected.append(-float(weights.abs().mean() / weights.square().mean().sqrt()))
        assert expert_scores(ExpertDrop(score="aimer"), stats, layer) == pytest.approx(expected, rel=1e-6)


# Experts that no token reaches


def edited(folder: Path, copy: Path, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Path:
    """A copy of a checkpoint in which some tensors are changed."""
    shutil.copytree(folder, copy)
    for name, change in changes.items():
        file = tensor_files(copy)[name]
        tensors = load_file(file)
        save_file({**tensors, name: change(tensors[name])}, file, metadata={"format": "pt"})
    return copy


def put(expert: int, value: float) -> Callable[[Tensor], Tensor]:
    """Set one expert's entry of a router bias."""
    return lambda bias: bias.index_fill(0, torch.tensor([expert]), value)


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight * factor


@pytest.fixture(scope="module")
def shunned(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[View, Stats]]:
    """Expert 5 of layer 2 is never chosen: its softmax is nothing (gpt_oss), or its bias forbids it (deepseek_v3)."""
    biases = {"gpt_oss": ("model.layers.2.mlp.router.bias", -1e4),
              "deepseek_v3": ("model.layers.2.mlp.gate.e_score_correction_bias", -50.0)}  # fmt: skip
    made = {}
    for name, (tensor, value) in biases.items():
        folder = tmp_path_factory.mktemp("shunned") / name
        view = open_view(edited(zoo(name), folder, {tensor: put(5, value)}))
        made[name] = view, measured(view, tokens_for(view, 6, 40), "routing", "reconstruction")
    return made


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_an_expert_without_tokens_is_reported_by_name(family: str, shunned: dict[str, tuple[View, Stats]]):
    view, stats = shunned[family]
    assert stats.of(2, view.source.layers[2].experts, "tokens")[5] == 0
    (line,) = [line for line in stats.warnings if "L2.E5" in line]
    assert line.startswith("no calibration token reached L2.E5: ")


# `routing` adds up over all tokens: where a bias forbids an expert, its score may well be high.
LAST = [
    ("gpt_oss", "routing"),
    *(("gpt_oss", score) for score in (*FROM_TEXT[1:], "reconstruction")),
    *(("deepseek_v3", score) for score in (*FROM_TEXT[1:], "reconstruction")),
]


@pytest.mark.parametrize(("family", "score"), LAST)
def test_an_expert_without_tokens_is_needed_least(
    family: str, score: Any, shunned: dict[str, tuple[View, Stats]]
):
    view, stats = shunned[family]
    layer = view.source.layers[2]
    scores = expert_scores(ExpertDrop(score=score), stats, layer)
    (group,) = [experts for experts in grouped(layer, range(layer.experts)) if 5 in experts]
    assert scores[5] < min(scores[expert] for expert in group if expert != 5)
    assert not any(math.isnan(value) for value in scores)
    step = ExpertDrop(score=score, keep=layer.experts - layer.groups, protect_super=False)
    assert 5 not in kept_by(step.decide(stats, view.source))[2]


def test_a_score_that_is_no_number_counts_as_least():
    layer = LayerSpec(0, "attention", 3, top_k=1, floor=1)
    stats = made_up([[1.0, math.nan, -5.0]])
    assert expert_scores(ExpertDrop(score="ean"), stats, layer) == [1.0, -math.inf, -5.0]


# Padding


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "minimax_m2", "jamba"])
def test_padding_is_left_out_of_every_sum(name: str, zoo: Zoo):
    view = open_view(zoo(name))
    batches = tokens_for(view, 2, 20, short=(13,))
    together = measured(view, batches)
    alone = [measured(view, Batches(ids[None, :end], torch.ones(1, end, dtype=torch.bool), {}))
             for ids, end in ((batches.ids[0], 13), (batches.ids[1], 20))]  # fmt: skip
    assert together.values.keys() == alone[0].values.keys()
    for unit, row in together.values.items():
        for sum_, value in row.items():
            parts = [stats.values[unit][sum_] for stats in alone]
            whole = max(parts) if sum_ in ("largest", "softmax_gates") else sum(parts)
            assert value == pytest.approx(whole, rel=1e-5, abs=1e-9), f"{unit} {sum_}"


def test_what_stands_on_padding_does_not_matter(zoo: Zoo):
    view = open_view(zoo("mixtral"))
    batches = tokens_for(view, 2, 20, short=(13,))
    other = replace(batches, ids=torch.where(batches.mask, batches.ids, torch.tensor(7)))
    assert not torch.equal(batches.ids, other.ids)
    assert measured(view, batches).values == measured(view, other).values


# How many are kept


def sketch(*layers: LayerSpec) -> Blueprint:
    """A blueprint of layers alone, without tensors."""
    return Blueprint("made", "made-up", "x", 8, 16, False, layers, ())


def made_up(scores: Sequence[Sequence[float]], **more: Sequence[Sequence[float]]) -> Stats:
    """Stats of layers 0, 1, ... in which `score=ean` is just what `scores` says."""
    names = {"norm": scores, **more}
    layers = {Unit(layer, "experts"): {"tokens": 1.0} for layer in range(len(scores))}
    experts = {
        Unit(layer, "experts", expert): {name: rows[layer][expert] for name, rows in names.items()}
        for layer, row in enumerate(scores)
        for expert in range(len(row))
    }
    return Stats("key", "x", 1, {**layers, **experts})


def kept_by(decision: Decision) -> dict[int, tuple[int, ...]]:
    kept: dict[int, tuple[int, ...]] = {}
    for unit, treatment in decision.treatments.items():
        assert unit == Unit(unit.layer, "experts")
        assert treatment.keep is not None
        kept[unit.layer or 0] = treatment.keep
    return kept


EIGHT = sketch(LayerSpec(0, "attention", 8, top_k=2, floor=2))
TWELVE = sketch(LayerSpec(0, "attention", 12, top_k=3, groups=3, floor=6))


@pytest.mark.parametrize(
    ("blueprint", "options", "sentence"),
    [
        (EIGHT, {"keep": 9}, "keep=9 in L0 is more than the 8 experts there are"),
        (EIGHT, {"keep": 1}, r"keep=1 in L0 is under 2, the fewest its router \(top_k=2\) works with"),
        (EIGHT, {"ratio": 0.9}, "keep=1 in L0 is under 2"),
        (TWELVE, {"keep": 8}, "keep=8 in L0 does not divide into 3 router groups: keep 6 or 9"),
        (TWELVE, {"keep": 5}, "keep=5 in L0 is under 6"),
        (TWELVE, {"ratio": 0.75}, "keep=3 in L0 is under 6"),
        (sketch(LayerSpec(0, "attention")), {}, r"needs routed experts, but made-up \(made\) is dense"),
    ],
)
def test_a_number_that_cannot_be_kept_is_refused(
    blueprint: Blueprint, options: dict[str, Any], sentence: str
):
    with pytest.raises(UserError, match=f"expert_drop.* ?{sentence}"):
        ExpertDrop(**options).check(blueprint)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep": 4, "ratio": 0.5}, "give keep or ratio, not both"),
        ({"ratio": 1.0}, r"ratio=1.0 is the share removed and must be in \[0, 1\)"),
        ({"ratio": -0.1}, "must be in"),
        ({"ratio": math.nan}, "must be in"),
        ({"router": "preserve", "renormalise": "compensate"}, "for routers that lose rows"),
    ],
)
def test_settings_that_contradict_are_refused_at_once(options: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        ExpertDrop(**options)


@pytest.mark.parametrize(
    ("blueprint", "options", "count"),
    [
        (EIGHT, {"keep": 8}, 8),
        (EIGHT, {"keep": 2}, 2),
        (EIGHT, {"ratio": 0.25}, 6),
        (EIGHT, {"ratio": 0.0}, 8),
        (EIGHT, {}, 6),
        (TWELVE, {"ratio": 0.25}, 9),
        (TWELVE, {"ratio": 0.3}, 9),
        (TWELVE, {"keep": 6}, 6),
    ],
)
def test_keep_is_what_stays_and_ratio_what_goes(blueprint: Blueprint, options: dict[str, Any], count: int):
    step = ExpertDrop(score="random", **options)
    step.check(blueprint)
    assert len(kept_by(step.decide(made_up([]), blueprint))[0]) == count
    assert len(step.outline(blueprint, Plan("x")).treatments[Unit(0, "experts")].keep or ()) == count


def test_a_ratio_that_does_not_come_out_even_is_said():
    said = ExpertDrop(score="random", ratio=0.3).decide(made_up([]), TWELVE).notes
    assert said == ("ratio=0.3 of 12 experts is not a whole number per group: 9 are kept",)
    assert ExpertDrop(score="random", ratio=0.25).decide(made_up([]), TWELVE).notes == ()


# Which are kept


@st.composite
def cases(draw: st.DrawFn) -> tuple[Blueprint, list[list[float]], int]:
    """Layers of one router form with made-up scores, and a number to keep that all of them allow."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    sizes = [groups * each for each in draw(st.lists(st.integers(2, 6), min_size=1, max_size=4))]
    floors = [groups * draw(st.integers(1, min(sizes) // groups)) for _ in sizes]
    keep = draw(st.integers(max(floors), min(sizes)))
    layers = [LayerSpec(index, "attention", size, top_k=1, groups=groups, floor=floor)
              for index, (size, floor) in enumerate(zip(sizes, floors, strict=True))]  # fmt: skip
    numbers = st.integers(-9, 9).map(float)
    scores = [draw(st.lists(numbers, min_size=size, max_size=size)) for size in sizes]
    return sketch(*layers), scores, keep


def decided(
    blueprint: Blueprint, scores: Sequence[Sequence[float]], **options: Any
) -> dict[int, tuple[int, ...]]:
    step = ExpertDrop(score="ean", protect_super=False, **options)
    return kept_by(step.decide(made_up(scores), blueprint))


def grouped(layer: LayerSpec, experts: Sequence[int]) -> list[list[int]]:
    """Experts by the router's groups."""
    size = layer.experts // layer.groups
    return [[expert for expert in experts if expert // size == group] for group in range(layer.groups)]


def check_shape(
    blueprint: Blueprint, scores: Sequence[Sequence[float]], kept: dict[int, tuple[int, ...]]
) -> None:
    """What holds in every scope: ascending, never under the floor, the same in every group, the group's best."""
    for layer in blueprint.layers:
        ids = kept[layer.index]
        assert list(ids) == sorted(set(ids))
        assert len(ids) >= layer.floor
        every = grouped(layer, range(layer.experts))
        for inside, group in zip(grouped(layer, ids), every, strict=True):
            assert len(inside) == len(ids) // layer.groups
            row = scores[layer.index]
            lost = [row[expert] for expert in group if expert not in inside]
            assert min((row[expert] for expert in inside), default=math.inf) >= max(lost, default=-math.inf)


@quickly
@given(cases())
def test_layer_scope_keeps_the_best_of_every_group(case: tuple[Blueprint, list[list[float]], int]):
    blueprint, scores, keep = case
    keep -= keep % blueprint.layers[0].groups
    kept = decided(blueprint, scores, keep=keep)
    check_shape(blueprint, scores, kept)
    assert {len(ids) for ids in kept.values()} == {keep}


@quickly
@given(cases())
def test_global_scope_spends_the_whole_budget_where_it_is_worth_most(
    case: tuple[Blueprint, list[list[float]], int],
):
    blueprint, scores, keep = case
    groups, budget = blueprint.layers[0].groups, keep * len(blueprint.layers)
    kept = decided(blueprint, scores, keep=keep, scope="global")
    check_shape(blueprint, scores, kept)
    total = sum(len(ids) for ids in kept.values())
    assert total == budget - budget % groups
    # One row is the next best expert of every group; what is not owed to a floor goes to the best rows of all.
    owed, free = 0.0, []
    for layer in blueprint.layers:
        ranked = [sorted((scores[layer.index][e] for e in group), reverse=True)
                  for group in grouped(layer, range(layer.experts))]  # fmt: skip
        rows = [sum(row) for row in zip(*ranked, strict=True)]
        owed += sum(rows[: layer.floor // groups])
        free += rows[layer.floor // groups :]
        total -= layer.floor
    best = owed + sum(sorted(free, reverse=True)[: total // groups])
    assert sum(scores[layer][expert] for layer, ids in kept.items() for expert in ids) == pytest.approx(best)


@quickly
@given(cases(), st.sampled_from(["layer", "global"]))
def test_reverse_keeps_what_the_opposite_scores_would(
    case: tuple[Blueprint, list[list[float]], int], scope: str
):
    blueprint, scores, keep = case
    keep -= keep % blueprint.layers[0].groups
    opposite = [[-value for value in row] for row in scores]
    kept = decided(blueprint, scores, keep=keep, scope=scope, reverse=True)
    assert kept == decided(blueprint, opposite, keep=keep, scope=scope)


def test_reverse_drops_the_best():
    assert decided(EIGHT, [[3, 9, 1, 7, 5, 8, 2, 6]], keep=6, reverse=True) == {0: (0, 2, 3, 4, 6, 7)}
    assert decided(EIGHT, [[3, 9, 1, 7, 5, 8, 2, 6]], keep=6) == {0: (0, 1, 3, 4, 5, 7)}


def test_only_global_scope_is_uneven():
    assert ExpertDrop(scope="global").uneven
    assert not ExpertDrop().uneven
    assert ExpertDrop(scope="global", keep=7).even(TWELVE) == "keep=6"


# Random


def drawn(layers: Sequence[LayerSpec], keep: int, seed: int) -> dict[int, tuple[int, ...]]:
    return kept_by(ExpertDrop(score="random", keep=keep, seed=seed).decide(made_up([]), sketch(*layers)))


def test_random_is_seeded_and_the_same_in_any_order_of_layers():
    layers = [LayerSpec(index, "attention", 16, top_k=2, floor=2) for index in range(6)]
    one = drawn(layers, 8, seed=3)
    assert one == drawn(layers, 8, seed=3) == drawn(layers[::-1], 8, seed=3) != drawn(layers, 8, seed=4)
    assert len(set(one.values())) == 6
    assert drawn(layers[4:5], 8, seed=3) == {4: one[4]}


def test_random_favours_no_expert():
    layer = LayerSpec(0, "attention", 8, top_k=1, floor=1)
    seen = Counter(expert for seed in range(400) for expert in drawn([layer], 2, seed)[0])
    assert all(70 < seen[expert] < 130 for expert in range(8)), seen


# Super experts


def test_a_planted_super_expert_is_kept_and_named(zoo: Zoo, tmp_path: Path):
    view = open_view(zoo("mixtral"))
    counts = measured(view, tokens_for(view)).of(1, 8, "tokens")
    rare = min(range(8), key=lambda expert: counts[expert])
    down = f"model.layers.1.block_sparse_moe.experts.{rare}.w2.weight"
    planted = open_view(edited(zoo("mixtral"), tmp_path / "planted", {down: times(1000)}))
    stats = measured(planted, tokens_for(planted))
    guarded = ExpertDrop(score="frequency", keep=7).decide(stats, planted.source)
    assert guarded.protected == super_experts(stats, planted.source) == {Unit(1, "experts", rare)}
    assert guarded.notes == (f"super experts, protected: L1.E{rare}",)
    assert rare in kept_by(guarded)[1]
    bare = ExpertDrop(score="frequency", keep=7, protect_super=False).decide(stats, planted.source)
    assert rare not in kept_by(bare)[1]
    assert (bare.protected, bare.notes) == (frozenset(), ())


def test_an_ordinary_model_has_no_super_experts(zoo: Zoo):
    view = open_view(zoo("mixtral"))
    assert super_experts(measured(view, tokens_for(view)), view.source) == frozenset()


@pytest.mark.parametrize(
    ("layer", "value", "found"),
    [
        (0, 100.0, True),
        (2, 100.0, True),
        (3, 100.0, False),  # the last quarter of the layers is left alone
        (0, 9.9, False),  # under ten times the median
    ],
)
def test_super_experts_are_outliers_of_the_first_three_quarters(layer: int, value: float, found: bool):
    largest = [[1.0] * 8 for _ in range(4)]
    largest[layer][5] = value
    blueprint = sketch(*(LayerSpec(index, "attention", 8, top_k=2, floor=2) for index in range(4)))
    expected = {Unit(layer, "experts", 5)} if found else set()
    assert super_experts(made_up(largest, largest=largest), blueprint) == expected


def test_a_super_expert_must_reach_a_tenth_of_the_largest():
    largest = [[1.0] * 128 for _ in range(4)]
    largest[0][5], largest[1][7], largest[2][9] = 1000.0, 101.0, 99.0
    blueprint = sketch(*(LayerSpec(index, "attention", 128, top_k=1, floor=1) for index in range(4)))
    found = super_experts(made_up(largest, largest=largest), blueprint)
    assert found == {Unit(0, "experts", 5), Unit(1, "experts", 7)}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_all_super_experts_of_a_layer_are_kept_though_their_scores_are_the_lowest(scope: Any):
    largest, scores = [[1.0] * 128 for _ in range(4)], [[9.0] * 128 for _ in range(4)]
    for expert in (3, 70):
        largest[0][expert], scores[0][expert] = 1000.0, 0.0
    blueprint = sketch(*(LayerSpec(index, "attention", 128, top_k=1, floor=1) for index in range(4)))
    step = ExpertDrop(score="ean", keep=96, scope=scope)
    scores[0] = [min(value, 1.0) for value in scores[0]]
    decision = step.decide(made_up(scores, largest=largest), blueprint)
    assert {str(unit) for unit in decision.protected} == {"L0.E3", "L0.E70"}
    assert {3, 70} <= set(kept_by(decision)[0])


# Compensation

SWELLING = ["qwen2_moe", "deepseek_v2", "jamba"]
COMPENSATE = ExpertDrop(score="routing", ratio=0.3, renormalise="compensate", protect_super=False)


@pytest.mark.parametrize("name", SWELLING)
def test_compensation_is_the_mean_softmax_mass_of_what_is_kept(name: str, zoo: Zoo):
    view, model = open_view(zoo(name)), reference(zoo(name), torch.float64)
    batches = tokens_for(view)
    observed, decision = observe(model, batches), COMPENSATE.decide(measured(view, batches), view.source)
    for layer, kept in kept_by(decision).items():
        mass = observed[layer].logits.double().softmax(-1)[:, list(kept)].sum(-1)
        scale = decision.treatments[Unit(layer, "experts")].scale
        assert scale == pytest.approx(float(mass.mean()), rel=1e-6)
        assert 0.5 < scale < 0.95


@pytest.mark.parametrize("name", SWELLING)
@pytest.mark.few(1)
def test_compensation_restores_gates_that_swelled(name: str, zoo: Zoo, tmp_path: Path):
    # Where all tokens are routed about evenly, the kept mass is the same for all, and so its mean is exact.
    names = [tensor for tensor in tensor_files(zoo(name)) if is_router(tensor)]
    view = open_view(edited(zoo(name), tmp_path / "even", dict.fromkeys(names, times(0.01))))
    before = measured(view, tokens_for(view))
    plan = conducted(view, [COMPENSATE], tmp_path).plan
    after = measured(replace(view, plan=plan), tokens_for(view))
    for layer in view.source.moe_layers:
        left = plan.kept_experts(layer.index, layer.experts)
        whole = sum(before.of(layer.index, layer.experts, "gate"))
        swollen = sum(after.of(layer.index, len(left), "gate"))
        assert swollen > 1.25 * whole
        assert swollen * plan.routed_scale(layer.index) == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SWELLING])
def test_compensation_leaves_other_routers_alone_and_says_so(name: str, zoo: Zoo):
    view = open_view(zoo(name))
    decision = COMPENSATE.decide(measured(view, tokens_for(view)), view.source)
    assert {treatment.scale for treatment in decision.treatments.values()} == {1.0}
    assert any("renormalise=compensate changes nothing here" in note for note in decision.notes)


def test_a_sure_router_that_renormalises_is_not_taken_for_one_that_does_not(zoo: Zoo, tmp_path: Path):
    names = [name for name in tensor_files(zoo("mixtral")) if is_router(name)]
    sure = edited(zoo("mixtral"), tmp_path / "sure", dict.fromkeys(names, times(100)))
    view = open_view(sure)
    decision = COMPENSATE.decide(measured(view, tokens_for(view)), view.source)
    assert {treatment.scale for treatment in decision.treatments.values()} == {1.0}


def test_the_scale_is_folded_into_the_down_projections_alone(zoo: Zoo, tmp_path: Path):
    view = open_view(zoo("qwen2_moe"))
    decision = COMPENSATE.decide(measured(view, tokens_for(view)), view.source)
    plan = conducted(view, [COMPENSATE], tmp_path).plan
    scales = {unit.layer: treatment.scale for unit, treatment in decision.treatments.items()}
    for piece in replace(view, plan=plan).pieces:
        unit = piece.source.unit
        down = unit.part == "experts" and unit.matrix == "down"
        assert piece.scale == pytest.approx(scales[unit.layer] if down else 1.0, rel=1e-4)


# Two steps


def conducted(
    view: View, steps: Sequence[ExpertDrop], folder: Path, batches: Batches | None = None
) -> Decided:
    """Let the conductor decide, with its notes in a folder of its own."""
    work = Path(tempfile.mkdtemp(dir=folder))
    return decide(Job(view, work, batches or tokens_for(view)), steps)


FIRST = {"mixtral": 6, "deepseek_v2": 9, "granitemoe": 6}
SECOND = {"mixtral": 4, "deepseek_v2": 6, "granitemoe": 4}
staged = pytest.mark.parametrize("name", list(FIRST))


def kept_after(plan: Plan, view: View) -> dict[int, tuple[int, ...]]:
    return {layer.index: plan.kept_experts(layer.index, layer.experts) for layer in view.source.moe_layers}


def first_stage(plan: Plan) -> Plan:
    return replace(plan, stages=plan.stages[:1])


@staged
def test_without_rescoring_the_second_step_ranks_the_survivors_as_first_measured(
    name: str, zoo: Zoo, tmp_path: Path
):
    view = open_view(zoo(name))
    first = ExpertDrop(score="frequency", keep=FIRST[name])
    second = ExpertDrop(score="ean", keep=SECOND[name], rescore=False)
    done = conducted(view, [first, second], tmp_path)
    stats = measured(view, tokens_for(view))
    survivors = kept_by(first.decide(stats, view.source))
    assert kept_after(first_stage(done.plan), view) == survivors
    for layer in view.source.moe_layers:
        norms = stats.of(layer.index, layer.experts, "norm")
        share = SECOND[name] // layer.groups
        best = [expert for group in grouped(layer, survivors[layer.index])
                for expert in sorted(group, key=lambda expert: -norms[expert])[:share]]  # fmt: skip
        assert kept_after(done.plan, view)[layer.index] == tuple(sorted(best))
        for expert in survivors[layer.index]:
            assert done.scores[Unit(layer.index, "experts", expert)] == pytest.approx(norms[expert], rel=1e-4)
    assert len(done.stats) == 1, "two steps that share a measurement measured twice"


@staged
def test_with_rescoring_the_second_step_sees_the_pressed_model(name: str, zoo: Zoo, tmp_path: Path):
    view, batches = open_view(zoo(name)), tokens_for(open_view(zoo(name)))
    second = ExpertDrop(score="reap", keep=SECOND[name])
    done = conducted(view, [ExpertDrop(score="frequency", keep=FIRST[name]), second], tmp_path, batches)
    kept = kept_after(first_stage(done.plan), view)
    cut = cut_by_hand(reference(zoo(name)), {layer: list(ids) for layer, ids in kept.items()})
    cut.save_pretrained(tmp_path / "pressed")
    pressed = open_view(tmp_path / "pressed")
    again = conducted(pressed, [second], tmp_path, batches)
    in_source = {layer: tuple(kept[layer][position] for position in ids)
                 for layer, ids in kept_after(again.plan, pressed).items()}  # fmt: skip
    assert kept_after(done.plan, view) == in_source
    for layer, ids in kept.items():
        mine = [done.scores[Unit(layer, "experts", expert)] for expert in ids]
        theirs = [again.scores[Unit(layer, "experts", position)] for position in range(len(ids))]
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert len(done.stats) == 2


def test_a_protected_expert_of_a_second_step_is_named_as_in_the_source(zoo: Zoo, tmp_path: Path):
    down = "model.layers.1.block_sparse_moe.experts.6.w2.weight"
    view = open_view(edited(zoo("mixtral"), tmp_path / "planted", {down: times(1000)}))
    steps = [ExpertDrop(score="ean", keep=6), ExpertDrop(score="ean", keep=4)]
    done = conducted(view, steps, tmp_path)
    assert done.protected == {Unit(1, "experts", 6)}
    assert 6 in done.plan.kept_experts(1, 8)


# Stats that were measured for something else


@pytest.mark.parametrize(
    "step",
    [
        ExpertDrop(score="reap"),
        ExpertDrop(score="frequency"),
        ExpertDrop(score="reconstruction"),
        ExpertDrop(score="aimer", renormalise="compensate"),
    ],
    ids=lambda step: step.score,
)
def test_stats_without_what_a_score_needs_are_the_users_mistake(step: ExpertDrop, zoo: Zoo):
    view = open_view(zoo("mixtral"))
    with Tensors(view.checkpoint.folder) as reader:
        weights = Stats("key", view.source.digest, values=Weights().measure(view, reader, Silent()))
    with pytest.raises(UserError, match="measure again with a step that needs it"):
        step.decide(weights, view.source)
