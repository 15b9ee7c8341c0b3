"""Nothing of a conversation is lost in silence: what stands beside the turns is read or named, and so is every turn, call and
row that a template or a tokenizer makes nothing of."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moespresso.core.errors import UserError
from moespresso.data import Sampling, Source, calibration, sequences
from moespresso.data.text import documents
from test_conversations import ANSWER, ASK, BARE, FULL, TOOL, Record, call, read, stock, write
from test_data import byte_tokenizer

SYSTEM = {"role": "system", "content": "be short"}
OTHER = {"role": "user", "content": "snow?"}


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


BESIDE: dict[str, tuple[Record, str]] = {
    "reasoning beside turns": ({"prompt": [ASK], "completion": [ANSWER], "reasoning_content": "HM"},
                               "<user>rain?<assistant><think>HM</think>no"),
    "reasoning beside messages": ({"messages": [ASK, ANSWER], "thinking": "HM"}, "<user>rain?<assistant><think>HM</think>no"),
    "the same reasoning twice": ({"messages": [ASK, ANSWER | {"reasoning": "HM"}], "thinking": "HM"},
                                 "<user>rain?<assistant><think>HM</think>no"),
    "a completion": ({"messages": [ASK], "completion": "no"}, "<user>rain?<assistant>no"),
    "an output of turns": ({"conversations": [{"from": "human", "value": "rain?"}], "output": [ANSWER]}, "<user>rain?<assistant>no"),
    "a response that is a turn": ({"messages": [ASK], "response": ANSWER}, "<user>rain?<assistant>no"),
    "an answer that begins with its question": ({"system": "be short", "messages": [ASK], "chosen": [ASK, ANSWER], "rejected": "x"},
                                                "<system>be short<user>rain?<assistant>no"),
    "an answer to a prompt, with reasoning": ({"prompt": [ASK], "answer": "no", "reasoning": "HM"},
                                              "<user>rain?<assistant><think>HM</think>no"),
    "input and output": ({"input": [ASK], "output": "no", "system_prompt": "be short"}, "<system>be short<user>rain?<assistant>no"),
    "the same, in texts": ({"input": "rain?", "output": "no"}, "<user>rain?<assistant>no"),
    "the cure for another name": ({"messages": [ASK], "output": "no", "system_prompt": "be short"},
                                  "<system>be short<user>rain?<assistant>no"),
    "both names of a system prompt": ({"system": "be short", "system_prompt": "be short", "messages": [ASK]},
                                      "<system>be short<user>rain?"),
    "roles as they are": ({"messages": [{"role": "human", "content": "a"}, {"role": "Assistant", "content": "b"}, {"role": "bot", "content": "c"}]},
                          "<human>a<Assistant>b<bot>c"),
    "a role of calls": ({"messages": [ASK, {"role": "function_call", "content": "f(1)"}]}, "<user>rain?<function_call>f(1)"),
    "speakers of ShareGPT": ({"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]}, "<user>a<assistant>b"),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_the_turns_is_read(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture):
    record, wanted = BESIDE[name]
    assert read(tmp_path, record) == wanted
    assert warned(caplog) == []


def test_a_text_beside_input_and_output_is_the_record(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", {"text": "print the sum", "input": "1 1", "output": "2"})
    assert [each.text for each in documents(Source(str(file)), 99)] == ["print the sum"]


@pytest.mark.parametrize(
    "kept", [[TOOL["function"]], json.dumps([TOOL["function"]]), [json.dumps(TOOL["function"])]]
)
def test_functions_are_tools(tmp_path: Path, kept: Any, caplog: pytest.LogCaptureFixture):
    record = {"messages": [ASK, ANSWER]}
    assert read(tmp_path, record | {"functions": kept}) == stock(record, tools=[TOOL])
    own = "{{ functions[0].name }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert read(tmp_path, record | {"functions": kept}, own) == "weatherrain?no"
    assert warned(caplog) == []


UNREAD: dict[str, tuple[Record, str]] = {
    "a context": ({"question": "rain?", "answer": "no", "context": "dry"}, "context"),
    "history": ({"question": "rain?", "answer": "no", "history": [["snow?", "yes"]]}, "history"),
    "an answer beside an answer": ({"messages": [ASK, ANSWER], "response": "yes"}, "response"),
    "another reasoning": ({"messages": [ASK, ANSWER | {"reasoning": "a"}], "thinking": "b"}, "thinking"),
    "functions in words": ({"messages": [ASK, ANSWER], "functions": "f(town)"}, "functions"),
    "functions beside tools": ({"messages": [ASK, ANSWER], "tools": [TOOL], "functions": [{"name": "f"}]}, "functions"),
    "notes": ({"messages": [ASK, ANSWER], "notes": "it was dry"}, "notes"),
    "words deep in an object": ({"messages": [ASK, ANSWER], "extra": {"more": [{"said": "it was dry"}]}}, "extra"),
    "turns under another name": ({"messages": [ASK, ANSWER], "dialog": json.dumps([ASK | {"content": "will it snow?"}])}, "dialog"),
    "a script without blanks": ({"messages": [ASK, ANSWER], "notes": "今日は雨が降りませんでした"}, "notes"),
    "a key of a turn": ({"messages": [ASK | {"hint": "look out there"}, ANSWER]}, "hint"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_words_that_nothing_reads_are_named_once(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture):
    record, field = UNREAD[name]
    file = write(tmp_path / "a.jsonl", *[record] * 3, {"messages": [ASK]})
    words = f"{file}: 3 of 4 conversations hold words in {field!r}, which is not read: put them"
    for make in (lambda: calibration([Source(str(file))], byte_tokenizer(FULL), Sampling(2, 999)),
                 lambda: sequences([Source(str(file))], byte_tokenizer(), 16)):  # fmt: skip
        caplog.clear()
        make()
        (said,) = warned(caplog)
        assert words in said


QUIET = [
    {"messages": [ASK, ANSWER], "prompt": "rain?", "prompt_id": "a b c d", "source": "the open web of old", "score": 3.5},
    {"messages": [ASK, ANSWER], "metadata": {"url": "http://a/b", "title": "on the rain"}, "url": "a b c", "lang": "en of here"},
    {"messages": [ASK, ANSWER], "chosen": [ASK, ANSWER], "rejected": [ASK], "date": "Monday 3 May 2021", "text": "rain? no, not now"},
    {"query": "rain?", "response": "no", "original_question": "will it rain today?", "answers": None, "label": "open qa", "ok": True},
]  # fmt: skip


@pytest.mark.parametrize("record", QUIET)
def test_what_is_about_a_record_is_no_words_of_it(
    tmp_path: Path, record: Record, caplog: pytest.LogCaptureFixture
):
    assert read(tmp_path, record, BARE) == "[user]rain?[assistant]no"
    assert warned(caplog) == []


def test_a_field_that_the_template_asks_for_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    record = {"messages": [ASK | {"hint": "look out there"}], "context": "it is dry"}
    shown = "{{ context }}{% for m in messages %}{{ m.content }}{{ m.hint }}{% endfor %}"
    assert read(tmp_path, record, shown) == "it is dryrain?look out there"
    assert warned(caplog) == []


@pytest.mark.parametrize("columns", [{"role": ["user", "assistant"], "content": ["rain?"]}, {"role": [], "content": ["a"]},
                                     {"from": ["human"], "value": ["a", "b", "c"]}])  # fmt: skip
def test_columns_of_unequal_length(tmp_path: Path, columns: Record):
    with pytest.raises(
        UserError, match=r"chats\.jsonl:1: the columns of 'messages' are of different lengths \(\d of"
    ):
        read(tmp_path, {"messages": columns})


# One turn, one call

FIRST_SYSTEM = (
    "{{ messages[0].content }}{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
)
EITHER = "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
ONE_CALL = (
    "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] }}{% endif %}{% endfor %}"
)
NAMES = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}"
CALLING = {
    "role": "assistant",
    "content": "let me look",
    "tool_calls": [call({"town": "rome"}), call({"town": "oslo"})],
}
PARTLY: dict[str, tuple[str, list[Record], str]] = {
    "a second system turn": (FIRST_SYSTEM, [SYSTEM, ASK, SYSTEM | {"content": "be long"}, ANSWER], "a turn of role 'system'"),
    "a text beside calls": (EITHER, [ASK, CALLING, ANSWER], "a text beside calls"),
    "the second call": (ONE_CALL, [ASK, CALLING, ANSWER], "one of several calls"),
    "arguments": (NAMES, [ASK, CALLING, ANSWER], "the arguments of a call"),
    "arguments as text": (NAMES, [ASK, CALLING | {"tool_calls": [call('{"town": "rome"}')]}], "the arguments of a call"),
    "all but the last question": ("{{ messages[-2].content }}{{ messages[-1].content }}", [ASK, OTHER, ANSWER], "a turn of role 'user'"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTLY)
def test_a_part_of_its_kind_that_is_not_shown_is_said(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    template, turns, words = PARTLY[name]
    read(tmp_path, {"messages": turns}, template)
    (said,) = warned(caplog)
    assert f"1 of 1 conversations hold {words}, of which" in said


@pytest.mark.parametrize("filter", ["upper", "trim", "replace('_', ' ')", "reverse", "tojson"])
def test_a_template_that_changes_what_it_shows_shows_it(
    tmp_path: Path, filter: str, caplog: pytest.LogCaptureFixture
):
    shown = f"{{% for m in messages %}}{{{{ m.content | {filter} }}}}{{{{ m.tool_calls | string | {filter} }}}}{{% endfor %}}"
    read(tmp_path, {"messages": [SYSTEM, ASK, CALLING, ANSWER]}, shown)
    assert warned(caplog) == []


def test_looking_costs_a_rendering_for_each_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from moespresso.data.template import Template

    renderings: list[Any] = []
    apply = Template._apply
    monkeypatch.setattr(Template, "_apply", lambda self, chat: renderings.append(0) or apply(self, chat))
    read(tmp_path, {"messages": [ASK, ANSWER] * 50})
    assert len(renderings) < 6


# As DeepSeek's template has it: calls where the content is none, which transformers never gives it.
DEEP = (
    "{% for m in messages %}{% if m['content'] is none %}{{ m['tool_calls'][0]['function']['name'] }}"
    "{% else %}{{ '<' + m['role'] + '>' + m['content'] }}{% endif %}{% endfor %}"
)


def test_calls_that_another_spelling_loses_are_refused(tmp_path: Path):
    record = {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [call({"a": 1})]}]}
    with pytest.raises(
        UserError, match=r":1: .*it leaves tool calls out; mend or take out the record, or use mode pack"
    ):
        read(tmp_path, record, DEEP)
    file = write(tmp_path / "a.jsonl", *[record] * 9)
    assert calibration([Source(str(file))], byte_tokenizer(DEEP), Sampling(1, 16, mode="pack"))
    assert read(tmp_path, {"messages": [ASK, ANSWER]}, DEEP) == "<user>rain?<assistant>no"


# What comes to nothing


@pytest.mark.parametrize(
    ("template", "count"), [("", 0), ("{{ '' }}", 0), ("{{ messages[0].content[:1] }}", 1)]
)
def test_a_conversation_of_no_row(tmp_path: Path, template: str, count: int):
    text = (
        f"{{% if messages[0].content == 'rain?' %}}{template}{{% else %}}long enough to be a row{{% endif %}}"
    )
    file = write(tmp_path / "a.jsonl", *[{"messages": [OTHER]}] * 9, {"messages": [ASK]})
    for seed in range(3):
        with pytest.raises(
            UserError, match=rf"a\.jsonl:10: .* comes to {count} tokens?, and a row needs at least 2"
        ):
            calibration([Source(str(file))], byte_tokenizer(text), Sampling(1, 16, seed))


def few_words(model: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that has no token for what it does not know."""
    known = {"rain": 0, "snow": 1, "sun": 2}
    bare = Tokenizer({"words": models.WordLevel(known, unk_token="<unk>"), "pieces": models.WordPiece(known, unk_token="<unk>"),
                      "unigram": models.Unigram([(word, -1.0) for word in [*known, *"rainsowu"]], unk_id=None)}[model])  # fmt: skip
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=bare, chat_template=template)


