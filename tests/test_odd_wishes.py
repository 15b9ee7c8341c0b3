"""What nobody means and somebody types: places that hold no file, names that are none, weights at the end of the numbers. Each is
one sentence with a cure, before any work, or is read as what it must mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from conftest import write_wide, write_words
from moespresso import api
from moespresso.build import pick_device
from moespresso.cli import main
from moespresso.core.errors import UserError
from moespresso.core.place import typed
from moespresso.core.registry import parse_step
from moespresso.data import Sampling, Source, calibration
from moespresso.data.text import documents
from moespresso.run import Recipe
from test_data import byte_tokenizer

STEP = ["--step", "expert_drop:keep=6"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_wide(home / "m")
    write_words(home / "t.txt", 400)
    return home


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with links to a model and a text."""
    monkeypatch.chdir(tmp_path)
    for name in ("m", "t.txt"):
        (tmp_path / name).symlink_to(made / name)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nowhere").symlink_to("not-there/file")
    return tmp_path


TEXT = ["--text", "t.txt", "--samples", "2", "--length", "16"]
# Of a file system that makes nothing: the kernel's own.
PLACES = {"pipe": "is a device or a pipe", "circle": "a link that leads nowhere", "circle/x": "circle is a link that leads nowhere",
          "nowhere": "a link that leads nowhere", "t.txt/x": "lies under t.txt, which is a file", "m": "is a folder",
          "/proc/x": "cannot be made", "/proc/x/y.json": "cannot be made"}  # fmt: skip


@pytest.mark.parametrize("out", PLACES)
@pytest.mark.parametrize("verb", ["plan", "measure"])
def test_a_result_that_could_not_be_written_is_not_worked_for(
    here: Path, verb: str, out: str, capsys: pytest.CaptureFixture[str]
):
    before = sorted(here.iterdir())
    assert main([verb, "m", "--out", out, *STEP, *TEXT]) == 2
    said = capsys.readouterr().err
    assert PLACES[out] in said
    assert said.startswith("moespresso: --out")
    assert "Traceback" not in said
    assert "measure layers" not in said
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("out", ["circle", "circle/x", "nowhere", "/proc/x", "pipe"])
def test_nor_a_folder(here: Path, out: str, capsys: pytest.CaptureFixture[str]):
    assert main(["press", "m", "--out", out, *STEP, *TEXT]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_file_that_is_there_and_folders_that_are_not_are_written(here: Path):
    (here / "s.json").write_text("old")
    (here / "link.json").symlink_to("s.json")
    for out in ("s.json", "link.json", "new/deep/s.json"):
        assert main(["measure", "m", "--out", out, *STEP, *TEXT]) == 0
        assert main(["plan", "m", "--out", f"{out}.plan", "--stats", out, *STEP]) == 0


def test_names_that_are_not_utf_8(here: Path, capsys: pytest.CaptureFixture[str]):
    odd = os.fsdecode(b"m\xe9")
    (here / odd).symlink_to("m")
    (here / os.fsdecode(b"t\xe9.txt")).symlink_to("t.txt")
    for words in (["inspect", odd], ["press", "m", "--out", f"o{odd}", *STEP, *TEXT], ["verify", odd],
                  ["measure", odd, "--out", "s.json", *STEP, *TEXT]):  # fmt: skip
        assert main(words) == 2
        assert (
            "has a name that is not UTF-8, which transformers cannot open: rename it"
            in capsys.readouterr().err
        )
    text = ["--text", os.fsdecode(b"t\xe9.txt"), *TEXT[2:]]
    assert main(["press", "m", "--out", "o", *STEP, *text]) == 0
    assert main(["plan", "m", "--out", os.fsdecode(b"p\xe9.json"), *STEP, *text]) == 0


@pytest.mark.parametrize(
    "device", ["meta", "hpu", "privateuseone", "ipu", "lazy", "mkldnn", "cpu:-1", "", "teapot", "meta:0"]
)
def test_devices_that_do_not_compute(device: str):
    with pytest.raises(UserError, match=r"^device '.*' is not to be had here \(.+\): use cpu, cuda or auto$"):
        pick_device(device)
    assert pick_device("cpu") == torch.device("cpu")


RECIPES = {
    "steps: [{kind: expert_drop, 3: 4}]": ":1: .*'3' is no name of a field",
    "seed: 1\nsteps: [{kind: expert_drop, null: 4}]": ":2: .*'null' is no name of a field",
    "? {a: b}\n: 1": ":1: .*a list or a mapping is no name",
    "calibration:\n  [a]: b": ":2: .*a list or a mapping is no name",
    "steps: [{kind: rtn, 1.5: 4}]": "'1.5' is no name",
    "yes: 1": "'yes' is no name",
    "steps: [{use: '.x', kind: y}]": ":1: step 1: `use: .x` cannot be imported",
    "steps: [{use: '', kind: y}]": "cannot be imported",
    "a: " + "[" * 3000: "nested too deep",
    "seed: 2020-13-45": "not YAML text",
}


@pytest.mark.parametrize("text", RECIPES)
def test_recipes(tmp_path: Path, text: str):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"r\.yaml.*{RECIPES[text]}"):
        Recipe.load(file)


