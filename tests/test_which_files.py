"""Which files of a folder are the model: the ones that transformers loads, in its order; what is left over is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import write_model
from moespresso import api
from moespresso.checkpoint import open_checkpoint
from moespresso.checkpoint.files import INDEX, SINGLE
from moespresso.core.errors import UserError

HEAD = "lm_head.weight"
STEP = "expert_drop:keep=6,score=aimer"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`old` is a model in three shards, `new` another one of its kind in a single file."""
    root = tmp_path_factory.mktemp("made")
    write_model("mixtral", root / "old", shards=3, seed=0)
    write_model("mixtral", root / "new", shards=1, seed=7)
    return root


@pytest.fixture
def old(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "old", tmp_path / "model"))


def head_of(folder: Path) -> Tensor:
    return next(found[HEAD] for path in folder.rglob("*.safetensors") if HEAD in (found := load_file(path)))


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    body = json.loads((folder / INDEX).read_text())
    change(body["weight_map"])
    (folder / INDEX).write_text(json.dumps(body))


def configure(folder: Path, **more: object) -> None:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | more))


def proven(folder: Path, out: Path, wanted: Tensor) -> list[str]:
    """Press the folder; the result and what transformers loads must have the wanted head. What was said of it."""
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).lm_head.weight, wanted)
    report = api.press(folder, out=out, steps=[STEP])
    assert torch.equal(load_file(out / SINGLE)[HEAD], wanted)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out).lm_head.weight, wanted)
    assert api.verify(out, against=folder)["ok"]
    left = [note for note in report.notes if "the weights are those of" in note or "places" in note]
    assert left == [note for note in api.inspect(folder)["notes"] if note in left]
    return left


def both(old: Path, made: Path) -> None:
    shutil.copy(made / "new" / SINGLE, old)


def stale(old: Path, made: Path) -> None:
    both(old, made)
    for shard in old.glob("model-*"):
        shard.unlink()


def broken_index(old: Path, made: Path) -> None:
    both(old, made)
    (old / INDEX).write_text("nothing that is read")


def linked(old: Path, made: Path) -> None:
    (old / SINGLE).symlink_to(made / "new" / SINGLE)


def explicit(old: Path, made: Path) -> None:
    shutil.copy(made / "new" / SINGLE, old / "chosen.safetensors")
    configure(old, transformers_weights="chosen.safetensors")


def explicit_before_single(old: Path, made: Path) -> None:
    explicit(old, made)
    shutil.copy(made / "old" / "model-00001-of-00003.safetensors", old / SINGLE)


@pytest.mark.parametrize("arrange", [both, stale, broken_index, linked, explicit, explicit_before_single])
@pytest.mark.few(2)
def test_the_single_file_is_the_model(
    arrange: Callable[[Path, Path], None], old: Path, made: Path, tmp_path: Path
):
    arrange(old, made)
    (said,) = proven(old, tmp_path / "out", head_of(made / "new"))
    assert INDEX in said
    assert not (tmp_path / "out" / INDEX).exists()
    assert "transformers_weights" not in json.loads((tmp_path / "out/config.json").read_text())


def in_a_folder(old: Path) -> None:
    (old / "sub/deep").mkdir(parents=True)
    for number, shard in enumerate(sorted(old.glob("model-*"))):
        shard.rename(old / ("sub" if number else "sub/deep") / shard.name)
    places = {path.name: path.relative_to(old).as_posix() for path in old.rglob("model-*")}
    edit_index(old, lambda found: found.update({name: places[file] for name, file in found.items()}))


def another_index(old: Path) -> None:
    (old / INDEX).rename(old / "other.safetensors.index.json")
    configure(old, transformers_weights="other.safetensors.index.json")


def a_dead_link(old: Path) -> None:
    (old / SINGLE).symlink_to(old / "nowhere")


def misplaced(old: Path) -> None:
    edit_index(old, lambda found: found.update({HEAD: found["model.embed_tokens.weight"]}))


def unlisted(old: Path) -> None:
    edit_index(old, lambda found: [found.pop(name) for name in list(found) if ".layers.1." in name] and None)


