"""docs/extending.md is true: every listing is one file, every command is run, and what is promised beside them holds."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import moespresso
from conftest import Zoo
from moespresso import api
from moespresso.build import Tensors, open_view
from moespresso.cli import main
from moespresso.core import registry
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan
from moespresso.core.registry import methods, parse_step
from moespresso.effect import price
from moespresso.formats import codecs
from moespresso.methods import _scores, scores
from moespresso.report import describe_methods
from moespresso.run import Recipe
from moespresso.statistics import registry as statistics
from test_scores import answer, kept_by, measured, observe, reference, tokens_for
from test_slim import OPTIONS, proven

PAGE = (Path(__file__).parents[1] / "docs/extending.md").read_text(encoding="utf-8")
SECTIONS = {"a quantizer": "mean_scale", "a score": "loudest", "a codec": "powers", "an exporter": "toy"}
FILES = dict(re.findall(r"`mine/(\w+)\.py`:\n\n```python\n(.*?)```", PAGE, re.DOTALL))
STEPS = {"mean_scale": "group_size=32", "powers": ""}
# What a command is, and what it is said to print.
COMMANDS = [
    (lines.partition("\n")[0], lines.splitlines()[1:])
    for block in re.findall(r"```\n(\$.*?)```", PAGE, re.DOTALL)
    for lines in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
]
REGISTERED: list[dict[str, Any]] = [
    registry._METHODS,
    statistics._STATISTICS,
    _scores._SCORES,
    importlib.import_module("moespresso.formats.codec")._CODECS,
]


@pytest.fixture(scope="module", autouse=True)
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A package `mine` of the page's listings, importable in this file alone; what it registers is taken back."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "mine").mkdir()
    (folder / "mine/__init__.py").touch()
    for name, code in FILES.items():
        (folder / f"mine/{name}.py").write_text(code, encoding="utf-8")
    before = [dict(known) for known in REGISTERED]
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for known, those in zip(REGISTERED, before, strict=True):
        known.clear()
        known.update(those)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def toys(mine: Path) -> None:
    for name in FILES:
        importlib.import_module(f"mine.{name}")


@pytest.fixture(scope="module")
def workplace(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page's commands are run, one after the other."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "MODEL").symlink_to(source)
    (folder / "notes.txt").write_bytes(text.read_bytes())
    return folder


def test_every_kind_is_one_file():
    rows = re.findall(r"^\| (an? [^|(]*?) (?:of experts |\([^|]*\) )?\| one \|", PAGE, re.MULTILINE)
    assert rows == list(SECTIONS)
    for title, name in SECTIONS.items():
        section = PAGE.partition(f"\n## {title[0].upper()}{title[1:]}\n")[2].partition("\n## ")[0]
        assert re.findall(r"`mine/(\w+)\.py`:", section) == [name]
    assert list(FILES) == list(SECTIONS.values())
    assert len(PAGE.splitlines()) < 280
    assert len(COMMANDS) == 8


def test_files_in_the_tree_that_the_page_names_exist():
    named = re.findall(r"`((?:methods|statistics|formats|export|run|model)/\w+\.py)`", PAGE)
    assert len(named) > 8
    assert all((Path(moespresso.__file__).parent / name).is_file() for name in named)


@pytest.mark.parametrize("command", COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_command_does_what_the_page_says(
    command: tuple[str, list[str]], workplace: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest,
):  # fmt: skip
    line, wanted = command
    words = shlex.split(line)
    if words[:2] == ["python", "-c"]:  # imports the file first, which `use` does elsewhere
        importlib.import_module(words[2].split()[1])
        words = words[2:]
    monkeypatch.chdir(workplace)
    short = ["--samples", "8", "--length", "24"] if "--text" in words else []
    refused = wanted[0].startswith("moespresso: ")
    assert main([*words[1:], *short]) == (2 if refused else 0)
    told = capsys.readouterr()
    assert wanted[0].strip() in (told.err if refused else told.out)


# The quantizer and the codec


@pytest.fixture(scope="module")
def pressed(source: Path, toys: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The source, pressed by either."""
    made = {name: tmp_path_factory.mktemp(name) / "out" for name in STEPS}
    for name, settings in STEPS.items():
        api.press(source, out=made[name], steps=[f"{name}:use=mine.{name},{settings}"], target="plugin")
    return made


