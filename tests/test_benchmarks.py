"""Benchmarks are run by hand and seldom: that they still find what they import, share one harness and save one form."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SHARED = {"harness", "tables", "figures", "pages", "zoo"}
FILES = sorted(FOLDER.glob("*.py"))
SCRIPTS = [path for path in FILES if path.stem not in SHARED]
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts are run with their folder in front of the path."""
    monkeypatch.syspath_prepend(str(FOLDER))


def loaded(script: Path) -> ModuleType:
    """A script by its path, since `families` is also the name of what the tests' models are in."""
    name = f"benchmark_{script.stem}"
    spec = importlib.util.spec_from_file_location(name, script)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for annotations
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@by_script
def test_a_benchmark_finds_what_it_imports(script: Path):
    assert callable(loaded(script).main)


@by_script
def test_a_benchmark_tells_how_it_is_asked(script: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        loaded(script).main()
    assert ended.value.code == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_script_takes_from_another(path: Path):
    stems = {script.stem for script in SCRIPTS}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not stems & {name.partition(".")[0] for name in names}, ast.unparse(node)


@by_script
def test_what_all_scripts_do_is_done_by_the_harness(script: Path):
    text = script.read_text(encoding="utf-8")
    shared = (
        "ArgumentParser(",
        "ProcessPoolExecutor",
        "date.today",
        "machine()",
        "write_text(json.dumps(body",
    )
    assert [call for call in shared if call in text] == []


def test_results_are_saved_with_their_date_machine_and_versions(tmp_path: Path):
    harness = importlib.import_module("harness")
    harness.save(tmp_path / "rows.json", {"results": {"a": 1}})
    harness.save(None, {"results": {}})
    body = json.loads((tmp_path / "rows.json").read_text())
    assert list(body) == ["date", "machine", "versions", "results"]
    assert body["results"] == {"a": 1}


def test_a_step_without_text_is_tried_once_and_one_with_text_on_every_sample():
    harness = importlib.import_module("harness")
    bench = harness.Bench("mixtral", stride=80, samples=2)
    assert len(bench.heldout.ids) == 3
    rounded = bench.sampled(
        ["rtn:bits=4,group_size=32"], 2, lambda view: {"left": harness.left_of(bench, view)}
    )
    assert list(rounded) == ["kl", "ci95", "left", "perplexity_ratio", "seconds"]
    assert len(rounded["kl"]) == 1
    assert rounded["kl"][0] > 0
    assert rounded["left"] < 0.35
    dropped = bench.sampled(
        ["expert_drop:ratio=0.25"], 2, lambda view: {"left": harness.left_of(bench, view)}
    )
    assert (len(dropped["kl"]), dropped["left"]) == (2, 0.75)
    assert dropped["kl"][0] > rounded["kl"][0]
