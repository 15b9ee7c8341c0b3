"""Kill it anywhere and run it again: the same bytes come out, and nothing that was finished is done twice.

Real processes, real SIGKILLs (see `driver.py`): the child dies at a named line of its own log, the same command is run
once more, and the folder is compared, file by file, with that of a run that nobody disturbed.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import Zoo, write_model
from driver import Driver, Outcome
from families import tensor_files
from moespresso.checkpoint import MANIFEST

SHARDS = 5
SHARD_BYTES = 60_000
KILLED = -9
REAP, AIMER = "expert_drop:keep=5,score=reap", "expert_drop:keep=5,score=aimer"
# A log line at which to die; what follows `begin` has not happened yet, what follows `end` has.
WHILE_MEASURING = [
    "begin measure 0", "begin rename sweep.safetensors", "end remember 0", "end measure 1", "end remember 2",
    "begin rename stats.json", "end rename stats.json", "end unlink sweep.safetensors",
]  # fmt: skip
WHILE_BUILDING = [
    "begin shard model-00001-of-00005.safetensors", "begin rename model-00003-of-00005.safetensors",
    "end rename model-00003-of-00005.safetensors", "end record model-00003-of-00005.safetensors",
    "end record model-00005-of-00005.safetensors", "begin rename model.safetensors.index.json",
    "end rename config.json", "begin rename tokenizer.json", "end rename README.md", "begin rename moespresso.json",
    "end rename moespresso.json", "begin clear .moespresso", "begin unlink journal.jsonl", "begin unlink lock",
]  # fmt: skip


class Press:
    """One command, run as often as a test likes."""

    def __init__(self, driver: Driver, source: Path, text: Path, out: Path) -> None:
        self._driver, self._source, self._text, self.out = driver, source, text, out

    def __call__(self, *steps: str, more: tuple[str, ...] = (), **job: object) -> Outcome:
        argv = ["press", str(self._source), "--out", str(self.out), "--json"]
        for step in steps:
            argv += ["--step", step]
        if any("aimer" not in step for step in steps):
            argv += ["--text", str(self._text), "--samples", "6", "--length", "32"]
        return self._driver.run([*argv, *more], shard_bytes=SHARD_BYTES, **job)

    def into(self, out: Path) -> "Press":
        return Press(self._driver, self._source, self._text, out)


@pytest.fixture(scope="module")
def source(zoo: Zoo) -> Path:
    return zoo("mixtral")


@pytest.fixture
def press(driver: Driver, source: Path, text: Path, tmp_path: Path) -> Press:
    return Press(driver, source, text, tmp_path / "out")


@pytest.fixture(scope="module")
def reference(
    driver: Driver, source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """What undisturbed runs write, by step."""
    folder = tmp_path_factory.mktemp("undisturbed")
    made = {}
    for step in (REAP, AIMER):
        whole = Press(driver, source, text, folder / step[-5:])
        assert whole(step).code == 0
        made[step] = contents(whole.out)
    assert len([name for name in made[REAP] if name.endswith(".safetensors")]) == SHARDS
    return made


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same(found: dict[str, bytes], wanted: dict[str, bytes]) -> bool:
    """Compare by name first: a difference of megabytes is no help to a reader."""
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    return True


def identity_of(path: Path) -> tuple[int, int]:
    """What changes when a file is written again."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def sentence(outcome: Outcome) -> str:
    """The one line that a refused run says, apart from progress."""
    assert outcome.code == 2, outcome.stderr
    assert outcome.stdout == ""
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("moespresso: ")]
    assert "Traceback" not in outcome.stderr
    assert len(lines) == 1, outcome.stderr
    assert outcome.stderr.rstrip().endswith(lines[0])
    return lines[0]


