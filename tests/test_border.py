"""The border from text to model: what a tokenizer, an embedding or a table of positions does not take is refused before any
work, with file, line and a cure that works, whichever rows are drawn."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import tiny_tokenizer, write_wide, write_words
from families import FAMILIES
from moespresso import api
from moespresso.build import num_positions, open_view
from moespresso.core.errors import UserError
from moespresso.data import Sampling, Source, calibration, load_tokenizer, sequences
from moespresso.data.text import documents
from moespresso.run import Recipe
from test_data import byte_tokenizer

ROWS = 96
STEP = ["expert_drop:keep=6"]


def wide_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a token more than the model has rows: "zeta" is number 96 of 0 to 95."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(ROWS - len(tokenizer))] + ["zeta"])
    tokenizer.add_special_tokens(special)
    return tokenizer


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    folder = write_wide(tmp_path / "model")
    wide_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that was made for 32 positions."""
    return write_wide(tmp_path_factory.mktemp("short") / "model", max_position_embeddings=32)


def lines(path: Path, *texts: object) -> Path:
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


def said(source: Source) -> list[str]:
    return [document.text for document in documents(source, 1 << 20)]


class TestTokens:
    @pytest.mark.parametrize("seed", range(3))
    def test_one_in_any_document_is_found_whatever_is_drawn(self, tmp_path: Path, seed: int):
        texts = [{"text": "word " * 30}] * 99
        path = lines(tmp_path / "a.jsonl", *texts, {"text": "a zeta of it"})
        with pytest.raises(UserError, match=r"a\.jsonl:100: 'zeta' is the tokenizer's token 96, .* has 96"):
            calibration([Source(str(path))], wide_tokenizer(), Sampling(2, 16, seed), vocab=ROWS)
        lines(path, *texts)
        assert len(calibration([Source(str(path))], wide_tokenizer(), Sampling(2, 16, seed), vocab=ROWS)) == 2

    @pytest.mark.parametrize("shape", ["{}", "{}\n\n\nmore\n" * 3, "\u00e9 \u2028 {}"])
    def test_its_line_in_a_text_is_named(self, tmp_path: Path, shape: str):
        path = tmp_path / "a.txt"
        path.write_text(
            "first\n\nsecond\n" + shape.replace("{}", "a zeta", 1).replace("{}", ""), encoding="utf-8"
        )
        for read in (lambda: calibration([Source(str(path))], wide_tokenizer(), Sampling(1, 4), vocab=ROWS),
                     lambda: sequences([Source(str(path))], wide_tokenizer(), 4, vocab=ROWS)):  # fmt: skip
            with pytest.raises(UserError, match=r"a\.txt:4: 'zeta'"):
                read()

    def test_its_line_in_a_piece_of_a_long_text_is_named(self, tmp_path: Path):
        path = write_words(tmp_path / "a.txt", 6000)
        count = len(path.read_text().splitlines())
        path.write_text(path.read_text() + "and zeta\n")
        with pytest.raises(UserError, match=rf"a\.txt:{count + 1}: 'zeta'"):
            calibration([Source(str(path))], wide_tokenizer(), Sampling(1, 4), vocab=ROWS)

    def test_in_conversations(self, tmp_path: Path):
        tokenizer = wide_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
        good, bad = ({"messages": [{"role": "user", "content": text}]} for text in ("theta", "no zeta here"))
        with pytest.raises(UserError, match=r"a\.jsonl:4: 'zeta'"):
            calibration(
                [Source(str(lines(tmp_path / "a.jsonl", good, good, good, bad)))],
                tokenizer,
                Sampling(1, 4),
                vocab=ROWS,
            )
        assert calibration(
            [Source(str(lines(tmp_path / "a.jsonl", good)))], tokenizer, Sampling(1, 4), vocab=ROWS
        )

    def test_a_template_of_its_own_that_holds_one(self, tmp_path: Path):
        tokenizer = wide_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}zeta {{ m.content }}{% endfor %}"
        path = lines(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "abcdefgh"}]})
        with pytest.raises(UserError, match=r"a\.jsonl:1: 'zeta'"):
            calibration([Source(str(path))], tokenizer, Sampling(1, 4), vocab=ROWS)
        assert calibration([Source(str(path))], tokenizer, Sampling(1, 4, mode="pack"), vocab=ROWS)

    def test_the_end_of_a_text(self, tmp_path: Path):
        path = lines(tmp_path / "a.jsonl", {"text": "words and words"})
        with pytest.raises(UserError, match="ends a text with 'zeta', its token 96"):
            calibration([Source(str(path))], wide_tokenizer(eos_token="zeta"), Sampling(1, 4), vocab=ROWS)
        assert calibration([Source(str(path))], wide_tokenizer(), Sampling(1, 4), vocab=ROWS)

    def test_what_fills_rows_has_a_row(self, tmp_path: Path):
        """A padding token that was added behind the embedding is the commonest of all, and nobody looks at it."""
        path = lines(tmp_path / "a.jsonl", {"text": "word"})
        rows = sequences([Source(str(path))], wide_tokenizer(pad_token="zeta"), 32, vocab=ROWS)
        assert int(rows.ids.max()) < ROWS

    def test_more_rows_than_tokens_are_no_matter(self, tmp_path: Path):
        path = write_words(tmp_path / "a.txt", 200)
        drawn = [
            calibration([Source(str(path))], tiny_tokenizer(), Sampling(4, 16), vocab=vocab)
            for vocab in (None, ROWS, 5000)
        ]
        assert len({batches.digest for batches in drawn}) == 1

    def test_every_verb_says_it_and_goes_on_without(self, wide: Path, tmp_path: Path):
        path = tmp_path / "a.txt"
        words = write_words(path, 400).read_text()
        path.write_text(words + "zeta\n")
        more: dict[str, Any] = {"steps": STEP, "texts": [path], "samples": 2, "length": 16}
        verbs: list[Callable[[], object]] = [
            lambda: api.press(wide, out=tmp_path / "out", **more),
            lambda: api.measure(wide, out=tmp_path / "stats", **more),
            lambda: api.plan(wide, out=tmp_path / "plan", **more),
            lambda: api.evaluate(wide, texts=[Source(str(path))], length=16),
        ]
        for verb in verbs:
            with pytest.raises(UserError, match=r"a\.txt:41: 'zeta' .*give the model the tokenizer"):
                verb()
        assert sorted(file.name for file in tmp_path.iterdir()) == ["a.txt", "model"]
        path.write_text(words)
        api.press(wide, out=tmp_path / "out", **more)
        path.write_text(words + "zeta\n")
        tiny_tokenizer().save_pretrained(wide)
        assert api.evaluate(wide, texts=[Source(str(path))], length=16)["tokens"]


