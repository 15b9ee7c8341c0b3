"""The manifest: its bytes are what they ever were, what is read is what was written, and damage is one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moespresso import api
from moespresso.checkpoint import MANIFEST, Manifest
from moespresso.core.errors import UserError
from moespresso.core.unit import Unit
from moespresso.run import Recipe

# Order and names are part of the file's bytes, which the same recipe must give again.
KEYS = [
    "moespresso", "identity", "source", "recipe", "plan", "cost", "experts", "family", "target", "stock", "layout",
    "packing", "plugin", "layers", "fitted", "coverage", "scores", "protected", "files", "nonfinite", "warnings", "notes",
    "seed", "versions",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(zoo: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("manifest") / "out"
    api.press(zoo("mixtral"), out=out, steps=["expert_drop:ratio=0.25,score=aimer", "rtn:group_size=8"])
    return out


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """A folder whose manifest is the pressed one's with some keys changed; None takes a key out."""

    def _write(changes: dict[str, Any]) -> Path:
        body = json.loads((folder / MANIFEST).read_text()) | changes
        kept = {name: value for name, value in body.items() if value is not None or name not in changes}
        (tmp_path / MANIFEST).write_text(json.dumps(kept))
        return tmp_path

    return _write


def test_its_keys_and_their_order(folder: Path):
    body = json.loads((folder / MANIFEST).read_text())
    assert list(body) == KEYS
    assert list(body["source"]) == ["name", "family", "digest"]
    assert list(body["files"]["README.md"]) == ["bytes", "sha256"]
    assert list(body["files"])[-1] == "README.md"


def test_what_is_read_is_written_to_the_same_bytes(folder: Path):
    read = Manifest.load(folder)
    assert read.to_json() == (folder / MANIFEST).read_text()
    assert Unit(0, "experts", 3) in read.scores
    assert read.plan.as_dict() == json.loads((folder / MANIFEST).read_text())["plan"]


def test_the_recipe_in_it_asks_for_the_same_again(folder: Path, zoo: Callable[[str], Path], tmp_path: Path):
    recipe = Recipe.model_validate(dict(Manifest.load(folder).recipe))
    api.press(zoo("mixtral"), out=tmp_path / "again", recipe=recipe)
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


def test_that_experts_lie_apart_is_said_only_where_it_is_so(damaged: Callable[[dict[str, Any]], Path]):
    read = Manifest.load(damaged({"apart": True}))
    assert read.apart
    assert list(json.loads(read.to_json())) == [*KEYS, "apart"]


def test_a_folder_of_a_version_that_said_less_is_read(damaged: Callable[[dict[str, Any]], Path]):
    said_since = ("layout", "packing", "coverage", "fitted", "notes")
    read = Manifest.load(damaged(dict.fromkeys(said_since)))
    assert (read.layout, read.packing, read.notes) == (None, "", ())


def test_what_a_later_version_says_is_passed_over(damaged: Callable[[dict[str, Any]], Path]):
    assert "heal" not in json.loads(Manifest.load(damaged({"heal": 1})).to_json())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"identity": None, "files": None}, "lacks files, identity: it was changed after it was written"),
        ({"plan": {}}, "is damaged ('stages' is missing): press the model again with --no-resume"),
        ({"plan": 3}, "is damaged ("),
        ({"cost": {"bytes": 1}}, "is damaged ("),
        ({"files": [1]}, "is damaged ("),
        ({"scores": {"Q3": 1.0}}, "is damaged ('Q3' is not a unit address"),
    ],
)
def test_damage_is_told_in_one_sentence(
    damaged: Callable[[dict[str, Any]], Path], changes: dict[str, Any], words: str
):
    folder = damaged(changes)
    with pytest.raises(UserError) as caught:
        Manifest.load(folder)
    assert f"{folder / MANIFEST} {words}" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_what_is_no_object_is_damaged(tmp_path: Path, text: str):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        Manifest.load(tmp_path)
