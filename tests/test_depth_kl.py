"""How layers and blocks are chosen: cosines, runs of blocks, and true KL with swaps.

Cosines are taken again from stock models observed by hooks, KL from stock models in which every candidate was really
silenced. That many candidates share their work must not show in any of their hidden states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import families
from conftest import Zoo, tiny_tokenizer
from depth_by_hand import Cut, mean_cosine, observe, parts, silenced, token_kl
from moespresso import api
from moespresso.build import Tensors, View, open_view
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.method import Candidate
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.data import Batches, Sampling, Source, calibration
from moespresso.effect import validated
from moespresso.fit import Job, Judge
from moespresso.methods import BlockDrop, LayerDrop
from moespresso.methods._depth import greedy
from moespresso.model import MetaModel, PausedBatch
from moespresso.quality import token_kl as kl_of_states
from moespresso.run import Decided, decide
from moespresso.statistics import runs as runs_statistic
from moespresso.stream import Variant, sweep, sweep_variants
from test_engine import close
from test_more_families import DENSE, MIXTURES, _random_model
from test_scores import measured, tokens_for

SAMPLES, LENGTH = 8, 24
SCORED = ["mixtral", "qwen2_moe", "deepseek_v2", "granitemoe", "jamba", "gpt_oss"]
scored = pytest.mark.parametrize("family", SCORED)
A, B, C = (Unit(layer, "experts") for layer in range(3))


def settled(view: View, *steps: Any, batches: Batches, folder: Path) -> Decided:
    """What the conductor decides, with its notes in a folder."""
    return decide(Job(view, folder, batches), steps)


def gone(plan: Plan, stage: int = -1) -> list[str]:
    return [str(unit) for unit, what in sorted(plan.stages[stage].treatments.items()) if what.drop]


# Cosines


@scored
def test_every_cosine_is_its_formula_and_padding_has_no_part_in_it(family: str, zoo: Zoo):
    view = open_view(zoo(family))
    batches = tokens_for(view, short=(11, 12))
    values = measured(view, batches, "similarity").values
    observed = observe(families.reference(zoo(family), torch.float64), batches.ids, batches.mask)
    assert len(observed[0].before) == 3 * 16 - 5 - 4
    for layer, said in zip(view.source.layers, observed, strict=True):
        attention, feed = layer.unit("attention"), layer.unit("mlp")
        assert feed.part == ("experts" if layer.experts else "dense")
        assert values[Unit(layer.index)]["cosine"] == pytest.approx(
            mean_cosine(said.before, said.after), abs=1e-7
        )
        assert values[attention]["cosine"] == pytest.approx(mean_cosine(said.before, said.middle), abs=1e-7)
        assert values[feed]["cosine"] == pytest.approx(mean_cosine(said.middle, said.after), abs=1e-7)
        assert values[feed]["cosine_moe"] == pytest.approx(mean_cosine(said.fed, said.answer), abs=1e-7)
    multiplier = getattr(view.checkpoint.config, "residual_multiplier", 1)
    assert multiplier == 1 or family == "granitemoe"


@scored
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.few(5)
def test_a_run_is_measured_across_exactly_its_blocks(family: str, length: int, zoo: Zoo):
    view = open_view(zoo(family))
    batches = tokens_for(view, short=(11, 12))
    values = measured(view, batches, f"run@{length}").values
    observed = observe(families.reference(zoo(family), torch.float64), batches.ids, batches.mask)
    runs = {first: mean_cosine(observed[first].before, observed[first + length - 1].after)
            for first in range(len(observed) - length + 1)}  # fmt: skip
    assert values.keys() == {Unit(first) for first in runs}
    for first, wanted in runs.items():
        assert values[Unit(first)][f"run@{length}"] == pytest.approx(wanted, abs=1e-7)


def test_a_run_on_a_sample_of_tokens_is_near_the_whole(zoo: Zoo, monkeypatch: pytest.MonkeyPatch):
    view = open_view(zoo("mixtral"))
    batches = tokens_for(view, 12, 30, short=(7,))
    whole = measured(view, batches, "run@2").values[Unit(0)]["run@2"]
    monkeypatch.setattr(runs_statistic, "RUN_BYTES", 8 * 48 * 3 * 150)
    sample = measured(view, batches, "run@2").values[Unit(0)]["run@2"]
    assert sample != whole
    assert sample == pytest.approx(whole, abs=0.05)


@pytest.mark.parametrize(
    ("step", "cut"),
    [
        ("layer_drop:drop=2", lambda observed: (observed.middle, observed.after)),
        ("layer_drop:drop=2,score=cosine_moe", lambda observed: (observed.fed, observed.answer)),
        ("layer_drop:drop=2,part=attention", lambda observed: (observed.before, observed.middle)),
        ("block_drop:drop=2", lambda observed: (observed.before, observed.after)),
    ],
)
@pytest.mark.few(2)
def test_the_most_similar_go(step: str, cut: Callable[..., Any], zoo: Zoo, text: Path):
    """On real text, through the front door."""
    plan = api.plan(
        zoo("gpt_oss"), steps=[step], texts=[text], samples=SAMPLES, length=LENGTH, target="plugin"
    )
    observed = observe(families.reference(zoo("gpt_oss")), rows_of(text).ids)
    cosines = [mean_cosine(*cut(layer)) for layer in observed]
    best = sorted(sorted(range(4), key=lambda layer: -cosines[layer])[:2])
    part = {"layer_drop:drop=2,part=attention": ".attention", "block_drop:drop=2": ""}.get(step, ".experts")
    assert gone(plan) == [f"L{layer}{part}" for layer in best]


def test_the_most_similar_run_goes(zoo: Zoo, text: Path):
    step = "block_drop:drop=2,contiguous=true"
    plan = api.plan(zoo("gpt_oss"), steps=[step], texts=[text], samples=SAMPLES, length=LENGTH)
    observed = observe(families.reference(zoo("gpt_oss")), rows_of(text).ids)
    runs = [mean_cosine(observed[first].before, observed[first + 1].after) for first in range(3)]
    first = max(range(3), key=lambda place: runs[place])
    assert gone(plan) == [f"L{first}", f"L{first + 1}"]


def test_of_equals_the_deeper_goes_and_is_named(zoo: Zoo):
    blueprint = open_view(zoo("mixtral")).source
    values = {Unit(layer, "experts"): {"cosine": value} for layer, value in enumerate([0.5, 0.9, 0.9])}
    decision = LayerDrop(drop=1).decide(Stats("", "", values=values), blueprint)
    assert list(decision.treatments) == [C]
    (note,) = decision.notes
    assert note == "L1.experts is exactly as similar as L2.experts, which goes: the deeper one was taken"
    assert LayerDrop(drop=2).decide(Stats("", "", values=values), blueprint).notes == ()
    runs = {Unit(first): {"run@2": 0.7} for first in range(2)}
    decision = BlockDrop(drop=2, contiguous=True).decide(Stats("", "", values=runs), blueprint)
    assert sorted(decision.treatments) == [Unit(1), Unit(2)]
    assert "L0 is exactly as similar as L1" in decision.notes[0]


def test_dense_parts_go_where_there_are_no_experts_and_never_beside_them(
    zoo: Zoo, tmp_path: Path, text: Path
):
    dense = other_folder("llama", tmp_path)
    options: Any = {"texts": [text], "samples": SAMPLES, "length": LENGTH, "target": "plugin"}
    plan = api.plan(dense, steps=["layer_drop:drop=1"], **options)
    observed = observe(families.reference(dense), rows_of(text).ids)
    cosines = [mean_cosine(layer.middle, layer.after) for layer in observed]
    assert gone(plan) == [f"L{max(range(3), key=lambda layer: cosines[layer])}.dense"]
    plan = api.plan(zoo("deepseek_v3"), steps=["layer_drop:drop=2"], **options)
    assert gone(plan) == ["L2.experts", "L3.experts"]


def other_folder(family: str, folder: Path) -> Path:
    """A checkpoint of a family that is not in the zoo, with a tokenizer."""
    _random_model(family, {**MIXTURES, **DENSE}[family]).save_pretrained(folder / family)
    tiny_tokenizer().save_pretrained(folder / family)
    return folder / family


def rows_of(text: Path) -> Batches:
    """The rows that a run with this text calibrates on."""
    return calibration([Source(str(text))], tiny_tokenizer(), Sampling(SAMPLES, LENGTH))


# True KL


def by_brute_force(
    model: PreTrainedModel, candidates: Sequence[Cut], count: int, batches: Batches
) -> tuple[list[Cut], float]:
    """Greedy, then one pass of swaps, each candidate evaluated on a stock model that really lacks it."""

    def loss(cuts: Sequence[Cut]) -> float:
        return token_kl(model, silenced(model, *cuts), batches.ids, batches.mask)

    chosen: list[Cut] = []
    for _ in range(count):
        chosen.append(min(set(candidates) - {*chosen}, key=lambda cut: loss([*chosen, cut])))
    for place in range(count if count > 1 else 0):
        others = chosen[:place] + chosen[place + 1 :]
        best = min(set(candidates) - {*chosen}, key=lambda cut: loss([*others, cut]))
        if loss([*others, best]) < loss(chosen):
            chosen[place] = best
    return chosen, loss(chosen)


@pytest.mark.parametrize(
    ("family", "step", "candidates"),
    [
        ("gpt_oss", LayerDrop(drop=2, score="kl", rows=2), [(layer, "mlp") for layer in range(4)]),
        ("gpt_oss", LayerDrop(drop=2, score="kl", part="attention", rows=3),
         [(layer, "attention") for layer in range(4)]),
        ("qwen2_moe", LayerDrop(drop=1, score="kl"), [(layer, "mlp") for layer in (0, 2, 3)]),
        ("jamba", LayerDrop(drop=1, score="kl", part="attention"), [(1, "attention"), (4, "attention")]),
        ("qwen2_moe", BlockDrop(drop=2, score="kl"), [(layer, "block") for layer in range(4)]),
        ("granitemoe", BlockDrop(drop=2, score="kl"), [(layer, "block") for layer in range(3)]),
    ],
)  # fmt: skip
@pytest.mark.few(2)
def test_kl_chooses_what_trying_everything_chooses(
    family: str, step: Any, candidates: list[Cut], zoo: Zoo, tmp_path: Path
):
    view = open_view(zoo(family))
    batches = tokens_for(view, 4, 15, short=(9,))
    done = settled(view, step, batches=batches, folder=tmp_path)
    few = Batches(batches.ids[: step.rows], batches.mask[: step.rows], {})
    chosen, loss = by_brute_force(families.reference(zoo(family)), candidates, step.drop, few)
    names = {"mlp": ".experts", "attention": ".attention", "block": ""}
    assert gone(done.plan) == sorted(f"L{layer}{names[what]}" for layer, what in chosen)
    assert min(abs(score - loss) for score in done.scores.values()) < 1e-5
    assert done.stats == []


def test_kl_tries_every_run_of_neighbours(zoo: Zoo, tmp_path: Path):
    view = open_view(zoo("gpt_oss"))
    batches = tokens_for(view, 2, 15)
    step = BlockDrop(drop=2, score="kl", contiguous=True)
    done = settled(view, step, batches=batches, folder=tmp_path)
    model = families.reference(zoo("gpt_oss"))
    losses = [
        token_kl(model, silenced(model, (first, "block"), (first + 1, "block")), batches.ids, batches.mask)
        for first in range(3)
    ]
    first = min(range(3), key=lambda place: losses[place])
    assert gone(done.plan) == [f"L{first}", f"L{first + 1}"]
    assert [done.scores[Unit(place)] for place in range(3)] == pytest.approx(losses, rel=1e-3)


def test_kl_is_against_the_original_after_an_earlier_step(zoo: Zoo, tmp_path: Path):
    view = open_view(zoo("gpt_oss"))
    batches = tokens_for(view, 2, 15)
    steps = BlockDrop(drop=1), LayerDrop(drop=1, score="kl")
    done = settled(view, *steps, batches=batches, folder=tmp_path)
    first = int(gone(done.plan, 0)[0][1:])
    model = families.reference(zoo("gpt_oss"))
    losses = {layer: token_kl(model, silenced(model, (first, "block"), (layer, "mlp")), batches.ids, batches.mask)
              for layer in range(4) if layer != first}  # fmt: skip
    best = min(losses, key=lambda layer: losses[layer])
    assert gone(done.plan) == [f"L{best}.experts"]
    assert done.scores[Unit(best, "experts")] == pytest.approx(losses[best], rel=1e-3)


def fake_judge(
    losses: Mapping[str, float], asked: list[list[str]] | None = None
) -> Callable[..., list[float]]:
    """A judge that has an opinion on every set of the candidates A, B and C."""
    letters = dict(enumerate("ABC"))

    def judge(candidates: Sequence[Candidate]) -> list[float]:
        names = ["".join(sorted(letters[unit.layer or 0] for unit in each)) for each in candidates]
        if asked is not None:
            asked.append(names)
        return [losses[name] for name in names]

    return judge


CANDIDATES = {unit: {unit: Treatment(drop=True)} for unit in (A, B, C)}


def test_the_pass_of_swaps_finds_the_pair_that_greedy_misses():
    """A alone costs least, but B and C together cost next to nothing."""
    losses = {"A": 1.0, "B": 2.0, "C": 3.0, "AB": 9.0, "AC": 10.0, "BC": 0.5}
    asked: list[list[str]] = []
    chosen, notes = greedy(CANDIDATES, 2, fake_judge(losses, asked))
    assert sorted(chosen) == [B, C]
    assert notes == ["L2.experts in the place of L0.experts lowers the KL from 9 to 0.5"]
    assert asked == [["A", "B", "C"], ["AB", "AC"], ["BC"], ["AC"]]
    assert chosen[C] == 0.5


def test_without_a_better_pair_nothing_is_swapped():
    losses = {"A": 1.0, "B": 2.0, "C": 3.0, "AB": 4.0, "AC": 5.0, "BC": 4.0}
    assert greedy(CANDIDATES, 2, fake_judge(losses)) == ({A: 1.0, B: 4.0}, [])
    assert greedy(CANDIDATES, 1, fake_judge(losses)) == ({A: 1.0}, [])
    everything = {**losses, "ABC": 7.0}
    assert greedy(CANDIDATES, 3, fake_judge(everything)) == ({A: 1.0, B: 4.0, C: 7.0}, [])


# Many candidates at once


VARIANTS: list[frozenset[tuple[int, Any]]] = [
    frozenset(),
    frozenset({(1, "mlp")}),
    frozenset({(1, "mlp"), (2, "attention")}),
    frozenset({(0, "attention"), (0, "mlp")}),
    frozenset({(2, "attention"), (2, "mlp"), (1, "attention")}),
    frozenset({(2, "mlp")}),
]


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "granitemoe", "jamba", "gpt_oss", "nemotron_h", "gemma2"]
)
@pytest.mark.few(2)
def test_hidden_states_of_candidates_are_those_of_views_with_the_plan(family: str, zoo: Zoo, tmp_path: Path):
    folder = zoo(family) if family in families.FAMILIES else other_folder(family, tmp_path)
    view = open_view(folder)
    ids = families.random_ids(families.reference(folder).config, 3, 13)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 8:] = False
    specs = view.source.layers
    asked = [frozenset(at for at in cuts if at[1] in specs[at[0]].bodies) for cuts in VARIANTS]
    with (
        Tensors(folder) as reader,
        sweep_variants(meta_of(view, reader), (ids, mask), list(map(Variant, asked))) as found,
    ):
        for cuts, hidden in zip(asked, map(torch.cat, found), strict=True):
            treatments = {specs[layer].unit(branch): Treatment(drop=True) for layer, branch in cuts}
            plan = validated(Plan(view.source.digest, (Stage({"kind": "by hand"}, treatments),)), view.source)
            wanted = sweep(meta_of(replace(view, plan=plan), reader), ids, mask)
            close(hidden[mask], wanted[mask])


def meta_of(view: View, reader: Tensors) -> MetaModel:
    return view.meta_model(reader, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("spilled", [False, True])
def test_a_round_loads_each_layer_once_and_runs_equal_beginnings_once(
    spilled: bool, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loads: Counter[int] = Counter()
    runs: Counter[int] = Counter()
    load, run = MetaModel.layer, PausedBatch.run

    def layer(self: MetaModel, index: int) -> Any:
        loads[index] += 1
        return load(self, index)

    def counted(self: PausedBatch, module: torch.nn.Module, hidden: Tensor | None = None) -> Tensor:
        runs[len(loads) - 1] += 1
        return run(self, module, hidden)

    monkeypatch.setattr(MetaModel, "layer", layer)
    monkeypatch.setattr(PausedBatch, "run", counted)
    view = open_view(zoo("gpt_oss"))
    ids = families.random_ids(families.FAMILIES["gpt_oss"].config(), 2, 9)
    mask = torch.ones_like(ids, dtype=torch.bool)
    for what in ("mlp", "attention", "block"):
        loads.clear(), runs.clear()
        candidates = [Variant(frozenset(parts((layer, what)))) for layer in range(4)]
        spill = tmp_path if spilled else None
        with (
            Tensors(zoo("gpt_oss")) as reader,
            sweep_variants(meta_of(view, reader), (ids, mask), candidates, spill=spill),
        ):
            assert len(list(tmp_path.iterdir())) == spilled
        assert not list(tmp_path.iterdir())
        assert loads == dict.fromkeys(range(4), 1)
        # Behind layer l: those that have lost something up to it, and one for all others; a block that goes needs none.
        beginnings = {layer: layer + 1 + (layer < 3) - (what == "block") for layer in range(4)}
        assert runs == beginnings


def test_plans_of_any_kind_are_judged_at_once(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Experts, bits, branches and mixtures of them: each loss is that of the model the plan makes, run by itself."""
    view = open_view(zoo("mixtral"))
    batches = tokens_for(view, 3, 13)
    keep, four = Treatment(keep=(0, 1, 2, 3, 5)), Treatment(format=Format("integer", 4, 8))
    drop, rtn = {"kind": "expert_drop"}, {"kind": "rtn", "group_size": 8}
    stages = [
        [],
        [Stage(drop, {Unit(1, "experts"): keep})],
        [Stage(drop, {Unit(1, "experts"): keep, Unit(2, "experts"): keep})],
        [Stage(rtn, {Unit(0, "experts"): four})],
        [Stage(drop, {Unit(1, "experts"): keep}), Stage(rtn, {Unit(1, "experts"): four})],
        [Stage({"kind": "layer_drop"}, {Unit(1, "attention"): Treatment(drop=True)}), Stage(rtn, {Unit(1, "experts"): four})],
        [Stage({"kind": "block_drop"}, {Unit(2): Treatment(drop=True)}), Stage(drop, {Unit(1, "experts"): keep})],
    ]  # fmt: skip
    plans = [validated(Plan(view.source.digest, tuple(each)), view.source) for each in stages]
    loads: Counter[int] = Counter()
    load = MetaModel.layer

    def layer(self: MetaModel, index: int) -> Any:
        loads[index] += 1
        return load(self, index)

    with Judge.of(Job(view, tmp_path, batches), view, 3) as judge:
        monkeypatch.setattr(MetaModel, "layer", layer)
        losses = judge(plans)
        monkeypatch.undo()
        # Once as it is, and once in each of its forms: L1 fewer experts, 4 bits, and both.
        assert loads == {0: 2, 1: 4, 2: 2}
        for plan, loss in zip(plans, losses, strict=True):
            alone = replace(view, plan=plan)
            meta = meta_of(alone, judge.tensors)
            hidden = sweep(meta, batches.ids, batches.mask)
            (wanted,) = kl_of_states([meta, judge.source], [[hidden]], judge.truth, batches.mask)
            assert loss == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    assert losses[0] == pytest.approx(0, abs=1e-9)
    assert min(losses[1:]) > 0


def test_a_plan_that_would_be_judged_in_part_is_refused(zoo: Zoo, tmp_path: Path):
    view = open_view(zoo("mixtral"))
    four, whole = Treatment(format=Format("integer", 4, 8)), Unit(1, "experts")
    asked = {
        "gptq needs values": Stage({"kind": "gptq", "group_size": 8}, {whole: four}),
        "channel_prune needs values": Stage({"kind": "channel_prune"}, {whole: Treatment(channels=8)}),
        "layer_drop needs values": Stage(
            {"kind": "layer_drop"}, {whole: Treatment(drop=True, repair="linear")}
        ),
        "not to the head": Stage({"kind": "rtn", "group_size": 8}, {Unit(None, "head"): four}),
    }
    with Judge.of(Job(view, tmp_path, tokens_for(view, 2, 9)), view, 2) as judge:
        for words, stage in asked.items():
            with pytest.raises(UserError, match=words):
                judge([Plan(view.source.digest), Plan(view.source.digest, (stage,))])
