"""Plans, stats, steps and old configs that somebody edited wrongly: one sentence each, never a traceback or silence.

`PLAN` and `STATS` are sound; every fault is one change to them. Each sentence says what stands where.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Zoo
from moespresso.checkpoint.index import Checkpoint
from moespresso.cli import main
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.registry import parse_step
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.model.equivalent import adopt, equivalents_of, obstacle
from test_equivalent import TINY

Body = dict[str, Any]

PLAN: Body = {
    "blueprint": "b", "made_by": "me", "seed": 3,
    "calibration": {"sources": [{"name": "text"}], "samples": 2, "length": 16, "seed": 0, "mode": "pack", "digest": "d"},
    "stages": [{"method": {"kind": "expert_drop"},
                "treatments": {"L1.experts": {"keep": [0, 2], "scale": 1}, "L2": {"drop": True, "repair": "scale"}}}],
}  # fmt: skip
STATS: Body = {
    "key": "k", "blueprint": "b", "tokens": 7, "warnings": ["oh"], "calibration": {"samples": 2}, "needs": ["routing"],
    "values": {"L1.E0": {"gate": 0.5, "tokens": 7}, "L1.experts": {"kept": float("nan")}},
}  # fmt: skip


def changed(body: Body, **changes: Any) -> str:
    return json.dumps(body | changes)


def without(body: Body, name: str) -> str:
    return json.dumps({key: value for key, value in body.items() if key != name})


def treated(**treatment: Any) -> str:
    """The plan with one treatment, of the experts of layer 1."""
    return changed(PLAN, stages=[{"method": {}, "treatments": {"L1.experts": treatment}}])


def staged(**changes: Any) -> str:
    return changed(PLAN, stages=[PLAN["stages"][0] | changes])


def calibrated(**changes: Any) -> str:
    return changed(PLAN, calibration=PLAN["calibration"] | changes)


HUGE = 10**400
PLANS: list[tuple[str, str]] = [
    ("[1]", r"\[1\] is not an object"),
    ('"x"', "'x' is not an object"),
    ("[" * 100_000, "recursion"),
    ('{"blueprint": "x", "seed": 1, "seed": 2, "stages": []}', "'seed' stands there twice"),
    (without(PLAN, "blueprint"), "'blueprint' is missing"),
    (without(PLAN, "stages"), "'stages' is missing"),
    (changed(PLAN, blueprint=3), "blueprint 3 is not text"),
    (changed(PLAN, blueprint=None), "blueprint None is not text"),
    (changed(PLAN, made_by=["me"]), r"made_by \['me'\] is not text"),
    (changed(PLAN, seed=True), "seed True is not a whole number"),
    (changed(PLAN, seed=1.5), "seed 1.5 is not a whole number"),
    (changed(PLAN, seed="3"), "seed '3' is not a whole number"),
    (changed(PLAN, calibration=[]), r"calibration \[\] is not an object"),
    (changed(PLAN, calibration="x"), "calibration 'x' is not an object"),
    (calibrated(samples="two"), "calibration: samples 'two' is not a whole number"),
    (calibrated(length=True), "calibration: length True is not a whole number"),
    (calibrated(seed=[]), r"calibration: seed \[\] is not a whole number"),
    (calibrated(mode=1), "mode 1 is not text"),
    (calibrated(digest=1), "digest 1 is not text"),
    (calibrated(sources="x"), "sources 'x' is not a list"),
    (calibrated(sources=["x"]), "sources: 'x' is not an object"),
    (calibrated(sources=[{}]), "'name' is missing"),
    (changed(PLAN, stages={}), r"stages \{\} is not a list"),
    (changed(PLAN, stages=[3]), "stages: 3 is not an object"),
    (changed(PLAN, stages=[{"method": {}}]), "stage 0: 'treatments' is missing"),
    (changed(PLAN, stages=[{"treatments": {}}]), "stage 0: 'method' is missing"),
    (staged(method=[]), r"stage 0: method \[\] is not an object"),
    (staged(treatments=[]), r"stage 0: treatments \[\] is not an object"),
    (staged(treatments={"1.experts": {}}), r"stage 0: '1.experts' is not a unit address"),
    (staged(treatments={"L1": {}, "L01": {}}), "stage 0: .* are the same unit"),
    (staged(treatments={"L1.experts": [0]}), r"stage 0, L1.experts: .*\[0\] is not an object"),
    (treated(keeep=[0]), r"stage 0, L1.experts: 'keeep' is unknown \(did you mean 'keep'\?\)"),
    (treated(keep=3), "keep 3 is not a list"),
    (treated(keep={}), r"keep \{\} is not a list"),
    (treated(keep=["0"]), "keep: '0' is not a whole number"),
    (treated(keep=[False, 1]), "keep: False is not a whole number"),
    (treated(keep=[0.0, 1]), "keep: 0.0 is not a whole number"),
    (treated(keep=[0, 0, 1]), r"keep \[0, 0, 1\] does not ascend: give each number once"),
    (treated(keep=[2, 1]), r"keep \[2, 1\] does not ascend"),
    (treated(channels=[2, 1]), r"channels \[2, 1\] is not a whole number"),
    (treated(keep=[0], drop=True), "keep stands beside drop"),
    (treated(keep=[], drop=True), "keep stands beside drop"),
    (treated(drop=True, scale=2.0), "scale stands beside drop"),
    (treated(drop=True, into=1), "into stands beside drop"),
    (treated(drop=1), "drop 1 is not true or false"),
    (treated(drop=None), "drop None is not true or false"),
    (treated(into=False), "into False is not a whole number"),
    (treated(into=1.0), "into 1.0 is not a whole number"),
    (treated(scale=True), "scale True is not a number"),
    (treated(scale="2"), "scale '2' is not a number"),
    (treated(scale=None), "scale None is not a number"),
    (treated(scale=0), "scale 0.0 is not a positive number"),
    (treated(scale=float("nan")), "scale nan is not a positive number"),
    (treated(scale=float("inf")), "scale inf is not a positive number"),
    (treated(scale=HUGE), "too large"),
    (treated(share=float("nan")), "share nan is not between 0 and 1"),
    (treated(share=1.5), "share 1.5 is not between 0 and 1"),
    (treated(share=False), "share False is not a number"),
    (treated(channels="4"), "channels '4' is not a whole number"),
    (treated(rank=4), r"'rank' is unknown \(choose from channels, drop"),
    (treated(format=3), "format 3 is not an object"),
    (treated(format={"bit": 4}), "bit"),
    (treated(format={"bits": "4"}), "format: bits '4' is not a whole number"),
    (treated(format={"group_size": "x"}), "format: group_size 'x' is not a whole number"),
    (treated(format={"group_size": -1}), "format: group_size -1 is less than 0"),
    (treated(format={"symmetric": "yes"}), "format: symmetric 'yes' is not true or false"),
    (treated(repair=["scale"]), r"repair \['scale'\] is not text"),
]


@pytest.mark.parametrize(("text", "reason"), PLANS, ids=[reason for _, reason in PLANS])
def test_a_malformed_plan_is_answered_with_one_sentence(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^this is not a moespresso plan \(.*{reason}") as caught:
        Plan.from_json(text)
    assert_one_sentence(caught.value, "mend it, or write one with `moespresso plan`")
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        Plan.load(path)
    assert str(caught.value).startswith(f"{path} is not a moespresso plan (")


def assert_one_sentence(error: UserError, cure: str) -> None:
    said = str(error)
    assert "\n" not in said
    assert len(said) < 400
    assert said.endswith(cure)


def test_a_sound_plan_is_read_and_null_says_what_leaving_out_says() -> None:
    treatments = {Unit(1, "experts"): Treatment(keep=(0, 2)), Unit(2): Treatment(drop=True, repair="scale")}
    stage = Stage({"kind": "expert_drop"}, treatments)
    assert Plan.from_json(json.dumps(PLAN)) == Plan("b", (stage,), PLAN["calibration"], "me", 3)
    assert Plan.from_json('{"blueprint": "b", "stages": []}') == Plan("b")
    empty = Plan.from_json(treated(keep=None, into=None, channels=None, format=None, repair=None))
    assert empty.stages[0].treatments == {Unit(1, "experts"): Treatment()}


def folder(path: Path) -> None:
    path.mkdir()


def binary(path: Path) -> None:
    path.write_bytes(b'{"blueprint": "\x80\xff"}')


def nothing(path: Path) -> None:
    path.write_bytes(b"")


NO_TEXT: list[tuple[Callable[[Path], None], str]] = [
    (folder, "not exist as a file"),
    (binary, "codec can't decode byte 0x80"),
    (nothing, "Expecting value"),
]


@pytest.mark.parametrize(("make", "reason"), NO_TEXT)
@pytest.mark.parametrize("load", [Plan.load, Stats.load])
def test_what_is_no_text_file_is_said_with_its_path(
    load: Callable[[Path], object], make: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    make(tmp_path / "given.json")
    with pytest.raises(UserError, match=rf"given\.json.*{reason}"):
        load(tmp_path / "given.json")


@pytest.mark.parametrize("make", [folder, binary, lambda path: path.write_text(changed(PLAN, calibration=[]))],
                         ids=["folder", "binary", "calibration"])  # fmt: skip
def test_build_ends_with_one_line_and_exit_code_2(
    make: Callable[[Path], object], zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "plan.json")
    asked = ["build", str(zoo("mixtral")), "--plan", str(tmp_path / "plan.json")]
    assert main([*asked, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "moespresso plan" in " ".join(said.split())
    assert not (tmp_path / "out").exists()


# Stats


def valued(**row: Any) -> str:
    return changed(STATS, values={"L1.E0": row})


STATS_FAULTS: list[tuple[str, str]] = [
    ("[]", r"\[\] is not an object"),
    *((without(STATS, name), f"'{name}' is missing") for name in STATS),
    (changed(STATS, key=1), "key 1 is not text"),
    (changed(STATS, blueprint=3), "blueprint 3 is not text"),
    (changed(STATS, tokens=True), "tokens True is not a whole number"),
    (changed(STATS, tokens="7"), "tokens '7' is not a whole number"),
    (changed(STATS, tokens=-1), "tokens -1 is less than 0"),
    (changed(STATS, warnings="oh"), "warnings 'oh' is not a list"),
    (changed(STATS, warnings=[1]), "warnings: 1 is not text"),
    (changed(STATS, needs="routing"), "needs 'routing' is not a list"),
    (changed(STATS, needs={}), r"needs \{\} is not a list"),
    (changed(STATS, calibration=[]), r"calibration \[\] is not an object"),
    (changed(STATS, calibration="x"), "calibration 'x' is not an object"),
    (changed(STATS, calibration={"sources": [3]}), "sources: 3 is not an object"),
    (changed(STATS, values=[]), r"values \[\] is not an object"),
    (changed(STATS, values={"1.experts": {}}), "'1.experts' is not a unit address"),
    (changed(STATS, values={"L1": {}, "L01": {}}), "are the same unit"),
    (changed(STATS, values={"L1.E0": 3}), "L1.E0 3 is not an object"),
    (valued(gate="0.5"), "gate '0.5' is not a number"),
    (valued(gate=True), "gate True is not a number"),
    (valued(gate=None), "gate None is not a number"),
    (valued(gate=HUGE), "too large"),
    ('{"key": "k", "key": "l"}', "'key' stands there twice"),
]


@pytest.mark.parametrize(("text", "reason"), STATS_FAULTS, ids=[reason for _, reason in STATS_FAULTS])
def test_malformed_stats_are_answered_with_one_sentence(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "stats.json").write_text(text)
    with pytest.raises(UserError, match=rf"is not a moespresso stats file \(.*{reason}") as caught:
        Stats.load(tmp_path / "stats.json")
    assert_one_sentence(caught.value, "write one with `moespresso measure`")


def test_sound_stats_are_read(tmp_path: Path) -> None:
    (tmp_path / "stats.json").write_text(json.dumps(STATS))
    stats = Stats.load(tmp_path / "stats.json")
    assert stats.values[Unit(1, "experts", 0)] == {"gate": 0.5, "tokens": 7.0}
    assert stats.values[Unit(1, "experts")]["kept"] != stats.values[Unit(1, "experts")]["kept"]
    assert (stats.warnings, stats.needs, stats.tokens) == (("oh",), ("routing",), 7)


# Steps


@pytest.mark.parametrize(("step", "name"), [("expert_drop:keep=4,keep=5", "keep"), ("expert_drop:keep=4, keep =4", "keep"),
                                            ("expert_drop:kind=layer_drop", "kind")])  # fmt: skip
def test_a_setting_given_twice_is_refused(step: str, name: str) -> None:
    with pytest.raises(
        UserError, match=rf"in step '{step}', '{name}' is given twice: leave one of the two out"
    ):
        parse_step(step)


# Configs of DeepSeek-MoE

LINEAR = "its rope_scaling is not linear"
FACTOR = "the factor of its rope_scaling is not a positive number"
CONFIGS: list[tuple[Body, str]] = [
    ({"first_k_dense_replace": None}, "its first_k_dense_replace is not a whole number of at least 0"),
    ({"first_k_dense_replace": True}, "its first_k_dense_replace is not a whole number of at least 0"),
    ({"moe_layer_freq": 0}, "its moe_layer_freq is not a whole number of at least 1"),
    ({"num_experts_per_tok": None}, "its num_experts_per_tok is not a whole number of at least 1"),
    ({"num_hidden_layers": "4"}, "its num_hidden_layers is not a whole number of at least 1"),
    ({"n_routed_experts": 9.5}, "its n_routed_experts is not a whole number of at least 1"),
    ({"n_shared_experts": "2"}, "its n_shared_experts is not a whole number of at least 0"),
    ({"num_key_value_heads": 0}, "its num_key_value_heads is not a whole number of at least 1"),
    ({"rope_scaling": "x"}, LINEAR),
    ({"rope_scaling": []}, LINEAR),
    ({"rope_scaling": {}}, LINEAR),
    ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, LINEAR),
    ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, LINEAR),
    ({"rope_scaling": {"type": "linear"}}, FACTOR),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, FACTOR),
    ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, FACTOR),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), CONFIGS, ids=[json.dumps(changes) for changes, _ in CONFIGS])
def test_a_deepseek_config_that_cannot_be_read_is_refused_in_one_clause(changes: Body, reason: str) -> None:
    (equivalent,) = equivalents_of("deepseek")
    assert obstacle(equivalent, TINY | changes) == reason
    with pytest.raises(UserError, match=rf"^somewhere: .* cannot be presented as qwen2_moe \({reason}\)$"):
        adopt(Checkpoint(Path("somewhere"), TINY | changes, {}))


@pytest.mark.parametrize("names", [("type",), ("rope_type",), ("type", "rope_type")])
def test_linear_rope_scaling_is_read_under_either_name(names: tuple[str, ...]) -> None:
    from transformers import Qwen2MoeConfig

    scaling = {"factor": 4.0, **dict.fromkeys(names, "linear")}
    adopted = adopt(Checkpoint(Path("somewhere"), TINY | {"rope_scaling": scaling}, {}))
    read = Qwen2MoeConfig.from_dict(dict(adopted.config)).rope_parameters
    assert (read["rope_type"], read["factor"], read["rope_theta"]) == ("linear", 4.0, 500.0)
