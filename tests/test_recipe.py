"""Recipes: what is written is what is asked for, and every mistake names its place."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moespresso.core.errors import UserError
from moespresso.core.registry import parse_step
from moespresso.data import Source
from moespresso.run import Recipe, parse_size

GOLDEN = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
FULL = """\
model: ./tiny
calibration:
  texts:
    - path: text/code.jsonl
      weight: 3
      field: content
    - dataset: wikitext2
      split: validation
  samples: 16
  length: 64
  mode: pack
steps:
  - kind: expert_drop
    keep: 6
    score: routing
  - expert_drop:ratio=0.5,score=random
budget:
  size: 25%
target: vllm
seed: 7
"""


@pytest.fixture
def recipe_file(tmp_path):
    """Write a recipe and give its path."""

    def _write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return _write


def test_a_full_recipe_asks_for_what_it_says(recipe_file):
    path = recipe_file(FULL)
    recipe = Recipe.load(path)
    assert recipe.steps == (
        parse_step("expert_drop:keep=6,score=routing"),
        parse_step("expert_drop:ratio=0.5,score=random"),
    )
    code = Source(str(path.parent / "text/code.jsonl"), weight=3, field="content")
    text = recipe.calibration
    assert text.texts == (code, Source("wikitext2", split="validation", hub=True))
    assert (text.samples, text.length, text.mode, recipe.seed) == (16, 64, "pack", 7)
    assert (recipe.target, recipe.budget.size) == ("vllm", "25%")
    assert recipe.model == str(path.parent / "tiny")


def test_what_is_resolved_is_json_and_asks_for_the_same_again(recipe_file, tmp_path):
    recipe = Recipe.load(recipe_file(FULL))
    again = tmp_path / "again.yaml"
    again.write_text(json.dumps(recipe.resolved()))
    assert Recipe.load(again) == recipe


def test_what_is_resolved_stands_in_the_order_of_manifests(recipe_file):
    """Manifests keep it: other bytes of it would be another result."""
    path = recipe_file(FULL)
    code = {"path": f"{path.parent}/text/code.jsonl", "weight": 3.0, "field": "content", "join": False}
    wiki = {"dataset": "wikitext2", "weight": 1.0, "split": "validation", "join": False}
    said = Recipe.load(path).resolved()
    assert list(said) == ["model", "calibration", "steps", "budget", "target", "mtp", "seed"]
    assert json.dumps(said["calibration"]) == json.dumps(
        {"texts": [code, wiki], "samples": 16, "length": 64, "mode": "pack"}
    )
    assert json.dumps(Recipe().resolved()) == (
        '{"calibration": {"texts": [], "samples": 128, "length": 2048, "mode": "auto"}, "steps": [], '
        '"target": "transformers", "mtp": "like_trunk", "seed": 0}'
    )


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_recipes_load(path):
    recipe = Recipe.load(path)
    assert recipe.steps
    assert all(text.hub or Path(text.name).exists() for text in recipe.calibration.texts)


def test_there_are_golden_recipes():
    assert {"demo_quarter", "mixtral-8x7b_drop-two-experts"} <= {path.stem for path in GOLDEN}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (
            "calibration:\n  sampels: 3\n",
            2,
            "unknown field 'sampels' in calibration (did you mean 'samples'?)",
        ),
        (
            "calibration:\n  texts:\n    - path: a\n      wieght: 2\n",
            4,
            "unknown field 'wieght' in calibration.texts (did you mean 'weight'?)",
        ),
        ("stepz: []\n", 1, "unknown field 'stepz' (did you mean 'steps'?)"),
        ("seed: 1\nheal:\n  lora: 8\n", 2, "heal is not available in this version: leave it out"),
        ("export: gguf\n", 1, "export is not available in this version: leave it out"),
        ("evaluate:\n  tasks: [piqa]\n", 1, "evaluate is not available in this version: leave it out"),
        ("budget:\n  memory: 8GiB\n", 2, "budget.memory is not available in this version: leave it out"),
        ("budget:\n  size: 8 gallons\n", 2, "budget.size: size '8 gallons' is not understood"),
        ("target: vlm\n", 1, "target 'vlm' is unknown (did you mean 'vllm'?)"),
        ("calibration:\n  mode: chatty\n", 2, "calibration.mode 'chatty' is unknown (did you mean 'chat'?)"),
        (
            "calibration:\n  samples: 0\n",
            2,
            "calibration.samples: it should be greater than or equal to 1, got 0",
        ),
        ("calibration:\n  samples: true\n", 2, "calibration.samples: it should be a valid integer, got True"),
        ("calibration:\n  texts:\n    - {}\n", 3, "calibration.texts.0: needs either a path or a dataset"),
        ("calibration:\n  texts:\n    - {path: a, dataset: c4}\n", 3, "needs either a path or a dataset"),
        ("calibration:\n  texts:\n    - {path: a, weight: -1}\n", 3, "calibration.texts.0.weight"),
        (
            "steps:\n  - expert_drop\n  - kind: expert_drop\n    kep: 3\n",
            3,
            "step 2: expert_drop has no setting 'kep' (did you mean 'keep'?)",
        ),
        ("steps:\n  - expert_dorp\n", 2, "step 1: step kind 'expert_dorp' is unknown"),
        ("steps:\n  - 7\n", 2, "step 1: step 7 is neither text"),
        (
            "seed: 1\ncalibration:\n  seed: 2\n",
            1,
            "seed and calibration.seed differ: one seed serves both, so leave one out",
        ),
        ("seed: 1\nseed: 2\n", 2, "not valid YAML ('seed' is said twice)"),
        ("steps: [\n", 2, "not valid YAML"),
    ],
)
def test_a_mistake_is_one_sentence_with_file_line_and_field(recipe_file, text, line, words):
    path = recipe_file(text)
    with pytest.raises(UserError) as caught:
        Recipe.load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}:{line}: ")
    assert words in said
    assert "\n" not in said


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n"])
def test_a_file_that_is_no_recipe_is_refused(recipe_file, text):
    with pytest.raises(UserError, match="does not hold a recipe"):
        Recipe.load(recipe_file(text))


def test_a_missing_or_binary_recipe_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "shard.safetensors").write_bytes(b"\xff\x00\x01")
    with pytest.raises(UserError, match="not YAML text"):
        Recipe.load(tmp_path / "shard.safetensors")


def test_a_model_that_may_be_a_hub_id_is_left_alone(recipe_file):
    assert Recipe.load(recipe_file("model: owner/name\n")).model == "owner/name"


def test_the_calibration_seed_alone_is_the_seed(recipe_file):
    recipe = Recipe.load(recipe_file("calibration:\n  seed: 5\n"))
    assert recipe.seed == recipe.resolved()["seed"] == 5


def test_options_are_followed_instead_of_the_recipe_and_the_log_says_so(recipe_file, caplog):
    recipe = Recipe.load(recipe_file(FULL))
    with caplog.at_level(logging.INFO, "moespresso"):
        asked = recipe.with_options(samples=4, size="1GiB", seed=7, texts=["mine.txt"])
    text = asked.calibration
    assert (text.samples, asked.budget.size, text.length, asked.target) == (4, "1GiB", 64, "vllm")
    assert text.texts == (Source("mine.txt"),)
    assert asked.steps == recipe.steps
    said = caplog.messages
    assert "samples: 4 is followed instead of the recipe's 16" in said
    assert any(line.startswith("size: 1GiB") for line in said)
    assert "texts: those given are followed instead of the recipe's" in said
    assert not any(line.startswith("seed") for line in said), "the same seed overrides nothing"


def test_an_option_the_recipe_is_silent_about_needs_no_words(recipe_file, caplog):
    recipe = Recipe.load(recipe_file("steps: [expert_drop]\n"))
    with caplog.at_level(logging.INFO, "moespresso"):
        recipe.with_options(samples=4, seed=3)
    assert not caplog.messages


def test_the_seed_option_overrides_a_calibration_seed(recipe_file):
    recipe = Recipe.load(recipe_file("calibration:\n  seed: 5\n"))
    asked = recipe.with_options(seed=6)
    assert asked.seed == asked.resolved()["seed"] == 6


def test_python_may_give_objects(tmp_path):
    step = parse_step("expert_drop:keep=4")
    source = Source("a.txt", weight=2)
    recipe = Recipe().with_options(
        steps=[step, {"kind": "expert_drop"}], texts=[source, tmp_path], datasets=["c4"]
    )
    assert recipe.steps == (step, parse_step("expert_drop"))
    assert recipe.calibration.texts == (source, Source(str(tmp_path)), Source("c4", hub=True))
    json.dumps(recipe.resolved())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 0}, "calibration.samples: it should be greater"),
        ({"mode": "chatt"}, "did you mean 'chat'"),
        ({"target": "lama.cpp"}, "did you mean 'llama.cpp'"),
        ({"size": "huge"}, "size 'huge' is not understood"),
        (
            {"steps": ["expert_drop:score=raep"]},
            "step 1: expert_drop: score='raep' is unknown (did you mean 'reap'?)",
        ),
        ({"texts": ["a.txt:wait=2"]}, "unknown option 'wait'"),
        ({"stepz": ["expert_drop"]}, "no option 'stepz' (did you mean 'steps'?)"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(options, words):
    with pytest.raises(UserError) as caught:
        Recipe().with_options(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("123456", 123456),
        (123456, 123456),
        ("20GiB", 20 << 30),
        ("1.5GB", 1_500_000_000),
        ("1.5 gb", 1_500_000_000),
        ("512KiB", 512 << 10),
        ("10B", 10),
        ("25%", 250),
        ("33.3 %", 333),
        ("100%", 1000),
    ],
)
def test_sizes(text, expected):
    assert parse_size(text, of=1000) == expected


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "0", "0%", "101%", "1.5", "0.25", "20G", "20 GiB left", "1e9", "nan"]
)
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="is not understood"):
        parse_size(text, of=1000)


@given(st.integers(1, 100), st.integers(1, 1 << 50))
def test_a_share_is_never_more_than_it_says(share, whole):
    size = parse_size(f"{share}%", of=whole)
    assert size <= whole * share / 100 < size + 2


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_recipes_that_come_along_are_read(path: Path):
    recipe = Recipe.load(path)
    assert recipe.steps
    assert all(Path(source.name).is_dir() for source in recipe.calibration.texts if not source.hub)
