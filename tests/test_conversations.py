"""Conversations keep what they hold: whole turns reach the chat template, and what it drops or refuses is said.

The truth is transformers' own `apply_chat_template` on the record as it lies in the file.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from moespresso.core.errors import UserError
from moespresso.data import Sampling, Source, calibration, sequences
from test_data import byte_tokenizer

Record = dict[str, Any]

# Shows everything that a turn may hold, and reads content in parts.
FULL = """{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif -%}
{% if documents %}{% for d in documents %}<doc>{{ d.title }}:{{ d.text }}{% endfor %}{% endif -%}
{% for m in messages %}<{{ m.role }}{{ '/' + m.name if m.name }}>
{%- if m.reasoning_content and enable_thinking is not false %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}
{%- for c in m.tool_calls or [] %}<call>{{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}{% endfor %}
{%- generation %}{% endgeneration %}{% endfor %}"""
# Knows nothing but a role and a text.
BARE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
# Knows nothing but them, and tries to add the text to something.
ADDED = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"

ASK, ANSWER = {"role": "user", "content": "rain?"}, {"role": "assistant", "content": "no"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}


def call(arguments: Any) -> Record:
    return {"type": "function", "id": "1", "function": {"name": "weather", "arguments": arguments}}


def read(tmp_path: Path, record: Any, template: Any = FULL, **options: Any) -> str:
    """What calibration makes of a file that holds this record once."""
    return read_file(write(tmp_path / "chats.jsonl", record), byte_tokenizer(template), **options)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_file(path: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    rows = calibration([Source(str(path))], tokenizer, Sampling(1, 999, **options))
    return str(tokenizer.decode(rows.ids[0][rows.mask[0]]))


def stock(record: Record, template: Any = FULL, **settings: Any) -> str:
    return str(byte_tokenizer(template).apply_chat_template(record["messages"], tokenize=False, **settings))


WHOLE: dict[str, tuple[Record, Record]] = {
    "tool calls, null content and an answer": (
        {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call({"town": "rome"})]},
                      {"role": "tool", "name": "weather", "content": "dry"}, ANSWER]}, {}),
    "tools": ({"messages": [ASK, ANSWER], "tools": [TOOL]}, {"tools": [TOOL]}),
    "documents": ({"messages": [ASK, ANSWER], "documents": [{"title": "sky", "text": "blue"}]},
                  {"documents": [{"title": "sky", "text": "blue"}]}),
    "reasoning": ({"messages": [ASK, ANSWER | {"reasoning_content": "it is dry"}]}, {}),
    "reasoning by another name": ({"messages": [ASK, ANSWER | {"thinking": "it is dry"}]}, {}),
    "names": ({"messages": [ASK | {"name": "ann"}, ANSWER]}, {}),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "rain"}, {"type": "text", "text": "?"}]},
                            ANSWER]}, {}),
    "a variable of the template": (
        {"messages": [ASK, ANSWER | {"reasoning_content": "dry"}], "enable_thinking": False}, {"enable_thinking": False}),
    "variables by their usual name": (
        {"messages": [ASK, ANSWER | {"reasoning_content": "dry"}], "chat_template_kwargs": {"enable_thinking": False}},
        {"enable_thinking": False}),
    "fields that are nobody's": ({"messages": [ASK | {"id": 3}, ANSWER], "id": "x", "bos_token": "<b>", "tokenize": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_record_reads_as_the_template_reads_it(tmp_path: Path, name: str):
    record, settings = WHOLE[name]
    assert read(tmp_path, record) == stock(record, **settings)


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "parts"])  # a column has one type
def test_a_table_gives_what_lines_give(tmp_path: Path, name: str):
    """A table's objects all have all keys; those that a row did not have are null in it."""
    record, _ = WHOLE[name]
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "chats.parquet")
    found = read_file(tmp_path / "chats.parquet", byte_tokenizer(FULL))
    assert sorted(found) == sorted(read(tmp_path, record))  # a table sorts the keys of an object


def test_what_a_table_keeps_as_text_is_opened(tmp_path: Path):
    record = {
        "messages": [ASK, {"role": "assistant", "tool_calls": [call({"town": "rome"})]}, ANSWER],
        "tools": [TOOL],
    }
    text = {"messages": json.dumps(record["messages"]), "tools": json.dumps(record["tools"])}
    each = {**record, "tools": [json.dumps(TOOL)]}
    wanted = stock(
        {"messages": [m if "tool_calls" not in m else m | {"content": ""} for m in record["messages"]]},
        tools=[TOOL],
    )
    assert read(tmp_path, record) == read(tmp_path, text) == read(tmp_path, each) == wanted