class TestKilled:
    @pytest.mark.parametrize("line", WHILE_MEASURING)
    @pytest.mark.few(2)
    def test_while_measuring(self, press: Press, reference: dict[str, dict[str, bytes]], line: str):
        first = press(REAP, kill=line)
        assert first.code == KILLED
        assert not (press.out / MANIFEST).exists()
        second = press(REAP)
        assert second.code == 0, second.stderr
        assert same(contents(press.out), reference[REAP])
        finished = len(first.numbers("end rename sweep.safetensors"))
        assert second.numbers("begin measure") == [str(layer) for layer in range(finished, 3)]

    @pytest.mark.parametrize("line", WHILE_BUILDING)
    @pytest.mark.few(2)
    def test_while_building(self, press: Press, reference: dict[str, dict[str, bytes]], line: str):
        first = press(AIMER, kill=line)
        assert first.code == KILLED
        finished = {name: identity_of(press.out / name) for name in first.numbers("end record")}
        second = press(AIMER)
        assert second.code == 0, second.stderr
        assert same(contents(press.out), reference[AIMER])
        assert finished == {name: identity_of(press.out / name) for name in finished}
        assert not set(second.numbers("begin shard")) & finished.keys()

    @pytest.mark.parametrize("more", [4, 1])
    @pytest.mark.breadth
    def test_again_and_again(self, press: Press, more: int):
        """Two steps, the second measured on what the first leaves: three layers each, one memory of each. Every run may do
        some things more than the one before."""
        steps = "expert_drop:keep=6,score=reap", "expert_drop:keep=5,score=frequency"
        whole = press.into(press.out.with_name("whole"))
        assert whole(*steps).code == 0
        events: list[str] = []
        for patience in range(6, 100, more):
            outcome = press(*steps, kill_after=patience)
            events += outcome.events
            if outcome.code != KILLED:
                break
        assert outcome.code == 0, outcome.stderr
        assert same(contents(press.out), contents(whole.out))
        assert events.count("end rename sweep.safetensors") == 6
        records = [line for line in events if line.startswith("end record")]
        assert len(records) == len(set(records)) == SHARDS

    def test_trouble_seen_before_the_kill_is_not_forgotten(
        self, driver: Driver, text: Path, tmp_path: Path, reference: dict[str, dict[str, bytes]]
    ):
        source = write_model("mixtral", tmp_path / "source")
        spoil(source, "model.layers.0.block_sparse_moe.experts.4.w1.weight")
        spoil(source, "model.layers.2.input_layernorm.weight")
        allow = ("--allow-nonfinite",)
        whole, press = (Press(driver, source, text, tmp_path / name) for name in ("whole", "out"))
        assert whole(REAP, more=allow).code == 0
        assert press(REAP, more=allow, kill="end remember 1").code == KILLED
        assert press(REAP, more=allow).code == 0
        warnings = json.loads((whole.out / MANIFEST).read_text())["warnings"]
        assert [line for line in warnings if "layers.0.block_sparse_moe.experts.4.w1" in line]
        assert same(contents(press.out), contents(whole.out))

    @pytest.mark.parametrize(
        "more", [("--text", "other.txt"), ("--samples", "5"), ("--seed", "1"), ("--target", "vllm")]
    )
    @pytest.mark.few(1)
    def test_other_settings_are_refused(self, press: Press, more: tuple[str, ...], text: Path):
        press(REAP, kill="end remember 0")
        other = press.out.parent / "other.txt"
        other.write_text(text.read_text()[::-1])
        more = tuple(str(other) if word == other.name else word for word in more)
        before = contents(press.out)
        assert "unfinished run with other settings" in sentence(press(REAP, more=more))
        assert same(contents(press.out), before)

    @pytest.mark.parametrize(
        "line", ["begin rename model-00003-of-00005.safetensors", "begin rename README.md"]
    )
    @pytest.mark.few(1)
    def test_starting_over_with_other_settings_leaves_nothing_of_the_old(self, press: Press, line: str):
        other = "expert_drop:keep=3,score=aimer"
        whole = press.into(press.out.with_name("whole"))
        assert whole(other).code == 0
        assert press(AIMER, kill=line).code == KILLED
        assert press(other, more=("--no-resume",)).code == 0
        assert same(contents(press.out), contents(whole.out))

    @pytest.mark.parametrize(
        "line", ["end unlink moespresso.json", "end unlink model-00002-of-00005.safetensors"]
    )
    @pytest.mark.few(1)
    def test_while_clearing_a_finished_folder(
        self, press: Press, reference: dict[str, dict[str, bytes]], line: str
    ):
        assert press(AIMER).code == 0
        assert press(AIMER, more=("--no-resume",), kill=line).code == KILLED
        assert press(AIMER, more=("--no-resume",)).code == 0
        assert same(contents(press.out), reference[AIMER])