@pytest.mark.parametrize("model", ["words", "pieces", "unigram"])
@pytest.mark.parametrize("chat", [False, True], ids=["texts", "chats"])
@pytest.mark.parametrize("size", [20, 4000], ids=["few", "many"])
@pytest.mark.few(4)
def test_a_text_that_the_tokenizer_does_not_take_whichever_is_drawn(
    tmp_path: Path, model: str, chat: bool, size: int
):
    texts = ["rain snow sun rain sun"] * size
    texts[7] = "rain hail"
    records = [
        {"messages": [{"role": "user", "content": text}]} if chat else {"text": text} for text in texts
    ]
    file = write(tmp_path / "a.jsonl", *records)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}" if chat else None
    for seed in range(3):
        with pytest.raises(
            UserError, match=r"a\.jsonl:8: the tokenizer (does not take this text|has no token)"
        ):
            calibration([Source(str(file))], few_words(model, template), Sampling(2, 4, seed))


def test_deep_nesting_is_text(tmp_path: Path):
    deep = "[" * 200_000
    file = write(tmp_path / "a.jsonl", {"text": deep})
    assert calibration([Source(str(file))], byte_tokenizer(), Sampling(1, 16))
    file = write(tmp_path / "b.jsonl", {"prompt": deep, "completion": deep, "tools": deep[:50]})
    assert calibration([Source(str(file))], byte_tokenizer(), Sampling(1, 16, mode="pack"))
    (tmp_path / "c.txt").write_text(deep)
    assert sequences([Source(str(tmp_path / "c.txt"))], byte_tokenizer(), 16, 2)
