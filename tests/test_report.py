"""Reports: JSON with the promised keys, pages people can read anywhere, cards that can be published."""

from __future__ import annotations

import io
import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moespresso.core.cost import Cost
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.report import (
    Bars,
    LayerScores,
    Licence,
    Report,
    machine,
    model_card,
    render_demo,
    render_evaluation,
    render_inspection,
    render_methods,
    render_plan,
    render_report,
    render_stats,
    render_verdict,
    shareable,
    source_licence,
    to_json,
    versions,
    words,
)

GIB = 1 << 30
RECIPE = {
    "model": "/home/someone/models/Mixtral-8x7B",
    "calibration": {
        "texts": [{"path": "/data/private/c4.jsonl", "weight": 1.0}, {"dataset": "lima"}],
        "samples": 128,
    },
    "steps": [{"kind": "expert_drop", "keep": 6}],
    "seed": 0,
}
PLAN = Plan(
    "digest",
    (
        Stage(
            {"kind": "expert_drop", "keep": 6, "ratio": None},
            {Unit(0, "experts"): Treatment(keep=(0, 1, 2, 4, 6, 7))},
        ),
    ),
    seed=0,
)
REPORT = Report(
    recipe=RECIPE,
    plan=PLAN,
    before=Cost(87 * GIB, 46_700_000_000, 12_900_000_000, 55 * 10**12, 131072, 3 * GIB),
    after=Cost(66 * GIB, 35_400_000_000, 12_900_000_000, 55 * 10**12, 131072, 2 * GIB),
    scores={
        0: LayerScores((0, 1, 2, 4, 6, 7), (3, 5), (0.5,) * 8, "routing", (7,)),
        1: LayerScores(tuple(range(8)), (), (0.5,) * 8, "routing"),
    },
    seconds={"measure": 200.0, "plan": 0.5, "build": 61.0},
    machine={"cpu": "A processor", "cores": 8, "memory_bytes": 64 * GIB, "os": "Linux 6", "accelerators": []},
    versions={"moespresso": "0.1.0"},
    out=Path("pressed"),
    warnings=("L3.E7 saw no token",),
    notes=("left behind: modeling.py",),
    peak_rss_bytes=5 * GIB,
    peak_anonymous_bytes=3 * GIB,
)
INSPECTION = {
    "family": "deepseek_v2",
    "num_layers": 4,
    "layers": [
        {"index": index, "mixer": "attention", "experts": 64 * bool(index), "shared_experts": 2 * bool(index),
         "top_k": 6 * bool(index), "width": 1408 if index else 10944}
        for index in range(4)
    ],
    "params": {"total": 15_700_000_000, "active": 2_400_000_000},
    "bytes": {"total": 100, "experts": 90, "shared": 0, "attention": 5, "embedding": 3, "other": 2},
    "kv_bytes_per_token": 31104,
    "flops_2048": 10**13,
    "notes": ["3 tensors outside the language model are passed through unchanged"],
}  # fmt: skip
METHODS = [
    {
        "kind": "expert_drop",
        "summary": "Drop experts.",
        "doc": "Drop experts.\n\nA story that is\nrunning text:\n    a formula\n    another",
        "settings": [
            {"name": "keep", "type": "int | None", "default": None, "doc": "experts to keep"},
            {"name": "scope", "type": "Literal['layer', 'global']", "default": "layer", "doc": "where"},
        ],
    }
]
VERDICT = {
    "ok": False,
    "checks": [
        {"name": "digests", "ok": True, "detail": ""},
        {"name": "finite", "ok": False, "detail": "NaN"},
    ],
}
EVALUATION = {
    "tokens": 65536,
    "perplexity": {"value": 21.4, "ci95": [20.9, 21.9]},
    "kl": {"mean": 0.0312, "ci95": [0.03, 0.0325]},
    "top1_agreement": 0.913,
    "perplexity_ratio": 1.034,
}
STATS = Stats(
    "key", "digest", 4096, {Unit(3, "experts", 1): {"tokens": 1.0}}, ("L3.E7 saw no token",), {}, ("routing",)
)


def test_to_dict_has_the_keys_of_press_json():
    body = json.loads(to_json(REPORT))
    assert body["out"] == "pressed"
    assert body["bytes"] == {"before": 87 * GIB, "after": 66 * GIB}
    assert body["params"] == {"before": 46_700_000_000, "after": 35_400_000_000}
    assert body["seconds"] == 261.5
    assert body["phases"] == {"measure": 200.0, "plan": 0.5, "build": 61.0}
    assert body["peak_rss_bytes"] == 5 * GIB
    assert body["plan"] == json.loads(PLAN.to_json())
    assert body["warnings"] == ["L3.E7 saw no token"]
    assert body["scores"]["L0"]["dropped"] == [3, 5]


