"""Conversations: the shapes that instruction data comes in, each read to one `Chat` that keeps all it holds.

The shapes are told apart by their field names alone, so a local file in a hub dataset's own schema
reads like that dataset:

| fields                                           | known from                         |
|--------------------------------------------------|------------------------------------|
| `messages` (role, content)                       | most chat datasets                 |
| `conversations` (from, value), or strings        | ShareGPT; LIMA (taking turns)      |
| `instruction`, `output`, perhaps `input`         | Alpaca                             |
| `query`, `response` and the like                 | MetaMathQA, GSM8K                  |
| `prompt`, `completion`, of texts or of turns     | TRL                                |
| `prompt`, `chosen`, `rejected`                   | preferences; what was chosen counts |

A turn keeps every key that is not null (tool calls, reasoning, names, parts): what becomes of them is the chat template's
matter (`data/template.py`). A system prompt beside the turns becomes the first of them. Whatever else the record says
(`tools`, `documents`, `enable_thinking`, ...) stays beside them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from moespresso.core.errors import UserError

ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    **{role: role for role in ("user", "assistant", "system", "developer", "tool")},
}  # fmt: skip
CALLERS = ("function_call", "tool_call")
TURNS = ("messages", "conversations", "conversation")
SYSTEMS = ("system", "system_prompt", "system_message")
QUESTION_ANSWER = (
    ("query", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "chosen"),
)
# As transformers knows them: whichever of them is there, its templates see.
REASONING = ("reasoning_content", "thinking", "reasoning")
# What a turn says; of any other key a template decides whether it matters.
SPOKEN = ("role", "content", "tool_calls", "function_call", *REASONING)
MEDIA = ("image", "audio", "video", "file")

Turn = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """The turns of a conversation, each a mapping as a chat template takes it, and what its record says beside them."""

    turns: tuple[Turn, ...]
    beside: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def said(self, keys: Iterable[str] = (), fields: Iterable[str] = ()) -> list[Any]:
        """What counts, for a digest: what every turn says, with `keys`, and the record's `fields`.

        A conversation of nothing but roles and texts is just those.
        """
        told = {*SPOKEN, *keys}
        turns = [{key: turn[key] for key in turn if key in told} for turn in self.turns]
        beside = {name: self.beside[name] for name in sorted({*fields} & {*self.beside})}
        if not beside and all(
            {*turn} == {"role", "content"} and isinstance(turn["content"], str) for turn in turns
        ):
            return [[turn["role"], turn["content"]] for turn in turns]
        return [turns, beside]


def conversation(record: Mapping[str, Any], place: str) -> Chat | None:
    """Read a record as a conversation; None when its fields are of no known conversation shape.

    `place` (``file:line``) goes into the `UserError` for whatever is not what its name says.
    """
    for name in TURNS:
        if record.get(name) not in (None, [], ()):
            return _chat(_turns(record[name], name, place), record, {name}, place)
    if "instruction" in record and "output" in record:
        return _alpaca(record, place)
    for question, answer in QUESTION_ANSWER:
        if question in record and answer in record:
            return _chat(
                _exchange(record, question, answer, place), record, {question, answer, *REASONING}, place
            )
    for name in ("prompt", "chosen"):
        if isinstance(record.get(name), list):
            return _chat(_turns(record[name], name, place), record, {name}, place)
    return None


def is_turn(turn: object) -> bool:
    """Whether this is a turn of a conversation: an object that says who speaks, and something that is said."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role", turn.get("from")), str):
        return False
    return bool({*turn} & {*SPOKEN[1:], "value"})


def opened(value: Any) -> Any:
    """A list or an object that was stored as JSON text, as tables do with what has no fixed columns; else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def plain(chat: Chat) -> str:
    """Return a conversation as plain text, without roles: all it says in its order, parted by blank lines.

    That is tools and documents (as JSON) first, then of every turn its reasoning, its text and its calls
    (``name(arguments)``).
    """
    beside = [chat.beside.get(name) for name in ("tools", "documents")]
    first = [_as_json(opened(value)) for value in beside if value]
    return "\n\n".join([*first, *(text for turn in chat.turns for text in _texts(turn))])


def part_text(part: Any) -> str | None:
    """The text of one part of a turn's content; None where it is not text."""
    if isinstance(part, str):
        return part
    text = (
        part.get("text") if isinstance(part, Mapping) and part.get("type", "text").endswith("text") else None
    )
    return text if isinstance(text, str) else None