@pytest.mark.parametrize(
    ("arrange", "words"),
    [
        (in_a_folder, ""),
        (another_index, ""),
        (a_dead_link, SINGLE),
        (misplaced, "but it is in"),
        (unlisted, ""),
    ],
)
@pytest.mark.few(3)
def test_an_index_is_read_as_transformers_reads_it(
    arrange: Callable[[Path], None], words: str, old: Path, made: Path, tmp_path: Path
):
    arrange(old)
    said = proven(old, tmp_path / "out", head_of(made / "old"))
    assert len(said) == bool(words)
    assert words in "".join(said)


def test_shards_of_a_folder_are_not_said_to_be_left_behind(old: Path, tmp_path: Path):
    in_a_folder(old)
    report = api.press(old, out=tmp_path / "out", steps=[STEP])
    assert not any("left behind" in note for note in report.notes)


def test_other_weights_beside_the_model_are_named(old: Path, made: Path):
    save_file({"x": torch.ones(1)}, old / "consolidated.safetensors")
    shutil.copy(made / "new" / SINGLE, old / "model.fp16.safetensors")
    (note,) = open_checkpoint(old).notes
    assert "consolidated.safetensors, model.fp16.safetensors" in note
    assert open_checkpoint(made / "old").notes == open_checkpoint(made / "new").notes == ()


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "model.gguf",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.pt",
        "consolidated.00.pth",
    ],
)
@pytest.mark.few(2)
def test_weights_in_other_forms_are_named_once(name: str, old: Path, made: Path, tmp_path: Path):
    (old / name).write_bytes(b"weights")
    (note,) = proven(old, tmp_path / "out", head_of(made / "old"))
    assert f"left over in the folder: {name}, which" in note
    notes = api.press(old, out=tmp_path / "again", steps=[STEP]).notes
    assert sum(name in said for said in notes) == 1


def test_what_a_trainer_leaves_is_no_weights(old: Path, tmp_path: Path):
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (old / name).write_bytes(b"state")
    assert open_checkpoint(old).notes == ()
    report = api.press(old, out=tmp_path / "out", steps=[STEP])
    assert [note for note in report.notes if "training_args.bin" in note and "left behind" in note]


def renamed(old: Path) -> None:
    next(iter(old.glob("model-*"))).rename(old / "renamed.safetensors")


def only(name: str) -> Callable[[Path], None]:
    def arrange(old: Path) -> None:
        for path in (*old.glob("model-*"), old / INDEX):
            path.unlink()
        if name:
            (old / name).write_bytes(b"")

    return arrange


def outside(old: Path) -> None:
    edit_index(old, lambda found: found.update({HEAD: "../model-00001-of-00003.safetensors"}))


@pytest.mark.parametrize(
    ("arrange", "words"),
    [
        (renamed, r"names model-0000.-of-00003\.safetensors, which is not there: download model-"),
        (outside, r"which is outside of the folder: copy the files into it"),
        (lambda old: configure(old, transformers_weights="no.safetensors"), r"names no\.safetensors, which is not there: correct"),
        (lambda old: configure(old, transformers_weights="model.bin"), r"'model\.bin', which names no safetensors file"),
        (lambda old: configure(old, transformers_weights="../x.safetensors"), "names no safetensors file or index in the folder"),
        (lambda old: (old / "adapter_config.json").write_text("{}"), "holds an adapter .* merge it"),
        (only("consolidated.safetensors"), "give the version made for transformers"),
        (only("Model.safetensors"), f"rename a single file that is the whole model to {SINGLE}"),
        (only("pytorch_model.bin"), "save it as safetensors first"),
        (only(""), "holds neither .* give the folder of a checkpoint"),
        (lambda old: edit_index(old, lambda found: found.update({"model.extra": found[HEAD]})), "or take the name out of the index"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named_with_its_cure(arrange: Callable[[Path], None], words: str, old: Path):
    arrange(old)
    with pytest.raises(UserError, match=words):
        api.inspect(old)
