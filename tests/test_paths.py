"""Places as people type them: `~`, quotes, addresses, a file for its folder; whatever it is, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import write_wide, write_words
from moespresso import api
from moespresso.checkpoint import locate
from moespresso.cli import main
from moespresso.core.errors import UserError
from moespresso.core.place import place, typed
from moespresso.data import Source
from moespresso.data.hub import hub_dataset
from moespresso.data.text import documents
from moespresso.run import Recipe

STEP = "expert_drop:keep=6"
BLIND = "expert_drop:keep=6,score=aimer"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a model, a text and a folder whose name has a blank in it."""
    home = tmp_path_factory.mktemp("home")
    write_wide(home / "m")
    write_words(home / "t.txt", 400)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which `~` stands for."""
    folder = Path(shutil.copytree(made, tmp_path / "home"))
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


class TestTyped:
    @pytest.mark.parametrize(
        ("said", "meant"),
        [
            ("~", "{home}"), ("~/m", "{home}/m"), ("~root/x", "/root/x"), ("$HOME/m", "{home}/m"), ("${HOME}/m", "{home}/m"),
            (" ~/m\n", "{home}/m"), ("'~/m'", "{home}/m"), ('"a b"', "a b"), ("file:///a/b%20c", "/a/b c"), ("file:/a", "/a"),
            ("file://localhost/a", "/a"), ("a/", "a/"), ("./~", "./~"), ("a~", "a~"), ("a b/c", "a b/c"), ("C:\\x", "C:\\x"),
            ("$NOT_SET_ANYWHERE/x", "$NOT_SET_ANYWHERE/x"), ("it's", "it's"), ("a:b", "a:b"),
        ],
    )  # fmt: skip
    def test_what_is_meant(self, home: Path, said: str, meant: str):
        assert typed(said) == meant.format(home=home)

    def test_a_path_object_is_not_cut(self, home: Path):
        assert place(Path("~/ m ")) == home / " m "

    @pytest.mark.parametrize(
        ("said", "words"),
        [("", "is empty"), (" \n", "is empty"), ("''", "is empty"), ("a\0b", "NUL"), ("~nobody-here/x", "no user 'nobody-here'"),
         ("file://server/x", "not lie on this machine"), ("file:x", "not lie on this machine")],
    )  # fmt: skip
    def test_what_cannot_be(self, said: str, words: str):
        with pytest.raises(UserError, match=words):
            typed(said)

    def test_the_cure_for_a_file_of_that_name(self, home: Path):
        Path("~nobody-here").write_text("x")
        assert [d.text for d in documents(Source("./~nobody-here"), 99)] == ["x"]


class TestEveryDoor:
    def test_options(self, home: Path):
        text = ["--text", "~/t.txt", "--samples", "2", "--length", "16"]
        assert main(["inspect", "~/m"]) == 0
        assert main(["inspect", "~/m/config.json"]) == 0
        assert main(["measure", "~/m", "--out=~/s.json", "--step", STEP, *text]) == 0
        assert main(["plan", "~/m", "--stats=~/s.json", "--out=~/p.json", "--step", STEP]) == 0
        assert main(["build", "~/m", "--plan=~/p.json", "--out=~/built"]) == 0
        assert (
            main(["press", "~/m", "--out=~/pressed", "--step", STEP, "--text=~/t.txt:weight=2", *text[2:]])
            == 0
        )
        assert main(["verify", "~/pressed", "--against", "~/m"]) == 0
        assert (
            main(
                [
                    "evaluate",
                    "~/pressed",
                    "--against",
                    "~/m",
                    "--text",
                    "~/t.txt",
                    "--limit",
                    "1",
                    "--length",
                    "16",
                ]
            )
            == 0
        )
        assert main(["press", "~/m", "--out=~/rounded", "--step", "rtn:group_size=32"]) == 0
        assert main(["export", "~/rounded", "--to", "compressed-tensors", "--out=~/exported"]) == 0
        assert {"s.json", "p.json", "built", "pressed", "rounded", "exported"} <= {
            path.name for path in home.iterdir()
        }
        assert not Path("~").exists()
        assert (home / "built/model.safetensors").read_bytes() == (
            home / "pressed/model.safetensors"
        ).read_bytes()

    def test_a_recipe_wherever_it_lies(self, home: Path):
        Path("far").mkdir()
        file = Path("far/r.yaml")
        file.write_text(
            f"model: ~/m\nsteps: ['{STEP}']\ncalibration: {{samples: 2, length: 16, texts: [{{path: ~/t.txt}}]}}\n"
        )
        recipe = Recipe.load(file)
        assert (recipe.model, recipe.calibration.texts) == (str(home / "m"), (Source(str(home / "t.txt")),))
        shutil.copy(file, home / "r.yaml")
        assert Recipe.load("~/r.yaml") == recipe
        assert main(["press", "--recipe=~/r.yaml", "--out=~/o"]) == 0

    @pytest.mark.parametrize(
        "field", ["model: ''", "model: ~nobody-here/m", "calibration: {texts: [{path: ~nobody-here/t}]}"]
    )
    def test_a_recipe_that_cannot_be_names_its_line(self, tmp_path: Path, field: str):
        (tmp_path / "r.yaml").write_text(f"seed: 3\n{field}\n")
        with pytest.raises(UserError, match=r"r\.yaml:2: .*(is empty|no user)"):
            Recipe.load(tmp_path / "r.yaml")

    @pytest.mark.parametrize("kind", [str, Path])
    def test_python(self, home: Path, kind: Callable[[str], Any]):
        more: dict[str, Any] = {"samples": 2, "length": 16, "texts": [kind("~/t.txt")], "steps": [STEP]}
        api.measure(kind("~/m"), out=kind("~/s"), **more)
        api.plan(kind("~/m"), stats=kind("~/s"), out=kind("~/p"), steps=[STEP])
        report = api.build(kind("~/m"), plan=kind("~/p"), out=kind("~/o"))
        assert report.out == str(home / "o")
        assert api.verify(kind("~/o"), against=kind("~/m"))["ok"]
        assert api.evaluate(kind("~/o"), texts=[Source("~/t.txt")], limit=1, length=16)["tokens"]
        assert api.load(kind("~/o")).config.num_local_experts == 6

    def test_a_plan_says_the_same_however_its_text_was_named(self, home: Path):
        made = [api.plan("~/m", texts=[text], steps=[STEP], samples=2, length=16).to_json()
                for text in ("~/t.txt", str(home / "t.txt"), f"file://{home}/t.txt", f"'{home}/t.txt' ")]  # fmt: skip
        assert len(set(made)) == 1
        assert str(home) not in made[0]


class TestModel:
    @pytest.mark.parametrize(
        "said", ["m/", "m/config.json", "m/model.safetensors", "'m'", " m\n", "./m", "home/../m"]
    )
    def test_something_in_it(self, home: Path, said: str):
        os.chdir(home)
        (home / "home").mkdir()
        assert locate(said).resolve() == home / "m"
        assert main(["inspect", said]) == 0

    def test_the_folder_around_it(self, home: Path, caplog: pytest.LogCaptureFixture):
        assert locate(home) == home / "m"
        assert "taken as the checkpoint in it" in caplog.text
        shutil.copytree(home / "m", home / "n")
        with pytest.raises(UserError, match=r"holds 2 of them \(m, n\): give the folder of one"):
            locate(home)
        assert locate(home / "n") == home / "n"

    def test_the_hub_caches_own_folder(self, home: Path):
        cache = home / "models--owner--name"
        for revision in ("abc", "def"):
            shutil.copytree(home / "m", cache / "snapshots" / revision)
        with pytest.raises(UserError, match=r"holds 2 of them \(abc, def\)"):
            locate(cache)
        (cache / "refs").mkdir()
        (cache / "refs/main").write_text("def\n")
        assert locate(cache) == locate(cache / "snapshots") == cache / "snapshots/def"

    @pytest.mark.parametrize("name", ["m.gguf", "pytorch_model.bin", "x.txt"])
    def test_a_file_that_is_none(self, home: Path, name: str):
        (home / name).write_bytes(b"x")
        with pytest.raises(UserError, match="give the folder of"):
            locate(home / name)

    @pytest.mark.parametrize(
        ("said", "name", "revision"),
        [
            ("owner/name", "owner/name", None), ("owner/name/", "owner/name", None), ("owner/name@v1", "owner/name", "v1"),
            ("https://huggingface.co/owner/name", "owner/name", None), ("huggingface.co/owner/na.me-7B", "owner/na.me-7B", None),
            ("http://hf.co/owner/name/", "owner/name", None), ("hf://owner/name@v1", "owner/name", "v1"),
            ("https://huggingface.co/owner/name/tree/v1", "owner/name", "v1"),
            ("https://huggingface.co/owner/name/blob/main/config.json?download=true", "owner/name", "main"),
        ],
    )  # fmt: skip
    def test_the_hub(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, said: str, name: str, revision: str | None
    ):
        asked: list[tuple[str, str | None]] = []

        def fetch(name: str, revision: str | None, **_: object) -> str:
            asked.append((name, revision))
            return str(home / "m")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
        assert locate(said) == home / "m"
        assert asked == [(name, revision)]

    def test_a_folder_of_that_name_comes_first(self, home: Path):
        shutil.copytree(home / "m", "owner/name")
        assert locate("owner/name") == Path("owner/name")

    def test_a_dataset_is_no_model(self):
        with pytest.raises(UserError, match="no model but one of the hub's datasets"):
            locate("https://huggingface.co/datasets/owner/name")


class TestText:
    @pytest.mark.parametrize(
        ("said", "words"),
        [
            ("a.txt,b.txt", "say --text for each"), ("a.txt:wieght", "behind the file stand options"),
            ("*.txt", "opened by the shell"), ("https://example.org/a.txt", "download it first"),
            ("https://huggingface.co/datasets/owner/name", "--dataset owner/name"), ("nowhere.txt", "give the path"),
            ("x" * 5000, "no such file"), ("a.txt/b", "no such file"), ("wikitext2", "--dataset wikitext2"),
        ],
    )  # fmt: skip
    def test_what_was_probably_meant(self, home: Path, said: str, words: str):
        for name in ("a.txt", "b.txt"):
            Path(name).write_text("x")
        with pytest.raises(UserError, match=words):
            list(documents(Source.parse(said), 99))

    def test_blanks_between_options(self, home: Path):
        assert Source.parse("~/t.txt: weight = 2, field=x") == Source(str(home / "t.txt"), 2.0, "x")

    def test_what_is_neither_a_file_nor_a_folder(self, home: Path):
        os.mkfifo("pipe")
        with pytest.raises(UserError, match="neither a file nor a folder"):
            list(documents(Source("pipe"), 99))

    def test_a_datasets_page(self):
        assert hub_dataset("https://huggingface.co/datasets/owner/name/viewer").repo == "owner/name"
        with pytest.raises(UserError, match=r"say --text \./a/b"):
            hub_dataset("./a/b")


# Each is a user's mistake or no mistake at all; none may end in a traceback.
TYPED = {
    "an empty MODEL": ("inspect", ""),
    "a MODEL that is a sentence": ("inspect", "my own model, please"),
    "a MODEL of NULs": ("inspect", "a\0b"),
    "a very long MODEL": ("inspect", "x" * 5000),
    "a MODEL under a file": ("inspect", "~/t.txt/m"),
    "nobody's home": ("inspect", "~nobody-here/m"),
    "an index": ("inspect", "~/m/nothing.safetensors.index.json"),
    "an empty --out": ("press", "~/m", "--step", BLIND, "--out", ""),
    "home as --out": ("press", "~/m", "--step", BLIND, "--out", "~"),
    "the root as --out": ("press", "~/m", "--step", BLIND, "--out", "/"),
    "the model as --out": ("press", "~/m", "--step", BLIND, "--out", "~/m/"),
    "--out in the model": ("press", "~/m", "--step", BLIND, "--out", "~/m/out"),
    "a file as --out": ("press", "~/m", "--step", BLIND, "--out", "~/t.txt"),
    "--out under a file": ("press", "~/m", "--step", BLIND, "--out", "~/t.txt/out"),
    "a very long --out": ("press", "~/m", "--step", BLIND, "--out", "x" * 5000),
    "--out with a NUL": ("press", "~/m", "--step", BLIND, "--out", "a\0b"),
    "a plan under a file": ("plan", "~/m", "--step", BLIND, "--out", "~/t.txt/p"),
    "a very long plan": ("plan", "~/m", "--step", BLIND, "--out", "x" * 300),
    "an empty plan": ("plan", "~/m", "--step", BLIND, "--out", ""),
    "stats that are a folder": ("plan", "~/m", "--step", STEP, "--out", "p", "--stats", "~/m"),
    "empty stats": ("plan", "~/m", "--step", STEP, "--out", "p", "--stats", ""),
    "a plan that is a folder": ("build", "~/m", "--out", "o", "--plan", "~"),
    "a very long plan to read": ("build", "~/m", "--out", "o", "--plan", "x" * 5000),
    "a recipe that is a folder": ("press", "~/m", "--out", "o", "--recipe", "~/m"),
    "a very long recipe": ("press", "~/m", "--out", "o", "--recipe", "x" * 5000),
    "an empty recipe": ("press", "~/m", "--out", "o", "--recipe", ""),
    "an empty text": ("press", "~/m", "--out", "o", "--step", STEP, "--text", ""),
    "a text of blanks": ("press", "~/m", "--out", "o", "--step", STEP, "--text", " "),
    "a text of options": ("press", "~/m", "--out", "o", "--step", STEP, "--text", ":weight=2"),
    "an empty dataset": ("press", "~/m", "--out", "o", "--step", STEP, "--dataset", ""),
    "samples in another spelling": ("press", "~/m", "--out", "o", "--step", STEP, "--samples", "1e3"),
    "a length in another spelling": ("press", "~/m", "--out", "o", "--step", STEP, "--length", "4k"),
    "no windows": ("evaluate", "~/m", "--text", "~/t.txt", "--limit", "0"),
    "no tokens": ("evaluate", "~/m", "--text", "~/t.txt", "--length", "-1"),
    "a size without an end": ("press", "~/m", "--out", "o", "--step", BLIND, "--size", "9" * 400 + "GB"),
    "an empty size": ("press", "~/m", "--out", "o", "--step", BLIND, "--size", ""),
    "a size of blanks": ("press", "~/m", "--out", "o", "--step", BLIND, "--size", " % "),
    "no step": ("press", "~/m", "--out", "o", "--step", ""),
    "half a step": ("press", "~/m", "--out", "o", "--step", "expert_drop:keep"),
    "a step of commas": ("press", "~/m", "--out", "o", "--step", "expert_drop:,keep=6,, ,"),
    "a step of a very large number": ("press", "~/m", "--out", "o", "--step", "expert_drop:keep=" + "9" * 5000),
    "a step of a number that is none": ("press", "~/m", "--out", "o", "--step", "expert_drop:ratio=nan"),
    "an empty target": ("press", "~/m", "--out", "o", "--step", BLIND, "--target", ""),
    "an empty device": ("press", "~/m", "--out", "o", "--step", STEP, "--text", "~/t.txt", "--samples", "2", "--length", "8", "--device", ""),
    "an empty against": ("verify", "~/m", "--against", ""),
    "an empty layout": ("export", "~/m", "--to", "", "--out", "o"),
    "no result": ("verify", "~"),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPED)
def test_nothing_that_is_typed_ends_in_a_traceback(home: Path, name: str, capsys: pytest.CaptureFixture[str]):
    before = sorted(home.rglob("*"))
    assert main(list(TYPED[name])) == 2
    said = capsys.readouterr().err
    assert said.startswith("moespresso: "), said
    assert said.count("\n") == 1
    assert sorted(home.rglob("*")) == before


FINE = {
    "blanks in a step": ("--step", "expert_drop: keep = 6 , score=aimer"),
    "a comma too many": ("--step", "expert_drop:keep=6,score=aimer,"),
    "a size with a blank": ("--step", "expert_drop:score=aimer", "--size", "90 %"),
    "a size in small letters": ("--step", BLIND, "--size", " 20 gib "),
}


@pytest.mark.parametrize("name", FINE)
def test_what_is_understood(home: Path, name: str):
    assert main(["press", "~/m", "--out", "~/a b/o", *FINE[name]]) == 0
    assert json.loads((home / "a b/o/config.json").read_text())["num_local_experts"] >= 6


def test_the_folder_of_a_plan_is_made(home: Path):
    assert main(["plan", "~/m", "--step", BLIND, "--out", "~/new/folder/p.json"]) == 0
    assert (home / "new/folder/p.json").is_file()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to(home: Path, capsys: pytest.CaptureFixture[str]):
    (home / "locked").mkdir(mode=0o500)
    assert main(["press", "~/m", "--step", BLIND, "--out", "~/locked/o"]) == 2
    assert "change its permissions" in capsys.readouterr().err