def calls_of(turn: Turn) -> list[Any]:
    """The calls of a turn, in today's form or the older one of a single function."""
    return [*turn.get("tool_calls", ()), *([turn["function_call"]] if turn.get("function_call") else [])]


def _texts(turn: Turn) -> list[str]:
    content = turn.get("content", "")
    reasoning = next((turn[name] for name in REASONING if name in turn), None)
    said = content if isinstance(content, str) else "\n".join(filter(None, map(_part_words, content)))
    calls = [_call_text(call) for call in calls_of(turn)]
    thought = [] if reasoning is None else [reasoning if isinstance(reasoning, str) else _as_json(reasoning)]
    return [*thought, *([said] if said or not (thought or calls) else []), *calls]


def _part_words(part: Any) -> str:
    """A part's text; of a part of another type, all it holds."""
    text = part_text(part)
    return (
        text if text is not None else _as_json({key: value for key, value in part.items() if key != "type"})
    )


def _call_text(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not (isinstance(function, Mapping) and "name" in function):
        return _as_json(call)
    arguments = function.get("arguments", "")
    return f"{function['name']}({arguments if isinstance(arguments, str) else _as_json(arguments)})"


def _as_json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _chat(turns: Sequence[Turn], record: Mapping[str, Any], used: set[str], place: str) -> Chat:
    """Put the system prompt that stands beside the turns before them, and keep what else the record says."""
    system = next((name for name in SYSTEMS if record.get(name) not in (None, "", [])), None)
    if system is not None:
        first = _turn({"role": "system", "content": record[system]}, f"{place}: the field {system!r}")
        there = [turn for turn in turns if turn["role"] in ("system", "developer")]
        if any(turn.get("content") != first["content"] for turn in there):
            raise UserError(
                f"{place}: {system!r} and the turns hold different system prompts: leave one of the two out"
            )
        turns = [*([] if there else [first]), *turns]
    beside = {
        name: value for name, value in record.items() if name not in {*used, *SYSTEMS} and value is not None
    }
    return Chat(tuple(turns), beside)


def _turns(value: Any, name: str, place: str) -> list[Turn]:
    """Read a list of turns, or the columns of one (as `datasets` gives a sequence of objects)."""
    value = opened(value)
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list | tuple):
        kind = (
            "a text"
            if isinstance(value, str)
            else "one object"
            if isinstance(value, Mapping)
            else repr(value)
        )
        raise UserError(
            f"{place}: {name!r} holds {kind}, not a list of turns: write it as a list of objects with role and content"
            + (f", or read it as plain text with field={name}" if isinstance(value, str) else "")
        )
    if not value:
        raise UserError(f"{place}: {name!r} holds no turn: take the record out")
    return [
        _bare(turn, number) if isinstance(turn, str) else _turn(turn, f"{place}: turn {number + 1}")
        for number, turn in enumerate(value)
    ]


def _bare(text: str, number: int) -> Turn:
    """A turn that is nothing but its text: the user speaks first."""
    return {"role": "user" if number % 2 == 0 else "assistant", "content": text}


def _alpaca(record: Mapping[str, Any], place: str) -> Chat:
    wanted = [record["instruction"], record.get("input")]
    if any(part is not None and not isinstance(part, str) for part in wanted) or not any(wanted):
        raise UserError(f"{place}: turn 1 needs a role and a text (instruction and input must be texts)")
    turns = _history(record.get("history"), place)
    turns += [_bare("\n\n".join(part for part in wanted if part), 0), _answer(record, "output", place)]
    return _chat(turns, record, {"instruction", "input", "output", "history", *REASONING}, place)


def _history(pairs: Any, place: str) -> list[Turn]:
    """Earlier questions with their answers, as Alpaca's kind holds them."""
    turns: list[Turn] = []
    for number, pair in enumerate(pairs or (), 1):
        if not isinstance(pair, list) or list(map(type, cast("list[Any]", pair))) != [str, str]:
            raise UserError(
                f"{place}: history {number} must be a question and its answer, two texts: mend it"
            )
        turns += [_bare(text, side) for side, text in enumerate(cast("list[str]", pair))]
    return turns


