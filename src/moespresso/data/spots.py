"""The spots of a conversation where something is said, and the conversation with other words in some of them.

A template that shows a spot cannot be unaware of other words in it. A spot is the text of one turn, or one of
its calls: what is dropped may be the second system prompt, or a text beside calls, while the rest of its kind
is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moespresso.data.chat import Turn, calls_of, opened

CALLS, CALL, ARGUMENTS = "tool calls", "one of several calls", "the arguments of a call"


@dataclass(frozen=True)
class Spot:
    """The text of the turn of this number, or (`call`) one of its calls: which function, or its
    `arguments`."""

    turn: int
    call: int | None = None
    arguments: bool = False

    def description(self, spots: Sequence[Spot], hidden: Sequence[Spot], turns: Sequence[Turn]) -> str:
        """What is hidden here, in words that say whether all of its kind is."""
        if self.arguments:
            return CALL if replace(self, arguments=False) in hidden else ARGUMENTS
        if self.call is not None:
            others = [spot for spot in spots if spot.call is not None and not spot.arguments]
            return CALLS if {*others} <= {*hidden} else CALL
        role = turns[self.turn]["role"]
        others = [spot for spot in spots if spot.call is None and turns[spot.turn]["role"] == role]
        if {*others} <= {*hidden}:
            return f"what role {role!r} says"
        return "a text beside calls" if calls_of(turns[self.turn]) else f"a turn of role {role!r}"


def spots_of(turns: Sequence[Turn]) -> list[Spot]:
    """Every spot of a conversation."""
    spots = [Spot(number) for number, turn in enumerate(turns) if turn.get("content")]
    for number, turn in enumerate(turns):
        for at, call in enumerate(calls_of(turn)):
            spots.append(Spot(number, at))
            if _function(call).get("arguments") not in (None, "", "{}", {}):
                spots.append(Spot(number, at, arguments=True))
    return spots


def _function(call: Any) -> Mapping[str, Any]:
    inner = call.get("function") if isinstance(call, Mapping) else None
    return inner if isinstance(inner, Mapping) else call if isinstance(call, Mapping) else {}


def altered(turns: Sequence[Turn], marks: Mapping[Spot, str]) -> tuple[Turn, ...]:
    """The turns with a mark in each of these spots."""
    return tuple(_with_marks(number, turn, marks) for number, turn in enumerate(turns))


def _with_marks(number: int, turn: Turn, marks: Mapping[Spot, str]) -> Turn:
    copy = dict(turn)
    if (mark := marks.get(Spot(number))) is not None:
        content = turn["content"]
        copy["content"] = (
            [{**part, "text": f"{mark}{part.get('text', '')}{mark}"} for part in content]
            if isinstance(content, list)
            else f"{mark}{content}{mark}"
        )
    calls = [
        _call(call, marks.get(Spot(number, at)), marks.get(Spot(number, at, arguments=True)))
        for at, call in enumerate(calls_of(turn))
    ]
    if turn.get("tool_calls"):
        copy["tool_calls"] = calls[: len(turn["tool_calls"])]
    if turn.get("function_call"):
        copy["function_call"] = calls[-1]
    return copy


def _call(call: Any, function: str | None, arguments: str | None) -> Any:
    """A call of another function, or with other arguments, in the same form."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], function, arguments)}
    copy = dict(call)
    if function is not None:
        copy["name"] = f"{call.get('name', '')}{function.strip()}"
    if arguments is not None:
        copy["arguments"] = _arguments(call["arguments"], arguments.strip())
    return copy


def _arguments(arguments: Any, mark: str) -> Any:
    inside = opened(arguments)
    if not isinstance(inside, Mapping):
        return f"{arguments}{mark}"
    other = dict.fromkeys(inside, mark)
    return other if isinstance(arguments, Mapping) else json.dumps(other)