@pytest.mark.parametrize("content", [None, "", "..."])
def test_calls_with_or_without_a_text(tmp_path: Path, content: str | None):
    for template in (FULL, FULL.replace("c.function", "c['function']")):
        said = read(
            tmp_path,
            {"messages": [ASK, {"role": "assistant", "content": content, "tool_calls": [call({"a": 1})]}]},
            template,
        )
        assert said == f"<user>rain?<assistant>{content or ''}<call>weather a=1"


def test_arguments_as_text_are_opened_only_where_the_template_wants_objects(tmp_path: Path):
    record = {
        "messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call('{"town": "rome"}')]}]
    }
    assert read(tmp_path, record).endswith("<call>weather town=rome")
    printed = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    assert read(tmp_path, record, printed) == stock(record, printed) == 'rain?{"town": "rome"}'


NAMED = {"default": BARE, "tool_use": FULL}


def test_of_named_templates_the_one_for_tools_is_taken_where_there_are_tools(tmp_path: Path):
    for record, settings in (
        ({"messages": [ASK, ANSWER]}, {}),
        ({"messages": [ASK, ANSWER], "tools": [TOOL]}, {"tools": [TOOL]}),
    ):
        assert read(tmp_path, record, NAMED) == stock(record, NAMED, **settings)


SHAPES: dict[str, tuple[Any, str]] = {
    "a system prompt beside turns": ({"system": "be short", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
                                     "[system]be short[user]q[assistant]a"),
    "beside a question": ({"system_prompt": "be short", "question": "q", "response": "a"}, "[system]be short[user]q[assistant]a"),
    "the same one twice": ({"system": "s", "messages": [{"role": "system", "content": "s"}, ASK]}, "[system]s[user]rain?"),
    "an empty one": ({"system": "", "messages": [ASK]}, "[user]rain?"),
    "other speakers": ({"conversations": [{"from": "system", "value": "s"}, {"from": "Human", "value": "q"}, {"from": "observation", "value": "o"}]},
                       "[system]s[user]q[tool]o"),
    "a bare list of turns": ([ASK, ANSWER], "[user]rain?[assistant]no"),
    "columns of turns": ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, "[user]q[assistant]a"),
    "a prompt of turns and a completion": ({"prompt": [ASK], "completion": [ANSWER]}, "[user]rain?[assistant]no"),
    "a prompt of turns and a text": ({"prompt": [ASK], "completion": "no"}, "[user]rain?[assistant]no"),
    "a prompt of turns": ({"prompt": [ASK]}, "[user]rain?"),
    "preferences in texts": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "[user]q[assistant]good"),
    "preferences in turns": ({"prompt": "rain?", "chosen": [ASK, ANSWER], "rejected": [ASK]}, "[user]rain?[assistant]no"),
    "preferences without a prompt": ({"chosen": [ASK, ANSWER], "rejected": [ASK]}, "[user]rain?[assistant]no"),
    "a null input": ({"instruction": "i", "input": None, "output": "o"}, "[user]i[assistant]o"),
    "what was said before": ({"instruction": "i", "output": "o", "history": [["q", "a"]]}, "[user]q[assistant]a[user]i[assistant]o"),
    "null keys": ({"messages": None, "conversations": [], "question": "q", "answer": "a", "tools": None}, "[user]q[assistant]a"),
    "parts of bare texts": ({"messages": [{"role": "user", "content": ["a", {"text": "b"}]}]}, "[user]a\nb"),
    "one part": ({"messages": [{"role": "user", "content": {"type": "text", "text": "a"}}]}, "[user]a"),
}  # fmt: skip


