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

A turn keeps every key that is not null (tool calls, reasoning, names, parts): what becomes of them is the
chat template's matter (`data/template.py`). A system prompt beside the turns becomes the first of them, an
answer and its reasoning the last; `functions` are tools by their older name. Whatever else the record says
(`documents`, `enable_thinking`, ...) stays beside them, and what of it is text that nothing reads can be
named (`unread`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
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
    ("input", "output"),
)
# What may answer a list of turns that ends with a question.
ANSWERS = ("response", "completion", "chosen", "answer", "output")
# As transformers knows them: whichever of them is there, its templates see.
REASONING = ("reasoning_content", "thinking", "reasoning")
# What a turn says; of any other key a template decides whether it matters.
SPOKEN = ("role", "content", "tool_calls", "function_call", *REASONING)
# What is said in one of these counts, however short it is.
SPEECH = (
    *REASONING,
    *ANSWERS,
    "context",
    "history",
    "functions",
    "input",
    "instruction",
    "prompt",
    "question",
    "query",
)
MEDIA = ("image", "audio", "video", "file")
# About a record, not of it; `text` and `rejected` are spoken of where records are read.
ABOUT = re.compile(
    r"(.*_)?(ids?|name|title|source|urls?|meta(data)?|licen[cs]e|dataset|model|date|timestamp|lang(uage)?|category|tags?|topics?|"
    r"task|type|split)|rejected|original_question",
    re.IGNORECASE,
)
LABELS = ("role", "from", "type", "id")
# Nesting too deep and numbers of thousands of digits are no JSONDecodeError.
BROKEN = (ValueError, RecursionError)

Turn = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """The turns of a conversation, each a mapping as a chat template takes it, and what its record says
    beside them."""

    turns: tuple[Turn, ...]
    beside: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def content(self, keys: Iterable[str] = (), fields: Iterable[str] = ()) -> list[Any]:
        """What counts, for a digest: what every turn says, with `keys`, and the record's `fields`.

        A conversation of nothing but roles and texts is just those.
        """
        shown = {*SPOKEN, *keys}
        turns = [{key: turn[key] for key in turn if key in shown} for turn in self.turns]
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
        # Programs have inputs and outputs, too: a text beside them is what the record is.
        if question == "input" and isinstance(record.get("text"), str):
            continue
        if question in record and answer in record:
            return _chat(_exchange(record, question, answer, place), record, {question, answer}, place)
    for name in ("prompt", "chosen"):
        if isinstance(record.get(name), list):
            return _chat(_turns(record[name], name, place), record, {name}, place)
    return None


def is_turn(turn: object) -> bool:
    """Whether this is a turn of a conversation: an object that says who speaks, and something that is
    said."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role", turn.get("from")), str):
        return False
    return bool({*turn} & {*SPOKEN[1:], "value"})


def opened(value: Any) -> Any:
    """A list or an object that was stored as JSON text, as tables do with what has no fixed columns; else as
    it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except BROKEN:
            return value
    return value


def unread(chat: Chat, text: str, keys: Container[str] = (), fields: Container[str] = ()) -> set[str]:
    """The fields that hold words which are neither in `text` nor read: keys of turns but for `keys`, others
    but for `fields`."""
    shown = {*text.split("\n\n")}
    held = [(name, value) for name, value in chat.beside.items() if name not in fields]
    held += [(key, turn[key]) for turn in chat.turns for key in turn if key not in SPOKEN and key not in keys]
    return {
        name
        for name, value in held
        if name != "text"
        and not ABOUT.fullmatch(name)
        and any(
            string.strip() not in shown
            and (name in SPEECH or (_prose(string) and string.strip() not in text))
            for string in _strings(opened(value))
        )
    }


