"""What steps there are, read off the registered settings classes: the class is the schema, its docstring the
manual."""

from __future__ import annotations

import dataclasses
import inspect as introspection
from typing import Any, get_args, get_type_hints

from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.registry import choices_of, methods


def describe_methods(kind: str | None = None) -> list[dict[str, Any]]:
    """What steps there are, and their settings."""
    known = methods()
    if kind is not None and kind not in known:
        raise UserError(f"step kind {kind!r} is unknown{did_you_mean(kind, known)}")
    return [_method(name, cls) for name, cls in known.items() if kind in (None, name)]


def _method(kind: str, cls: type[Any]) -> dict[str, Any]:
    story = introspection.getdoc(introspection.getmodule(cls)) or ""
    docs = {
        name: words
        for kind_of in reversed(cls.__mro__)
        for name, words in _setting_docs(kind_of.__doc__ or "")
    }
    hints = get_type_hints(cls, include_extras=True)
    settings = [
        {"name": f.name, "type": _type_words(hints[f.name]), "default": None if f.default is dataclasses.MISSING else f.default,
         "doc": docs.get(f.name, "")}
        for f in dataclasses.fields(cls)
    ]  # fmt: skip
    return {
        "kind": kind,
        "summary": story.split("\n\n")[0].replace("\n", " "),
        "doc": story,
        "settings": settings,
    }


def _setting_docs(doc: str) -> list[tuple[str, str]]:
    """Read `name: meaning` lines (and their indented continuations) from a settings class's docstring."""
    rows: list[tuple[str, str]] = []
    for line in introspection.cleandoc(doc).splitlines()[1:]:
        name, colon, words = line.partition(": ")
        if colon and name.isidentifier() and not line.startswith(" "):
            rows.append((name, words))
        elif rows and line.strip():
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
    return rows


def _type_words(hint: Any) -> str:
    """A type as a person writes it: choices parted by bars."""
    choices = choices_of(hint) or get_args(hint)
    if not choices:
        return getattr(hint, "written", None) or getattr(hint, "__name__", str(hint))
    return " | ".join(
        "none" if choice is type(None) else getattr(choice, "__name__", str(choice)) for choice in choices
    )