def test_one_mapping_may_take_in_another(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text("steps: [&a {kind: expert_drop, keep: 6}, {<<: *a, keep: 4}]\n'seed': 3\n")
    assert [step.keep for step in Recipe.load(file).steps] == [6, 4]
    with pytest.raises(UserError, match="has no setting 3"):
        parse_step({"kind": "expert_drop", 3: 4})


@pytest.mark.parametrize("weight", [1e308, 1.7e308, 5e-324, 1e-300, 3.0])
def test_weights_of_any_size_are_shares(tmp_path: Path, weight: float):
    file = tmp_path / "a.txt"
    file.write_text("some words " * 40)
    rows = calibration([Source(str(file), weight)] * 3, byte_tokenizer(), Sampling(9, 8))
    assert [each["samples"] for each in rows.describe()["sources"]] == [3, 3, 3]


@pytest.mark.parametrize(
    ("said", "meant"),
    [("file:///a/m?x", "/a/m?x"), ("file:///a/m#1", "/a/m#1"), ("FILE:///a", "/a"), ("File://LocalHost/a%20b", "/a b"),
     ("file:///a/%3Fx", "/a/?x"), ("file:/[x", "/[x"), ("file:///m%E9", os.fsdecode(b"/m\xe9"))],
)  # fmt: skip
def test_addresses_of_files(said: str, meant: str):
    assert typed(said) == meant


@pytest.mark.parametrize("said", ["file://[x", "file://[::1]/a", "file:", "FILE://server/a", "file:///a%00b"])
def test_addresses_of_nothing(said: str):
    with pytest.raises(UserError, match=r"not lie on this machine|NUL"):
        typed(said)


@pytest.mark.parametrize(
    "said", ["'t.txt:weight=2'", '"t.txt:weight=2"', " 't.txt':weight=2", "' t.txt : weight = 2 '"]
)
def test_quotes_around_a_text_and_its_options(said: str):
    assert Source.parse(said) == Source("t.txt", 2.0)


@pytest.mark.parametrize(
    ("said", "join"),
    [("yes", True), ("TRUE", True), ("1", True), ("no", False), ("0", False), ("False", False)],
)
def test_join_is_a_switch(said: str, join: bool):
    assert Source.parse(f"a.parquet:join={said}").join is join
    for other in ("maybe", "", "y e s", "2", "on"):
        with pytest.raises(UserError, match="join must be true or false, got"):
            Source.parse(f"a.parquet:join={other}")


def test_inspect_takes_a_file_of_a_checkpoint_as_its_folder(here: Path, caplog: pytest.LogCaptureFixture):
    whole = api.inspect("m")
    for file in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert api.inspect(f"m/{file}") == whole
    other = here / "variant.json"
    other.write_text((here / "m/config.json").read_text())
    for alone in ("m/config.json", str(other)):
        assert any("priced from its config alone" in note for note in api.inspect(alone)["notes"])


ODD_COLUMNS: dict[str, Any] = {
    "nanoseconds": pyarrow.array([1, 2], pyarrow.duration("ns")), "a far time": pyarrow.array([2**48] * 2, pyarrow.timestamp("ms")),
    "a time": pyarrow.array([1, 2], pyarrow.time64("ns")),
    "a long time": pyarrow.array([2**53] * 2, pyarrow.duration("s")), "a far day": pyarrow.array([10**9] * 2, pyarrow.date32()),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_COLUMNS)
def test_columns_that_python_has_no_values_for(tmp_path: Path, name: str):
    table = pyarrow.table({"text": ["rain", "snow"], "odd": ODD_COLUMNS[name]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [each.text for each in documents(Source(str(tmp_path / "a.parquet")), 99)] == ["rain", "snow"]


def test_a_column_that_cannot_be_read_at_all_is_named(tmp_path: Path):
    odd = pyarrow.array([1], pyarrow.timestamp("ns", tz="Nowhere/X"))
    parquet.write_table(pyarrow.table({"text": ["rain"], "odd": odd}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: the column 'odd' holds timestamp.*: leave it out"):
        list(documents(Source(str(tmp_path / "a.parquet")), 99))
