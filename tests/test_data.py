"""Text to token batches: no token is lost, no machine is special, every mistake names its place."""

from __future__ import annotations

import builtins
import gzip
import io
import json
import sys
import types

import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moespresso.core.errors import UserError
from moespresso.data import READY, Batches, Sampling, Source, calibration, sequences
from moespresso.data.chat import conversation
from moespresso.data.pack import pack_windows
from moespresso.data.text import cut, documents

EOS = 256
PAD = 257
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
)
GOLDEN = "5a5bda1fc77138f7820ce2ded6026dd4fa574d6109f099b900266addcae2f5c7"


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, so that lengths can be counted by eye."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, eos_token="<eos>", pad_token="<pad>", chat_template=template
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Write a file (records as JSON lines) and give its `Source`."""

    def _write(name, content, **options):
        path = tmp_path / name
        if not isinstance(content, str | bytes):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return Source(str(path), **options)

    return _write


def numbered(count, word="document"):
    return [{"text": f"{word} {index:05d}"} for index in range(count)]


def said(source, piece=1 << 20):
    return [document.text for document in documents(source, piece)]


class TestPack:
    @given(st.lists(st.lists(st.integers(0, 99), max_size=20)), st.integers(2, 9))
    def test_loses_nothing_but_the_dropped_tail(self, pieces, length):
        flat = [token for piece in pieces for token in piece]
        windows, found = pack_windows(pieces, length)
        assert found == len(flat)
        kept = len(flat) // length * length or len(flat)
        assert windows.flatten().tolist() == flat[:kept]
        assert len(windows) == max(1, len(flat) // length)

    @given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=20), min_size=20), st.integers(1, 5))
    def test_stops_reading_at_the_limit(self, pieces, limit):
        reading = iter(pieces)
        windows, found = pack_windows(reading, 4, limit)
        assert len(windows) == limit
        assert found < limit * 4 + 20
        assert len(list(reading)) >= len(pieces) - limit * 4

    @given(st.text(alphabet="ab \n", max_size=200), st.integers(2, 30))
    def test_cut_pieces_join_to_the_text(self, text, size):
        pieces = list(cut(io.StringIO(text, newline=""), size))
        assert "".join(piece for piece, _ in pieces) == text
        assert all(0 < len(piece) <= size for piece, last in pieces if not last)
        assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]

    def test_cuts_after_a_blank_line_where_there_is_one(self):
        pieces = [piece for piece, _ in cut(io.StringIO("one two\n\nthree four"), 12)]
        assert pieces == ["one two\n\n", "three four"]


class TestCalibration:
    def test_packs_documents_with_eos_and_without_bos(self, tokenizer, write):
        batches = calibration([write("a.jsonl", [{"text": "abc"}] * 8)], tokenizer, Sampling(3, 8))
        row = [*tokenizer("abc")["input_ids"], EOS]
        assert batches.ids.tolist() == [row + row] * 3
        assert batches.mask.all()
        assert batches.num_tokens == 24

    def test_same_settings_same_tokens_and_another_seed_another_order(self, tokenizer, write):
        source = write("a.jsonl", numbered(50))
        first, again, other = (calibration([source], tokenizer, Sampling(8, 16, seed)) for seed in (3, 3, 4))
        assert first.digest == again.digest
        assert torch.equal(first.ids, again.ids)
        assert first.digest != other.digest

    def test_tokens_do_not_depend_on_where_the_file_lies(self, tokenizer, write):
        here, there = write("a.jsonl", numbered(50)), write("elsewhere.jsonl", numbered(50))
        one, two = (calibration([source], tokenizer, Sampling(8, 16)) for source in (here, there))
        assert one.digest == two.digest
        assert one.describe()["sources"][0]["digest"] == two.describe()["sources"][0]["digest"]

    def test_golden(self, tokenizer, write):
        text = write("a.jsonl", numbered(40), weight=3)
        chat = write("b.jsonl", [{"query": f"{index}+1?", "response": f"{index + 1}"} for index in range(9)])
        assert calibration([text, chat], tokenizer, Sampling(12, 16, 7)).digest == GOLDEN

    @given(st.lists(st.floats(0.5, 2), min_size=1, max_size=4), st.integers(8, 30))
    def test_weights_are_shares_of_the_samples(self, tokenizer, tmp_path_factory, weights, samples):
        folder = tmp_path_factory.mktemp("weights")
        sources = []
        for index, weight in enumerate(weights):
            (folder / f"{index}.txt").write_text(str(index) * 200)
            sources.append(Source(str(folder / f"{index}.txt"), weight))
        batches = calibration(sources, tokenizer, Sampling(samples, 4))
        rows = [source["samples"] for source in batches.describe()["sources"]]
        assert sum(rows) == len(batches) == samples
        for count, weight in zip(rows, weights, strict=True):
            assert abs(count - samples * weight / sum(weights)) < 1
        letters = tokenizer.decode(batches.ids[:, 0])
        assert letters == "".join(str(index) * count for index, count in enumerate(rows))

    def test_chat_rows_are_padded_on_the_right_and_truncated(self, tokenizer, write):
        records = [{"query": "hi", "response": "x" * 99}, {"query": "yo", "response": "ok"}]
        batches = calibration([write("a.jsonl", records)], tokenizer, Sampling(2, 12))
        short, long = sorted(range(2), key=lambda row: int(batches.mask[row].sum()))
        assert tokenizer.decode(batches.ids[short]) == "u:yo<eos>a:ok<eos><pad><pad>"
        assert batches.mask[short].tolist() == [True] * 10 + [False] * 2
        assert tokenizer.decode(batches.ids[long]) == "u:hi<eos>a:xxxxx"
        assert batches.num_tokens == 22

    def test_auto_decides_for_each_source(self, tokenizer, write):
        chat = write("chat.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}] * 4)
        sources = [write("a.txt", "text " * 40), chat]
        described = calibration(sources, tokenizer, Sampling(4, 16)).describe()
        assert [source["mode"] for source in described["sources"]] == ["pack", "chat"]

    def test_pack_mode_reads_conversations_as_plain_text(self, tokenizer, write):
        source = write("a.jsonl", [{"query": "q", "response": "a"}] * 9)
        batches = calibration([source], tokenizer, Sampling(2, 5, mode="pack"))
        assert tokenizer.decode(batches.ids[0]) == "q\n\na<eos>"

    def test_without_a_template_auto_packs_and_says_so(self, write, caplog):
        source = write("a.jsonl", [{"query": "q", "response": "a"}] * 9)
        batches = calibration([source], byte_tokenizer(template=None), Sampling(2, 5))
        assert batches.describe()["sources"][0]["mode"] == "pack"
        assert "no chat template" in caplog.text

    def test_long_text_takes_part_in_pieces(self, tokenizer, write):
        text = "".join(f"paragraph {index:05d}\n\n" for index in range(5000))
        one, other = (
            calibration([write("a.txt", text)], tokenizer, Sampling(4, 32, seed)) for seed in (0, 1)
        )
        assert one.digest != other.digest
        assert one.describe()["sources"][0]["documents"] == 1

    def test_reads_no_further_than_the_pool(self, tokenizer, write):
        lines = (json.dumps({"text": "word " * 2000}) + "\n") * 450 + "not json\n"
        assert len(calibration([write("a.jsonl", lines)], tokenizer, Sampling(4, 32))) == 4
        with pytest.raises(UserError, match=r"a\.jsonl:451: not valid JSON"):
            said(write("a.jsonl", lines))

    def test_goes_on_behind_the_pool_when_it_runs_dry(self, tokenizer, write, monkeypatch):
        monkeypatch.setattr("moespresso.data.pack.POOL_CHARACTERS", 100)
        monkeypatch.setattr("moespresso.data.pack.POOL_CHARACTERS_PER_TOKEN", 0)
        assert len(calibration([write("a.jsonl", numbered(99))], tokenizer, Sampling(40, 16))) == 40

    def test_describe_is_json_and_complete(self, tokenizer, write):
        batches = calibration([write("a.jsonl", numbered(50), weight=2.5)], tokenizer, Sampling(4, 16, 9))
        described = json.loads(json.dumps(batches.describe()))
        assert described["seed"] == 9
        assert described["tokens"] == 64
        assert described["digest"] == batches.digest
        assert described["sources"][0]["weight"] == 2.5
        assert len(described["sources"][0]["digest"]) == 64

    def test_batches_come_in_chunks(self):
        batches = Batches(torch.arange(20).view(5, 4), torch.ones(5, 4, dtype=torch.bool), {})
        chunks = list(batches.batches(2))
        assert [len(ids) for ids, _ in chunks] == [2, 2, 1]
        assert torch.equal(torch.cat([ids for ids, _ in chunks]), batches.ids)


class TestSequences:
    def test_every_window_in_file_order(self, tokenizer, write):
        text = "".join(f"{index:03d}," for index in range(100))
        batches = sequences([write("a.txt", text)], tokenizer, length=16)
        assert len(batches) == 25
        assert "".join(tokenizer.decode(row) for row in batches.ids) == text
        assert batches.mask.all()

    def test_limit_and_several_sources(self, tokenizer, write):
        sources = [write("b.txt", "bbb"), write("a.jsonl", [{"text": "aaa"}, {"text": "ccc"}])]
        batches = sequences(sources, tokenizer, length=4, limit=2)
        assert [tokenizer.decode(row) for row in batches.ids] == ["bbb<eos>", "aaa<eos>"]
        assert len(sequences(sources, tokenizer, length=4)) == 3

    def test_a_short_text_gives_one_masked_window(self, tokenizer, write):
        batches = sequences([write("a.txt", "abc")], tokenizer, length=10)
        assert batches.ids.shape == (1, 10)
        assert batches.ids[0, 3:].tolist() == [EOS] + [PAD] * 6
        assert batches.mask[0].tolist() == [True] * 4 + [False] * 6

    def test_pieces_of_one_document_are_not_parted_by_eos(self, tokenizer, write, monkeypatch):
        monkeypatch.setattr("moespresso.data.pack.EVALUATION_PIECE", 10)
        batches = sequences([write("a.txt", "some words\n\n" * 9)], tokenizer, length=109)
        assert (batches.ids == EOS).sum() == 1

    @pytest.mark.parametrize(("text", "weight", "message"), [("", 1, "at least 2"), ("abc", 2, "weights")])
    def test_refuses(self, tokenizer, write, text, weight, message):
        with pytest.raises(UserError, match=message):
            sequences([write("a.txt", text, weight=weight)], tokenizer, length=4)


HUB_SCHEMAS = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 1", "output": "2", "text": "Below is ..."},
        ({"role": "user", "content": "Add.\n\n1 1"}, {"role": "assistant", "content": "2"}),
    ),
    "lima": (
        {"conversations": ["hi", "hello", "bye"], "source": "x"},
        (
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "bye"},
        ),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}),
    ),
    "metamathqa": (
        {"query": "1+1?", "response": "2", "type": "x", "original_question": "y"},
        ({"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}),
    ),
    "messages": (
        {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]},
        ({"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}),
    ),
    "c4": ({"text": "a page", "timestamp": "2019", "url": "x"}, ()),
}


class TestSources:
    @pytest.mark.parametrize("name", HUB_SCHEMAS)
    def test_a_local_file_in_a_hub_schema_is_told_by_its_fields(self, write, tmp_path, name):
        record, chat = HUB_SCHEMAS[name]
        parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "x.parquet")
        for source in (write("x.jsonl", [record]), Source(str(tmp_path / "x.parquet"))):
            (document,) = documents(source, 1000)
            assert (document.chat.turns if document.chat else ()) == chat
            assert document.text == ("\n\n".join(turn["content"] for turn in chat) or "a page")

    def test_field_reads_plain_text_whatever_else_there_is(self, write):
        assert said(write("a.jsonl", [HUB_SCHEMAS["alpaca"][0]], field="output")) == ["2"]

    def test_gzip_and_json_arrays_and_byte_order_marks(self, write):
        lines = "".join(json.dumps(record) + "\n" for record in numbered(2)).encode()
        wanted = ["document 00000", "document 00001"]
        array = json.dumps(numbered(2), indent=1)
        assert said(write("a.json.gz", gzip.compress(lines))) == wanted
        assert said(write("a.json", b"\xef\xbb\xbf \n" + array.encode())) == wanted
        assert said(write("b.json", b"\n" + lines)) == wanted
        assert said(write("a.txt.gz", gzip.compress(b"hello"))) == ["hello"]

    def test_a_folder_is_its_files_sorted(self, write, tmp_path):
        for name in ("b.txt", "a.md", ".hidden", "c.jsonl"):
            write(name, json.dumps("record") if name == "c.jsonl" else name)
        (tmp_path / "deep").mkdir()
        write("deep/a.txt", "deep")
        assert said(Source(str(tmp_path))) == ["a.md", "b.txt", "record", "deep"]

    def test_join_reads_records_as_lines_of_one_text(self, write):
        lines = [{"text": text} for text in ("", " = Title = \n", "body", "", "more")]
        source = write("a.jsonl", lines, join=True)
        assert said(source) == ["\n\n".join(record["text"] for record in lines)]
        pieces = list(documents(source, 12))
        assert "".join(piece.text for piece in pieces) == said(source)[0]
        assert [piece.ends for piece in pieces] == [False, True]

    def test_blank_documents_are_passed_over(self, write):
        assert said(write("a.jsonl", [{"text": " \n"}, {"text": ""}, {"text": "x"}])) == ["x"]

    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("a.txt", Source("a.txt")),
            ("a.txt:weight=0.3", Source("a.txt", 0.3)),
            ("C:\\x.jsonl:field=body,weight=2", Source("C:\\x.jsonl", 2.0, field="body")),
            ("a:b.txt", Source("a:b.txt")),
            ("a.parquet:join=true", Source("a.parquet", join=True)),
        ],
    )
    def test_parse(self, text, wanted):
        assert Source.parse(text) == wanted

    def test_parse_a_dataset(self):
        assert Source.parse("c4:split=validation", hub=True) == Source("c4", split="validation", hub=True)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a:weigth=1", "did you mean 'weight'"),
            ("a:weight=x", "positive number, got 'x'"),
            ("a:weight=0", "positive number"),
            ("a:weight=nan", "positive number"),
            ("", "needs a name"),
        ],
    )
    def test_parse_refuses(self, text, message):
        with pytest.raises(UserError, match=message):
            Source.parse(text)


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
            ("a.json", "[1,", r"a\.json:1: not valid JSON"),
            ("a.jsonl", "[1]\n", r"a\.jsonl:1: a record must be an object"),
            ("a.jsonl", '{"body": "x"}\n', r"a\.jsonl:1: neither a text .*fields: body.*field=NAME"),
            ("a.jsonl", '{"messages": [{"role": "user"}]}\n', r"a\.jsonl:1: turn 1 needs a role and a text"),
            ("a.jsonl", '{"query": "x", "response": null}\n', r"a\.jsonl:1: turn 2 needs"),
            ("a.txt", b"abc\xff\xfe", r"a\.txt:1: not UTF-8 text \(byte 0xff\)"),
            ("a.txt", b"abc\0def", r"a\.txt:1: not text but binary"),
            ("a.txt.gz", b"not gzip", r"a\.txt\.gz: cannot be read"),
            (
                "a.jsonl.gz",
                gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:30],
                r"a\.jsonl\.gz: cannot be read",
            ),
            ("a.parquet", b"not parquet", r"a\.parquet: not a Parquet file"),
        ],
    )
    def test_a_broken_file_is_named_with_its_place(self, write, name, content, message):
        with pytest.raises(UserError, match=message):
            said(write(name, content))

    def test_a_missing_field_is_guessed(self, write):
        with pytest.raises(UserError, match="did you mean 'body'"):
            said(write("a.jsonl", [{"body": "x"}], field="bodi"))

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(UserError, match="no such file or folder"):
            said(Source(str(tmp_path / "nowhere.txt")))

    def test_a_dataset_name_given_as_a_file(self):
        with pytest.raises(UserError, match="--dataset c4"):
            said(Source("c4"))

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(UserError, match="holds no files"):
            said(Source(str(tmp_path)))

    @pytest.mark.parametrize("options", [{"field": "x"}, {"join": True}, {"split": "train"}])
    def test_options_that_a_text_file_cannot_follow(self, write, options):
        with pytest.raises(UserError, match=r"field and join|for hub datasets"):
            said(write("a.txt", "abc", **options))

    @pytest.mark.parametrize(
        ("content", "options", "message"),
        [
            (" \n", {}, "holds no text"),
            ("abc", {}, r"2 samples of 4 tokens need 8 tokens, but there are 4; .*at most 1 samples"),
            ("abc", {"mode": "chat"}, "chat mode needs conversations"),
            ("abc", {"samples": 0}, "at least 1 sample"),
        ],
    )
    def test_too_little_text(self, tokenizer, write, content, options, message):
        with pytest.raises(UserError, match=message):
            calibration(
                [write("a.txt", content)], tokenizer, Sampling(**{"samples": 2, "length": 4, **options})
            )

    def test_too_few_conversations(self, tokenizer, write):
        source = write("a.jsonl", [{"query": "q", "response": "a"}] * 3)
        with pytest.raises(UserError, match="5 samples need 5 conversations, but there are 3"):
            calibration([source], tokenizer, Sampling(5, 8))

    def test_a_conversation_that_the_template_refuses(self, tokenizer, write):
        source = write("a.jsonl", [{"messages": [{"role": "tool", "content": "x"}]}])
        with pytest.raises(UserError, match=r"a\.jsonl:1: .*refuses this conversation: no tools"):
            calibration([source], tokenizer, Sampling(1, 8))

    def test_chat_mode_without_a_template(self, write):
        source = write("a.jsonl", [{"query": "q", "response": "a"}])
        with pytest.raises(UserError, match="does not have; use mode pack"):
            calibration([source], byte_tokenizer(template=None), Sampling(1, 8, mode="chat"))

    def test_a_source_whose_weight_leaves_it_nothing(self, tokenizer, write):
        sources = [write("a.txt", "a" * 99), write("b.txt", "b" * 99, weight=0.001)]
        with pytest.raises(UserError, match=r"b\.txt: its weight leaves it none of the 4 samples"):
            calibration(sources, tokenizer, Sampling(4, 8))

    def test_no_sources(self, tokenizer):
        with pytest.raises(UserError, match="no text was given"):
            calibration([], tokenizer)

    def test_an_unknown_shape_is_no_conversation(self):
        assert conversation({"text": "x"}, "here:1") is None


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch):
        """Stand in for the `datasets` package: its one function, in its own signature."""
        calls = []
        module = types.ModuleType("datasets")
        monkeypatch.setitem(sys.modules, "datasets", module)

        def serve(answer):
            def load_dataset(path, name=None, data_files=None, split=None, streaming=False):
                calls.append((path, name, data_files, split, streaming))
                if isinstance(answer, Exception):
                    raise answer
                return iter(answer)

            module.load_dataset = load_dataset  # pyright: ignore[reportAttributeAccessIssue]
            return calls

        return serve

    def test_a_ready_name_is_drawn_from_like_a_file(self, tokenizer, hub, write):
        calls = hub(numbered(50))
        drawn = calibration([Source("c4", hub=True)], tokenizer, Sampling(4, 16))
        assert (
            drawn.digest == calibration([write("a.jsonl", numbered(50))], tokenizer, Sampling(4, 16)).digest
        )
        assert calls == [("allenai/c4", "en", None, "train", True)]

    def test_wikitext_is_one_running_text(self, hub):
        hub([{"text": " = A = \n"}, {"text": "b"}])
        assert said(Source("wikitext2", hub=True, split="test")) == [" = A = \n\n\nb"]

    def test_lima_is_read_from_its_file(self, hub):
        calls = hub([HUB_SCHEMAS["lima"][0]])
        assert said(Source("lima", hub=True)) == ["hi\n\nhello\n\nbye"]
        assert calls == [("json", None, "hf://datasets/GAIR/lima/train.jsonl", "train", False)]

    def test_any_dataset_by_owner_and_name(self, hub):
        calls = hub([{"text": "x"}])
        assert said(Source("someone/thing", hub=True)) == ["x"]
        assert calls == [("someone/thing", None, None, "train", True)]

    def test_an_unknown_name(self):
        with pytest.raises(UserError, match="did you mean 'alpaca'"):
            said(Source("alpacca", hub=True))

    def test_offline_is_one_sentence(self, hub):
        hub(ConnectionError("Couldn't reach the hub\nTraceback ..."))
        with pytest.raises(
            UserError, match=r"cannot read allenai/c4 .*Couldn't reach the hub\); a local copy"
        ):
            said(Source("c4", hub=True))

    @pytest.mark.parametrize(
        ("missing", "source", "extra"),
        [("datasets", Source("c4", hub=True), "datasets"), ("pyarrow", Source("a.parquet"), "parquet")],
    )
    def test_a_missing_extra_is_named(self, monkeypatch, tmp_path, missing, source, extra):
        real = builtins.__import__

        def without(name, *rest):
            if name.partition(".")[0] == missing:
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.chdir(tmp_path)
        (tmp_path / "a.parquet").touch()
        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(UserError, match=rf"pip install \"moespresso\[{extra}\]\""):
            said(source)

    def test_the_table_is_complete(self):
        assert set(READY) == {"c4", "pile", "wikitext2", "alpaca", "lima", "metamathqa"}
