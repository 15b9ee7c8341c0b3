"""One conversation in the tokenizer's chat template, nothing of it lost in silence.

Turns go to transformers' `apply_chat_template` as the record holds them, with the record's tools, documents
and whatever other variable the template asks for by name (`enable_thinking`, or anything in
`chat_template_kwargs`). Templates differ in what they take, so where one fails it is asked again in the other
usual spelling of the same: an empty text for a missing one, a call's arguments as an object for JSON text.
Content in parts is joined to one text (lines) for a template that would print the parts as Python does, or
not at all.

What a template drops is found by trying: a conversation that reads the same without its tools is one whose
tools are not shown, and one that reads the same with other words in a turn is one whose turn is not
(`data/spots.py`). No template's source is interpreted, beyond the names of its variables.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, meta

from moespresso.core.errors import UserError, reason
from moespresso.data.chat import REASONING, Chat, Turn, calls_of, opened, part_text
from moespresso.data.spots import CALL, CALLS, Spot, altered, spots_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD = re.compile(r"[^\W\d]\w*")
# transformers' own tag, which plain jinja does not know.
GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
KWARGS = "chat_template_kwargs"
# What `apply_chat_template` takes from a record as it is; its other parameters say how, not what.
ARGUMENTS = ("tools", "documents", "add_generation_prompt")
MARK = "moespresso_mark"


@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer that has one."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def sources(self) -> list[str]:
        """The template's text; of several named ones, all."""
        template: Any = self.tokenizer.chat_template or ""
        return list(template.values()) if isinstance(template, dict) else [template]

    @cached_property
    def words(self) -> frozenset[str]:
        """Every name in it: a turn's key that is none of these cannot be shown."""
        return frozenset(word for source in self.sources for word in WORD.findall(source))

    @cached_property
    def fields(self) -> frozenset[str]:
        """The names that a record can give it: what it shows and does not set itself."""
        return frozenset((_variables(self.sources) | {*ARGUMENTS[:2], KWARGS}) - self._reserved)

    @cached_property
    def _reserved(self) -> frozenset[str]:
        how = inspect.signature(self.tokenizer.apply_chat_template).parameters
        return frozenset({*how, *self.tokenizer.special_tokens_map, "messages"} - {*ARGUMENTS[:2]})

    def render(self, chat: Chat, place: str) -> tuple[Chat, str]:
        """The conversation as text, and in the form that the template took.

        Raises `UserError` where it takes none (many demand that user and assistant take turns).
        """
        reasons: list[str] = []
        settings = self._settings(chat, place)
        for form in _forms(self._readable(replace(chat, beside=settings), place)):
            try:
                rendered = self._apply(form)
            except Exception as error:  # whatever the template's own code raises
                reasons.append(reason(error))
                continue
            if not (reasons and self._drops_calls(form, rendered)):
                return form, rendered
            reasons.append("in the spelling that it takes it leaves tool calls out")
        raise UserError(
            f"{place}: the tokenizer's chat template refuses this conversation: {', and '.join(dict.fromkeys((reasons[0], reasons[-1])))}; mend or take out "
            "the record, or use mode pack, which reads conversations as plain text"
        )

    def unseen(self, form: Chat, rendered: str) -> Iterator[str]:
        """Name what `form`, which was rendered, holds and the template does not show at all."""

        def same(turns: Iterable[Turn], beside: Mapping[str, Any] = form.beside) -> bool:
            try:
                return self._apply(Chat(tuple(turns), beside)) == rendered
            except Exception:  # it cannot do without, so it looks
                return False

        for name in ARGUMENTS[:2]:
            others = {key: value for key, value in form.beside.items() if key != name}
            if form.beside.get(name) and same(form.turns, others):
                yield name
        if any(turn.get(key) for turn in form.turns for key in REASONING) and same(
            map(_without_reasoning, form.turns)
        ):
            yield "reasoning"
        spots = spots_of(form.turns)
        hidden = [
            spot for spot in self._unmarked(form, spots) if same(altered(form.turns, {spot: f" {MARK} "}))
        ]
        names = dict.fromkeys(spot.description(spots, hidden, form.turns) for spot in hidden)
        yield from [name for name in names if name != CALL or CALLS not in names]

    def _unmarked(self, form: Chat, spots: Sequence[Spot]) -> Sequence[Spot]:
        """The spots whose marks cannot be seen where every one has its own: only these need be tried one by
        one."""
        marks = {spot: f" {MARK}{number}x " for number, spot in enumerate(spots)}
        try:
            shown = self._apply(replace(form, turns=altered(form.turns, marks)))
        except Exception:  # it takes no such texts
            return spots
        return [spot for spot in spots if marks[spot].strip() not in shown]

    def _drops_calls(self, form: Chat, rendered: str) -> bool:
        """Whether a call of `form` is not shown."""
        if not any(map(calls_of, form.turns)):
            return False
        return any(name in (CALLS, CALL) for name in self.unseen(form, rendered))

    def _apply(self, chat: Chat) -> str:
        rendered = self.tokenizer.apply_chat_template(
            [dict(turn) for turn in chat.turns], tokenize=False, **chat.beside
        )
        assert isinstance(rendered, str)
        return rendered

    def _settings(self, chat: Chat, place: str) -> dict[str, Any]:
        """What goes to the template beside the turns."""
        more = opened(chat.beside.get(KWARGS, {}))
        if not isinstance(more, Mapping) or (self._reserved - {*ARGUMENTS}) & {*more}:
            raise UserError(
                f"{place}: {KWARGS} must be an object with the template's own variables, not {more!r}: mend or take it out"
            )
        known = {name: chat.beside[name] for name in chat.beside if name in self.fields and name != KWARGS}
        settings = {**known, **{name: value for name, value in more.items() if value is not None}}
        if settings.get("tools") and "functions" in self.fields and "functions" not in settings:
            settings["functions"] = [
                tool.get("function", tool) for tool in _as_objects("tools", settings["tools"], place)
            ]
            settings = {
                name: value for name, value in settings.items() if name != "tools" or "tools" in self.words
            }
        return {
            name: _as_objects(name, value, place) if name in ARGUMENTS[:2] else value
            for name, value in settings.items()
        }

    def _readable(self, chat: Chat, place: str) -> Chat:
        """The conversation with its parts, where the template reads parts; else with each turn's parts
        joined."""
        if not any(isinstance(turn.get("content"), list) for turn in chat.turns) or self._reads_parts(chat):
            return chat
        return replace(chat, turns=tuple(_join_parts(turn, f"{place}: turn {number}")
                                         for number, turn in enumerate(chat.turns, 1)))  # fmt: skip

    def _reads_parts(self, chat: Chat) -> bool:
        """Whether every part's text is shown, and no part is printed with its keys."""
        marked = replace(chat, turns=tuple(map(_mark_parts, chat.turns)))
        parts = [
            part for turn in chat.turns if isinstance(turn.get("content"), list) for part in turn["content"]
        ]
        for form in _forms(marked):
            try:
                rendered = self._apply(form)
            except Exception:  # not in this form
                continue
            return MARK not in rendered and all(_is_shown(part, rendered) for part in parts)
        return False


