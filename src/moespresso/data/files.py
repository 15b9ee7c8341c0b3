"""What lies in a file: text as it is, or the records of JSON and Parquet, each with its place
(``file:line``).

JSON is read for what it holds and not for what it is called: one value a line, or an array, or values written
over many lines, one after the other. A file that cannot be read is refused with what it seems to be, and the
cure for that.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from moespresso.core.errors import UserError
from moespresso.data.chat import BROKEN, is_turn

JSON = (".jsonl", ".ndjson", ".json")
BLANK = re.compile(r"\s*")
# How other kinds of files begin, and what to do about them.
BEGINNINGS = (
    (b"\xff\xfe", "it seems to be UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`"),
    (b"\xfe\xff", "it seems to be UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`"),
    (b"\x1f\x8b", "it seems to be packed by gzip: give its name the ending .gz"),
    (b"PAR1", "it seems to be Parquet: give its name the ending .parquet"),
    (b"PK", "it seems to be a zip archive or an office document: save what it holds as text"),
    (b"%PDF", "it seems to be a PDF: save its text"),
    (b"\x28\xb5\x2f\xfd", "it seems to be packed by zstd: unpack it"),
    (b"BZh", "it seems to be packed by bzip2: unpack it"),
    (b"\xfd7zXZ", "it seems to be packed by xz: unpack it"),
)
OTHERWISE = "give text in UTF-8, JSON lines or Parquet"


def kind_of(file: Path) -> str:
    """The ending of a file's name that says what it holds, `.gz` left out."""
    return Path(file.name.removesuffix(".gz")).suffix.lower()


def open_text(file: Path) -> TextIO:
    """Open a text file, packed or not."""
    # utf-8-sig drops the byte order mark that some editors write.
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn what goes wrong while `file` is read into a `UserError` with the place and a cure."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{file}:{_bad_line(file)}: not UTF-8 text (byte 0x{byte:02x}); {seems(file)}"
        ) from None
    except gzip.BadGzipFile as error:
        raise UserError(
            f"{file}: cannot be read ({error}): it is not packed, so take the ending .gz from its name"
        ) from None
    except (EOFError, zlib.error) as error:
        raise UserError(
            f"{file}: cannot be read ({error}): it is damaged, so make or download it again"
        ) from None
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror or error}): see to its permissions, or give another file"
        ) from None


def seems(file: Path) -> str:
    """What a file that is no text seems to be, and the cure."""
    with file.open("rb") as raw:
        first = raw.read(8)
    return next((words for start, words in BEGINNINGS if first.startswith(start)), OTHERWISE)


def json_records(file: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a JSON file, however its values are laid out."""
    with open_text(file) as stream:
        number, first = next(
            ((number, line) for number, line in enumerate(stream, 1) if not line.isspace()), (1, "")
        )
        stream.seek(0)
        fault = _fault(first)
        if (fault is None and not (kind == ".json" and first.lstrip()[:1] == "[")) or not first:
            yield from _lines(stream, file)
            return
        text = stream.read()
    try:
        yield from _values(text, file)
    except json.JSONDecodeError as error:
        # In JSON lines it is the line that is broken; a value over many lines is broken where it stops making sense.
        if kind != ".json" and fault is not None:
            raise _invalid(f"{file}:{number}", fault) from None
        raise _invalid(f"{file}:{error.lineno}", error) from None


def parquet_records(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) of a Parquet file.

    A column of objects holds every key in every row, null where a row did not have it: these are left out
    again.
    """
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
                columns = [
                    _values_of(column, name, file)
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                ]
                for row in zip(*columns, strict=True):
                    number += 1
                    yield (
                        f"{file}:{number}",
                        dict(zip(batch.schema.names, map(without_nulls, row), strict=True)),
                    )
    except pyarrow.ArrowInvalid as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"{file}: not a Parquet file ({reason}): give its name the ending that it is"
        ) from None


def _values_of(column: Any, name: str, file: Path) -> list[Any]:
    """A column's values; as text, where Python has no such (times in nanoseconds, years beyond 9999)."""
    import pyarrow

    for read in (column.to_pylist, lambda: column.cast(pyarrow.string()).to_pylist()):
        with suppress(ValueError, OverflowError, ImportError, pyarrow.ArrowException):
            return read()
    raise UserError(
        f"{file}: the column {name!r} holds {column.type}, which Python has no values for: leave it out"
    )


def without_nulls(value: Any) -> Any:
    """The same value without keys that say nothing, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _bad_line(file: Path) -> int:
    """The number of the first line that is not UTF-8."""
    opening = cast("Callable[..., BinaryIO]", gzip.open if file.suffix == ".gz" else io.open)
    with opening(file, "rb") as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _lines(stream: TextIO, file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(stream, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except BROKEN as error:
            raise _invalid(f"{file}:{number}", error) from None
        yield f"{file}:{number}", record


def _fault(text: str) -> Exception | None:
    try:
        json.loads(text)
    except BROKEN as error:
        return error
    return None


def _invalid(place: str, error: Exception) -> UserError:
    fault = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return UserError(f"{place}: not valid JSON ({fault}): mend it or take it out")


def _values(text: str, file: Path) -> Iterator[tuple[str, Any]]:
    """Values over many lines, one after the other; of a single array, what is in it, unless that is one
    conversation."""
    tops = list(_sequence(text, file))
    if len(tops) > 1 or not isinstance(tops[0][1], list) or (tops[0][1] and all(map(is_turn, tops[0][1]))):
        yield from ((f"{file}:{text.count(chr(10), 0, at) + 1}", value) for at, value in tops)
        return
    line, before = 1, 0
    for number, (at, value) in enumerate(_elements(text, tops[0][0]), start=1):
        line, before = line + text.count("\n", before, at), at
        yield f"{file}:{line}, record {number}", value


def _sequence(text: str, file: Path) -> Iterator[tuple[int, Any]]:
    at = _skip(text, 0)
    while at < len(text):
        value, end = _decode(text, at, file)
        yield at, value
        at = _skip(text, end)


def _elements(text: str, at: int) -> Iterator[tuple[int, Any]]:
    """The elements of a valid array that begins at `at`, with where they begin."""
    at = _skip(text, at + 1)
    while text[at] != "]":
        value, end = json.JSONDecoder().raw_decode(text, at)
        yield at, value
        at = _skip(text, end)
        at = _skip(text, at + 1) if text[at] == "," else at


def _decode(text: str, at: int, file: Path) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except json.JSONDecodeError:
        raise
    except BROKEN as error:
        raise _invalid(f"{file}:{text.count(chr(10), 0, at) + 1}", error) from None


def _skip(text: str, at: int) -> int:
    match = BLANK.match(text, at)
    assert match is not None
    return match.end()
