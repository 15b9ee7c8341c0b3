"""A place as a person types it: what a shell would have made of it, done where no shell was.

A shell opens `~`, takes quotes away and cuts what surrounds a word; a recipe, Python, `--text=~/x` and a quoted
option know no shell. So every door reads paths through `typed`, once, and what lies behind it sees plain paths.
Nothing is looked up on disk here: what is written so is meant so (`./~name` is a file of that name).
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from moespresso.core.errors import UserError

QUOTES = ("'", '"')


def typed(text: str | os.PathLike[str], what: str = "the path") -> str:
    """Return a path as it is meant: `~`, `~user`, `$HOME`, `file://`, quotes and blanks around it are opened.

    Anything else comes back to the letter. Raises `UserError` for nothing, for a user who is not there and for what no
    file system can hold.
    """
    said = text.strip() if isinstance(text, str) else os.fspath(text)
    if len(said) > 1 and said[0] in QUOTES and said[0] == said[-1]:
        said = said[1:-1].strip()
    if not said:
        raise UserError(f"{what} is empty: give a path")
    if "\0" in said:
        raise UserError(f"{what} {said!r} holds a NUL character, which no path can: leave it out")
    if said.startswith("file:"):
        said = _from_url(said, what)
    return _home(os.path.expandvars(said) if "$" in said else said, what)


def place(text: str | os.PathLike[str], what: str = "the path") -> Path:
    """`typed`, as a `Path`."""
    return Path(typed(text, what))


def _home(said: str, what: str) -> str:
    opened = os.path.expanduser(said)
    if opened.startswith("~"):
        user = opened.partition("/")[0]
        raise UserError(
            f"{what} {said!r}: there is no user {user[1:]!r} here (a file of that name is ./{said})"
        )
    return opened


def _from_url(said: str, what: str) -> str:
    url = urlsplit(said)
    if url.netloc not in ("", "localhost") or not url.path.startswith("/"):
        raise UserError(f"{what} {said!r} does not lie on this machine: give its path here")
    return unquote(url.path)
