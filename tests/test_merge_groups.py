"""Which experts are merged: are pairs measured, grouped and weighed as HC-SMoE, M-SMoE and REAM say?

The truth is a stock transformers model in float64, observed by hooks, with all its experts asked about all tokens. From
that the tables of pairs and the three ways to group are written out again in plain loops. More experts than the zoo has,
and experts that nobody asks, are made up.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import families
from conftest import tiny_tokenizer, write_model
from merged_by_hand import merge_by_hand, read_stage, routed_groups
from moespresso import api
from moespresso.build import View, open_view
from moespresso.core.blueprint import LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan, Treatment
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.data import Sampling, Source, calibration
from moespresso.methods import ExpertMerge
from test_scores import SIGMOID, Observed, edited, measured, observe, put, sketch, tokens_for

Zoo = Callable[[str], Path]
every_family = pytest.mark.parametrize("name", list(families.FAMILIES))
every_method = pytest.mark.parametrize("method", ["hc_smoe", "m_smoe", "ream"])
# Leader -> member -> share.
Groups = dict[int, dict[int, float]]
Tables = Mapping[str, Tensor]


@dataclass
class Known:
    """A family's stats as the product measures them, and by layer what the stock model says by hand."""

    view: View
    stats: Stats
    tables: dict[int, Tables]
    weights: dict[int, dict[str, list[float]]]


@pytest.fixture(scope="module")
def known(zoo: Zoo) -> Callable[[str], Known]:
    """`known(family)`, learnt when first asked for."""
    found: dict[str, Known] = {}

    def of(name: str) -> Known:
        if name not in found:
            found[name] = learn(zoo(name))
        return found[name]

    return of


def learn(folder: Path) -> Known:
    view = open_view(folder)
    text, model = tokens_for(view), families.reference(folder, torch.float64)
    known = Known(view, measured(view, text, "routing", "pairs"), {}, {})
    for layer, observed in observe(model, text).items():
        answers = answers_of(model, layer, observed.hidden)
        known.tables[layer] = tables_of(observed, answers, sigmoid=model.config.model_type in SIGMOID)
        known.weights[layer] = weights_of(observed, answers)
    return known


def answers_of(model: PreTrainedModel, layer: int, hidden: Tensor) -> Tensor:
    """What every expert answers to every token [T, E, H]: the stock module, asked for one expert at a time."""
    ask, ones = families.moe_blocks(model)[layer].experts, hidden.new_ones(len(hidden), 1)
    every = range(families.experts_of(model)[layer][0])
    with torch.no_grad():
        return torch.stack(
            [ask(hidden, torch.full((len(hidden), 1), expert), ones) for expert in every], dim=1
        )


def tables_of(observed: Observed, answers: Tensor, *, sigmoid: bool) -> Tables:
    """The four tables of pairs by their formulas, pair by pair."""
    scores = observed.logits.sigmoid() if sigmoid else observed.logits.softmax(-1)
    count = answers.shape[1]
    tables = {name: torch.zeros(count, count, dtype=torch.float64) for name in
              ("output_distance", "logit_cosine", "gated_cosine", "profile_cosine")}  # fmt: skip
    for i, j in itertools.product(range(count), repeat=2):
        tables["output_distance"][i, j] = (answers[:, i].mean(0) - answers[:, j].mean(0)).norm()
        tables["logit_cosine"][i, j] = cosine(observed.logits[:, i], observed.logits[:, j])
        gated = [answers[:, expert] * scores[:, expert, None] for expert in (i, j)]
        tables["gated_cosine"][i, j] = cosine(gated[0].flatten(), gated[1].flatten())
        tables["profile_cosine"][i, j] = cosine(scores[:, i], scores[:, j])
    return tables


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return one @ other / (one.norm() * other.norm())


