"""Open a checkpoint folder: its config, and every tensor that its safetensors shards announce.

Only headers are read (8 bytes of length, then JSON), so a folder of any size opens in milliseconds, and what
is missing, truncated or contradictory shows before any work is done. The digest identifies the content
cheaply: SHA-256 over config, all shard headers and 64 evenly spaced samples of 4 KiB per shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from moespresso.checkpoint.files import ADAPTER, EXPLICIT, INDEX, SINGLE, choose, read_json
from moespresso.checkpoint.packed import joined
from moespresso.checkpoint.reader import Reader
from moespresso.checkpoint.section import hoisted
from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import DTYPE_BYTES

__all__ = ["INDEX", "SINGLE", "Checkpoint", "open_checkpoint", "read_header"]

# How many packed matrices are looked at when a folder is opened.
_LOOKS = 32
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A folder's config (as its JSON says it) and tensors, in shard order and then by place in the shard; a
    packed matrix is one of them. `notes` say which of its files are not the model, `index` which file names
    the others (empty: none does)."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorRef] = field(repr=False)
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    index: str = ""

    @cached_property
    def metadata(self) -> object:
        """What the index says of the shards as a whole: an object, if anything; without an index an empty
        one."""
        return read_json(self.folder / self.index).get("metadata") if self.index else {}

    @cached_property
    def digest(self) -> str:
        """Identity of the content (see the module's docstring); seconds at 100 GB."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            digest.update(file.encode())
            _sample(self.folder / file, digest)
        return digest.hexdigest()

    def require(self, name: str) -> TensorRef:
        """The tensor `name`, or a `UserError` saying that the files lack it."""
        if name not in self.tensors:
            raise UserError(f"{self.folder} lacks the tensor {name}: download the checkpoint again")
        return self.tensors[name]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config and headers; raises `UserError` with the place and the cure for anything that does not add
    up."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the path of a Hugging Face checkpoint or a hub id")
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER}), which transformers adds to the weights where peft is installed: merge it "
            f"into its base model first (merge_and_unload in peft), or take {ADAPTER} out of the folder"
        )
    config = hoisted(read_json(folder / "config.json"), str(folder))
    chosen = choose(folder, config.pop(EXPLICIT, None))
    tensors: dict[str, TensorRef] = {}
    for file in chosen.files:
        for ref in read_header(folder / file, file):
            if ref.name in tensors:
                raise UserError(
                    f"tensor {ref.name} is in both {tensors[ref.name].file} and {file}: keep one of them"
                )
            tensors[ref.name] = ref
    notes = chosen.notes(folder, tensors)
    packed = joined(config, tensors, folder)
    _check_some(packed, folder)
    return Checkpoint(folder, config, packed, chosen.files, notes, chosen.index)


def _check_some(tensors: Mapping[str, TensorRef], folder: Path) -> None:
    """Whether zeros and groups of a few packed matrices are what the config says: the others are looked at
    when they are read."""
    packed = [ref for ref in tensors.values() if ref.packed is not None]
    with Reader(folder) as reader:
        for ref in packed[:: max(1, len(packed) // _LOOKS)]:
            reader.check_small(ref)


def read_header(path: Path, file: str = "") -> list[TensorRef]:
    """The tensors a safetensors file announces, by place; raises `UserError` when the file is cut short or
    broken.

    `file` is its path in its checkpoint's folder (empty: its name).
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(
                f"{path} is truncated or not a safetensors file ({size} bytes): download it again"
            )
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise UserError(f"{path} has an unreadable header ({error}): download it again") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} has a header that is not a JSON object: download it again")
    rows = {str(name): row for name, row in cast("dict[str, Any]", header).items() if name != "__metadata__"}
    refs = [_ref(name, row, path, file, 8 + length) for name, row in rows.items()]
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    _check_cover(path, refs, 8 + length, size)
    return refs


def _check_cover(path: Path, refs: list[TensorRef], start: int, size: int) -> None:
    """The data must be covered exactly: a hole or an overlap means wrong offsets, that is wrong tensors in
    silence."""
    end = start
    for ref in refs:
        if ref.offset != end:
            raise UserError(
                f"{path}: tensor {ref.name} starts at byte {ref.offset}, not {end}: download it again"
            )
        end += ref.nbytes
    if size < end:
        raise UserError(
            f"{path} is truncated: its header announces {end} bytes, it has {size}: download it again"
        )
    if size > end:
        raise UserError(f"{path} has {size - end} bytes behind its last tensor: download it again")


def _ref(name: str, row: Any, path: Path, file: str, base: int) -> TensorRef:
    try:
        start, end = (_count(offset) for offset in row["data_offsets"])
        shape, dtype = tuple(_count(size) for size in row["shape"]), str(row["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has a broken header at tensor {name}: download it again") from error
    if dtype not in DTYPE_BYTES:
        raise UserError(f"{path}: tensor {name} has dtype {dtype}, which this version cannot read")
    ref = TensorRef(name, shape, dtype, file or path.name, base + start)
    if ref.numel * DTYPE_BYTES[dtype] != end - start:
        raise UserError(
            f"{path}: tensor {name} is announced with {end - start} bytes, its shape needs {ref.nbytes}"
        )
    return ref


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(value)
    return value


def _sample(path: Path, digest: Any) -> None:
    """Feed a shard's header and evenly spaced samples of its data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        digest.update(size.to_bytes(8, "little") + file.read(length))
        start = 8 + length
        for sample in range(_SAMPLES):
            offset = start + (size - start) * sample // _SAMPLES
            digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))