def _exchange(record: Mapping[str, Any], question: str, answer: str, place: str) -> list[Turn]:
    """A question and its answer, each a text or a list of turns; an answer that begins with its question says it once."""
    asked, answered = (_side(record[name]) for name in (question, answer))
    before = (
        _turns(asked, question, place)
        if isinstance(asked, list)
        else [_said("user", asked, f"{place}: turn 1")]
    )
    if not isinstance(answered, list):
        return [*before, _answer(record, answer, place)]
    after = _turns(answered, answer, place)
    return after if after[: len(before)] == before else [*before, *after]


def _side(value: Any) -> Any:
    """A list of turns, also where it was stored as JSON text; anything else as it is, but no list."""
    found = opened(value)
    return (
        found
        if isinstance(found, list) and found and all(map(is_turn, found))
        else value
        if isinstance(value, str)
        else None
    )


def _answer(record: Mapping[str, Any], name: str, place: str) -> Turn:
    """The assistant's turn of a record without turns; reasoning beside it is the assistant's."""
    thought = {key: record[key] for key in REASONING if isinstance(record.get(key), str)}
    text = record[name] if isinstance(record[name], str) else None
    return {**_said("assistant", text, f"{place}: turn 2"), **thought}


def _said(role: str, content: Any, place: str) -> Turn:
    return _turn({"role": role, "content": content}, place)


def _turn(turn: Any, place: str) -> Turn:
    """Read one turn: a (role, content) or (from, value) mapping; keys whose value is null are as good as not there."""
    turn = (
        {key: value for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else {}
    )
    if "role" not in turn and isinstance(turn.get("from"), str):
        rest = {key: value for key, value in turn.items() if key not in ("from", "value", "content")}
        content = turn.get("value", turn.get("content"))
        turn = {"role": turn["from"], **({} if content is None else {"content": content}), **rest}
    if "content" not in turn and "value" in turn:
        turn = {("content" if key == "value" else key): value for key, value in turn.items()}
    role = turn.get("role")
    if isinstance(role, str) and role.lower() in CALLERS:
        return _caller(turn, place)
    turn = {key: _held(key, value, place) for key, value in turn.items()}
    if not isinstance(role, str) or not any(key in turn for key in SPOKEN[1:]):
        raise UserError(
            f"{place} needs a role and a text (role and content, or from and value), or tool calls: mend it or take the "
            "record out"
        )
    return {**turn, "role": ROLES.get(role.lower(), role)}


def _held(key: str, value: Any, place: str) -> Any:
    """The value of a turn's key in the form that templates know, refused where it has none."""
    if key == "tool_calls":
        value = opened(value)
        if not (isinstance(value, list) and all(isinstance(call, Mapping) for call in value)):
            raise UserError(
                f"{place} has tool_calls that are no list of objects: write each with its function"
            )
    if key == "content" and not isinstance(value, str):
        return _parts(value, place)
    return value


def _parts(content: Any, place: str) -> list[Turn]:
    """Content in parts: each an object with its type; only text can be measured on."""
    parts = [content] if isinstance(content, Mapping) else content
    if not isinstance(parts, list | tuple):
        raise UserError(
            f"{place} needs a role and a text, but its content is {content!r}: write text or parts of text"
        )
    return [_part(part, place) for part in parts]


def _part(part: Any, place: str) -> Turn:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    part = (
        {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    )
    kind = part.get("type", "text" if "text" in part else next(iter(part), "unknown"))
    if not isinstance(kind, str) or any(word in kind for word in MEDIA):
        raise UserError(
            f"{place} holds a part of type {kind!r}, but only text is measured on: take the record out"
        )
    if kind.endswith("text") and not isinstance(part.get("text"), str):
        raise UserError(
            f"{place} holds a part of type {kind!r} without a text: mend it or take the record out"
        )
    return {"type": kind, **part}


def _caller(turn: Turn, place: str) -> Turn:
    """ShareGPT's way to call a function: a turn of its own whose text is the call."""
    found = opened(turn.get("content"))
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise UserError(
            f"{place} is a call, but not JSON with a name and arguments: mend it or take the record out"
        )
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": dict(call)} for call in calls],
    }