def test_a_total_that_was_taken_is_the_whole_time():
    body = replace(REPORT, seconds={"build": 61.0, "digest": 30.0, "total": 70.0}).to_dict()
    assert body["seconds"] == 70.0
    assert body["phases"] == {"build": 61.0, "digest": 30.0}


def test_the_page_of_a_report_says_what_matters():
    page = render_report(REPORT)
    for said in ("87.0 GiB", "66.0 GiB", "-24.1 %", "46.7 B", "35.4 B", "8 → 6", "3, 5", "L3.E7 saw no token",
                 "left behind: modeling.py", "4 min 22 s", "build 1 min 01 s", "5.0 GiB, of which 3.0 GiB anonymous",
                 "super experts, kept", "no expert dropped in", "A processor, 8 cores, 64.0 GiB"):  # fmt: skip
        assert said in page


def test_a_report_read_back_from_json_gives_the_same_page():
    assert render_report(json.loads(to_json(REPORT))) == render_report(REPORT)


def test_the_page_of_an_inspection_joins_equal_layers():
    page = render_inspection(INSPECTION)
    lines = [line.split() for line in page.splitlines()]
    assert ["1-3", "attention", "64", "2", "6", "1408"] in lines
    assert ["0", "attention", "-", "-", "-", "10944"] in lines
    assert "15.7 B parameters, 2.4 B active per token" in page
    assert "90.0 %" in page
    assert "3 tensors outside" in page
    assert not any(line[:1] == ["shared"] for line in lines), "a part without bytes has no row"


def test_the_page_of_an_evaluation_has_intervals():
    page = render_evaluation(EVALUATION)
    for said in ("65,536", "21.40  (95 %: 20.90 to 21.90)", "0.03120", "91.3 %", "1.034"):
        assert said in page
    assert "KL" not in render_evaluation({"tokens": 5, "perplexity": {"value": float("inf")}})


def test_the_page_of_a_verdict_counts_failures():
    page = render_verdict(VERDICT)
    assert "FAILED   finite" in page
    assert page.endswith("1 of 2 checks failed\n")
    assert render_verdict({"ok": True, "checks": VERDICT["checks"][:1]}).endswith("all 1 checks hold\n")


def test_the_page_of_methods_shows_settings_and_keeps_formulas():
    page = render_methods(METHODS)
    for said in (
        "expert_drop: Drop experts.",
        "layer | global",
        "experts to keep",
        "A story that is running text:\n",
    ):
        assert said in page
    assert "     a formula\n     another\n" in page
    assert page.count("Drop experts.") == 1


def test_the_pages_of_stats_and_plans():
    stats = render_stats(STATS, "s.json")
    assert "measured into s.json" in stats
    assert "4,096" in stats
    assert "L3.E7 saw no token" in stats
    assert "tokens" not in render_stats(replace(STATS, tokens=0, warnings=()))
    plan = render_plan(PLAN, "p.json")
    assert "stage 1: expert_drop (keep=6)" in plan
    assert "L0.experts   keep 0-2, 4, 6, 7" in plan
    assert "nothing is changed" in render_plan(Plan("digest"))


def test_the_demo_is_its_parts_on_one_page():
    page = render_demo({"press": REPORT, "verify": VERDICT, "evaluate": EVALUATION})
    assert page.index("tensor bytes") < page.index("FAILED") < page.index("perplexity")