def decoded(folder: Path, name: str) -> Tensor:
    with Tensors(folder) as tensors:
        return next(tensors.whole(piece) for piece in open_view(folder).pieces if piece.name == name).float()


@pytest.mark.parametrize("name", list(STEPS))
def test_it_is_verified_byte_for_byte_and_priced_by_its_parts(
    name: str, source: Path, pressed: dict[str, Path]
):
    out = pressed[name]
    proven(out, source)
    plan = Plan.from_json(json.dumps(json.loads((out / "moespresso.json").read_text())["plan"]))
    stored = sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    assert price(plan, open_view(source).source).bytes == stored


MATRIX = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def test_mean_scale_is_its_formula(source: Path, pressed: dict[str, Path]):
    weights = load_file(source / "model.safetensors")[MATRIX].float()
    found = decoded(pressed["mean_scale"], MATRIX)
    for row, group in ((0, 0), (7, 2)):
        part = weights[row, group * 32 : group * 32 + 32]
        scale = (3 * part.abs().mean() / 8).to(torch.float32)
        wanted = (part / scale).round().clamp(-8, 7) * scale
        torch.testing.assert_close(found[row, group * 32 : group * 32 + 32], wanted, rtol=0.01, atol=1e-6)


def test_powers_are_their_formula(source: Path, pressed: dict[str, Path]):
    weights = load_file(source / "model.safetensors")[MATRIX].float()
    found = decoded(pressed["powers"], MATRIX)
    largest = weights.abs().amax(-1, keepdim=True)
    wanted = weights.sign() * largest * 2 ** -(largest / weights.abs()).log2().round()
    torch.testing.assert_close(found, wanted, rtol=0.01, atol=1e-6)
    loaded = moespresso.load(pressed["powers"], dtype="float32").state_dict()
    assert any(torch.equal(found, each) for stack in loaded.values() if stack.ndim == 3 for each in stack)


def test_powers_are_trimmed_afterwards(pressed: dict[str, Path], text: Path, tmp_path: Path):
    out = tmp_path / "out"
    steps = ["expert_drop:keep=6"]
    api.press(pressed["powers"], out=out, steps=steps, texts=[text], target="plugin", **OPTIONS)
    proven(out, pressed["powers"])
    api.export(out, to="plain", out=tmp_path / "plain")
    assert not open_view(tmp_path / "plain").formats


