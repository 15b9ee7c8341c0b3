"""Result pages are made from results: every one is current, changes when a number does, and leads nowhere that is not there."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from moespresso.cli.app import app
from moespresso.core.registry import parse_step

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import pages  # noqa: E402
import tables  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {
    path: path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A tree with README, pages and results that may be changed."""
    for name in ("docs/results", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in pages.BLOCKS:
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def stale(root: Path) -> set[str]:
    found = pages.Results(root / "benchmarks" / "results")
    return {path.name for path in pages.stale(found, root)}


def test_pages_are_current():
    assert stale(ROOT) == set(), "run: python benchmarks/pages.py"


def test_a_number_changed_by_hand_is_noticed(copied: Path):
    page = copied / "docs" / "results" / "pruning.md"
    page.write_text(page.read_text().replace("0.", "1.", 1))
    assert stale(copied) == {"pruning.md"}


@pytest.mark.parametrize(
    ("place", "mark", "was"), [("README.md", "half", "0."), ("docs/compatibility.md", "families", "ok")]
)
def test_a_page_in_part_by_hand_is_noticed_inside_the_marks_only(
    copied: Path, place: str, mark: str, was: str
):
    page = copied / place
    text = page.read_text()
    page.write_text(text + "More.\n")
    assert stale(copied) == set()
    inside = text.index(f"<!-- {mark} -->")
    page.write_text(text[:inside] + text[inside:].replace(was, "1.", 1))
    assert stale(copied) == {page.name}


@pytest.mark.parametrize(("kind", "path", "named"), [
    ("pruning", ["results", "mixtral", "expert_drop:ratio=0.5", "kl", 0], {"pruning.md", "README.md"}),
    ("slimming", ["results", "mixtral, 4 bits", "gptq", "kl", 1], {"bits.md", "README.md"}),
    ("build_speed", ["build_over_cp", "warm"], {"speed.md", "README.md"}),
    ("scores", ["models", "mixtral", "scores", "man", "kl", "mean"], {"experts.md"}),
    ("attention", ["machine", "cpu"], {"pruning.md"}),
    ("families", ["results", "mixtral", "steps", "gptq"], {"compatibility.md"}),
])  # fmt: skip
def test_another_result_asks_for_another_page(copied: Path, kind: str, path: list[str], named: set[str]):
    file = pages.Results(copied / "benchmarks" / "results").files[kind]
    body = place = json.loads(file.read_text())
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "another" if isinstance(place[path[-1]], str) else 1.5 * place[path[-1]]
    file.write_text(json.dumps(body))
    assert stale(copied) == named


def test_the_newest_result_counts(copied: Path):
    results = copied / "benchmarks" / "results"
    shutil.copy(pages.Results(results).files["depth"], results / "2099-01-01_depth.json")
    assert stale(copied) == {"depth.md"}
    assert (
        "2099-01-01_depth.json"
        in pages.written(pages.Results(results), copied)[copied / "docs/results/depth.md"]
    )


def test_every_kind_of_result_is_on_a_page():
    found = pages.Results(RESULTS)
    made = [path for path in TEXTS if path.parent.name == "results" or path.name == "compatibility.md"]
    told = "\n".join(TEXTS[path] for path in made)
    assert [kind for kind, path in found.files.items() if path.name not in told] == []


def test_every_result_says_when_where_and_with_what_it_was_made():
    for path in RESULTS.glob("*.json"):
        body = json.loads(path.read_text())
        assert path.name.startswith(body["date"]), path.name
        assert {"cpu", "cores"} <= set(body["machine"]), path.name
        assert {"torch", "transformers", "moespresso"} <= set(body["versions"]), path.name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[path])
    assert [link for link in links if not (path.parent / link).exists()] == []


# Of the files that the page on extending tells of, `test_extending` runs the steps.
TOLD = [path for path in TEXTS if path.name != "extending.md"]


@pytest.mark.parametrize("path", TOLD, ids=lambda path: str(path.relative_to(ROOT)))
def test_steps_that_are_told_can_be_asked_for(path: Path):
    for step in re.findall(r"--step ([a-z_]+(?::\S+)?)", TEXTS[path]):
        parse_step(step.rstrip("`)],"))


def test_steps_of_the_readmes_tables_can_be_asked_for():
    found = pages.Results(RESULTS)
    steps = re.findall(r"`([a-z_]+:[^` ]+)`", pages.choices(found))
    assert len(steps) >= 8
    for step in steps:
        parse_step(step)


def test_the_first_sentences_say_what_it_does():
    assert "compresses" in README.split("\n\n")[1].partition(".")[0]
    assert "compresses" in (app.info.help or "").partition(".")[0]


@pytest.mark.parametrize(("steps", "parted"), [
    ("expert_drop:ratio=0.15", ("expert_drop", "0.15")),
    ("expert_drop:ratio=0.15 refit", ("expert_drop refit", "0.15")),
    ("channel_prune:ratio=0.5,score=camera", ("channel_prune:score=camera", "0.5")),
    ("low_rank:method=shared_basis,ratio=0.25", ("low_rank:method=shared_basis", "0.25")),
    ("wanda:sparsity=2:4,gate=true", ("wanda:gate=true", "2:4")),
    ("channel_prune:ratio=0.3333,score=s low_rank:method=b,ratio=0.25", ("channel_prune:score=s low_rank:method=b", "0.5")),
    ("channel_prune:ratio=0.143,score=s low_rank:method=b,ratio=0.125", ("channel_prune:score=s low_rank:method=b (0.143, then 0.125)", "0.17")),
])  # fmt: skip
def test_steps_without_their_amounts(steps: str, parted: tuple[str, str]):
    assert tables.parted(steps) == parted


@pytest.mark.parametrize(("value", "told"), [
    (0.0123456, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (0.00001234, "0.0000123"), (123.4, "123"),
])  # fmt: skip
def test_three_digits_that_say_something(value: float, told: str):
    assert tables.number(value) == told