def spoil(source: Path, name: str) -> None:
    """Put a NaN into one tensor."""
    path = tensor_files(source)[name]
    tensors = load_file(path)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


class TestFinished:
    def test_the_same_command_does_nothing(self, press: Press, reference: dict[str, dict[str, bytes]]):
        assert press(AIMER).code == 0
        before = {path: identity_of(path) for path in press.out.iterdir()}
        again = press(AIMER)
        assert again.code == 0
        assert again.events == ()
        assert before == {path: identity_of(path) for path in press.out.iterdir()}
        assert "already finished" in " ".join(json.loads(again.stdout)["notes"])

    def test_the_same_command_tells_the_same(self, press: Press):
        first, again = (json.loads(press(AIMER).stdout) for _ in range(2))
        for key in ("plan", "bytes", "params", "scores", "warnings", "recipe"):
            assert first[key] == again[key]

    def test_other_settings_are_refused(self, press: Press, reference: dict[str, dict[str, bytes]]):
        assert press(AIMER).code == 0
        assert "another finished result" in sentence(press("expert_drop:keep=4,score=aimer"))
        assert same(contents(press.out), reference[AIMER])

    def test_a_changed_source_is_another_source(self, driver: Driver, text: Path, tmp_path: Path):
        source = write_model("mixtral", tmp_path / "source")
        press = Press(driver, source, text, tmp_path / "out")
        assert press(AIMER).code == 0
        write_model("mixtral", source, seed=1)
        assert "another finished result" in sentence(press(AIMER))

    def test_a_damaged_manifest_can_be_started_over(
        self, press: Press, reference: dict[str, dict[str, bytes]]
    ):
        assert press(AIMER).code == 0
        (press.out / MANIFEST).write_text('{"files"')
        sentence(press(AIMER))
        assert press(AIMER, more=("--no-resume",)).code == 0
        assert same(contents(press.out), reference[AIMER])


class TestDeterminism:
    def test_another_folder_another_name_for_the_text(
        self, press: Press, driver: Driver, source: Path, text: Path
    ):
        """Neither where the result lies nor where the text lay shows in it."""
        moved = press.out.parent / "elsewhere" / text.name
        moved.parent.mkdir()
        shutil.copy(text, moved)
        assert press(REAP).code == 0
        other = Press(driver, source, moved, press.out.parent / "a" / "deeper" / "one")
        assert other(REAP).code == 0
        assert same(contents(press.out), contents(other.out))

    def test_no_path_is_published(self, press: Press, text: Path):
        assert press(REAP).code == 0
        told = [name for name, content in contents(press.out).items() if str(text.parent).encode() in content
                or str(press.out.parent).encode() in content]  # fmt: skip
        assert told == []


