"""A view to a folder: tensors in shards, streamed, and the config and side files beside them.

Shards follow the source's order, so both disks read and write in sequence; a finished one is noted in the
journal and not written again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moespresso.build.tensors import Tensors
from moespresso.build.view import View
from moespresso.checkpoint import (
    INDEX,
    SINGLE,
    Journal,
    Written,
    as_bytes,
    copy_sidecar,
    header,
    sidecars,
    write_file,
    write_index,
    write_text,
)
from moespresso.core.format import DTYPE_BYTES
from moespresso.core.runtime import Runtime
from moespresso.effect import Piece
from moespresso.model import is_converted, tokenizer_config

_SMALLEST, _LARGEST, _AIM = 256 << 20, 4 << 30, 32


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to write and what goes into it."""

    name: str
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Tensor bytes, without the header."""
        return sum(piece.ref.nbytes for piece in self.pieces)


def shard_limit(total: int) -> int:
    """Bytes a shard may hold: about a 32nd of the model, between 256 MiB and 4 GiB, so that a resume redoes
    little."""
    return min(max(total // _AIM, _SMALLEST), _LARGEST)


def shards_of(pieces: Sequence[Piece], limit: int) -> list[Shard]:
    """Cut `pieces`, in order, into shards of at most `limit` bytes (a larger tensor gets one of its own)."""
    groups: list[list[Piece]] = []
    filled = 0
    for piece in pieces:
        if not groups or filled + piece.ref.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.ref.nbytes
    names = [SINGLE] if len(groups) == 1 else [
        f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)
    ]  # fmt: skip
    return [Shard(name, tuple(_align(group))) for name, group in zip(names, groups, strict=True)]


def _align(group: list[Piece]) -> list[Piece]:
    # Wide dtypes first keep every tensor aligned to its own width, as safetensors' own writer does.
    return sorted(group, key=lambda piece: -DTYPE_BYTES[piece.ref.dtype])


def write_folder(
    view: View, folder: Path, journal: Journal, runtime: Runtime
) -> tuple[list[Written], list[str]]:
    """Write the view's tensors, config and side files; finished ones are not done again. Returns files and
    notes."""
    source = view.checkpoint.folder
    shards = shards_of(view.stored, shard_limit(sum(piece.ref.nbytes for piece in view.stored)))
    runtime.progress.stage("write shards", len(shards))
    with Tensors(source, allow_nonfinite=runtime.allow_nonfinite) as tensors:
        for shard in shards:
            if shard.name not in journal.finished:
                journal.record(write_shard(folder, shard, tensors))
            runtime.progress.advance()
    written = [journal.finished[shard.name] for shard in shards]
    if len(shards) > 1:  # a single file needs no index
        written.append(index_of(folder, shards))
    written.append(
        Written("config.json", *write_text(folder / "config.json", json.dumps(view.config, indent=2) + "\n"))
    )
    travel, left = sidecars(source)
    used = {file.partition("/")[0] for file in view.checkpoint.files}
    left = [name for name in left if name not in used]
    written += [_sidecar(view, folder, name) for name in travel]
    return written, [f"left behind: {', '.join(left)}"] if left else []


def _sidecar(view: View, folder: Path, name: str) -> Written:
    """A side file as it is, but for what goes by the family's name, where that is another one now."""
    source = view.checkpoint.folder
    if (
        name != "tokenizer_config.json"
        or not is_converted(view.checkpoint)
        or not (source / "tokenizer.json").is_file()
    ):
        return copy_sidecar(source, folder, name)
    config = tokenizer_config(json.loads((source / name).read_text()))
    return Written(name, *write_text(folder / name, json.dumps(config, indent=2, ensure_ascii=False) + "\n"))


def write_shard(folder: Path, shard: Shard, tensors: Tensors) -> Written:
    """Stream one shard into `folder`; the name appears only when every byte of it is on the disk."""
    tensors.nonfinite = {}

    def parts() -> Iterator[memoryview]:
        yield memoryview(header((piece.ref for piece in shard.pieces), {"format": "pt"}))
        for piece in tensors.ahead(shard.pieces):
            yield from map(as_bytes, tensors.chunks(piece))

    size, digest = write_file(folder / shard.name, parts())
    for file in {ref.file for piece in shard.pieces for ref in piece.inputs}:
        tensors.reader.drop_pages(file)
    nonfinite = tensors.nonfinite
    counts = {piece.name: sum(nonfinite.get(ref.name, 0) for ref in piece.inputs) for piece in shard.pieces}
    return Written(shard.name, size, digest, {name: count for name, count in counts.items() if count})


def index_of(folder: Path, shards: Sequence[Shard]) -> Written:
    """Write which shard holds which tensor."""
    places = {piece.name: shard.name for shard in shards for piece in shard.pieces}
    return Written(INDEX, *write_index(folder, places, sum(shard.nbytes for shard in shards)))