@pytest.mark.parametrize("template", [BARE, ADDED], ids=["printed", "added"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(tmp_path: Path, name: str, template: str):
    record, wanted = SHAPES[name]
    assert read(tmp_path, record, template) == wanted


def test_a_call_as_a_turn_of_its_own(tmp_path: Path):
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
    ]
    assert read(tmp_path, {"conversations": turns}) == "<user>q<assistant><call>f a=1"


def test_reasoning_beside_a_question_is_the_answers(tmp_path: Path):
    assert (
        read(tmp_path, {"question": "q", "answer": "a", "reasoning": "r"})
        == "<user>q<assistant><think>r</think>a"
    )


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        ("{{ m.content }}", "a\nb"),
        ("{{ m.content | tojson }}", '"a\\nb"'),
        ("{{ m.content | trim }}", "a\nb"),
        ("{% if m.content is string %}{{ m.content }}{% endif %}", "a\nb"),
        ("{{ m.content.strip() }}", "a\nb"),
        ("{% for p in m.content %}{{ p['text'] | upper }}{% endfor %}", None),
        ("{% for p in m.content %}{{ p['text'] }}|{% endfor %}", "a|b|"),
        ("{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}", "ab"),
    ],
)
def test_parts_go_to_a_template_that_reads_them_and_one_text_to_any_other(
    tmp_path: Path, shown: str, wanted: str | None
):
    record = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": part} for part in ("a", "b")]}]
    }
    template = f"{{% for m in messages %}}{shown}{{% endfor %}}"
    if wanted is not None:
        assert read(tmp_path, record, template) == wanted


SPOILT: dict[str, tuple[Any, str, Any]] = {
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
                  "turn 1 holds a part of type 'image_url', but only text", {"messages": [ASK]}),
    "a part that is no text": ({"messages": [{"role": "user", "content": [{"type": "cite", "at": 3}]}]}, "type 'cite'", {"messages": [ASK]}),
    "a turn that holds nothing": ({"messages": [ASK, {"role": "assistant", "content": None}]}, "turn 2 needs", {"messages": [ASK]}),
    "a turn without a role": ({"messages": [{"content": "x"}]}, "turn 1 needs a role", {"messages": [ASK]}),
    "a number for a text": ({"messages": [{"role": "user", "content": 5}]}, "its content is 5", {"messages": [ASK]}),
    "a turn that is null": ({"messages": [None]}, "turn 1 needs", {"messages": [ASK]}),
    "turns that are a text": ({"messages": "hello"}, "'messages' holds a text", {"messages": [ASK]}),
    "turns that are one turn": ({"messages": ASK}, "'messages' holds one object", {"messages": [ASK]}),
    "no turn": ({"messages": []}, "'messages' holds no turn", {"messages": [ASK]}),
    "two system prompts": ({"system": "a", "messages": [{"role": "system", "content": "b"}, ASK]}, "different system prompts", {"messages": [ASK]}),
    "tools that are none": ({"messages": [ASK], "tools": ["weather"]}, "'tools' is no list of objects", {"messages": [ASK], "tools": [TOOL]}),
    "calls that are none": ({"messages": [ASK, {"role": "assistant", "tool_calls": ["weather"]}]}, "turn 2 has tool_calls", {"messages": [ASK]}),
    "variables that are none": ({"messages": [ASK], "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs must be", {"messages": [ASK]}),
    "a call that is no JSON": ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "turn 1 is a call", {"messages": [ASK]}),
    "an instruction that is a list": ({"instruction": ["a"], "output": "b"}, "must be texts", {"instruction": "a", "output": "b"}),
    "history in another form": ({"instruction": "a", "output": "b", "history": ["q"]}, "history 1 must be", {"instruction": "a", "output": "b"}),
    "an answer of several": ({"question": "a", "answer": ["b", "c"]}, "turn 2 needs", {"question": "a", "answer": "b"}),
    "a conversation under another name": ({"dialog": [ASK, ANSWER]}, "'dialog' seems to hold a conversation: call it messages", {"messages": [ASK, ANSWER]}),
    "a record in a field": ({"data": {"messages": [ASK]}}, "seem to stand in the field 'data'", {"messages": [ASK]}),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_what_cannot_be_read_is_refused_with_its_place_whatever_is_drawn(tmp_path: Path, name: str):
    record, words, cured = SPOILT[name]
    file = write(tmp_path / "chats.jsonl", *[{"messages": [ASK]}] * 9, record)
    for seed in range(3):
        with pytest.raises(UserError, match=words) as refused:
            read_file(file, byte_tokenizer(FULL), seed=seed)
        assert f"{file}:10" in str(refused.value)
    assert read(tmp_path, cured).startswith("<")


NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ m.content }}{% endfor %}"


