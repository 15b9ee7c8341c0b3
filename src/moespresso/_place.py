"""A place as a person types it: what a shell would have made of it, done where no shell was.

A shell opens `~`, takes quotes away and cuts what surrounds a word; a recipe, Python, `--text=~/x` and a
quoted option know no shell. So every door reads paths through `typed`, once, and what lies behind it sees
plain paths. Nothing is looked up on disk here: what is written so is meant so (`./~name` is a file of that
name).
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote_to_bytes

from moespresso.core.errors import UserError

QUOTES = ("'", '"')


def typed(text: str | os.PathLike[str], what: str = "the path") -> str:
    """Return a path as it is meant: `~`, `~user`, `$HOME`, `file://`, quotes and blanks around it are opened.

    Anything else comes back to the letter. Raises `UserError` for nothing, for a user who is not there and
    for what no file system can hold.
    """
    said = text.strip() if isinstance(text, str) else os.fspath(text)
    if len(said) > 1 and said[0] in QUOTES and said[0] == said[-1]:
        said = said[1:-1].strip()
    if not said:
        raise UserError(f"{what} is empty: give a path")
    if said[:5].lower() == "file:":
        said = _from_url(said, what)
    if "\0" in said:
        raise UserError(f"{what} {said!r} holds a NUL character, which no path can: leave it out")
    return _home(os.path.expandvars(said) if "$" in said else said, what)


def place(text: str | os.PathLike[str], what: str = "the path") -> Path:
    """`typed`, as a `Path`."""
    return Path(typed(text, what))


def real(path: Path) -> Path:
    """Where a path leads, links followed as far as they do (a circle of links is no error here)."""
    return Path(os.path.realpath(path))


def sayable(path: Path, what: str) -> Path:
    """The path of a folder that other libraries open, too, which take none whose name is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{what} {str(path)!r} has a name that is not UTF-8, which transformers cannot open: rename it"
        ) from None
    return path


def unquoted(said: str) -> str:
    """What stands between quotes, where they are around all of it."""
    inner = said[1:-1]
    whole = len(said) > 1 and said[0] in QUOTES and said[0] == said[-1] and said[0] not in inner
    return inner.strip() if whole else said


def _home(said: str, what: str) -> str:
    opened = os.path.expanduser(said)
    if opened.startswith("~"):
        user = opened.partition("/")[0]
        raise UserError(
            f"{what} {said!r}: there is no user {user[1:]!r} here (a file of that name is ./{said})"
        )
    return opened


def _from_url(said: str, what: str) -> str:
    """The path of a `file:` address, whose name may hold what in others begins a query or a fragment."""
    rest = said[5:]
    host, path = rest[2:].partition("/")[::2] if rest.startswith("//") else ("", rest.removeprefix("/"))
    if host.lower() not in ("", "localhost") or not rest.startswith("/"):
        raise UserError(f"{what} {said!r} does not lie on this machine: give its path here")
    return os.fsdecode(b"/" + unquote_to_bytes(os.fsencode(path)))