class TestTexts:
    @pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc00\ud800"])
    @pytest.mark.parametrize("where", ["text", "messages", "tools"])
    def test_half_a_character(self, tmp_path: Path, text: str, where: str):
        record = {"text": {"text": text}, "messages": {"messages": [{"role": "user", "content": text}]},
                  "tools": {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": text}]}}[where]  # fmt: skip
        path = lines(tmp_path / "a.jsonl", {"text": "x"}, record)
        with pytest.raises(UserError, match=r"a\.jsonl:2: holds half a character \(\\\\?ud.*take it out"):
            said(Source(str(path)))
        whole = lines(tmp_path / "a.jsonl", {"text": "x \U0001f600"})
        assert said(Source(str(whole))) == ["x \U0001f600"]

    def test_what_the_tokenizer_itself_refuses(self, tmp_path: Path):
        bare = Tokenizer(models.WordLevel({"known": 0, "words": 1}, unk_token="<nothing>"))
        bare.pre_tokenizer = pre_tokenizers.Whitespace()
        path = lines(tmp_path / "a.jsonl", {"text": "known words"}, {"text": "other words"})
        with pytest.raises(
            UserError, match=r"a\.jsonl:2: the tokenizer does not take this text \(.*\): mend"
        ):
            sequences([Source(str(path))], PreTrainedTokenizerFast(tokenizer_object=bare), 2)
        lines(path, {"text": "known words"})
        assert len(sequences([Source(str(path))], PreTrainedTokenizerFast(tokenizer_object=bare), 2)) == 1

    @pytest.mark.parametrize("text", ["a\0b", "\ufeff x", "x" * 70000, "\u202e\u200b.", "\r\n\tx"])
    def test_odd_texts_are_texts(self, tmp_path: Path, text: str):
        assert said(Source(str(lines(tmp_path / "a.jsonl", {"text": text})))) == [text]

    def test_a_text_that_holds_nothing(self, tmp_path: Path):
        path = lines(tmp_path / "a.jsonl", {"text": " \n"}, {"text": ""})
        with pytest.raises(UserError, match="holds no text: give a file that does"):
            calibration([Source(str(path))], byte_tokenizer(), Sampling(1, 4))


class TestLayouts:
    WANTED = ("one", "two")

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.json.gz"])
    @pytest.mark.parametrize("indent", [None, 1])
    @pytest.mark.parametrize("array", [True, False])
    def test_values_are_read_however_they_are_laid_out(
        self, tmp_path: Path, name: str, indent: int | None, array: bool
    ):
        records = [{"text": text, "n": [1, {"a": "]"}]} for text in self.WANTED]
        written = (
            json.dumps(records, indent=indent)
            if array
            else "\n".join(json.dumps(r, indent=indent) for r in records)
        )
        packed = gzip.compress(written.encode()) if name.endswith(".gz") else written.encode()
        (tmp_path / name).write_bytes(packed)
        if array and indent is None and ".json" not in (name.removesuffix(".gz")[-5:],):
            with pytest.raises(
                UserError, match=r":1: a record must be .*got a list: mend"
            ):  # cure: its own ending
                said(Source(str(tmp_path / name)))
            (tmp_path / name).rename(tmp_path / "b.json")
            name = "b.json"
        assert said(Source(str(tmp_path / name))) == list(self.WANTED)

    def test_one_conversation_over_many_lines(self, tmp_path: Path):
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        for content in (chat, chat["messages"]):
            (tmp_path / "a.json").write_text(json.dumps(content, indent=2))
            assert said(Source(str(tmp_path / "a.json"))) == ["hi"]

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("a.json", '[\n{"text": "x"},\n{"text": 3}\n]', r"a\.json:3, record 2: no text in field 'text', but a number"),
            ("a.json", '{\n"version": 1,\n"data": [{"text": "x"}]\n}', r"a\.json:1: the records .* in the field 'data'"),
            ("a.json", '[{"text": "x"},\n{"text": "y"', r"a\.json:2: not valid JSON"),
            ("a.jsonl", '{"text": "x"}\n\n{"text": null}\n', r"a\.jsonl:3: no text in field 'text', but null: mend it"),
            ("a.jsonl", '{"text": "x"}\nnull\n', r"a\.jsonl:2: a record must be .* got null"),
            ("a.jsonl", '{"text": ["x"]}\n', r"a\.jsonl:1: no text in field 'text', but a list"),
            ("a.jsonl", '{"text": "x"}\n' + '{"n": ' + "9" * 5000 + "}\n", r"a\.jsonl:2: not valid JSON \(Exceeds"),
            ("a.jsonl", '{"text": "x"}\n' + "[" * 99999, r"a\.jsonl:2: not valid JSON"),
            ("a.jsonl", "text\nx\n", r"a\.jsonl:1: not valid JSON"),
            ("a.txt", b"fine\nb\xff\xfe", r"a\.txt:2: not UTF-8 text \(byte 0xff\); give text"),
            ("a.txt", "text".encode("utf-16"), r"a\.txt:1: not UTF-8 .*UTF-16: convert"),
            ("a.jsonl", '{"text": "x"}'.encode("utf-16"), r"a\.jsonl:1: not UTF-8 .*UTF-16: convert"),
            ("a.txt", "text".encode("utf-16-le"), r"a\.txt:1: not text but binary"),
            ("a.txt", gzip.compress(b"text", mtime=0), r"a\.txt:1: not UTF-8 .*gzip: give its name the ending \.gz"),
            ("a.txt.gz", b"text", r"a\.txt\.gz: cannot be read .* take the ending \.gz"),
            ("a.docx", b"PK\x03\x04\0\0", r"a\.docx:1: not text but binary; it seems to be a zip"),
            ("a.parquet", b"PAR1", r"a\.parquet: not a Parquet file .*: give its name"),
        ],
    )  # fmt: skip
    def test_what_is_none_is_refused_with_its_line(
        self, tmp_path: Path, name: str, content: str | bytes, words: str
    ):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=words):
            said(Source(str(tmp_path / name)))

    def test_utf_16_reads_when_converted_and_gzip_when_named(self, tmp_path: Path):
        (tmp_path / "a.txt").write_text("text".encode("utf-16").decode("utf-16"), encoding="utf-8")
        (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"text", mtime=0))
        assert said(Source(str(tmp_path / "a.txt"))) == said(Source(str(tmp_path / "b.txt.gz"))) == ["text"]

    @pytest.mark.parametrize(
        ("name", "content"),
        [("a.txt", '{"text": "x"}\n{"text": "y"}\n'), ("a.csv", "text\nx\n"), ("a.tsv", "text\tn\n")],
    )
    def test_records_read_as_text_are_told(
        self, tmp_path: Path, name: str, content: str, caplog: pytest.LogCaptureFixture
    ):
        (tmp_path / name).write_text(content)
        assert said(Source(str(tmp_path / name))) == [content]
        assert "read as plain text, though it seems to hold records" in caplog.text

    def test_plain_text_is_not(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        (tmp_path / "a.txt").write_text("{ a text }\n[1] and more\n")
        said(Source(str(tmp_path / "a.txt")))
        assert caplog.text == ""

    @pytest.mark.parametrize("seed", range(3))
    def test_a_text_among_conversations(self, tmp_path: Path, seed: int):
        chat = {"messages": [{"role": "user", "content": "hi"}]}
        path = lines(tmp_path / "a.jsonl", *[chat] * 9, {"text": "hello"})
        with pytest.raises(UserError, match=r"a\.jsonl:10: chat mode needs conversations.*use mode pack"):
            calibration([Source(str(path))], byte_tokenizer(), Sampling(1, 4, seed))
        assert calibration([Source(str(path))], byte_tokenizer(), Sampling(1, 4, seed, "pack"))

    def test_a_conversation_among_texts(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        path = lines(
            tmp_path / "a.jsonl", {"text": "hello"}, {"messages": [{"role": "user", "content": "hi"}]}
        )
        calibration([Source(str(path))], byte_tokenizer(), Sampling(1, 4))
        assert "a.jsonl:2: a conversation among texts" in caplog.text


class TestPositions:
    def test_a_wish_beyond_them_is_refused_and_its_cure_works(self, model: Path, text: Path, tmp_path: Path):
        more: dict[str, Any] = {"steps": STEP, "texts": [text], "samples": 2}
        with pytest.raises(UserError, match=r"--length 33 is more than the 32 positions .*: say --length 32"):
            api.press(model, out=tmp_path / "out", length=33, **more)
        with pytest.raises(UserError, match="--length 2048 is more than the 32"):
            api.press(model, out=tmp_path / "out", length=2048, **more)
        with pytest.raises(UserError, match="say --length 32"):
            api.evaluate(model, texts=[Source(str(text))], length=512)
        assert not (tmp_path / "out").exists()
        api.press(model, out=tmp_path / "out", length=32, **more)
        assert api.evaluate(model, texts=[Source(str(text))], length=32, limit=1)["tokens"]

    def test_the_usual_length_gives_way_aloud(
        self, model: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ):
        report = api.press(model, out=tmp_path / "out", steps=STEP, texts=[text], samples=2)
        assert report.recipe["calibration"]["length"] == report.plan.calibration["length"] == 32
        assert "rows have 32 tokens and not 2048" in caplog.text
        caplog.clear()
        api.evaluate(model, texts=[Source(str(text))], limit=1)
        assert "rows have 32 tokens and not 512" in caplog.text

    def test_a_recipe_that_says_a_length_wishes_it(self, model: Path, text: Path, tmp_path: Path):
        path = tmp_path / "r.yaml"
        path.write_text(
            f"calibration:\n  texts: [{{path: {text}}}]\n  samples: 2\n  length: 2048\nsteps: [expert_drop:keep=6]\n"
        )
        with pytest.raises(UserError, match="say --length 32"):
            api.press(model, out=tmp_path / "out", recipe=Recipe.load(path))
        path.write_text(path.read_text().replace("  length: 2048\n", ""))
        api.press(model, out=tmp_path / "out", recipe=Recipe.load(path))

    def test_steps_without_text_have_no_rows(self, model: Path, tmp_path: Path):
        api.press(model, out=tmp_path / "out", steps=["expert_drop:keep=6,score=aimer"], length=4096)

    @pytest.mark.parametrize(
        ("said", "wanted"),
        [
            ({}, 32),
            ({"max_position_embeddings": 64}, 64),
            (
                {
                    "rope_scaling": {
                        "rope_type": "yarn",
                        "factor": 4.0,
                        "original_max_position_embeddings": 16,
                    }
                },
                64,
            ),
            ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 128),
            ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 64),
            ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 64),
            ({"sliding_window": 8}, 32),
        ],
    )
    def test_what_a_config_comes_to(self, model: Path, tmp_path: Path, said: dict[str, Any], wanted: int):
        folder = Path(shutil.copytree(model, tmp_path / "model"))
        config = json.loads((folder / "config.json").read_text())
        config.pop("rope_parameters", None) if "rope_scaling" in said else None
        (folder / "config.json").write_text(json.dumps(config | said))
        assert num_positions(open_view(folder)) == wanted

    @pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe"])
    def test_families_say_them(self, zoo: Callable[[str], Path], family: str):
        assert family in FAMILIES
        assert num_positions(open_view(zoo(family))) in (128, 16 * 32, 128 * 32)

    def test_a_recipe_knows_what_was_asked(self):
        assert Recipe().within(64).calibration.length == 64
        assert Recipe().with_options(length=32).within(64).calibration.length == 32
        assert Recipe().within(None) == Recipe()
        for asked in (100, 2048):
            with pytest.raises(UserError, match="say --length 64"):
                Recipe().with_options(length=asked).within(64)


