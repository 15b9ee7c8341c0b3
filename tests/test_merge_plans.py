"""Plans of merges: edited by hand, shared, built again.

What does not make sense in a plan is refused in one sentence before anything is written; what does gives the same bytes
wherever and however often it is built, without any text, since weights alone say which neurons belong together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import families
from moespresso import api
from moespresso.build import open_view
from moespresso.core.errors import UserError

Zoo = Callable[[str], Path]
Rows = dict[str, dict[str, Any]]
KEPT = [0, 1, 2, 3, 4, 5]


@pytest.fixture
def plan(zoo: Zoo, tmp_path: Path) -> Callable[..., Path]:
    """`plan(stage, ...)` writes a plan for Mixtral (three layers of eight experts, three of them selected)."""
    digest = open_view(zoo("mixtral")).source.digest

    def write(*stages: Rows) -> Path:
        body = {"blueprint": digest, "stages": [{"method": {}, "treatments": rows} for rows in stages]}
        (tmp_path / "plan.json").write_text(json.dumps(body))
        return tmp_path / "plan.json"

    return write


def merge(**changes: Any) -> Rows:
    """A stage that keeps six experts everywhere and merges 6 and 7 of L1 into 0, with some rows changed or (None) gone;
    `L1_E6` stands for L1.E6."""
    rows: Rows = {f"L{layer}.experts": {"keep": KEPT} for layer in range(3)}
    rows |= {"L1.E0": {"into": 0, "share": 0.5}, "L1.E6": {"into": 0, "share": 0.25, "repair": "align"},
             "L1.E7": {"into": 0, "share": 0.25}, "L1.router": {"repair": "mean"}}  # fmt: skip
    rows |= {name.replace("_", "."): row for name, row in changes.items()}
    return {unit: row for unit, row in rows.items() if row is not None}


def refused(zoo: Zoo, path: Path, *, out: Path, target: str = "transformers") -> str:
    """The one sentence by which a plan is refused, with nothing written."""
    with pytest.raises(UserError) as said:
        api.build(zoo("mixtral"), plan=path, out=out, target=target)
    assert not out.exists()
    assert "\n" not in str(said.value)
    return str(said.value)


def test_the_plan_that_is_edited_below_is_a_good_one(zoo: Zoo, plan: Callable[..., Path], tmp_path: Path):
    api.build(zoo("mixtral"), plan=plan(merge()), out=tmp_path / "out")
    assert api.verify(tmp_path / "out", against=zoo("mixtral"))["ok"]


NOT_A_PLAN = (
    r".*plan\.json is not a moespresso plan \(stage 0{}\): mend it, or write one with `moespresso plan`"
)
SENSELESS: dict[str, tuple[Rows, str]] = {
    "a leader that is not kept": (
        merge(L1_experts={"keep": [1, 2, 3, 4, 5]}), "the plan merges experts into L1.E0, which it does not keep"),
    "a leader that is no member": (
        merge(L1_E0=None), "the plan merges experts into L1.E0, which it does not keep"),
    "a leader that merges into another": (
        merge(L1_E0={"into": 0, "share": 0.75}, L1_E6={"into": 7, "share": 0.25}),
        "the plan merges experts into L1.E7, which it does not keep"),
    "a leader of another layer's": (
        merge(L0_E7={"into": 7, "share": 1.0}), "the plan merges experts into L0.E7, which it does not keep"),
    "no number to keep": (
        merge(L1_experts=None), "the plan merges experts into L1.E0, which it does not keep"),
    "a member that is kept": (
        merge(L1_experts={"keep": [0, 1, 2, 3, 4, 6]}),
        "the plan merges L1.E6 into L1.E0 and keeps it as well: do one of the two"),
    "shares under one": (
        merge(L1_E7={"into": 0, "share": 0.2}), "the shares of what merges into L1.E0 sum to 0.95, not 1"),
    "shares over one": (
        merge(L1_E7={"into": 0, "share": 0.5}), "the shares of what merges into L1.E0 sum to 1.25, not 1"),
    "no share, which is one": (
        merge(L1_E7={"into": 0}), "the shares of what merges into L1.E0 sum to 1.75, not 1"),
    "a share over one": (
        merge(L1_E7={"into": 0, "share": 1.5}), NOT_A_PLAN.format(", L1.E7: share 1.5 is not between 0 and 1")),
    "a share under zero": (
        merge(L1_E7={"into": 0, "share": -0.25}), NOT_A_PLAN.format(", L1.E7: share -0.25 is not between 0 and 1")),
    "a share that is no number": (
        merge(L1_E7={"into": 0, "share": "much"}), NOT_A_PLAN.format(", L1.E7: share 'much' is not a number")),
    "a word for a leader": (
        merge(L1_E7={"into": "0", "share": 0.25}), NOT_A_PLAN.format(", L1.E7: into '0' is not a whole number")),
    "half an expert": (
        merge(L1_E7={"into": 0.5, "share": 0.25}), NOT_A_PLAN.format(", L1.E7: into 0.5 is not a whole number")),
    "a leader past the last": (
        merge(L1_E7={"into": 8, "share": 0.25}), "the plan's treatment of L1.E7 does not merge it into an expert of L1"),
    "a leader before the first": (
        merge(L1_E7={"into": -1, "share": 0.25}), "the plan's treatment of L1.E7 does not merge it into an expert of L1"),
    "a member past the last": (
        merge(L1_E8={"into": 0, "share": 0.0}), "the plan's treatment of L1.E8 does not merge it into an expert of L1"),
    "nothing to merge into": (
        merge(L1_E7={"share": 0.25}), "the plan's treatment of L1.E7 does not merge it into an expert of L1"),
    "one matrix of an expert": (
        merge(L1_E7_down={"into": 0, "share": 0.0}),
        "the plan's treatment of L1.E7.down does not merge it into an expert of L1"),
    "an unknown repair of a member": (
        merge(L1_E7={"into": 0, "share": 0.25, "repair": "permute"}),
        "the plan's treatment of L1.E7 does not merge it into an expert of L1"),
    "a member with more to it": (
        merge(L1_E7={"into": 0, "share": 0.25, "scale": 2.0}),
        "the plan's treatment of L1.E7 does not merge it into an expert of L1"),
    "an unknown repair of experts": (
        merge(L1_experts={"keep": KEPT, "repair": "glue"}),
        "the plan repairs L1.experts by 'glue': experts know skip, novice"),
    "all experts into one": (
        merge(L1_experts={"keep": KEPT, "into": 0}),
        "the plan merges L1.experts: say of each expert by itself, as L3.E5, what it merges into"),
    "an unknown fate of the router": (
        merge(L1_router={"repair": "sum"}), "the plan treats L1.router, but .*mixtral has no routed experts there .*"),
    "a layer past the last": (
        merge(L3_E0={"into": 0}), "the plan treats L3.E0, but .*mixtral has no routed experts there .*"),
    "an expert past the last": (
        merge(L1_experts={"keep": [*KEPT, 8]}), "the plan keeps expert 8 of L1, which has 8"),
    "too few": (
        merge(L2_experts={"keep": [0, 1]}),
        r"L2 would keep 2 experts, but its router \(top_k=3, 1 groups\) needs at least 3: keep more"),
    "a field of another version": (
        merge(L1_E7={"into": 0, "share": 0.25, "rank": 4}),
        NOT_A_PLAN.format(r", L1.E7: 'rank' is unknown \(choose from .*\)")),
    "no address": (
        merge(**{"L1_E-7": {"into": 0}}),
        NOT_A_PLAN.format(": 'L1.E-7' is not a unit address such as L12.E37.down, L12.router or L3.attention")),
}  # fmt: skip


@pytest.mark.parametrize("case", SENSELESS)
@pytest.mark.few(26)
def test_a_merge_that_makes_no_sense_is_refused_in_one_sentence(
    case: str, zoo: Zoo, plan: Callable[..., Path], tmp_path: Path
):
    rows, sentence = SENSELESS[case]
    assert_matches(sentence, refused(zoo, plan(rows), out=tmp_path / "out"))


def assert_matches(pattern: str, said: str) -> None:
    assert re.fullmatch(pattern, said), said


def test_layers_that_end_up_unequal_are_refused_with_the_nearest_even_plan(
    zoo: Zoo, plan: Callable[..., Path], tmp_path: Path
):
    rows = merge(L2_experts={"keep": [0, 1, 2]})
    said = refused(zoo, plan(rows), out=tmp_path / "out")
    assert said.startswith("this plan leaves unequal layers (3 to 6 experts), which transformers cannot load")
    assert "the nearest plan that it can is scope=layer,keep=5" in said


# What a later step may say of experts that an earlier one merged

LATER: dict[str, tuple[Rows, str]] = {
    "merges an expert that is gone": (
        {"L1.experts": {"keep": [0, 1, 2, 3, 4]}, "L1.E0": {"into": 0, "share": 0.5},
         "L1.E6": {"into": 0, "share": 0.5, "repair": "align"}},
        "the plan merges L1.E6, which an earlier step let go"),
    "merges into an expert that is gone": (
        {"L1.experts": {"keep": [0, 1, 2, 3, 7]}, "L1.E7": {"into": 7, "share": 0.5},
         "L1.E0": {"into": 7, "share": 0.5}},
        "the plan merges L1.E.*"),
    "merges in a layer that is gone": (
        {"L1": {"drop": True}, "L1.E1": {"into": 2}}, "the plan merges experts into L1.E2, which it does not keep"),
}  # fmt: skip


@pytest.mark.parametrize("case", LATER)
def test_a_later_step_cannot_bring_experts_back(
    case: str, zoo: Zoo, plan: Callable[..., Path], tmp_path: Path
):
    rows, sentence = LATER[case]
    assert_matches(sentence, refused(zoo, plan(merge(), rows), out=tmp_path / "out"))


def test_experts_of_a_layer_that_is_gone_neither_merge_nor_leave_anything(
    zoo: Zoo, plan: Callable[..., Path], tmp_path: Path
):
    path = plan({"L1": {"drop": True}}, merge())
    said = refused(zoo, path, out=tmp_path / "out", target="plugin")
    assert said == "the plan merges L1.E0, which an earlier step let go"
    path = plan({"L1.experts": {"drop": True}}, {"L1.experts": {"keep": KEPT, "repair": "novice"}})
    said = refused(zoo, path, out=tmp_path / "out", target="plugin")
    assert said == "the plan repairs L1.experts by novice, but an earlier step let it go"


@pytest.mark.parametrize("first", ["members", "whole"])
def test_a_router_that_stays_whole_leaves_nothing_to_merge(
    first: str, zoo: Zoo, plan: Callable[..., Path], tmp_path: Path
):
    """In the same step and in a later one, in whatever order the JSON says it."""
    whole = {"L1.experts": {"keep": KEPT, "repair": "skip"}}
    rows = merge(L1_experts=None)
    rows = rows | whole if first == "members" else whole | rows
    sentence = "L1 keeps its whole router after an earlier step, so its experts cannot change again"
    assert refused(zoo, plan(rows), out=tmp_path / "out", target="plugin") == sentence
    later = {"L1.experts": {"keep": [0, 1, 2, 3, 4]}, "L1.E0": {"into": 0, "share": 0.5}, "L1.E5": {"into": 0, "share": 0.5}}  # fmt: skip
    assert refused(zoo, plan(whole, later), out=tmp_path / "out", target="plugin") == sentence


# Built again


def files(folder: Path, *, but: tuple[str, ...] = ()) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in but}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.few(1)
def test_a_pressed_merge_is_built_again_from_its_plan_without_text(
    name: str, zoo: Zoo, text: Path, tmp_path: Path
):
    """Two steps, so that the second one's neurons are put in line on what the first one's left."""
    steps = ["expert_merge:keep=6,method=m_smoe,router=mean", "expert_merge:keep=4,method=ream,group=2"]
    report = api.press(zoo(name), out=tmp_path / "pressed", texts=[text], samples=4, length=32, steps=steps)
    report.plan.save(tmp_path / "plan.json")
    api.build(zoo(name), plan=tmp_path / "plan.json", out=tmp_path / "built")
    about = ("moespresso.json", "README.md")  # they say by which command the folder was made
    assert files(tmp_path / "pressed", but=about) == files(tmp_path / "built", but=about)
    plans = [
        json.loads((tmp_path / made / "moespresso.json").read_text())["plan"] for made in ("pressed", "built")
    ]
    assert plans[0] == plans[1]
    api.build(zoo(name), plan=tmp_path / "plan.json", out=tmp_path / "again")
    assert files(tmp_path / "built") == files(tmp_path / "again")


def test_measured_planned_and_built_one_by_one_it_is_the_same(zoo: Zoo, text: Path, tmp_path: Path):
    options = {
        "texts": [text],
        "samples": 4,
        "length": 32,
        "steps": ["expert_merge:keep=4,method=hc_smoe,align=true"],
    }
    api.press(zoo("granitemoe"), out=tmp_path / "pressed", **options)
    api.measure(zoo("granitemoe"), out=tmp_path / "stats.json", **options)
    steps = options["steps"]
    api.plan(zoo("granitemoe"), stats=tmp_path / "stats.json", out=tmp_path / "plan.json", steps=steps)
    api.build(zoo("granitemoe"), plan=tmp_path / "plan.json", out=tmp_path / "built")
    about = ("moespresso.json", "README.md")
    assert files(tmp_path / "pressed", but=about) == files(tmp_path / "built", but=about)


def test_one_measurement_serves_every_number_and_method(zoo: Zoo, text: Path, tmp_path: Path):
    asked = {"texts": [text], "samples": 4, "length": 32}
    api.measure(zoo("mixtral"), out=tmp_path / "stats.json", steps=["expert_merge"], **asked)
    for step in (
        "expert_merge:keep=3,method=m_smoe",
        "expert_merge:keep=7,method=hc_smoe",
        "expert_drop:keep=5,score=reap",
    ):
        made = api.plan(zoo("mixtral"), stats=tmp_path / "stats.json", steps=[step])
        api.press(zoo("mixtral"), out=tmp_path / step, steps=[step], **asked)
        pressed = json.loads((tmp_path / step / "moespresso.json").read_text())["plan"]
        assert json.loads(made.to_json())["stages"] == pressed["stages"]


def test_a_size_is_reached_by_merging(zoo: Zoo, text: Path, tmp_path: Path):
    report = api.press(zoo("mixtral"), out=tmp_path / "out", texts=[text], samples=2, length=16,
                       steps=["expert_merge"], size="70%")  # fmt: skip
    assert report.after.bytes <= 0.7 * report.before.bytes
    assert report.after.bytes == sum(
        tensor.nbytes
        for file in (tmp_path / "out").glob("*.safetensors")
        for tensor in load_file(file).values()
    )
    one = sum(part.nbytes for part in families.expert_on_disk("mixtral", zoo("mixtral"), 1, 5).values())
    assert (
        report.after.bytes + 3 * one > 0.7 * report.before.bytes
    )  # one more in every layer would be too many
