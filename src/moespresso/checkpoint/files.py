"""Which files of a folder are the model: those that transformers 5.23 loads, in its order, and which are left
over.

`transformers_weights` in config.json, then `model.safetensors`, then what `model.safetensors.index.json`
names (in sub-folders too); an index beside a single file is not looked at. Of an index only the names of the
files count: a shard is loaded whole, wherever the index places its tensors. Weights that are not loaded are
named in a note, since other engines, or somebody who looks for them, may take them for the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
# The key of config.json that names the file to load.
EXPLICIT = "transformers_weights"
_WEIGHTS = (".safetensors", ".safetensors.index.json")
# Weights in forms that are not read, and their indexes.
_OTHERS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".bin.index.json",
    ".h5.index.json",
    ".msgpack.index.json",
)
# What trainers leave behind under the same endings.
_TRAINERS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files of the model, and the index that names them (empty: none does)."""

    files: tuple[str, ...]
    index: str = ""

    def notes(self, folder: Path, tensors: Mapping[str, TensorRef]) -> tuple[str, ...]:
        """What is left over, and where the index is wrong; raises `UserError` where it promises what no file
        has."""
        notes: list[str] = []
        over = _unused(folder, {*self.files, self.index})
        if over:
            read = self.index or self.files[0]
            notes.append(
                f"the weights are those of {read}, as for transformers; left over in the folder: {_some(over)}, which it does not "
                "load (take them out: another engine may)"
            )
        weight_map = _weight_map(folder / self.index) if self.index else {}
        for name, file in weight_map.items():
            if name not in tensors:
                raise UserError(
                    f"{folder / self.index} promises {name} in {file}, which lacks it: download {file} again, or take the name out "
                    "of the index where the model has no such tensor"
                )
        wrong = [name for name, file in weight_map.items() if tensors[name].file != file]
        if wrong:
            notes.append(
                f"{self.index} places {_some(wrong)} in {weight_map[wrong[0]]}, but it is in {tensors[wrong[0]].file}; "
                "transformers reads it from there too"
            )
        return tuple(notes)


def choose(folder: Path, explicit: object) -> Chosen:
    """The files that transformers would load, `explicit` being what config.json says of them; raises
    `UserError` where there are none."""
    if explicit is not None:
        name = str(explicit)
        if not name.endswith((".safetensors", ".safetensors.index.json")) or not _inside(name):
            raise UserError(
                f"{folder}: {EXPLICIT} of config.json is {explicit!r}, which names no safetensors file or index in the folder: "
                "correct it, or take it out"
            )
        _require(folder, name, f"{folder}/config.json ({EXPLICIT})", "correct the name, or take it out")
        return _by_index(folder, name) if name.endswith(".json") else Chosen((name,))
    if (folder / SINGLE).is_file():
        return Chosen((SINGLE,))
    if (folder / INDEX).is_file():
        return _by_index(folder, INDEX)
    raise UserError(f"{folder} holds neither {INDEX} nor {SINGLE}{_instead(folder)}")


def _by_index(folder: Path, index: str) -> Chosen:
    # transformers looks for shards from the folder on, wherever the index lies.
    files = tuple(sorted(set(_weight_map(folder / index).values())))
    for file in files:
        if not _inside(file):
            raise UserError(
                f"{folder / index} names {file}, which is outside of the folder: copy the files into it, and correct the index"
            )
        _require(
            folder,
            file,
            str(folder / index),
            f"download {file} again, or the index if that is another version's",
        )
    return Chosen(files, index)


def _require(folder: Path, file: str, place: str, cure: str) -> None:
    if (folder / file).is_file():
        return
    linked = " (its link leads nowhere)" if (folder / file).is_symlink() else ""
    raise UserError(f"{place} names {file}, which is not there{linked}: {cure}")


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _instead(folder: Path) -> str:
    """What there is in the place of weights, and what to do with it."""
    names = sorted(path.name for path in folder.iterdir())
    tensors = [name for name in names if name.endswith((".safetensors", ".safetensors.index.json"))]
    pickled = [name for name in names if name.endswith(".bin")]
    if any(name.startswith("consolidated") for name in tensors):
        return f" (it has {tensors[0]}, whose names are not those of transformers): give the version made for transformers"
    if tensors:
        return (
            f" (it has {tensors[0]}): transformers looks under these names only, so download the missing ones, or rename a single "
            f"file that is the whole model to {SINGLE}"
        )
    if pickled:
        return f" (it has {pickled[0]}: save it as safetensors first)"
    return ": give the folder of a checkpoint with its weights"


def _unused(folder: Path, used: set[str]) -> list[str]:
    """Weights and indexes of weights in the folder, and in folders of shards, that are not loaded."""
    folders = {str(PurePosixPath(name).parent) for name in used if name} | {"."}
    unused = [name for inner in folders for name in _weights(folder, inner) if name not in used]
    return sorted(unused, key=lambda name: (not name.endswith(".json"), name))


def _weights(folder: Path, inner: str) -> Iterator[str]:
    for path in (folder / inner).iterdir():
        if path.name.endswith(_WEIGHTS) or (is_other_weights(path.name) and path.is_file()):
            yield path.relative_to(folder).as_posix()


def is_other_weights(name: str) -> bool:
    """Whether a file holds weights, by its name, in a form that is not read."""
    return name.endswith(_OTHERS) and not name.startswith(_TRAINERS)


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map: download it again")
    return {
        str(name): str(PurePosixPath(str(file)))
        for name, file in cast("dict[object, object]", weight_map).items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; raises `UserError` where it is none."""
    if not path.is_file():
        raise UserError(f"{path} is missing: give the folder of a Hugging Face checkpoint")
    try:
        body = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(body, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return body  # pyright: ignore[reportUnknownVariableType]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