class TestFullDisk:
    """The disk runs full at a place of the log, or for real: a small file system of our own."""

    @pytest.mark.parametrize(
        "line",
        ["begin rename sweep.safetensors", "begin rename model-00003-of-00005.safetensors", "begin rename README.md",
         "begin record model-00002-of-00005.safetensors"],
    )  # fmt: skip
    @pytest.mark.few(2)
    def test_at(self, press: Press, reference: dict[str, dict[str, bytes]], line: str):
        first = press(REAP, full=line)
        assert "free some space" in sentence(first)
        assert not (press.out / MANIFEST).exists()
        finished = {name: identity_of(press.out / name) for name in first.numbers("end record")}
        assert press(REAP).code == 0
        assert same(contents(press.out), reference[REAP])
        assert finished == {name: identity_of(press.out / name) for name in finished}

    @pytest.mark.parametrize("free_kib", [0, 4, 24, 60, 130, 250, 280, 296])
    @pytest.mark.few(2)
    def test_for_real(
        self, press: Press, reference: dict[str, dict[str, bytes]], small_disk: Path, free_kib: int
    ):
        out = press.into(small_disk / "out")
        leave_free(small_disk, free_kib << 10)
        first = out(REAP)
        assert "free some space" in sentence(first)
        assert not (out.out / MANIFEST).exists()
        (small_disk / "ballast").unlink()
        second = out(REAP)
        assert second.code == 0, second.stderr
        assert same(contents(out.out), reference[REAP])
        assert not set(second.numbers("begin shard")) & set(first.numbers("end record"))
        remembered = len(first.numbers("end rename sweep.safetensors"))
        assert second.numbers("begin measure") == [str(layer) for layer in range(remembered, 3)]

    @pytest.mark.breadth
    def test_spilled_hidden_states_for_real(self, press: Press, small_disk: Path):
        """Mapped files that the disk cannot hold end a process without a word; they must be reserved first."""
        many = ("--samples", "120")
        least = re.search(
            r"takes about (\d+) MiB", sentence(press(REAP, more=(*many, "--max-memory", "1MiB")))
        )
        assert least is not None
        memory = (*many, "--max-memory", f"{int(least[1]) + 1}MiB")
        whole = press.into(press.out.with_name("whole"))
        assert whole(REAP, more=memory).numbers("begin map"), "nothing was spilled"
        out = press.into(small_disk / "out")
        leave_free(small_disk, 300 << 10)
        assert "free some space" in sentence(out(REAP, more=memory))
        (small_disk / "ballast").unlink()
        assert out(REAP, more=memory).code == 0
        assert same(contents(out.out), contents(whole.out))


class TestMeasure:
    """The verb that only measures keeps its memory beside the file it writes."""

    @pytest.fixture
    def measure(self, driver: Driver, source: Path, text: Path, tmp_path: Path) -> Callable[..., Outcome]:
        def run(name: str, *more: str, **job: str) -> Outcome:
            words = [
                "measure",
                str(source),
                "--out",
                str(tmp_path / name),
                "--step",
                REAP,
                "--text",
                str(text),
            ]
            return driver.run([*words, "--samples", "120", "--length", "32", *more], **job)

        return run

    def test_killed_and_taken_up(self, measure: Callable[..., Outcome], tmp_path: Path):
        assert measure("whole").code == 0
        assert measure("stats", kill="end remember 1").code == KILLED
        again = measure("stats")
        assert again.code == 0, again.stderr
        assert again.numbers("begin measure") == ["2"]
        assert same(
            contents(tmp_path),
            {"whole": (tmp_path / "whole").read_bytes(), "stats": (tmp_path / "whole").read_bytes()},
        )

    def test_killed_with_hidden_states_on_the_disk(self, measure: Callable[..., Outcome], tmp_path: Path):
        """What lies around in the end is swept up, folders too."""
        least = re.search(r"takes about (\d+) MiB", sentence(measure("stats", "--max-memory", "1MiB")))
        assert least is not None
        memory = ("--max-memory", f"{int(least[1]) + 1}MiB")
        assert measure("stats", *memory, kill="begin rename sweep.safetensors").code == KILLED
        assert measure("stats", *memory, kill="begin rename stats").code == KILLED
        again = measure("stats")
        assert again.code == 0, again.stderr
        assert contents(tmp_path).keys() == {"stats"}

    def test_starting_over(self, measure: Callable[..., Outcome]):
        assert measure("stats", kill="end remember 1").code == KILLED
        again = measure("stats", "--no-resume")
        assert again.numbers("begin measure") == ["0", "1", "2"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if (
        not mounted
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=False).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def leave_free(disk: Path, nbytes: int) -> None:
    """Fill the disk up to `nbytes`."""
    room = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(room.f_bavail * room.f_bsize - nbytes))
