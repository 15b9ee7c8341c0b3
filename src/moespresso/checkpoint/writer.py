"""Files, streamed: a shard's header is known before its first byte, so nothing is ever held.

Each file goes to a temporary name, is synced and renamed; its SHA-256 is taken from the bytes as they pass,
on a second thread.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch

from moespresso.checkpoint.files import INDEX
from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError

# Bytes after which the disk is asked to start writing.
_FLUSH = 32 << 20
# Bytes that are sooner hashed than handed to another thread.
_SMALL = 1 << 16


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file: its size and digest, and how many values of which tensor in it are not finite."""

    name: str
    nbytes: int
    sha256: str
    nonfinite: dict[str, int] = field(default_factory=dict[str, int])


def header(refs: Iterable[TensorRef], metadata: Mapping[str, str]) -> bytes:
    """A safetensors header, length included, for tensors that follow it in this order."""
    rows: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for ref in refs:
        rows[ref.name] = {
            "dtype": ref.dtype,
            "shape": list(ref.shape),
            "data_offsets": [offset, offset + ref.nbytes],
        }
        offset += ref.nbytes
    body = json.dumps(rows, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body


def write_file(path: Path, parts: Iterable[memoryview]) -> tuple[int, str]:
    """Write `parts` to `path` by way of a temporary name; return size and SHA-256. A full disk is a
    `UserError`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with disk_full_is_told(path.parent), temporary.open("wb", buffering=0) as file:
            size, digest = _stream(file, parts)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return size, digest


def _stream(file: FileIO, parts: Iterable[memoryview]) -> tuple[int, str]:
    """Write, hash and flush at the same time: the disk works while the next part is read, and the final sync
    is short."""
    digest, size, unflushed = hashlib.sha256(), 0, 0
    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as flusher:
        hashing: Future[None] | None = None
        flushing: Future[None] | None = None
        for part in parts:
            if hashing is not None:
                hashing.result()
            hashing = None
            if part.nbytes > _SMALL:
                hashing = hasher.submit(digest.update, part)
            else:
                digest.update(part)
            written = 0
            while written < part.nbytes:  # an unbuffered write may take less than it is given
                written += file.write(part[written:])
            size += part.nbytes
            unflushed += part.nbytes
            if unflushed >= _FLUSH and (flushing is None or flushing.done()):
                if flushing is not None:
                    flushing.result()
                flushing, unflushed = flusher.submit(os.fdatasync, file.fileno()), 0
        for last in filter(None, (hashing, flushing)):
            last.result()
    return size, digest.hexdigest()


@contextmanager
def disk_full_is_told(folder: Path) -> Generator[None]:
    """Turn a full disk into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk is full ({folder}): free some space and run the same command again, finished shards are kept"
        ) from error


def write_text(path: Path, text: str) -> tuple[int, str]:
    """Write a small text file the same careful way."""
    return write_file(path, [memoryview(text.encode())])


def write_index(folder: Path, weight_map: Mapping[str, str], total: int) -> tuple[int, str]:
    """Write the index of a sharded checkpoint of `total` tensor bytes: which file holds which tensor."""
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return write_text(folder / INDEX, json.dumps(body, indent=2) + "\n")


def as_bytes(chunk: torch.Tensor) -> memoryview:
    """The elements of a flat tensor as bytes, without a copy."""
    return memoryview(chunk.contiguous().view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
