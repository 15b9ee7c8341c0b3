"""The YAML of a recipe: what a file says, and on which line it says it.

This is the only file that reads YAML. What YAML would let pass in silence (a field said twice, a name that is
a number) is refused with its line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml

from moespresso.core.errors import UserError

Place = tuple[int | str, ...]

# What YAML takes for a name: text, and the sign by which one mapping takes in another.
NAMES = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a field has a name and may be said only once (plain YAML takes the last in
    silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in NAMES:
                subject = (
                    f"{key.value!r} is" if isinstance(key, yaml.ScalarNode) else "a list or a mapping is"
                )
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{subject} no name of a field: write a word, in quotes where YAML takes it for something else",
                    key.start_mark,
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is said twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> tuple[yaml.Node, dict[str, Any]]:
    """The file's node tree (it knows the lines) and what it says."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        body = cast("object", loader.construct_document(node)) if node else None  # pyright: ignore[reportUnknownMemberType]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML ({error.problem})") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deep: write a recipe as in recipes/") from error
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or a date that is none
        raise UserError(f"{path}: not YAML text ({error})".replace("\n", " ")) from error
    except OSError as error:
        raise UserError(
            f"recipe {path} cannot be read ({error.strerror}): give the path of a YAML file"
        ) from error
    if not isinstance(body, dict):
        raise UserError(f"{path} does not hold a recipe: write fields such as `steps:` (see recipes/)")
    return node, body  # pyright: ignore[reportUnknownVariableType, reportReturnType]


def line_of(node: yaml.Node, place: Place) -> int:
    """The line, counted from 1, of the innermost part of `place` that the file holds."""
    line = node.start_mark.line
    for part in place:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == part), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
    return line + 1