def _strings(value: Any) -> Iterator[str]:
    """The texts in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from [] if name in LABELS else _strings(item)


def _prose(text: str) -> bool:
    """Whether this is what somebody wrote, and no label, date or address: three words, or a line of a script
    without blanks."""
    return len(text.split()) > 2 or (
        len(text) > 8 and sum(letter > "\u2e80" for letter in text) > len(text) / 2
    )


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
    text = content if isinstance(content, str) else "\n".join(filter(None, map(_part_words, content)))
    calls = [_call_text(call) for call in calls_of(turn)]
    thought = [] if reasoning is None else [reasoning if isinstance(reasoning, str) else _as_json(reasoning)]
    return [*thought, *([text] if text or not (thought or calls) else []), *calls]


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
    """Put what stands beside the turns where it belongs: the system prompt before them, an answer and its
    reasoning behind."""
    more, answers = _answer_beside(turns, record, used, place)
    turns = _with_system([*turns, *more], record, place)
    turns, thoughts = _thinking(turns, record)
    gone = {*used, *answers, *thoughts, *SYSTEMS}
    beside = {name: value for name, value in record.items() if name not in gone and value is not None}
    return Chat(tuple(turns), _with_tools(beside))


def _with_system(turns: Sequence[Turn], record: Mapping[str, Any], place: str) -> Sequence[Turn]:
    """The system prompt that stands beside the turns, before them; it may be in them, too."""
    prompts = {name: record[name] for name in SYSTEMS if record.get(name) not in (None, "", [])}
    for name, prompt in prompts.items():
        first = _turn({"role": "system", "content": prompt}, f"{place}: the field {name!r}")
        in_turns = [turn for turn in turns if turn["role"] in ("system", "developer")]
        if any(turn.get("content") != first["content"] for turn in in_turns):
            other = "the turns" if name == next(iter(prompts)) else repr(next(iter(prompts)))
            raise UserError(
                f"{place}: {name!r} and {other} hold different system prompts: leave one of the two out"
            )
        turns = turns if in_turns else [first, *turns]
    return turns


def _answer_beside(
    turns: Sequence[Turn], record: Mapping[str, Any], used: set[str], place: str
) -> tuple[Sequence[Turn], set[str]]:
    """The answer that stands beside turns which end with a question, and the field that it was in."""
    for name in ANSWERS if not _speaks(turns[-1]) else ():
        answer = _side(record.get(name)) if name not in used else None
        if isinstance(answer, list):
            dialogue = _turns(answer, name, place)
            return dialogue[len(turns) :] if dialogue[: len(turns)] == [*turns] else dialogue, {name}
        if answer:
            return [_bare(answer, 1)], {name}
    return [], set()


def _speaks(turn: Turn) -> bool:
    return ROLES.get(turn["role"].lower()) == "assistant"


def _thinking(turns: Sequence[Turn], record: Mapping[str, Any]) -> tuple[list[Turn], set[str]]:
    """Give the assistant's last turn the reasoning that stands beside the turns, and say in which fields that
    was."""
    thoughts = {name: record[name] for name in REASONING if isinstance(record.get(name), str)}
    if not thoughts or not _speaks(turns[-1]):
        return [*turns], set()
    thoughts_in_turn = {turns[-1][name] for name in REASONING if isinstance(turns[-1].get(name), str)}
    if thoughts_in_turn:  # of another one it is to be said that nothing reads it
        return [*turns], {name for name, thought in thoughts.items() if thought in thoughts_in_turn}
    return [*turns[:-1], {**turns[-1], **thoughts}], set(thoughts)


def _with_tools(beside: Mapping[str, Any]) -> dict[str, Any]:
    """`functions` are what `tools` were called before."""
    functions = opened(beside.get("functions"))
    if not functions or beside.get("tools") or not isinstance(functions, list):
        return dict(beside)
    tools = [opened(tool) for tool in cast("list[Any]", functions)]
    if not all(isinstance(tool, Mapping) and "name" in tool for tool in tools):
        return dict(beside)
    others = {name: value for name, value in beside.items() if name != "functions"}
    return {**others, "tools": [{"type": "function", "function": tool} for tool in tools]}


def _turns(value: Any, name: str, place: str) -> list[Turn]:
    """Read a list of turns, or the columns of one (as `datasets` gives a sequence of objects)."""
    value = opened(value)
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {str(key): len(column) for key, column in value.items()}
        if len(set(lengths.values())) > 1:
            columns = ", ".join(f"{count} of {key}" for key, count in lengths.items())
            raise UserError(
                f"{place}: the columns of {name!r} are of different lengths ({columns}): mend it or take the record out"
            )
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
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
    return _chat(turns, record, {"instruction", "input", "output", "history"}, place)


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
    """A question and its answer, each a text or a list of turns; an answer that begins with its question says
    it once."""
    asked, answered = (_side(record[name]) for name in (question, answer))
    before = (
        _turns(asked, question, place)
        if isinstance(asked, list)
        else [_plain_turn("user", asked, f"{place}: turn 1")]
    )
    if not isinstance(answered, list):
        return [*before, _answer(record, answer, place)]
    after = _turns(answered, answer, place)
    return after if after[: len(before)] == before else [*before, *after]


def _side(value: Any) -> Any:
    """A list of turns, also where it is one turn or was stored as JSON text; anything else as it is, but no
    list."""
    opened_value = opened(value)
    opened_value = (
        [opened_value] if isinstance(opened_value, Mapping) and is_turn(opened_value) else opened_value
    )
    return (
        opened_value
        if isinstance(opened_value, list) and opened_value and all(map(is_turn, opened_value))
        else value
        if isinstance(value, str)
        else None
    )


def _answer(record: Mapping[str, Any], name: str, place: str) -> Turn:
    """The assistant's turn of a record without turns."""
    return _plain_turn(
        "assistant", record[name] if isinstance(record[name], str) else None, f"{place}: turn 2"
    )


def _plain_turn(role: str, content: Any, place: str) -> Turn:
    return _turn({"role": role, "content": content}, place)


def _turn(turn: Any, place: str) -> Turn:
    """Read one turn: a (role, content) or (from, value) mapping; keys whose value is null are as good as not
    there."""
    turn = (
        {key: value for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else {}
    )
    sharegpt = "role" not in turn and isinstance(turn.get("from"), str)
    if sharegpt:
        rest = {key: value for key, value in turn.items() if key not in ("from", "value", "content")}
        content = turn.get("value", turn.get("content"))
        turn = {"role": turn["from"], **({} if content is None else {"content": content}), **rest}
    if "content" not in turn and "value" in turn:
        turn = {("content" if key == "value" else key): value for key, value in turn.items()}
    role = turn.get("role")
    if sharegpt and isinstance(role, str) and role.lower() in CALLERS:
        return _caller(turn, place)
    turn = {key: _as_templates_know(key, value, place) for key, value in turn.items()}
    if not isinstance(role, str) or not any(key in turn for key in SPOKEN[1:]):
        raise UserError(
            f"{place} needs a role and a text (role and content, or from and value), or tool calls: mend it or take the "
            "record out"
        )
    return {**turn, "role": ROLES.get(role.lower(), role) if sharegpt else role}


def _as_templates_know(key: str, value: Any, place: str) -> Any:
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
    content = opened(turn.get("content"))
    calls = content if isinstance(content, list) else [content]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise UserError(
            f"{place} is a call, but not JSON with a name and arguments: mend it or take the record out"
        )
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": dict(call)} for call in calls],
    }
