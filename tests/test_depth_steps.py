"""Layer Drop, attention drop and Block Drop as steps: alone, together, in any order, and again.

What is written must compute what the stock model computes in which the same branches were silenced by hand, must weigh
what the plan said it would, and must be read again as any other checkpoint: in the form that stock transformers loads,
in the one that needs moespresso, and under another family's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import PreTrainedModel

import families
from conftest import Zoo, tiny_tokenizer
from depth_by_hand import Cut, body, mean_cosine, observe, silenced
from moespresso import api
from moespresso.build import View, open_view
from moespresso.core.errors import UserError
from moespresso.core.method import Selects
from moespresso.core.plan import Decision, Plan, Stage, Treatment
from moespresso.core.unit import Unit
from moespresso.effect import price
from moespresso.fit import Job
from moespresso.methods import ExpertDrop
from moespresso.run import decide
from test_depth_kl import LENGTH, SAMPLES, gone, other_folder, rows_of
from test_engine import close, streamed_logits
from test_resume import contents, same

GONE = Treatment(drop=True)
OPTIONS: dict[str, Any] = {"samples": SAMPLES, "length": LENGTH}


def by_hand(folder: Path, out: Path, *stages: Mapping[str, Treatment], target: Any = "plugin") -> Path:
    """What a plan by hand makes of a checkpoint."""
    made = tuple(
        Stage({"kind": "by hand"}, {Unit.parse(unit): what for unit, what in stage.items()})
        for stage in stages
    )
    Plan(open_view(folder).source.digest, made).save(out.with_suffix(".json"))
    api.build(folder, plan=out.with_suffix(".json"), out=out, target=target)
    return out


def plan_of(out: Path) -> Plan:
    return Plan.from_json(json.dumps(json.loads((out / "moespresso.json").read_text())["plan"]))


# Files that say how a folder came about.
TOLD = {"moespresso.json", "README.md"}


def weights_and_config(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name not in TOLD}


def cuts_of(units: list[str]) -> list[Cut]:
    """`L1.experts` in the words of depth_by_hand."""
    words = {"": "block", "experts": "mlp", "dense": "mlp", "attention": "attention"}
    return [(int(layer[1:]), words[part]) for layer, _, part in (unit.partition(".") for unit in units)]


def agree(out: Path, wanted: PreTrainedModel) -> None:
    """A folder, loaded by transformers with every key in its place, computes what `wanted` does."""
    ids = families.random_ids(wanted.config, 3, 17)
    close(families.logits_of(families.reference(out), ids), families.logits_of(wanted, ids))


# Every family


def first_moe_and_last_attention(view: View) -> list[str]:
    attention = [layer.index for layer in view.source.layers if layer.mixer == "attention"]
    return [f"L{view.source.moe_layers[0].index}.experts", f"L{attention[-1]}.attention"]


@pytest.mark.parametrize("what", ["parts", "block"])
@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.few(2)
def test_every_family_without_parts_or_a_block_is_the_model_silenced_by_hand(
    family: str, what: str, zoo: Zoo, tmp_path: Path
):
    view = open_view(zoo(family))
    units = first_moe_and_last_attention(view) if what == "parts" else [f"L{len(view.source.layers) - 2}"]
    target = "plugin" if what == "parts" else "transformers"
    out = by_hand(zoo(family), tmp_path / "out", dict.fromkeys(units, GONE), target=target)
    agree(out, silenced(families.reference(zoo(family)), *cuts_of(units)))
    found = api.verify(out, against=zoo(family))
    assert found["ok"], found
    priced, stored = price(plan_of(out), view.source), load_file(out / "model.safetensors")
    assert priced.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert priced == open_view(out).source.cost()
    without_attention = family == "jamba" and what == "block"
    assert without_attention or priced.kv_bytes_per_token < view.source.cost().kv_bytes_per_token
    assert ("per_layer_config" in json.loads((out / "config.json").read_text())) == (what == "parts")


STOCK = {
    "mixtral": ("mixtral", {}, "qwen2_moe", 8),
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": []}, "qwen2_moe", 8),
    "qwen2_moe, dense layer": ("qwen2_moe", {}, "qwen2_moe", 56),
    "qwen3_moe": ("qwen3_moe", {}, "qwen3_moe", 72),
    "qwen3_moe, no dense layer": ("qwen3_moe", {"decoder_sparse_step": 1}, "qwen3_moe", 8),
    "deepseek_v3": ("deepseek_v3", {}, "glm4_moe_lite", 64),
    "jamba": ("jamba", {}, "jamba", 40),
}  # fmt: skip


@pytest.mark.parametrize("case", STOCK)
@pytest.mark.few(1)
def test_where_stock_can_say_so_a_layer_without_a_mixture_is_a_dense_one_of_zeros(
    case: str, text: Path, tmp_path: Path
):
    family, changes, equivalent, width = STOCK[case]
    source = lively(family, tmp_path / "source", **changes)
    report = api.press(source, out=tmp_path / "out", texts=[text], steps=["layer_drop"], **OPTIONS)
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], "per_layer_config" in config) == (equivalent, False)
    (unit,) = gone(plan_of(out))
    assert any(
        f"in place of what {unit[:2]} lost stands a dense part of zeros, {width} wide" in note
        for note in report.notes
    )
    agree(out, silenced(families.reference(source), *cuts_of([unit])))
    assert api.verify(out, against=source)["ok"]
    layer = families.reference(out).model.layers[int(unit[1])]
    assert {bool(tensor.any()) for tensor in body(layer, "mlp").state_dict().values()} == {False}
    assert report.after.bytes == sum(
        tensor.nbytes for tensor in load_file(out / "model.safetensors").values()
    )


def lively(family: str, folder: Path, **changes: Any) -> Path:
    """A random checkpoint in float32 with a tokenizer."""
    families.build(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", ["plugin", "transformers"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.few(1)
def test_a_model_may_lose_its_last_mixture(family: str, target: str, zoo: Zoo, tmp_path: Path):
    units = [f"L{layer.index}.experts" for layer in open_view(zoo(family)).source.moe_layers]
    out = by_hand(zoo(family), tmp_path / "out", dict.fromkeys(units, GONE), target=target)
    agree(out, silenced(families.reference(zoo(family)), *cuts_of(units)))
    assert api.verify(out, against=zoo(family))["ok"]
    assert not open_view(out).source.moe_layers


@pytest.mark.parametrize(
    ("family", "prefix"), [("deepseek_v2", 0), ("deepseek_v3", 1), ("glm4_moe", 0), ("dots1", 0)]
)
@pytest.mark.few(2)
def test_a_dense_first_block_goes(family: str, prefix: int, zoo: Zoo, tmp_path: Path):
    out = by_hand(zoo(family), tmp_path / "out", {"L0": GONE}, target="transformers")
    assert json.loads((out / "config.json").read_text())["first_k_dense_replace"] == prefix
    agree(out, silenced(families.reference(zoo(family)), (0, "block")))


# What adds nothing


@pytest.mark.parametrize(
    ("family", "step", "unit"),
    [(family, step, unit)
     for step, unit in (("layer_drop", "L1.experts"), ("layer_drop:part=attention", "L1.attention"), ("block_drop", "L1"),
                        ("block_drop:contiguous=true", "L1"), ("layer_drop:score=kl", "L1.experts"))
     for family in ("mixtral", "granitemoe", "jamba", "gpt_oss")
     if (family, unit) != ("jamba", "L1")],  # its blocks come in patterns
)  # fmt: skip
@pytest.mark.few(2)
def test_what_adds_nothing_is_chosen_and_leaves_no_trace(
    family: str, step: str, unit: str, text: Path, tmp_path: Path
):
    source = tmp_path / "source"
    silenced(families.build(family), *cuts_of([unit])).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    target = "transformers" if unit == "L1" else "plugin"
    api.press(source, out=tmp_path / "out", texts=[text], steps=[step], target=target, **OPTIONS)
    assert gone(plan_of(tmp_path / "out")) == [unit]
    whole, pressed = families.reference(source), families.reference(tmp_path / "out")
    ids = families.random_ids(whole.config, 3, 17)
    torch.testing.assert_close(
        families.logits_of(pressed, ids), families.logits_of(whole, ids), rtol=1e-6, atol=1e-6
    )


# Two steps


@pytest.mark.parametrize(
    ("family", "step", "target"),
    [
        ("mixtral", "layer_drop:drop={}", "plugin"),
        ("gpt_oss", "layer_drop:part=attention,drop={}", "plugin"),
        ("deepseek_v3", "layer_drop:drop={}", "transformers"),
        ("qwen2_moe", "block_drop:drop={}", "transformers"),
        ("ernie4_5_moe", "block_drop:drop={}", "plugin"),
    ],
)
@pytest.mark.few(1)
def test_two_steps_that_are_not_rescored_are_one(
    family: str, step: str, target: str, zoo: Zoo, text: Path, tmp_path: Path
):
    steps = {"one": [step.format(2)], "two": [step.format(1), step.format(1) + ",rescore=false"]}
    for name, some in steps.items():
        api.press(zoo(family), out=tmp_path / name, texts=[text], steps=some, target=target, **OPTIONS)
    one, two = plan_of(tmp_path / "one"), plan_of(tmp_path / "two")
    assert len(two.stages) == 2
    assert sorted(gone(two, 0) + gone(two, 1)) == gone(one)
    assert same(weights_and_config(tmp_path / "two"), weights_and_config(tmp_path / "one"))


@pytest.mark.parametrize("step", ["layer_drop", "block_drop", "layer_drop:part=attention"])
@pytest.mark.few(1)
def test_a_rescored_second_step_sees_what_the_first_left(step: str, zoo: Zoo, text: Path, tmp_path: Path):
    plan = api.plan(zoo("gpt_oss"), texts=[text], steps=[step, step], target="plugin", **OPTIONS)
    (first,), (second,) = gone(plan, 0), gone(plan, 1)
    observed = observe(silenced(families.reference(zoo("gpt_oss")), *cuts_of([first])), rows_of(text).ids)
    ends = {"layer_drop": ("middle", "after"), "block_drop": ("before", "after")}.get(
        step, ("before", "middle")
    )
    cosines = {
        layer: mean_cosine(*(getattr(said, end) for end in ends)) for layer, said in enumerate(observed)
    }
    del cosines[int(first[1])]
    assert int(second[1]) == max(cosines, key=lambda layer: cosines[layer])


# Any order


@dataclass(frozen=True)
class Chosen(Selects):
    """A step that lets one unit go, numbered as in the model that it is shown."""

    unit: Unit
    kind: ClassVar[str] = "chosen"

    def outline(self, _: Any, __: Any) -> Stage:
        raise NotImplementedError

    def decide(self, _: Any, __: Any) -> Decision:
        return Decision({self.unit: GONE})


@dataclass
class ByHand:
    """The same on a stock model in memory: which of its layers, branches and experts are left."""

    family: str
    folder: Path
    layers: list[int]
    kept: dict[int, list[int]]
    silent: list[Cut] = field(default_factory=list)

    def parts(self, branch: str) -> list[int]:
        """Places, among the layers that are left, that have the branch."""
        there = [place for place, layer in enumerate(self.layers) if (layer, branch) not in self.silent]
        return [place for place in there if branch == "attention" or self.layers[place] in self.kept]

    def lose(self, place: int, what: str) -> None:
        layer = self.layers[place]
        self.silent.append((layer, what))
        if what != "attention":
            self.kept.pop(layer, None)
        if what == "block":
            del self.layers[place]

    def keep_best(self, count: int) -> None:
        """By AIMER, from the weights on disk."""
        for layer, there in self.kept.items():
            scores = {expert: self._aimer(layer, expert) for expert in there}
            self.kept[layer] = sorted(sorted(there, key=lambda expert: -scores[expert])[:count])

    def _aimer(self, layer: int, expert: int) -> float:
        parts = families.expert_on_disk(self.family, self.folder, layer, expert).values()
        weights = torch.cat([part.double().reshape(-1) for part in parts])
        return -float(weights.abs().mean() / weights.square().mean().sqrt())


sequences = st.lists(
    st.one_of(
        st.tuples(st.just("aimer"), st.integers(3, 9)),
        st.tuples(st.just("random"), st.integers(3, 9)),
        st.tuples(st.sampled_from(["mlp", "attention", "block"]), st.integers(0, 9)),
    ),
    min_size=2, max_size=5,
)  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "gpt_oss"])
@pytest.mark.breadth
@settings(max_examples=9, deadline=None, derandomize=True, database=None)
@example(asked=[("block", 1), ("aimer", 4), ("mlp", 1), ("aimer", 3)])
@given(asked=sequences)
def test_steps_in_any_order_keep_what_they_would_keep_in_memory(
    family: str, asked: list[tuple[str, int]], zoo: Zoo, tmp_path_factory: pytest.TempPathFactory
):
    """Layers and experts are numbered anew by every step, and a plan numbers them as the source does."""
    view, model = open_view(zoo(family)), families.reference(zoo(family))
    whole = {layer: list(range(count)) for layer, (count, _) in families.experts_of(model).items()}
    hand = ByHand(family, zoo(family), list(range(len(model.model.layers))), whole)
    made: list[Any] = []
    expected: list[dict[str, Any]] = []
    for what, number in asked:
        if what in ("aimer", "random"):
            count = min([number, *map(len, hand.kept.values())])
            if hand.kept:
                made.append(ExpertDrop(score=what, keep=count, seed=number))
                hand.keep_best(count) if what == "aimer" else followed(
                    hand, view, made, tmp_path_factory.mktemp("work")
                )
                expected.append({f"L{layer}.experts": tuple(kept) for layer, kept in hand.kept.items()})
            continue
        places = (
            hand.parts(what) if what != "block" else list(range(len(hand.layers)))[len(hand.layers) == 1 :]
        )
        if places:
            place = places[number % len(places)]
            part = {"mlp": "experts", "block": "other"}.get(what, what)
            made.append(Chosen(Unit(place, part)))
            expected.append({str(Unit(hand.layers[place], part)): None})
            hand.lose(place, what)
    done = decide(Job(view, tmp_path_factory.mktemp("work")), made)
    assert [
        {str(unit): what.keep for unit, what in stage.treatments.items()} for stage in done.plan.stages
    ] == expected
    ids = families.random_ids(model.config, 2, 11)
    wanted = families.logits_of(families.cut_by_hand(silenced(model, *hand.silent), hand.kept), ids)
    close(streamed_logits(View(view.checkpoint, view.source, done.plan), ids), wanted)


def followed(hand: ByHand, view: View, made: list[Any], work: Path) -> None:
    """Take up a random choice: only how many, and from which, is known beforehand."""
    treatments = decide(Job(view, work), made).plan.stages[-1].treatments
    chosen = {unit.layer: list(what.keep or ()) for unit, what in treatments.items()}
    assert chosen.keys() == hand.kept.keys()
    assert all(
        len(kept) == made[-1].keep and set(kept) <= set(hand.kept[layer]) for layer, kept in chosen.items()
    )
    hand.kept = chosen


# A pressed folder as the next one's source


FORMS = {
    "plugin": ("gpt_oss", "layer_drop:part=attention", "plugin"),
    "stock": ("qwen2_moe", "layer_drop", "transformers"),
    "re-in_equivalent": ("mixtral", "layer_drop", "transformers"),
}


@pytest.mark.parametrize(
    "step", ["layer_drop", "layer_drop:part=attention", "block_drop", "expert_drop:keep=5,score=aimer"]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.few(1)
def test_a_pressed_folder_can_be_pressed_again(form: str, step: str, zoo: Zoo, text: Path, tmp_path: Path):
    family, before, target = FORMS[form]
    once, twice = tmp_path / "once", tmp_path / "twice"
    api.press(zoo(family), out=once, texts=[text], steps=[before], target=target, **OPTIONS)
    target = "plugin" if "attention" in step else target
    api.press(once, out=twice, texts=[text], steps=[step], target=target, **OPTIONS)
    assert api.verify(twice, against=once)["ok"]
    wanted = silenced(
        families.reference(zoo(family)), *cuts_of(gone(plan_of(once))), *cuts_of(gone(plan_of(twice)))
    )
    kept = {
        unit.layer: list(what.keep) for unit, what in plan_of(twice).stages[0].treatments.items() if what.keep
    }
    agree(twice, families.cut_by_hand(wanted, kept))


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3", "dots1", "minimax_m2"])
@pytest.mark.few(1)
def test_one_folder_after_the_other_is_one_plan(family: str, zoo: Zoo, tmp_path: Path):
    """Byte for byte: layers that differ move up when a block before them goes, and lose experts as they would at once."""
    last, size = (
        len(open_view(zoo(family)).source.layers) - 1,
        {"deepseek_v3": 12, "dots1": 16}.get(family, 8),
    )
    fewer = Treatment(keep=tuple(expert for expert in range(size) if expert % 4))
    parts = {f"L{last - 1}.experts": GONE, f"L{last}.attention": GONE}
    at_once = by_hand(zoo(family), tmp_path / "one", parts, {"L0": GONE}, {f"L{last}.experts": fewer})
    first = by_hand(zoo(family), tmp_path / "first", parts)
    second = by_hand(first, tmp_path / "second", {"L0": GONE})
    third = by_hand(second, tmp_path / "third", {f"L{last - 1}.experts": fewer})
    found, wanted = weights_and_config(third), weights_and_config(at_once)
    assert json.loads(found.pop("config.json")) == json.loads(wanted.pop("config.json"))
    assert same(found, wanted)
    assert api.verify(third, against=second)["ok"]


def test_a_layer_of_one_branch_that_lost_it_is_read_again(tmp_path: Path):
    """A nemotron_h, whose layers are each a norm and a mixer."""
    source = other_folder("nemotron_h", tmp_path)
    once = by_hand(source, tmp_path / "once", {"L1.experts": GONE, "L2.attention": GONE})
    twice = by_hand(once, tmp_path / "twice", {"L3.experts": GONE}, {"L0": GONE})
    whole = families.reference(source)
    with torch.no_grad():
        for layer in range(4):
            for parameter in whole.model.layers[layer].mixer.parameters():
                parameter.zero_()
    agree(twice, whole)
    assert api.verify(once, against=source)["ok"]
    assert api.verify(twice, against=once)["ok"]
    assert [sorted(layer.bodies) for layer in open_view(twice).source.layers] == [[], [], [], ["mlp"]]


def test_what_lacks_a_part_already_cannot_be_made_stock_but_without_it(zoo: Zoo, tmp_path: Path):
    once = by_hand(zoo("mixtral"), tmp_path / "once", {"L0.attention": GONE})
    with pytest.raises(UserError, match=r"keeps layers that lack a part already \(L0\), which transformers cannot load; "
                                        r"the nearest plan that it can is block_drop:drop=1"):  # fmt: skip
        by_hand(once, tmp_path / "twice", {"L1": GONE}, target="transformers")
    assert not (tmp_path / "twice").exists()
    out = by_hand(once, tmp_path / "twice", {"L0": GONE}, target="transformers")
    agree(out, silenced(families.reference(zoo("mixtral")), (0, "block")))
