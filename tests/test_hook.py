"""In time: `import moespresso` is light and enough, whenever transformers is imported; without it, stock stops loudly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import families
from moespresso._hook import WATCHED, Watcher, watch
from moespresso.runtime.unequal import install

install()

# What the second layer of a mixtral says, and what stock transformers says to that.
FORBIDDEN = "AmbiguousGlobalPerLayerAttributeError '{}' is a per-layer attribute"
OWN = [
    ({"num_local_experts": 6}, FORBIDDEN.format("num_local_experts")),
    ({"skip": ["mlp+bias"], "num_local_experts": 0}, FORBIDDEN.format("num_local_experts")),
    ({"skip": ["attention"], "num_key_value_heads": 0}, FORBIDDEN.format("num_key_value_heads")),
    ({"skip": ["expert.1", "expert.2+novice"]}, "RuntimeError You set `ignore_mismatched_sizes` to `False`"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One checkpoint for each of OWN."""
    root = tmp_path_factory.mktemp("hook")
    for number, (own, _) in enumerate(OWN):
        config = families.FAMILIES["mixtral"].config(per_layer_config={"1": own})
        families.instantiate(config).save_pretrained(root / str(number))
    return [str(root / str(number)) for number in range(len(OWN))]


def run(code: str) -> list[str]:
    """The lines that a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_moespresso_stock_transformers_stops_loudly(folders: list[str]) -> None:
    said = run(f"""
import sys
from transformers import AutoModelForCausalLM
for folder in {folders}:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("loaded")
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
assert not any(name.startswith("moespresso") for name in sys.modules)
""")
    assert [line[: len(reason)] for line, (_, reason) in zip(said, OWN, strict=True)] == [
        reason for _, reason in OWN
    ]


@pytest.mark.parametrize(
    "imports", [["moespresso", "transformers"], ["transformers.modeling_utils", "moespresso"]], ids=" ".join
)
@pytest.mark.few(1)
def test_importing_moespresso_is_enough(folders: list[str], imports: list[str]) -> None:
    said = run(f"""
import sys
import {imports[0]}
print("torch" in sys.modules)
import {imports[1]}
from transformers import AutoModelForCausalLM
for folder in {folders}:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    print(any(info.values()))
from moespresso._hook import Watcher
print(any(isinstance(finder, Watcher) for finder in sys.meta_path))
""")
    first = "False" if imports[0] == "moespresso" else "True"
    assert said == [first, *["False"] * len(OWN), "False"]


def test_one_watcher_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, WATCHED)
    watch()
    watch()
    assert sum(isinstance(finder, Watcher) for finder in sys.meta_path) == 1


def test_a_module_that_fails_to_run_is_waited_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []
    monkeypatch.setattr("moespresso._hook.WATCHED", "watched_by_moespresso")
    monkeypatch.setattr("moespresso._hook._install", lambda: calls.append("installed"))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "watched_by_moespresso.py").write_text("raise RuntimeError('not yet')")
    watch()
    with pytest.raises(RuntimeError, match="not yet"):
        __import__("watched_by_moespresso")
    (tmp_path / "watched_by_moespresso.py").write_text("ready = 'yes, indeed it is'")
    assert __import__("watched_by_moespresso").ready == "yes, indeed it is"
    assert calls == ["installed"]
    assert not any(isinstance(finder, Watcher) for finder in sys.meta_path)
    monkeypatch.delitem(sys.modules, "watched_by_moespresso")
