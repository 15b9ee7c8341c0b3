"""Methods register themselves by being settings classes with a `kind`.

A method is one file: a frozen dataclass of typed settings and one call. The class is the schema: `parse_step`
reads `expert_drop:keep=6,score=reap` (or a mapping from a recipe) into it, checks names and types, and
answers a misspelt word with the one that was meant. `use: my_pkg.my_method` imports a user's own file, which
registers the same way.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, cast

from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.method import Step

_METHODS: dict[str, type[Step]] = {}
T = TypeVar("T", bound=Step)


@dataclass(frozen=True, slots=True)
class OneOf:
    """Beside the type of a setting (`Annotated[str, OneOf(scores)]`): it is one of some names, to which
    others may add theirs."""

    names: Callable[[], Iterable[str]]


def choices_of(hint: Any) -> tuple[Any, ...]:
    """The values that a setting of this type can have, where they are counted up; else none."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    beside = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    return tuple(name for each in beside if isinstance(each, OneOf) for name in each.names())


def check_one_of(place: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise `UserError` where the value is none of the choices."""
    if value not in (known := tuple(choices)):
        raise UserError(f"{place}={value!r} is unknown{did_you_mean(str(value), map(str, known))}")


def method(cls: type[T]) -> type[T]:
    """Register a frozen settings class under its `kind`; raises `UserError` where it leaves out what its
    role asks for."""
    if lacking := sorted(cls.__abstractmethods__):
        raise UserError(
            f"{cls.kind}: {cls.__name__} does not say {' and '.join(lacking)}, which its role asks for: add them"
        )
    known = _METHODS.setdefault(cls.kind, cls)
    assert known.__qualname__ == cls.__qualname__, f"two methods named {cls.kind}"
    _METHODS[cls.kind] = cls
    return cls


def methods() -> dict[str, type[Step]]:
    """All registered settings classes by kind."""
    return dict(sorted(_METHODS.items()))


def parse_step(step: str | Mapping[str, Any]) -> Step:
    """Read one step into its settings object; raises `UserError` for an unknown kind, setting or value."""
    body = _split(step) if isinstance(step, str) else dict(step)
    if "use" in body:
        _import(str(body.pop("use")))
    kind = str(body.pop("kind", ""))
    if kind not in _METHODS:
        raise UserError(f"step kind {kind!r} is unknown{did_you_mean(kind, _METHODS)}")
    return _construct(_METHODS[kind], kind, body)


def opened(step: Step) -> tuple[Step, ...]:
    """The steps that a step `stands_for`, where it is short for others; else itself alone."""
    return tuple(map(parse_step, step.stands_for())) or (step,)


def _split(text: str) -> dict[str, Any]:
    kind, _, rest = text.partition(":")
    body: dict[str, Any] = {"kind": kind.strip()}
    for pair in filter(None, rest.split(",")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"in step {text!r}, {pair!r} is not of the form setting=value")
        if name.strip() in body:
            raise UserError(f"in step {text!r}, {name.strip()!r} is given twice: leave one of the two out")
        body[name.strip()] = value.strip()
    return body


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except (ImportError, TypeError, ValueError) as error:  # a name that begins with a dot, or is none
        raise UserError(f"`use: {name}` cannot be imported ({error}): install it or mend its name") from error


def _construct(cls: type[Step], kind: str, body: Mapping[str, Any]) -> Step:
    hints = typing.get_type_hints(cls, include_extras=True)
    known = [f.name for f in dataclasses.fields(cast("Any", cls))]
    for name in body:
        if name not in known:
            raise UserError(f"{kind} has no setting {name!r}{did_you_mean(str(name), known)}")
    return cls(**{name: _convert(value, hints[name], f"{kind}: {name}") for name, value in body.items()})


def _convert(value: Any, hint: Any, place: str) -> Any:
    """Turn text (or a YAML scalar) into the type that the settings field declares."""
    if known := choices_of(hint):
        check_one_of(place, value, known)
        return value
    if choices := typing.get_args(hint):  # an optional type: X | None
        if value is None or value == "none":
            return None
        return _convert(value, next(choice for choice in choices if choice is not type(None)), place)
    if hint is bool:
        if str(value).lower() not in ("true", "false", "1", "0"):
            raise UserError(f"{place}={value!r} must be true or false")
        return str(value).lower() in ("true", "1")
    if hint is int and (isinstance(value, bool) or (isinstance(value, float) and not value.is_integer())):
        raise UserError(f"{place}={value!r} must be a whole number")
    try:
        return hint(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}={value!r} must be of type {hint.__name__}") from error