def weights_of(observed: Observed, answers: Tensor) -> dict[str, list[float]]:
    """How often each expert is selected, and its REAP saliency: the mean of gate times norm over its tokens."""
    tokens, saliency = [], []
    for expert in range(answers.shape[1]):
        token, slot = torch.nonzero(observed.index == expert, as_tuple=True)
        tokens.append(float(len(token)))
        sums = (observed.gates[token, slot] * answers[token, expert].norm(dim=-1)).sum()
        saliency.append(float(sums) / max(len(token), 1))
    return {"tokens": tokens, "saliency": saliency}


# The three ways to group, in loops


def by_linkage(experts: Sequence[int], count: int, tables: Tables) -> list[set[int]]:
    """Join the two clusters with the least mean distance between their members, until there are few enough."""
    clusters = [{expert} for expert in experts]
    while len(clusters) > count:
        pairs = itertools.combinations(clusters, 2)
        one, other = min(pairs, key=lambda pair: float(
            sum(tables["output_distance"][i, j] for i, j in itertools.product(*pair)) / (len(pair[0]) * len(pair[1]))))  # fmt: skip
        clusters = [cluster for cluster in clusters if cluster not in (one, other)] + [one | other]
    return clusters


def by_leader(experts: Sequence[int], leaders: Sequence[int], tables: Tables) -> list[set[int]]:
    """Everybody joins the leader whose router logits are most like its own."""
    clusters = {leader: {leader} for leader in leaders}
    for expert in set(experts) - set(leaders):
        clusters[max(leaders, key=lambda leader: float(tables["logit_cosine"][expert, leader]))].add(expert)
    return list(clusters.values())


def by_turn(experts: Sequence[int], leaders: Sequence[int], tables: Tables, most: int) -> list[set[int]]:
    """The most salient leader fills its group of at most `most`, itself included, with those most like it, then the next
    of what is left; whatever nobody may take goes to the last."""
    alike = ((tables["gated_cosine"] + 1) / 2 + tables["profile_cosine"]) / 2
    left, clusters = set(experts) - set(leaders), []
    for leader in leaders:
        taken = sorted(left, key=lambda expert: -float(alike[expert, leader]))[: most - 1]
        clusters.append({leader, *taken})
        left -= set(taken)
    clusters[-1] |= left
    return clusters


def grouped(
    method: str, experts: Sequence[int], count: int, tables: Tables, weights: Sequence[float], most: int = 16
) -> Groups:
    """Groups of some experts, with shares by what each counts for."""
    leaders = sorted(experts, key=lambda expert: -weights[expert])[:count]
    clusters = {"hc_smoe": lambda: by_linkage(experts, count, tables),
                "m_smoe": lambda: by_leader(experts, leaders, tables),
                "ream": lambda: by_turn(experts, leaders, tables, most)}[method]()  # fmt: skip
    groups = {}
    for cluster in clusters:
        total = sum(weights[expert] for expert in cluster)
        shares = {expert: weights[expert] / total if total else 1 / len(cluster) for expert in cluster}
        groups[max(cluster, key=lambda expert: (weights[expert], -expert))] = shares
    return groups


def check(found: Mapping[Unit, Treatment], layer: int, groups: Groups, *, aligned: bool, mean: bool = False):
    """The treatments of a layer are these groups, and nothing else."""
    rows = {unit: treatment for unit, treatment in found.items() if unit.layer == layer}
    assert rows.pop(Unit(layer, "experts")) == Treatment(keep=tuple(sorted(groups)))
    if mean:
        assert rows.pop(Unit(layer, "router")) == Treatment(repair="mean")
    wanted = {member: leader for leader, shares in groups.items() if len(shares) > 1 for member in shares}
    assert {unit.expert: treatment.into for unit, treatment in rows.items()} == wanted
    for unit, treatment in rows.items():
        share = groups[wanted[unit.expert]][unit.expert]
        repair = "align" if aligned and treatment.into != unit.expert else None
        assert treatment == Treatment(into=treatment.into, share=treatment.share, repair=repair)
        assert treatment.share == pytest.approx(share, rel=1e-5)
    sums: dict[int, float] = dict.fromkeys(set(wanted.values()), 0.0)
    for treatment in rows.values():
        sums[treatment.into] += treatment.share
    assert all(total == pytest.approx(1, abs=1e-12) for total in sums.values())