# The score


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_loudest_experts_are_kept(family: str, reverse: bool, zoo: Zoo, toys: None):
    view, model = open_view(zoo(family)), reference(zoo(family), torch.float64)
    batches = tokens_for(view)
    seen = observe(model, batches)
    step = parse_step({"use": "mine.loudest", "kind": "expert_drop", "score": "loudest", "ratio": 0.5,
                       "reverse": reverse, "protect_super": False})  # fmt: skip
    assert step.needs() == {"peaks"}
    kept = kept_by(step.decide(measured(view, batches, "peaks"), view.source))
    for layer in view.source.moe_layers:
        peaks = [0.0] * layer.experts
        for hidden, experts in zip(seen[layer.index].hidden, seen[layer.index].index.tolist(), strict=True):
            for expert in experts:
                peaks[expert] = max(peaks[expert], float(answer(model, layer.index, expert, hidden).norm()))
        ranked = sorted(range(layer.experts), key=lambda expert: peaks[expert], reverse=not reverse)
        size = layer.experts // layer.groups
        first = {
            group: [e for e in ranked if e // size == group][: size // 2] for group in range(layer.groups)
        }
        assert sorted(kept[layer.index]) == sorted(expert for some in first.values() for expert in some)


def test_a_score_that_sees_text_protects_super_experts_and_asks_for_text(source: Path, toys: None):
    assert parse_step("expert_drop:score=loudest").needs() == {"peaks", "routing"}
    assert scores()["loudest"].formula == "max over X_j of ||f||"
    with pytest.raises(UserError, match="these steps see real text"):
        api.plan(source, steps=["expert_drop:score=loudest"])


def test_a_recipe_imports_the_file_of_its_score(source: Path, text: Path, tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {source}\ncalibration: {{texts: [{{path: {text}}}], samples: 4, length: 16}}\n"
        "steps:\n  - {score: loudest, keep: 6, kind: expert_drop, use: mine.loudest}\n"
    )
    asked = Recipe.load(recipe)
    assert asked.steps == (parse_step("expert_drop:score=loudest,keep=6"),)
    plan = api.plan(source, recipe=asked)
    assert plan == api.plan(source, recipe=asked, steps=["expert_drop:keep=6,use=mine.loudest,score=loudest"])
    assert [len(each.keep or ()) for each in plan.stages[0].treatments.values()] == [6, 6, 6]


def test_the_manual_says_the_formula_of_every_score_in_the_tree():
    (told,) = describe_methods("expert_drop")
    words = " ".join(told["doc"].split())
    own = {name: score for name, score in scores().items() if score.of.__module__ == _scores.__name__}
    assert len(own) == 11
    # `ean`, `man` and `msan` are told beside one another.
    assert [name for name, score in own.items() if f"{name} {score.formula}" not in words] == ["man", "msan"]


# The exporter


@pytest.fixture(scope="module")
def exported(packed: Path, toys: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    api.export(packed, to="toy", out=out)
    return out


def test_the_toy_layout_holds_the_same_weights(packed: Path, exported: Path):
    section = json.loads((exported / "config.json").read_text())["quantization_config"]
    assert section == {"quant_method": "toy", "bits": 4, "group_size": 32}
    stored = load_file(exported / "model.safetensors")
    assert stored[MATRIX.replace("weight", "toy_values")].dtype == torch.uint8
    assert torch.equal(decoded(exported, MATRIX), decoded(packed, MATRIX))
    proven(exported, packed)
    before, after = (moespresso.load(folder, dtype="float32").state_dict() for folder in (packed, exported))
    assert all(torch.equal(each, after[name]) for name, each in before.items())


def test_the_toy_layout_is_exported_back_and_pressed_on(
    packed: Path, exported: Path, text: Path, tmp_path: Path
):
    api.export(exported, to="compressed-tensors", out=tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(each, after[name]) for name, each in before.items())
    api.press(exported, out=tmp_path / "out", steps=["expert_drop:keep=6"], texts=[text], **OPTIONS)
    proven(tmp_path / "out", exported)


def test_what_the_toy_layout_cannot_hold_is_refused(source: Path, toys: None, exported: Path, tmp_path: Path):
    api.press(source, out=tmp_path / "three", steps=["rtn:bits=3,group_size=32"])
    with pytest.raises(UserError, match=r"toy cannot store values of 3 bits: use bits=4 or bits=8"):
        api.export(tmp_path / "three", to="toy", out=tmp_path / "out")
    (tmp_path / "more").mkdir()
    for file in exported.iterdir():
        if file.is_file():
            (tmp_path / "more" / file.name).write_bytes(file.read_bytes())
    config = json.loads((exported / "config.json").read_text())
    config["quantization_config"]["rotated"] = True
    (tmp_path / "more/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="of which not all is known"):
        open_view(tmp_path / "more")


@pytest.mark.breadth
def test_all_four_register_themselves_for_this_file_alone(toys: None):
    assert {"mean_scale", "powers"} <= methods().keys()
    assert {"toy", "powers"} <= {held.layout for held in codecs()}
    assert "peaks" in statistics._STATISTICS
    assert "loudest" in scores()
    code = "from moespresso import api; print(*(each['kind'] for each in api.methods()))"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"mean_scale", "powers"} & set(alone.split())
