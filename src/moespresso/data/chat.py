"""Conversations: the shapes that instruction data comes in, and one conversation as one row of tokens.

The shapes are told apart by their field names alone, so a local file in a hub dataset's own schema
reads like that dataset:

| fields                                    | known from                    |
|-------------------------------------------|-------------------------------|
| `messages` (role, content)                | most chat datasets            |
| `conversations` (from, value), or strings | ShareGPT; LIMA (taking turns) |
| `instruction`, `output`, perhaps `input`  | Alpaca                        |
| `query`, `response` and the like          | MetaMathQA, GSM8K             |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moespresso.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
QUESTION_ANSWER = (
    ("query", "response"),
    ("question", "answer"),
    ("prompt", "response"),
    ("prompt", "completion"),
)


@dataclass(frozen=True)
class Message:
    """One turn: who speaks (``system``, ``user``, ``assistant``, ``tool``) and what."""

    role: str
    content: str


Chat = tuple[Message, ...]


def conversation(record: Mapping[str, Any], place: str) -> Chat | None:
    """Read a record as a conversation; None when its fields are of no known conversation shape.

    `place` (``file:line``) goes into the `UserError` for a turn without a role or text.
    """
    if turns := record.get("messages") or record.get("conversations"):
        return tuple(_turn(turn, number, place) for number, turn in enumerate(turns))
    if "instruction" in record and "output" in record:
        wanted = (record["instruction"], record.get("input"))
        return _exchange("\n\n".join(part for part in wanted if part), record["output"], place)
    for question, answer in QUESTION_ANSWER:
        if question in record and answer in record:
            return _exchange(record[question], record[answer], place)
    return None


def plain(chat: Iterable[Message]) -> str:
    """Return a conversation as plain text: the turns parted by blank lines, without roles."""
    return "\n\n".join(message.content for message in chat)


def encode(chat: Iterable[Message], tokenizer: PreTrainedTokenizerBase, place: str) -> list[int]:
    """Return the tokens of one conversation in the tokenizer's chat template, special tokens included.

    Raises `UserError` where the template refuses it (many demand that user and assistant take turns).
    """
    from jinja2 import TemplateError

    messages = [{"role": message.role, "content": message.content} for message in chat]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise UserError(
            f"{place}: the tokenizer's chat template refuses this conversation: {error}"
        ) from None
    assert isinstance(rendered, str)
    return tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]


def _exchange(question: Any, answer: Any, place: str) -> Chat:
    turns: Sequence[Mapping[str, Any]] = (
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    )
    return tuple(_turn(turn, number, place) for number, turn in enumerate(turns))


def _turn(turn: Any, number: int, place: str) -> Message:
    """Read one turn: a (role, content) or (from, value) mapping, or a bare string (user speaks first)."""
    if isinstance(turn, str):
        return Message("user" if number % 2 == 0 else "assistant", turn)
    turn = turn if isinstance(turn, Mapping) else {}
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        raise UserError(
            f"{place}: turn {number + 1} needs a role and a text (role and content, or from and value)"
        )
    return Message(ROLES.get(role, role), content)