def _is_shown(part: Mapping[str, Any], rendered: str) -> bool:
    """Whether a part's text is there; of a part of another type, any that it holds."""
    text = part_text(part)
    texts = (
        [value for key, value in part.items() if key != "type" and isinstance(value, str)]
        if text is None
        else [text]
    )
    return any(shown_text.strip() in rendered for shown_text in texts)


def _variables(sources: list[str]) -> set[str]:
    """The names that templates take from outside; nothing where one cannot be parsed, which rendering will
    say."""
    known = Environment(extensions=["jinja2.ext.loopcontrols"])
    names: set[str] = set()
    for source in sources:
        try:
            names |= meta.find_undeclared_variables(known.parse(GENERATION.sub("", source)))
        except TemplateError:
            return set()
    return names - {*known.globals, "raise_exception", "strftime_now"}


def _as_objects(name: str, value: Any, place: str) -> list[Any]:
    """Tools or documents: a list of objects, of which each or all may be stored as JSON text."""
    value = opened(value)
    objects = [
        opened(item)
        for item in ([value] if isinstance(value, Mapping) else value if isinstance(value, list) else [None])
    ]
    if not all(isinstance(item, Mapping) for item in objects):
        raise UserError(f"{place}: {name!r} is no list of objects: write each of them as a JSON object")
    return objects


def _forms(chat: Chat) -> Iterator[Chat]:
    """The conversation as it is, then in the other usual spellings of the same."""
    tried: list[Chat] = []
    for changes in ((), (_with_content,), (_parse_calls,), (_parse_calls, _with_content)):
        turns = chat.turns
        for change in changes:
            turns = tuple(map(change, turns))
        form = replace(chat, turns=turns)
        if form not in tried:
            tried.append(form)
            yield form


def _with_content(turn: Turn) -> Turn:
    return {"role": turn["role"], "content": "", **turn}


def _parse_calls(turn: Turn) -> Turn:
    """Calls with their arguments as objects."""
    if not turn.get("tool_calls"):
        return turn
    return {**turn, "tool_calls": [_parsed_call(call) for call in turn["tool_calls"]]}


def _parsed_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _parsed_call(call["function"])}
    return {**call, "arguments": opened(call["arguments"])} if "arguments" in call else call


def _mark_parts(turn: Turn) -> Turn:
    if not isinstance(turn.get("content"), list):
        return turn
    return {**turn, "content": [{**part, MARK: MARK} for part in turn["content"]]}


def _join_parts(turn: Turn, place: str) -> Turn:
    content = turn.get("content")
    if not isinstance(content, list):
        return turn
    texts = [part_text(part) for part in content]
    if None in texts:
        kind = content[texts.index(None)]["type"]
        raise UserError(
            f"{place} holds a part of type {kind!r}, which the tokenizer's chat template does not take: take the record out, "
            "or use mode pack"
        )
    return {**turn, "content": "\n".join(text for text in texts if text)}


def _without_reasoning(turn: Turn) -> Turn:
    return {key: value for key, value in turn.items() if key not in REASONING}