PAGES = (
    lambda: render_report(replace(REPORT, out="a/long/path" * 20, notes=("[bold]brackets[/bold] " * 20,))),
    lambda: render_inspection(INSPECTION),
    lambda: render_evaluation(EVALUATION),
    lambda: render_verdict(VERDICT),
    lambda: render_methods(METHODS),
    lambda: render_plan(PLAN),
    lambda: render_stats(STATS),
)


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_plain_text_of_100_columns(page, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    text = page()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_brackets_in_notes_are_words_not_markup():
    assert "[bold]x[/bold]" in render_report(replace(REPORT, notes=("[bold]x[/bold]",)))


def front_matter(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_card_states_base_model_licence_and_recipe():
    licence = Licence("other", "tongyi", "https://example.org/licence")
    front, body = front_matter(model_card(REPORT, "mistralai/Mixtral-8x7B-v0.1", licence))
    assert front["base_model"] == "mistralai/Mixtral-8x7B-v0.1"
    assert front["license"] == "other"
    assert front["license_name"] == "tongyi"
    assert "moespresso" in front["tags"]
    assert "# Mixtral-8x7B-v0.1, pressed" in body
    assert "2 of its 16 routed experts were dropped, and 87.0 GiB of tensors became 66.0 GiB." in body
    assert "| 0 | 6 | 3, 5 | 7 |" in body
    assert "- L3.E7 saw no token" in body
    assert "from_pretrained(folder)" in body
    assert "--against mistralai/Mixtral-8x7B-v0.1" in body
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe == shareable(RECIPE)


def test_a_card_says_nothing_about_the_disk_the_clock_or_the_machine():
    card = model_card(REPORT)
    assert "/home" not in card
    assert "/data" not in card
    assert "base_model" not in card
    assert "license" not in card
    other = replace(
        REPORT, seconds={"build": 1.0}, machine={}, out="elsewhere", peak_rss_bytes=0, peak_anonymous_bytes=0
    )
    assert model_card(other) == card


def test_a_card_of_an_untouched_model_claims_nothing():
    card = model_card(replace(REPORT, scores={}, warnings=(), notes=()))
    assert "dropped" not in card.lower()
    assert "To know" not in card


def test_shareable_leaves_relative_paths_and_the_original_alone():
    recipe = {"model": "owner/name", "calibration": {"texts": [{"path": "text/a.txt"}]}}
    assert shareable(recipe) == recipe
    assert shareable(RECIPE)["calibration"]["texts"][0]["path"] == "c4.jsonl"
    assert RECIPE["calibration"]["texts"][0]["path"] == "/data/private/c4.jsonl"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (None, Licence()),
        ("# no front matter\n", Licence()),
        ("---\nlicense: mit\nlanguage: en\n---\n# x\n", Licence("mit")),
        (
            "---\nlicense: other\nlicense_name: l\nlicense_link: LICENSE\n---\n",
            Licence("other", "l", "LICENSE"),
        ),
        ("---\nlicense: [a, b]\n---\n", Licence()),
        ("---\nlicense: 'open\n---\n", Licence()),
    ],
)
def test_the_licence_is_read_from_the_sources_card(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert source_licence(tmp_path) == expected


def test_the_machine_is_told_in_general_terms():
    found = machine()
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 1 << 20
    assert socket.gethostname() not in json.dumps(found)
    assert versions()["torch"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.size(0), "0 B"),
        (words.size(1023), "1023 B"),
        (words.size(1024), "1.0 KiB"),
        (words.size((1 << 20) - 1), "1.0 MiB"),
        (words.number(950), "950"),
        (words.number(46_700_000_000), "46.7 B"),
        (words.number(999_960), "1.0 M"),
        (words.flops(1.2e12), "1.2 TFLOP"),
        (words.duration(0), "0 ms"),
        (words.duration(0.0123), "12 ms"),
        (words.duration(12.34), "12.3 s"),
        (words.duration(59.99), "1 min 00 s"),
        (words.duration(185), "3 min 05 s"),
        (words.duration(3600 * 2 + 7 * 60), "2 h 07 min"),
        (words.change(100, 75), "-25.0 %"),
        (words.change(10000, 9997), "-0.03 %"),
        (words.change(5, 5), ""),
        (words.change(0, 5), ""),
        (words.figure(0.031249), "0.03125"),
        (words.figure(12345.6), "12,346"),
        (words.figure(0), "0"),
        (words.figure(float("nan")), "nan"),
        (words.spans([5, 1, 2, 3, 7, 8]), "1-3, 5, 7, 8"),
        (words.spans([]), ""),
    ],
)
def test_numbers_as_people_say_them(said, expected):
    assert said == expected


@given(st.sets(st.integers(0, 200)))
def test_spans_can_be_read_back(numbers):
    ends = (run.split("-") for run in words.spans(numbers).split(", ") if run)
    assert {value for run in ends for value in range(int(run[0]), int(run[-1]) + 1)} == numbers


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_log_file_gets_a_line_now_and_then():
    heard, clock = io.StringIO(), Clock()
    with Bars(Console(file=heard, force_terminal=False), clock) as bars:
        bars.stage("measure layers", 8)
        for _ in range(8):
            clock.now += 6
            bars.advance()
    assert heard.getvalue().splitlines() == [
        "measure layers: 0/8",
        "measure layers: 2/8, 36.0 s left",
        "measure layers: 4/8, 24.0 s left",
        "measure layers: 6/8, 12.0 s left",
        "measure layers: 8/8 in 48.0 s",
    ]


def test_a_terminal_gets_bars():
    heard = io.StringIO()
    with Bars(Console(file=heard, force_terminal=True, width=80)) as bars:
        bars.stage("measure layers", 2)
        bars.advance()
        bars.advance()
    assert "measure layers" in heard.getvalue()
    assert "2/2" in heard.getvalue()


def test_a_terminal_without_stages_stays_clean():
    heard = io.StringIO()
    with Bars(Console(file=heard, force_terminal=True, width=80)):
        pass
    assert not heard.getvalue().strip()
