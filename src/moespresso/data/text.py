"""Sources of text: files, folders and hub datasets, read lazily into documents.

A plain text file is one document. In JSON lines (also `.gz`), a JSON array and Parquet every record is one,
told from its fields (`chat` lists the conversations; otherwise `text`, or the field that the source names). A
folder is its files in the order of their names. Nothing reads further than its caller asks, so a source may
be larger than memory: long texts come in pieces, cut after a blank line where there is one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from moespresso.core.errors import UserError, did_you_mean
from moespresso.data.chat import Chat, conversation, plain
from moespresso.data.hub import READY, hub_dataset, load_records

OPTIONS = ("weight", "field", "split", "join")
SYNTAX = re.compile(r"(?P<name>.+?)(?::(?P<options>\w+=[^,]*(?:,\w+=[^,]*)*))?", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """Where text comes from: a path, or the name of a hub dataset (`hub`).

    `weight` is its share of the samples relative to the other sources. `field` reads that field of every
    record as plain text, whatever else there is. `split` is a hub dataset's. `join` reads the records as
    lines of one running text (as WikiText is stored) instead of documents.
    """

    name: str
    weight: float = 1.0
    field: str | None = None
    split: str | None = None
    join: bool = False
    hub: bool = False

    def __post_init__(self) -> None:
        """Refuse a weight that is no share."""
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UserError(f"{self.name}: a weight must be a positive number, got {self.weight}")

    @classmethod
    def parse(cls, text: str, *, hub: bool = False) -> Source:
        """Read ``PATH[:key=value[,key=value]...]`` (keys: weight, field, split, join), as ``--text`` takes
        it.

        With `hub` the name is a hub dataset's, as ``--dataset`` takes it.
        """
        match = SYNTAX.fullmatch(text)
        if match is None:
            raise UserError("a text source needs a name: PATH[:weight=0.5,field=text]")
        pairs = (match["options"] or "").split(",") if match["options"] else []
        return cls(match["name"], hub=hub, **dict(_option(pair, text) for pair in pairs))


@dataclass(frozen=True)
class Document:
    """A text (or a piece of one; `ends` tells the last) or a conversation, and its place (``file:line``)."""

    place: str
    text: str
    chat: Chat = ()
    ends: bool = True

    def digest(self) -> bytes:
        """Return the SHA-256 of what it says; where it stood does not matter."""
        said = [[message.role, message.content] for message in self.chat] or [self.text, self.ends]
        return hashlib.sha256(json.dumps(said).encode()).digest()


def documents(source: Source, piece: int) -> Iterator[Document]:
    """Yield the documents of `source` in order; texts longer than `piece` characters come in pieces.

    Documents without a visible character are passed over. Raises `UserError` with the place of whatever is
    missing, malformed or not text.
    """
    found = _hub_documents(source, piece) if source.hub else _path_documents(source, piece)
    return _visible(found)


def _visible(found: Iterable[Document]) -> Iterator[Document]:
    """Pass over blank documents, but not over the blank end of one that has begun: its end must be told."""
    begun = False
    for document in found:
        if begun or document.text.strip():
            yield document
            begun = not document.ends


def cut(stream: TextIO, size: int) -> Iterator[tuple[str, bool]]:
    """Yield a text in pieces of at most `size` characters, each with whether it is the last.

    A cut is made after a blank line, else after a line, else before a space, in the second half of the piece.
    """
    held = ""
    while more := stream.read(size):
        held += more
        while len(held) > size:
            end = _boundary(held[:size])
            yield held[:end], False
            held = held[end:]
    yield held, True


def _boundary(text: str) -> int:
    half = len(text) // 2
    for separator, kept in (("\n\n", 2), ("\n", 1), (" ", 0)):
        at = text.rfind(separator, half)
        if at > 0:
            return at + kept
    return len(text)


def _option(pair: str, text: str) -> tuple[str, Any]:
    key, _, value = pair.partition("=")
    if key not in OPTIONS:
        raise UserError(f"{text}: unknown option {key!r}{did_you_mean(key, OPTIONS)}")
    if key == "weight":
        return key, _number(value, text)
    if key == "join":
        return key, value.lower() in ("true", "yes", "1")
    return key, value


def _number(value: str, text: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{text}: a weight must be a positive number, got {value!r}") from None


def _hub_documents(source: Source, piece: int) -> Iterator[Document]:
    dataset = hub_dataset(source.name)
    records = enumerate(load_records(dataset, source.split), start=1)
    places = ((f"{source.name}:{number}", record) for number, record in records)
    return _from_records(places, source, piece, join=source.join or dataset.join)


def _path_documents(source: Source, piece: int) -> Iterator[Document]:
    path = Path(source.name)
    if not path.exists():
        hint = f" (for the hub dataset say --dataset {source.name})" if source.name in READY else ""
        raise UserError(f"{source.name}: no such file or folder{hint}")
    if source.split:
        raise UserError(
            f"{source.name}: split={source.split} is for hub datasets; give the file of that split"
        )
    for file in _files(path):
        with _readable(file):
            yield from _file_documents(file, source, piece)


def _files(path: Path) -> list[Path]:
    """List the files of a folder, hidden ones left out, ordered by their names on every platform alike."""
    if path.is_file():
        return [path]
    inside = [(file.relative_to(path), file) for file in path.rglob("*") if file.is_file()]
    seen = {name.as_posix(): file for name, file in inside if not any(part[0] == "." for part in name.parts)}
    if not seen:
        raise UserError(f"{path}: the folder holds no files")
    return [seen[name] for name in sorted(seen)]


def _file_documents(file: Path, source: Source, piece: int) -> Iterator[Document]:
    kind = Path(file.name.removesuffix(".gz")).suffix.lower()
    if kind == ".parquet":
        return _from_records(_parquet_records(file), source, piece, join=source.join)
    if kind in (".jsonl", ".ndjson", ".json"):
        return _from_records(_json_records(file, kind), source, piece, join=source.join)
    if source.field or source.join:
        raise UserError(f"{file}: field and join are for records; a plain text file has none")
    return _text_pieces(file, piece)


def _text_pieces(file: Path, piece: int) -> Iterator[Document]:
    with _open(file) as stream:
        for text, last in cut(stream, piece):
            if "\0" in text:
                raise UserError(f"{file}: not text but binary; give text, JSON lines or Parquet")
            yield Document(str(file), text, ends=last)


def _open(file: Path) -> TextIO:
    # utf-8-sig drops the byte order mark that some editors write.
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{file}: not UTF-8 text (byte 0x{byte:02x}); give text, JSON lines or Parquet"
        ) from None
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def _json_records(file: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of JSON lines, or of the one array that a `.json` may hold."""
    with _open(file) as stream:
        if kind == ".json" and _first_character(stream) == "[":
            for number, record in enumerate(_json(stream.read(), str(file)), start=1):
                yield f"{file}[{number}]", record
            return
        for number, line in enumerate(stream, start=1):
            if not line.isspace():
                yield f"{file}:{number}", _json(line, f"{file}:{number}")