# Against the stock model


@every_family
@pytest.mark.few(4)
def test_pairs_are_measured_by_their_formulas(name: str, known: Callable[[str], Known]):
    here = known(name)
    for layer in here.view.source.moe_layers:
        for table, wanted in here.tables[layer.index].items():
            found = [
                here.stats.of(layer.index, layer.experts, f"{table}@{other}")
                for other in range(layer.experts)
            ]
            torch.testing.assert_close(
                torch.tensor(found, dtype=torch.float64).T, wanted, rtol=1e-5, atol=1e-6
            )
        for column, weight in (("tokens", "tokens"), ("gate_norm", "saliency")):
            sums = here.stats.of(layer.index, layer.experts, column)
            counts = [1.0] * layer.experts if column == "tokens" else here.weights[layer.index]["tokens"]
            means = [total / max(number, 1) for total, number in zip(sums, counts, strict=True)]
            assert means == pytest.approx(here.weights[layer.index][weight], rel=1e-5)


@every_family
@every_method
def test_groups_are_those_of_the_formulas(name: str, method: Any, known: Callable[[str], Known]):
    here = known(name)
    groups = here.view.source.moe_layers[0].groups
    most = min(layer.experts for layer in here.view.source.moe_layers)
    keep = max(-(-most // 2 // groups) * groups, max(layer.floor for layer in here.view.source.moe_layers))
    decision = ExpertMerge(keep=keep, method=method, group=2).decide(here.stats, here.view.source)
    for layer in here.view.source.moe_layers:
        weights = here.weights[layer.index]["saliency" if method == "ream" else "tokens"]
        size, expected = layer.experts // layer.groups, {}
        for first in range(0, layer.experts, size):
            experts = range(first, first + size)
            expected |= grouped(method, experts, keep // groups, here.tables[layer.index], weights, 2)
        assert len(expected) == keep
        check(decision.treatments, layer.index, expected, aligned=method != "hc_smoe")
        assert {unit.expert: score for unit, score in decision.scores.items() if unit.layer == layer.index} == (
            pytest.approx(dict(enumerate(weights)), rel=1e-5)
        )  # fmt: skip


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"])
@every_method
def test_groups_of_a_router_stay_of_one_size_and_keep_to_themselves(
    name: str, method: Any, known: Callable[[str], Known]
):
    here = known(name)
    (layer, *_) = here.view.source.moe_layers
    size, keep = layer.experts // layer.groups, layer.experts - layer.groups
    found = ExpertMerge(keep=keep, method=method).decide(here.stats, here.view.source).treatments
    kept = found[Unit(layer.index, "experts")].keep or ()
    assert [expert // size for expert in kept] == sorted(list(range(layer.groups)) * (keep // layer.groups))
    members = {unit.expert: row.into for unit, row in found.items() if row.into is not None}
    assert members
    assert all(member // size == leader // size for member, leader in members.items())


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("method", ["ream", "hc_smoe"])
@pytest.mark.few(1)
def test_in_sequence_each_layer_is_decided_on_what_the_merged_ones_before_it_let_through(
    name: str, method: Any, text: Path, tmp_path: Path
):
    source = write_model(name, tmp_path / "source", dtype=torch.float32)
    (layer, *_) = open_view(source).source.moe_layers
    keep = layer.floor + layer.groups
    api.press(source, out=tmp_path / "out", texts=[text], samples=6, length=32,
              steps=[f"expert_merge:keep={keep},method={method},sequential=true,align=true"])  # fmt: skip
    plan = json.loads((tmp_path / "out" / "moespresso.json").read_text())["plan"]
    merges = read_stage(plan["stages"][0])
    text_rows = calibration([Source(str(text))], tiny_tokenizer(), Sampling(6, 32))
    for index, merge in merges.items():
        earlier = {number: other for number, other in merges.items() if number < index}
        model = merge_by_hand(families.reference(source), earlier).double()
        observed = observe(model, text_rows)[index]
        answers = answers_of(model, index, observed.hidden)
        weights = weights_of(observed, answers)["saliency" if method == "ream" else "tokens"]
        tables = tables_of(observed, answers, sigmoid=False)
        expected: Groups = {}
        for experts in routed_groups(model, index):
            expected |= grouped(method, experts, keep // layer.groups, tables, weights)
        assert merge.keep == sorted(expected)
        joined = {leader: shares for leader, shares in expected.items() if len(shares) > 1}
        assert merge.groups.keys() == joined.keys()
        for leader, shares in joined.items():
            assert merge.groups[leader] == pytest.approx(shares, rel=1e-4)


# Made up


def made_up(
    experts: int, seed: int, *, silent: Sequence[int] = ()
) -> tuple[Stats, Tables, dict[str, list[float]]]:
    """Stats of one layer: random answers and logits, and the tables and weights that follow."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randn(30, experts, 5, generator=generator, dtype=torch.float64)
    logits = torch.randn(30, experts, generator=generator, dtype=torch.float64)
    tables = tables_of(Observed(answers, logits, logits, logits, logits, logits), answers, sigmoid=False)
    tokens = [0.0 if expert in silent else float(row) for expert, row in
              enumerate(torch.randperm(experts, generator=generator) + 1)]  # fmt: skip
    norms = [0.0 if expert in silent else float(row) for expert, row in
             enumerate(100 * torch.rand(experts, generator=generator))]  # fmt: skip
    rows = {Unit(0, "experts", expert): {
        "tokens": tokens[expert], "gate_norm": norms[expert],
        **{f"{name}@{other}": float(table[expert, other]) for name, table in tables.items() for other in range(experts)},
    } for expert in range(experts)}  # fmt: skip
    saliency = [norm / count if count else 0.0 for norm, count in zip(norms, tokens, strict=True)]
    return Stats("key", "x", 30, rows), tables, {"tokens": tokens, "saliency": saliency}


@pytest.mark.parametrize(
    ("experts", "groups", "keep", "most"), [(40, 1, 7, 16), (40, 1, 30, 16), (48, 4, 12, 3), (24, 2, 4, 2)]
)
@every_method
@pytest.mark.few(5)
def test_groups_of_many_experts(method: Any, experts: int, groups: int, keep: int, most: int):
    """The last two leave REAM's leaders with more than they may take."""
    stats, tables, weights = made_up(experts, seed=experts + keep)
    blueprint = sketch(LayerSpec(0, "attention", experts, top_k=2, groups=groups, floor=groups))
    step = ExpertMerge(keep=keep, method=method, group=most, router="mean", align=False)
    size, expected = experts // groups, {}
    for first in range(0, experts, size):
        of_method = weights["saliency" if method == "ream" else "tokens"]
        expected |= grouped(method, range(first, first + size), keep // groups, tables, of_method, most)
    check(step.decide(stats, blueprint).treatments, 0, expected, aligned=False, mean=True)


def test_most_leaders_of_ream_stay_alone():
    """What the paper calls pseudo-pruning: 10 of 40 experts go, and the most salient leader takes all of them."""
    stats, _, weights = made_up(40, seed=1)
    step = ExpertMerge(keep=30, method="ream")
    found = step.decide(stats, sketch(LayerSpec(0, "attention", 40, top_k=2, floor=2))).treatments
    first = max(range(40), key=lambda expert: weights["saliency"][expert])
    assert {row.into for row in found.values() if row.into is not None} == {first}
    assert sum(row.into is not None for row in found.values()) == 11


@every_method
def test_who_is_never_selected_has_no_share(method: Any):
    """It leads nobody while others can, adds nothing to an average, and where nobody of a group is selected all of them
    count the same."""
    silent = [0, 3, 4, 5, 6, 7]
    stats, _, _ = made_up(8, seed=3, silent=silent)
    blueprint = sketch(LayerSpec(0, "attention", 8, top_k=1, groups=2, floor=2))
    found = ExpertMerge(keep=2, method=method).decide(stats, blueprint).treatments
    leader, other = found[Unit(0, "experts")].keep or ()
    assert leader in (1, 2)
    shares = {unit.expert: row.share for unit, row in found.items() if row.into == leader}
    assert shares[0] == shares[3] == 0
    assert shares[1] + shares[2] == 1
    assert {unit.expert: row.share for unit, row in found.items() if row.into == other} == dict.fromkeys(
        range(4, 8), 0.25
    )


def test_an_expert_that_no_token_reaches_leaves_its_leader_as_it_is(zoo: Zoo, text: Path, tmp_path: Path):
    """Expert 5 of layer 2 is never chosen, so what it merges into is not changed by it."""
    source = edited(zoo("gpt_oss"), tmp_path / "source", {"model.layers.2.mlp.router.bias": put(5, -1e4)})
    api.press(source, out=tmp_path / "out", texts=[text], samples=4, length=32,
              steps=["expert_merge:keep=7,method=m_smoe"])  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "moespresso.json").read_text())
    (stage,) = Plan.from_json(json.dumps(manifest["plan"])).stages
    gone = stage.treatments[Unit(2, "experts", 5)]
    assert gone.share == 0
    kept = stage.treatments[Unit(2, "experts")].keep or ()
    for expert in kept:
        before = families.expert_on_disk("gpt_oss", source, 2, expert)
        after = families.expert_on_disk("gpt_oss", tmp_path / "out", 2, kept.index(expert))
        assert all(torch.equal(after[part], tensor) for part, tensor in before.items())


# Settings


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep": 4, "ratio": 0.5}, "give keep or ratio, not both"),
        ({"ratio": 1.0}, r"ratio=1.0 is the share removed and must be in \[0, 1\)"),
        ({"group": 0}, "group=0 must be at least 2, a leader and one more"),
        ({"keep": 9}, "keep=9 in L0 is more than the 8 experts there are"),
        ({"keep": 2}, r"keep=2 in L0 is under 4, the fewest its router \(top_k=2\) works with"),
        ({"keep": 5}, "keep=5 in L0 does not divide into 2 router groups: keep 4 or 6"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(options: dict[str, Any], sentence: str):
    blueprint = sketch(LayerSpec(0, "attention", 8, top_k=2, groups=2, floor=4))
    with pytest.raises(UserError, match=f"^expert_merge: {sentence}$"):
        ExpertMerge(**options).check(blueprint)


def test_dense_models_have_nothing_to_merge():
    with pytest.raises(UserError, match=r"expert_merge needs routed experts, but made-up \(made\) is dense"):
        ExpertMerge().check(sketch(LayerSpec(0, "attention")))


def test_a_quarter_goes_when_nothing_is_said_and_an_outline_is_as_large_as_the_decision():
    stats, _, _ = made_up(12, seed=5)
    blueprint = sketch(LayerSpec(0, "attention", 12, top_k=2, groups=3, floor=6))
    for options, count in (({}, 9), ({"ratio": 0.5}, 6), ({"keep": 12}, 12)):
        step = ExpertMerge(**options)
        assert len(step.decide(stats, blueprint).treatments[Unit(0, "experts")].keep or ()) == count
        assert len(step.outline(blueprint, Plan("x")).treatments[Unit(0, "experts")].keep or ()) == count
    assert [step.keep for step in ExpertMerge().amounts(blueprint)] == [12, 9, 6]
