"""The number of channels of an expert: where a config says it, and what else follows.

A config has one number for all experts. What it sets beside them shows when the model is built on `meta` with
another one: nothing, in most families; in some the shared expert as well, whose width is so many times that
of a routed one. It must keep its own channels, so it is counted as more of the narrow ones, and what that is
too wide is filled with channels of zeros, which add nothing. Where dense layers follow too, one number cannot
say it: layers then differ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from moespresso.core.errors import UserError
from moespresso.model import quirks
from moespresso.model.skeleton import skeleton

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


def width_key(config: Mapping[str, Any]) -> str | None:
    """The key of a config.json that sets the width of experts."""
    text = _text(config)
    return next((key for key in quirks.WIDTH_KEYS if isinstance(text.get(key), int | list)), None)


def with_width(config: Mapping[str, Any], width: int, place: str, *, grow: bool) -> Config | None:
    """`config` with experts `width` channels wide and nothing else changed, or None where it cannot say that.
    With `grow` shared experts may become wider, to a multiple of `width`."""
    key = width_key(config)
    if key is None:
        return None
    edited = copy.deepcopy(dict(config))
    text, before = _text(edited), _shapes(config, place)
    was = text[key]
    text[key] = [width] * len(was) if isinstance(was, list) else width
    follow = _others(before, _shapes(edited, place))
    if not follow:
        return edited
    count = next((name for name in quirks.SHARED_KEYS if isinstance(text.get(name), int)), None)
    if not grow or count is None or not all("shared" in name for name in follow) or isinstance(was, list):
        return None
    text[count] = math.ceil(text[count] * was / width)
    after = _shapes(edited, place)
    follow = _others(before, after)
    fits = all("shared" in name and _holds(after[name], before[name]) for name in follow)
    return edited if fits else None


def shapes(config: Mapping[str, Any], place: str) -> Shapes:
    """In-memory names and shapes of the model that a config makes."""
    return _shapes(config, place)


def _shapes(config: Mapping[str, Any], place: str) -> Shapes:
    try:
        state = skeleton(config, place).names.state
    except UserError as error:
        raise UserError(f"{place}: the width of its experts cannot be changed: {error}") from error
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _others(before: Shapes, after: Shapes) -> list[str]:
    """What else changes than experts."""
    return [name for name, shape in before.items() if after.get(name) != shape and ".experts." not in name]


def _holds(wide: tuple[int, ...], narrow: tuple[int, ...]) -> bool:
    return len(wide) == len(narrow) and all(a >= b for a, b in zip(wide, narrow, strict=True))


def _text(config: Mapping[str, Any]) -> Any:
    """The language model's part of a config."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config