class TestTokenizers:
    def test_the_librarys_own_reason_is_said_and_its_cure_works(self, wide: Path):
        tokenizer = (wide / "tokenizer.json").read_bytes()
        (wide / "tokenizer.json").unlink()
        (wide / "tokenizer.model").write_bytes(b"\n\x0e")
        with pytest.raises(
            UserError,
            match=r"cannot|can load.*\(.*(tiktoken|sentencepiece).*\): pip install .*tokenizer\.json",
        ) as refused:
            load_tokenizer(wide)
        assert "\n" not in str(refused.value)
        (wide / "tokenizer.json").write_bytes(tokenizer)
        assert len(load_tokenizer(wide)) == 97

    @pytest.mark.parametrize(
        "content", ["{}", "", "not json", '{"version": "1.0", "model": {"type": "Unheard"}}']
    )
    def test_one_that_is_damaged(self, wide: Path, content: str):
        (wide / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"has no tokenizer .*\(.+\): copy tokenizer\.json"):
            load_tokenizer(wide)

    def test_none_at_all(self, wide: Path):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (wide / name).unlink()
        with pytest.raises(UserError, match=r"\(.+\): copy tokenizer\.json and tokenizer_config\.json"):
            load_tokenizer(wide)

    def test_one_without_tokens(self, wide: Path):
        bare = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE()), pad_token="<pad>", eos_token="</s>"
        )
        bare.save_pretrained(wide)
        with pytest.raises(UserError, match="without any tokens"):
            load_tokenizer(wide)