def _first_character(stream: TextIO) -> str:
    """Return the first visible character, and go back to the start."""
    while (character := stream.read(1)).isspace():
        pass
    stream.seek(0)
    return character


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from None


def _parquet_records(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f'{file}: Parquet needs one more package: pip install "moespresso[parquet]"'
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", record
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file}: not a Parquet file ({error})") from None


def _from_records(
    records: Iterable[tuple[str, Any]], source: Source, piece: int, *, join: bool
) -> Iterator[Document]:
    whole = (_document(place, record, source.field) for place, record in records)
    if join:
        return _joined(whole, piece)
    return (part for document in whole for part in _pieces(document, piece))


def _pieces(document: Document, piece: int) -> Iterator[Document]:
    """Cut a long text; a conversation stays whole."""
    if document.chat or len(document.text) <= piece:
        yield document
        return
    for text, last in cut(io.StringIO(document.text), piece):
        yield Document(document.place, text, ends=last)


def _joined(lines: Iterable[Document], piece: int) -> Iterator[Document]:
    """Join records to one running text, parted by blank lines (WikiText's usual protocol), in pieces."""
    held: list[str] = []
    place, size = "", 0
    for line in lines:
        if size >= piece:
            yield Document(place, "\n\n".join([*held, ""]), ends=False)
            held, size = [], 0
        place = line.place
        held.append(line.text)
        size += len(line.text) + 2
    yield Document(place, "\n\n".join(held))


def _document(place: str, record: Any, field: str | None) -> Document:
    """Tell what a record is from its fields: a conversation, or a text."""
    if isinstance(record, str):
        return Document(place, record)
    if not isinstance(record, Mapping):
        raise UserError(
            f"{place}: a record must be an object with fields or a text, got {type(record).__name__}"
        )
    chat = conversation(record, place) if field is None else None
    if chat:
        return Document(place, plain(chat), chat)
    text = record.get(field or "text")
    if not isinstance(text, str):
        raise UserError(f"{place}: {_missing(record, field)}")
    return Document(place, text)


def _missing(record: Mapping[str, Any], field: str | None) -> str:
    if field is not None:
        return f"no text in field {field!r}{did_you_mean(field, map(str, record))}"
    return f"neither a text nor a known conversation (fields: {', '.join(map(str, record))}); say field=NAME"