def test_what_the_template_refuses_can_be_packed(tmp_path: Path):
    file = write(
        tmp_path / "a.jsonl",
        *[{"messages": [ASK] * 400}] * 3,
        {"system": "s", "messages": [ASK, ANSWER] * 200},
    )
    for seed in range(3):
        with pytest.raises(
            UserError, match=r"a\.jsonl:4: .*System role not supported; mend .* or use mode pack"
        ):
            read_file(file, byte_tokenizer(NO_SYSTEM), seed=seed)
    assert read_file(file, byte_tokenizer(NO_SYSTEM), mode="pack")
    assert read_file(write(file, {"messages": [ASK]}), byte_tokenizer(NO_SYSTEM)) == "rain?"


@pytest.mark.parametrize("broken", ["{% for m in %}", "{{ messages[7].content + 1 }}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_in_any_way_is_one_sentence(tmp_path: Path, broken: str):
    with pytest.raises(UserError, match=r"chat template refuses this conversation: .*mode pack"):
        read(tmp_path, {"messages": [ASK]}, broken)


UNSEEN = {
    "tools": {"messages": [ASK, ANSWER], "tools": [TOOL]},
    "documents": {"messages": [ASK, ANSWER], "documents": [{"title": "a", "text": "b"}]},
    "tool calls": {"messages": [ASK, {"role": "assistant", "content": "", "tool_calls": [call({})]}]},
    "reasoning": {"messages": [ASK, ANSWER | {"reasoning": "dry"}]},
    "what role 'tool' says": {"messages": [ASK, {"role": "tool", "content": "dry"}, ANSWER]},
    "what role 'critic' says": {"messages": [ASK, {"role": "critic", "content": [{"type": "text", "text": "dry"}]}, ANSWER]},
}  # fmt: skip
TWO_ROLES = (
    "{% for m in messages if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize("name", UNSEEN)
def test_what_a_template_does_not_show_is_said_once(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
):
    file = write(tmp_path / "a.jsonl", *[UNSEEN[name]] * 3, {"messages": [ASK]})
    calibration([Source(str(file))], byte_tokenizer(TWO_ROLES), Sampling(4, 99))
    (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert f"3 of 4 conversations hold {name}, of which" in said


def test_nothing_is_said_where_all_is_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    last_only = FULL.replace("m.reasoning_content and", "m.reasoning_content and loop.last and")
    for record, _ in WHOLE.values():
        if "enable_thinking" not in json.dumps(record):
            read(tmp_path, record, last_only)
    read(
        tmp_path, {"messages": [ASK, ANSWER | {"thinking": "a"}, ASK, ANSWER | {"thinking": "b"}]}, last_only
    )
    assert caplog.records == []


def test_what_counts_is_in_the_digest_and_nothing_else(tmp_path: Path):
    def digest(record: Record, template: str = FULL) -> str:
        source = Source(str(write(tmp_path / "a.jsonl", record)))
        return calibration([source], byte_tokenizer(template), Sampling(1, 999)).describe()["sources"][0][
            "digest"
        ]

    plain = digest({"messages": [ASK, ANSWER]})
    assert (
        plain
        == digest({"messages": [ASK | {"id": 7}, ANSWER], "id": "x"})
        == digest({"prompt": [ASK], "completion": [ANSWER]})
    )
    others = [digest(record) for record, _ in list(WHOLE.values())[:6]]
    assert len({plain, *others}) == 7
    assert digest({"messages": [ASK], "enable_thinking": True}) != digest(
        {"messages": [ASK], "enable_thinking": False}
    )
    assert digest({"messages": [ASK], "enable_thinking": True}, BARE) == digest({"messages": [ASK]}, BARE)


def test_packed_and_evaluated_conversations_lose_nothing(tmp_path: Path):
    turns = [ASK, {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call({"town": "rome"})]},
             {"role": "tool", "content": [{"type": "text", "text": "dry"}]}, ANSWER]  # fmt: skip
    source, tokenizer = (
        Source(str(write(tmp_path / "a.jsonl", {"messages": turns, "tools": [{"name": "weather"}]}))),
        byte_tokenizer(),
    )
    wanted = '{"name": "weather"}|rain?|hm|weather({"town": "rome"})|dry|no<eos>'.split("|")
    wanted[0] = f"[{wanted[0]}]"
    rows = sequences([source], tokenizer, 999)
    assert str(tokenizer.decode(rows.ids[0][rows.mask[0]])) == "\n\n".join(wanted)
    packed = calibration([source], tokenizer, Sampling(1, rows.num_tokens, mode="pack"))
    assert packed.ids[0].tolist() == rows.ids[0][rows.mask[0]].tolist()
