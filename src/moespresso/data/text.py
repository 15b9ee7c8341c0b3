"""Sources of text: files, folders and hub datasets, read lazily into documents.

A plain text file is one document. In JSON lines (also `.gz`), a JSON array and Parquet every record is one,
told from its fields (`chat` lists the conversations; otherwise `text`, or the field that the source names). A
folder is its files in the order of their names. Nothing reads further than its caller asks, so a source may
be larger than memory: long texts come in pieces, cut after a blank line where there is one.

What is not what it seems (half a character, a record without a text, a table) is refused with its place and a
cure, or said aloud where it can be read in one way only.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from moespresso._place import typed, unquoted
from moespresso.core.errors import UserError, did_you_mean
from moespresso.data.chat import TURNS, Chat, conversation, is_turn, opened, plain
from moespresso.data.files import JSON, json_records, kind_of, open_text, parquet_records, readable, seems
from moespresso.data.hub import READY, hub_dataset, load_records, repo_of

logger = logging.getLogger(__name__)

OPTIONS = ("weight", "field", "split", "join")
SYNTAX = re.compile(r"(?P<name>.+?)(?::\s*(?P<options>\w+\s*=[^,]*(?:,\s*\w+\s*=[^,]*)*))?", re.DOTALL)
SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
TABLES = (".csv", ".tsv")


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
        """Read the name as it is meant, and refuse a weight that is no share."""
        if not self.hub:
            object.__setattr__(self, "name", typed(self.name, "a text source's path"))
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UserError(f"{self.name}: a weight must be a positive number, got {self.weight}")

    @classmethod
    def parse(cls, text: str, *, hub: bool = False) -> Source:
        """Read ``PATH[:key=value[,key=value]...]`` (keys: weight, field, split, join), as ``--text`` takes
        it.

        With `hub` the name is a hub dataset's, as ``--dataset`` takes it.
        """
        match = SYNTAX.fullmatch(unquoted(text.strip()))
        if match is None:
            raise UserError("a text source needs a name: PATH[:weight=0.5,field=text]")
        pairs = (match["options"] or "").split(",") if match["options"] else []
        return cls(match["name"], hub=hub, **dict(_option(pair, text) for pair in pairs))


@dataclass(frozen=True)
class Document:
    """A text (or a piece of one; `ends` tells the last) or a conversation, and its place (``file:line``).

    `line` is the first line of a piece of a text file, whose place is the file alone.
    """

    place: str
    text: str
    chat: Chat | None = None
    ends: bool = True
    line: int = 0

    def digest(self, keys: Iterable[str] = (), fields: Iterable[str] = ()) -> bytes:
        """Return the SHA-256 of what it says (see `Chat.content`); where it stood does not matter."""
        content = [self.text, self.ends] if self.chat is None else self.chat.content(keys, fields)
        return hashlib.sha256(json.dumps(content, default=str).encode()).digest()

    def at(self, offset: int) -> str:
        """The place of a character of its text."""
        return f"{self.place}:{self.line + self.text.count(chr(10), 0, offset)}" if self.line else self.place


def documents(source: Source, piece: int) -> Iterator[Document]:
    """Yield the documents of `source` in order; texts longer than `piece` characters come in pieces.

    Documents without a visible character are passed over. Raises `UserError` with the place of whatever is
    missing, malformed or not text.
    """
    stream = _hub_documents(source, piece) if source.hub else _path_documents(source, piece)
    return _visible(stream)


def _visible(stream: Iterable[Document]) -> Iterator[Document]:
    """Pass over blank documents, but not over the blank end of one that has begun: its end must be told."""
    begun = False
    for document in stream:
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
    for separator, length in (("\n\n", 2), ("\n", 1), (" ", 0)):
        at = text.rfind(separator, half)
        if at > 0:
            return at + length
    return len(text)


def _option(pair: str, text: str) -> tuple[str, Any]:
    key, _, value = (part.strip() for part in pair.partition("="))
    if key not in OPTIONS:
        raise UserError(f"{text}: unknown option {key!r}{did_you_mean(key, OPTIONS)}")
    if key == "weight":
        return key, _number(value, text)
    if key == "join":
        if value.lower() not in SWITCH:
            raise UserError(f"{text}: join must be true or false, got {value!r}")
        return key, SWITCH[value.lower()]
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
    if not _exists(path):
        raise UserError(f"{source.name}: no such file or folder{_hint(source.name)}")
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"{source.name}: neither a file nor a folder: write what it gives into a file")
    if source.split:
        raise UserError(
            f"{source.name}: split={source.split} is for hub datasets; give the file of that split"
        )
    for file in _files(path):
        with readable(file):
            yield from _file_documents(file, source, piece)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a name, or in a folder that may not be looked into
        return False


def _hint(name: str) -> str:
    """What somebody who typed this probably meant."""
    file, _, option = name.rpartition(":")
    if name in READY:
        return f" (for the hub dataset say --dataset {name})"
    if (repo := repo_of(name)) != name:
        return f" (for the hub dataset say --dataset {repo})"
    if "://" in name:
        return " (download it first, and give the file)"
    if "," in name and all(_exists(Path(part.strip())) for part in name.split(",")):
        return " (say --text for each of them)"
    if file and _exists(Path(file)):
        return f" (behind the file stand options such as weight=2, not {option!r})"
    if any(letter in name for letter in "*?["):
        return " (a pattern is opened by the shell where it is not quoted; a folder stands for its files)"
    return ": give the path of a text file, JSON lines, Parquet or a folder of such"


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
    kind = kind_of(file)
    if kind == ".parquet":
        return _from_records(parquet_records(file), source, piece, join=source.join)
    if kind in JSON:
        return _from_records(json_records(file, kind), source, piece, join=source.join)
    if source.field or source.join:
        raise UserError(f"{file}: field and join are for records; a plain text file has none")
    return _text_pieces(file, piece)


def _text_pieces(file: Path, piece: int) -> Iterator[Document]:
    line = 1
    with open_text(file) as stream:
        for text, last in cut(stream, piece):
            if "\0" in text:
                number = line + text.count("\n", 0, text.index("\0"))
                raise UserError(f"{file}:{number}: not text but binary; {seems(file)}")
            if line == 1:
                _say_records(file, text)
            yield Document(str(file), text, ends=last, line=line)
            line += text.count("\n")


def _say_records(file: Path, text: str) -> None:
    """Say that a file is read as plain text, where it seems to hold records."""
    first = opened(text.lstrip().partition("\n")[0])
    if isinstance(first, Mapping) or kind_of(file) in TABLES:
        logger.warning(
            "%s: read as plain text, though it seems to hold records: for these, %s", file,
            "write its rows as JSON lines" if kind_of(file) in TABLES else "give its name the ending .jsonl",
        )  # fmt: skip


def _from_records(
    records: Iterable[tuple[str, Any]], source: Source, piece: int, *, join: bool
) -> Iterator[Document]:
    logged: set[str] = set()
    read = (_document(place, record, source.field, logged) for place, record in records)
    if join:
        return _join(read, piece)
    return (part for document in read for part in _pieces(document, piece))


def _pieces(document: Document, piece: int) -> Iterator[Document]:
    """Cut a long text; a conversation stays whole."""
    if document.chat or len(document.text) <= piece:
        yield document
        return
    for text, last in cut(io.StringIO(document.text), piece):
        yield Document(document.place, text, ends=last)


def _join(lines: Iterable[Document], piece: int) -> Iterator[Document]:
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


def _document(place: str, record: Any, field: str | None, logged: set[str]) -> Document:
    """Tell what a record is from its fields: a conversation, or a text."""
    if isinstance(record, str):
        return Document(place, _check_encodable(record, place))
    if isinstance(record, list) and record and all(map(is_turn, record)):
        record = {TURNS[0]: record}
    if not isinstance(record, Mapping):
        raise UserError(
            f"{place}: a record must be an object with fields or a text, got {_kind(record)}: mend it or take it out"
        )
    chat = conversation(record, place) if field is None else None
    if chat is not None:
        _say_unread(place, record, logged)
        return Document(place, _check_encodable(plain(chat), place, chat), chat)
    text = record.get(field or "text")
    if not isinstance(text, str):
        raise UserError(f"{place}: {_missing(record, field)}")
    return Document(place, _check_encodable(text, place))


def _check_encodable(text: str, place: str, chat: Chat | None = None) -> str:
    """The text, refused where it (or what else a conversation says) holds half a character, which no
    tokenizer takes."""
    content = (
        text
        if chat is None
        else text + json.dumps([chat.turns, chat.beside], ensure_ascii=False, default=str)
    )
    try:
        content.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(content[error.start]):04x}"
        raise UserError(
            f"{place}: holds half a character ({half}, a surrogate without its other half), which no tokenizer takes: take it out"
        ) from None
    return text


def _say_unread(place: str, record: Mapping[str, Any], logged: set[str]) -> None:
    """Say once a source that of two things a record holds one is read."""
    if isinstance(record.get("text"), str) and "text" not in logged:
        logger.info(
            "%s: holds a conversation and a text: the conversation is read (field=text reads the text)", place
        )
        logged.add("text")
    if "chosen" in record and "rejected" in record and "rejected" not in logged:
        logger.info("%s: of two answers the chosen one is read", place)
        logged.add("rejected")


def _missing(record: Mapping[str, Any], field: str | None) -> str:
    """Say why a record is neither a conversation nor a text, and what to do about it."""
    name = field or "text"
    if field is not None and field not in record:
        return f"no text in field {field!r}{did_you_mean(field, map(str, record))}"
    if name in record:
        return f"no text in field {name!r}, but {_kind(record[name])}: mend it, take the record out or say another field=NAME"
    for key, value in record.items():
        inside = opened(value)
        if isinstance(inside, list) and inside and all(map(is_turn, inside)):
            return f"the field {key!r} seems to hold a conversation: call it {TURNS[0]}"
        if isinstance(inside, list | Mapping) and _is_record(inside):
            return f"the records seem to stand in the field {key!r}: write each of them as a line of its own (JSON lines)"
    empty = [key for key in TURNS if key in record]
    if empty:
        return f"{empty[0]!r} holds no turn: take the record out"
    return f"neither a text nor a known conversation (fields: {', '.join(map(str, record))}); say field=NAME"


def _is_record(inside: Sequence[Any] | Mapping[str, Any]) -> bool:
    """Whether this is a record or a list of records by itself."""
    records = [inside] if isinstance(inside, Mapping) else inside
    return bool(records) and all(isinstance(record, Mapping) and {*record} & {"text", "instruction", "question", *TURNS}
                                 for record in records)  # fmt: skip


def _kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    kinds: dict[type, str] = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list",
                              dict: "an object", bytes: "bytes"}  # fmt: skip
    return kinds.get(type(value), type(value).__name__)
