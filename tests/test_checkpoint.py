"""Bytes on disk: what is broken is refused, what is read is exact, what is written can be read by everyone."""

import fcntl
import itertools
import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from moespresso.build import Tensors
from moespresso.build import tensors as making
from moespresso.build.tensors import runs
from moespresso.build.write import Shard, index_of, shards_of, write_shard
from moespresso.checkpoint import (
    MANIFEST,
    FileFacts,
    Journal,
    Manifest,
    Origin,
    Written,
    claim,
    copy_sidecar,
    finish,
    open_checkpoint,
    sidecars,
    write_file,
    write_text,
)
from moespresso.checkpoint.files import INDEX, SINGLE
from moespresso.checkpoint.index import read_header
from moespresso.checkpoint.journal import WORK
from moespresso.checkpoint.reader import count_nonfinite
from moespresso.checkpoint.writer import header
from moespresso.core.blueprint import Entry, TensorRef
from moespresso.core.cost import Cost
from moespresso.core.errors import NonFiniteError, UserError
from moespresso.core.plan import Plan
from moespresso.core.unit import Unit
from moespresso.effect import Piece

# Hypothesis' examples share the folder of a function-scoped fixture; each writes its own files anew.
same_folder = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_raw(path: Path, rows: object, data: bytes = bytes(64), *, length: int | None = None) -> Path:
    """Write a safetensors file byte by byte: `rows` is its header (bytes are taken as they are)."""
    body = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + data)
    return path


def row(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def piece_of(
    ref: TensorRef, axis: int | None = None, take: tuple[int, ...] | None = None, scale: float = 1.0
) -> Piece:
    """A piece that takes entries `take` of `axis`, as a plan would."""
    shape = ref.shape if axis is None else (*ref.shape[:axis], len(take or ()), *ref.shape[axis + 1 :])
    return Piece(ref.name, shape, Entry(ref, Unit(None)), axis, take, scale)


def save_checkpoint(folder: Path, parts: dict[str, dict[str, Tensor]]) -> Path:
    """Write shards by file name, the index over them, and a config."""
    folder.mkdir(exist_ok=True)
    for file, tensors in parts.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def two_shards(tmp_path: Path) -> Path:
    parts = {
        "one.safetensors": {"a": torch.ones(2), "b": torch.zeros(3)},
        "two.safetensors": {"c": torch.ones(4)},
    }
    return save_checkpoint(tmp_path / "model", parts)


def edit_index(folder: Path, **changes: str | None) -> None:
    """Change or (None) remove entries of the weight map."""
    body = json.loads((folder / INDEX).read_text())
    body["weight_map"].update(changes)
    body["weight_map"] = {name: file for name, file in body["weight_map"].items() if file is not None}
    (folder / INDEX).write_text(json.dumps(body))


class TestHeader:
    @pytest.mark.parametrize(
        "rows",
        [
            b"", b"{", b"not json", b"\xff\xfe", [], 1, "text",
            {"a": 5}, {"a": {}}, {"a": {"dtype": "F32", "shape": [2]}},
            {"a": row(dtype="F33")}, {"a": row(dtype=["F32"])},
            {"a": row(shape=2)}, {"a": row(shape=["x"])}, {"a": row(shape=[-1], offsets=[4, 0])},
            {"a": row(offsets=[0])}, {"a": row(offsets=[0, "8"])}, {"a": row(offsets=[-8, 0])},
            {"a": row(offsets=[0, 4])}, {"a": row(offsets=[8, 0])}, {"a": row(shape=[32], offsets=[0, 128])},
        ],
        ids=str,
    )  # fmt: skip
    def test_a_broken_one_is_refused_with_its_place(self, tmp_path: Path, rows: object):
        path = write_raw(tmp_path / "x.safetensors", rows)
        with pytest.raises(UserError, match=r"x\.safetensors"):
            read_header(path)

    def test_tensors_that_overlap_are_refused(self, tmp_path: Path):
        rows = {"a": row(offsets=[0, 8]), "b": row(offsets=[4, 12])}
        with pytest.raises(UserError, match=r"x\.safetensors"):
            read_header(write_raw(tmp_path / "x.safetensors", rows, bytes(12)))

    @pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 8, b"\xff" * 300, b"<html>not here</html>"])
    def test_garbage_is_refused(self, tmp_path: Path, content: bytes):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(UserError, match="truncated or not a safetensors file"):
            read_header(path)

    def test_every_truncation_is_noticed(self, tmp_path: Path):
        path = tmp_path / "x.safetensors"
        save_file({"a": torch.arange(6.0), "b": torch.arange(3, dtype=torch.int64)}, path)
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with pytest.raises(UserError):
                read_header(path)

    def test_reads_what_safetensors_wrote(self, tmp_path: Path):
        tensors = {
            "a": torch.zeros(2, 3, dtype=torch.bfloat16),
            "b": torch.zeros(0, 4),
            "c": torch.tensor(1.0),
        }
        save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
        found = {ref.name: ref for ref in read_header(tmp_path / "x.safetensors")}
        assert {name: ref.shape for name, ref in found.items()} == {"a": (2, 3), "b": (0, 4), "c": ()}
        assert {name: ref.nbytes for name, ref in found.items()} == {"a": 12, "b": 0, "c": 4}


class TestOpen:
    def test_opens_two_shards(self, two_shards: Path):
        found = open_checkpoint(two_shards)
        assert {name: ref.file for name, ref in found.tensors.items()} == {
            "a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"
        }  # fmt: skip

    def test_index_naming_an_absent_file(self, two_shards: Path):
        edit_index(two_shards, d="three.safetensors")
        with pytest.raises(UserError, match=r"names three\.safetensors, which is not there"):
            open_checkpoint(two_shards)

    def test_index_naming_an_absent_tensor(self, two_shards: Path):
        edit_index(two_shards, d="two.safetensors")
        with pytest.raises(UserError, match=r"promises d in two\.safetensors, which lacks it"):
            open_checkpoint(two_shards)

    def test_index_naming_the_wrong_file(self, two_shards: Path):
        edit_index(two_shards, a="two.safetensors")
        found = open_checkpoint(two_shards)  # transformers loads all of every file that it names
        assert found.tensors["a"].file == "one.safetensors"
        assert "places a in two.safetensors, but it is in one.safetensors" in " ".join(found.notes)

    def test_a_tensor_in_two_shards(self, two_shards: Path):
        save_file({"c": torch.ones(4), "a": torch.ones(2)}, two_shards / "two.safetensors")
        with pytest.raises(UserError, match="tensor a is in both"):
            open_checkpoint(two_shards)

    @pytest.mark.parametrize("body", ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', "{}"])
    def test_a_broken_index(self, two_shards: Path, body: str):
        (two_shards / INDEX).write_text(body)
        with pytest.raises(UserError, match=r"index\.json"):
            open_checkpoint(two_shards)

    def test_weights_of_another_kind_are_named(self, tmp_path: Path):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "pytorch_model.bin").touch()
        with pytest.raises(UserError, match=r"pytorch_model\.bin: save it as safetensors"):
            open_checkpoint(tmp_path)

    def test_no_config(self, two_shards: Path):
        (two_shards / "config.json").unlink()
        with pytest.raises(UserError, match=r"config\.json is missing"):
            open_checkpoint(two_shards)

    def test_digest_sees_config_names_and_values(self, two_shards: Path):
        before = open_checkpoint(two_shards).digest
        assert open_checkpoint(two_shards).digest == before
        (two_shards / "config.json").write_text('{"a": 1}')
        other_config = open_checkpoint(two_shards).digest
        save_file({"c": torch.tensor([1.0, 1.0, 1.0, 2.0])}, two_shards / "two.safetensors")
        assert len({before, other_config, open_checkpoint(two_shards).digest}) == 3


class TestRuns:
    @given(st.sets(st.integers(0, 60)))
    def test_cover_exactly_and_are_as_few_as_can_be(self, numbers: set[int]):
        found = runs(tuple(sorted(numbers)))
        assert [n for start, stop in found for n in range(start, stop)] == sorted(numbers)
        assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(found))


class TestReader:
    @pytest.mark.parametrize(
        ("dtype", "torch_dtype"), [("F32", torch.float32), ("BF16", torch.bfloat16), ("I64", torch.int64)]
    )
    def test_unaligned_tensors_are_exact(self, tmp_path: Path, dtype: str, torch_dtype: torch.dtype):
        values = torch.arange(1, 7).to(torch_dtype)
        data = b"\1" + values.view(torch.uint8).numpy().tobytes()
        rows = {"byte": row("U8", [1], [0, 1]), "odd": row(dtype, [2, 3], [1, len(data)])}
        rows_text = json.dumps(rows).encode()
        path = write_raw(tmp_path / "x.safetensors", rows_text + b" " * (-len(rows_text) % 8), data)
        ref = read_header(path)[1]
        assert ref.offset % 2 == 1
        with Tensors(tmp_path) as reader:
            assert torch.equal(reader.reader.tensor(ref), values.view(2, 3))
            assert torch.equal(reader.whole(piece_of(ref, 1, (0, 2))), values.view(2, 3)[:, [0, 2]])

    def test_empty_and_scalar_tensors(self, tmp_path: Path):
        save_file({"none": torch.zeros(0, 4), "one": torch.tensor(2.5)}, tmp_path / "x.safetensors")
        with Tensors(tmp_path) as reader:
            found = {ref.name: reader.whole(piece_of(ref)) for ref in read_header(tmp_path / "x.safetensors")}
        assert found["none"].shape == (0, 4)
        assert found["one"].shape == ()
        assert found["one"] == 2.5

    @same_folder
    @given(data=st.data())
    def test_takes_rows_along_any_axis_and_scales(self, tmp_path: Path, data: st.DataObject):
        shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
        axis = data.draw(st.integers(0, len(shape) - 1))
        take = tuple(sorted(data.draw(st.sets(st.integers(0, shape[axis] - 1), min_size=1))))
        scale = data.draw(st.sampled_from([1.0, 0.5, 1.7]))
        values = torch.randn(shape).bfloat16()
        save_file({"before": torch.zeros(3), "x": values}, tmp_path / "x.safetensors")
        ref = next(ref for ref in read_header(tmp_path / "x.safetensors") if ref.name == "x")
        piece = piece_of(ref, axis, take, scale)
        wanted = (values.index_select(axis, torch.tensor(take)).float() * scale).bfloat16()
        with Tensors(tmp_path) as reader:
            assert torch.equal(reader.whole(piece), wanted)
            assert torch.equal(torch.cat([*reader.chunks(piece)]), wanted.reshape(-1))

    def test_chunks_are_bounded_and_in_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(making, "_CHUNK", 32)
        values = torch.randn(5, 7)
        save_file({"x": values}, tmp_path / "x.safetensors")
        with Tensors(tmp_path) as reader:
            chunks = [*reader.chunks(piece_of(read_header(tmp_path / "x.safetensors")[0], 0, (0, 1, 3, 4)))]
        assert max(chunk.nbytes for chunk in chunks) <= 32
        assert torch.equal(torch.cat(chunks), values[[0, 1, 3, 4]].reshape(-1))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_one_bad_value_is_refused_or_counted(self, tmp_path: Path, dtype: torch.dtype, bad: float):
        values = torch.ones(4, 5, dtype=dtype)
        values[2, 3] = bad
        save_file({"x": values}, tmp_path / "x.safetensors")
        ref = read_header(tmp_path / "x.safetensors")[0]
        with Tensors(tmp_path) as reader, pytest.raises(NonFiniteError, match=r"tensor x in .* holds 1 NaN"):
            reader.whole(piece_of(ref))
        with Tensors(tmp_path, allow_nonfinite=True) as reader:
            reader.whole(piece_of(ref))
            assert reader.nonfinite == {"x": 1}
        with Tensors(tmp_path) as reader:  # what is not taken is not looked at
            reader.whole(piece_of(ref, 0, (0, 1, 3)))

    def test_counts_in_eight_bit_floats_and_integers(self):
        eight = torch.tensor([1.0, float("nan"), 2.0]).to(torch.float8_e4m3fn)
        assert count_nonfinite(eight) == 1
        assert count_nonfinite(torch.ones(3, dtype=torch.int64)) == 0


def header_of(shard: Shard) -> bytes:
    return header((piece.ref for piece in shard.pieces), {"format": "pt"})


def refs(sizes: list[tuple[str, int]]) -> list[Piece]:
    return [
        piece_of(TensorRef(f"t{i}", (size,), dtype, "x.safetensors")) for i, (dtype, size) in enumerate(sizes)
    ]


class TestLayout:
    sizes = st.lists(
        st.tuples(st.sampled_from(["F64", "F32", "BF16", "U8"]), st.integers(0, 40)), min_size=1, max_size=30
    )

    @given(sizes, st.integers(1, 200))
    def test_every_piece_once_in_order_within_the_limit(self, sizes: list[tuple[str, int]], limit: int):
        pieces = refs(sizes)
        shards = shards_of(pieces, limit)
        number = {piece.name: place for place, piece in enumerate(pieces)}
        places = [[number[piece.name] for piece in shard.pieces] for shard in shards]
        # Shards follow each other in the source's order; within one, wide dtypes come first.
        assert [place for shard in places for place in sorted(shard)] == list(range(len(pieces)))
        assert all(
            shard.nbytes <= limit or len(shard.pieces) == 1 or _only_one_fills(shard) for shard in shards
        )

    @given(sizes, st.integers(1, 200))
    def test_no_shard_could_have_taken_the_next_piece(self, sizes: list[tuple[str, int]], limit: int):
        pieces = refs(sizes)
        shards = shards_of(pieces, limit)
        firsts = [min(shard.pieces, key=pieces.index).ref.nbytes for shard in shards[1:]]
        assert all(shard.nbytes + first > limit for shard, first in zip(shards, firsts, strict=False))

    @given(sizes, st.integers(1, 200))
    def test_every_tensor_is_aligned_to_its_width(self, sizes: list[tuple[str, int]], limit: int):
        width = {"F64": 8, "F32": 4, "BF16": 2, "U8": 1}
        for shard in shards_of(refs(sizes), limit):
            raw = header_of(shard)
            assert len(raw) % 8 == 0
            rows = json.loads(raw[8:])
            assert all(
                row["data_offsets"][0] % width[row["dtype"]] == 0
                for name, row in rows.items()
                if name != "__metadata__"
            )

    def test_names_count_from_one(self):
        pieces = refs([("U8", 10)] * 3)
        assert [shard.name for shard in shards_of(pieces, 10)] == [
            f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
        ]
        assert [shard.name for shard in shards_of(pieces, 30)] == [SINGLE]


def _only_one_fills(shard: Shard) -> bool:
    """A piece larger than the limit may stand with empty ones."""
    return sum(piece.ref.nbytes > 0 for piece in shard.pieces) == 1


class TestWrite:
    def test_shards_are_what_safetensors_reads(self, tmp_path: Path):
        tensors = {
            "byte": torch.arange(5, dtype=torch.uint8), "half": torch.randn(3, 5).half(), "brain": torch.randn(7).bfloat16(),
            "none": torch.zeros(0, 3), "scalar": torch.tensor(3.5), "wide": torch.randn(2, 2).double(),
            "flags": torch.tensor([True, False, True]), "whole": torch.arange(4),
        }  # fmt: skip
        save_file(tensors, tmp_path / "x.safetensors")
        shards = shards_of([piece_of(ref) for ref in read_header(tmp_path / "x.safetensors")], 40)
        assert len(shards) > 2
        out = tmp_path / "out"
        out.mkdir()
        with Tensors(tmp_path) as reader:
            written = [write_shard(out, shard, reader) for shard in shards]
        index_of(out, shards)
        weight_map = json.loads((out / INDEX).read_text())["weight_map"]
        assert weight_map.keys() == tensors.keys()
        for name, tensor in tensors.items():
            with safe_open(out / weight_map[name], "pt") as file:
                found = file.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
        for shard, file in zip(shards, written, strict=True):
            assert file.nbytes == (out / shard.name).stat().st_size == len(header_of(shard)) + shard.nbytes
            assert read_header(out / shard.name)

    def test_digest_and_nonfinite_are_of_what_was_written(self, tmp_path: Path):
        values = torch.ones(6)
        values[4] = float("nan")
        save_file({"x": values}, tmp_path / "x.safetensors")
        shard = shards_of([piece_of(read_header(tmp_path / "x.safetensors")[0])], 99)[0]
        with Tensors(tmp_path, allow_nonfinite=True) as reader:
            first, second = (write_shard(tmp_path, replace(shard, name=name), reader) for name in ("a", "b"))
        assert first.nonfinite == second.nonfinite == {"x": 1}
        digest = subprocess.run(["sha256sum", tmp_path / "a"], capture_output=True, text=True, check=True)
        assert digest.stdout.split()[0] == first.sha256 == second.sha256

    def test_index_counts_all_tensor_bytes(self, tmp_path: Path):
        shards = shards_of(refs([("F32", 10), ("BF16", 10), ("U8", 3)]), 40)
        index_of(tmp_path, shards)
        assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 63

    def test_a_failure_leaves_nothing_behind(self, tmp_path: Path):
        (tmp_path / "x").write_text("as it was")

        def parts():
            yield memoryview(b"half")
            raise RuntimeError("in the middle")

        with pytest.raises(RuntimeError, match="in the middle"):
            write_file(tmp_path / "x", parts())
        assert os.listdir(tmp_path) == ["x"]
        assert (tmp_path / "x").read_text() == "as it was"

    def test_the_name_appears_only_when_all_is_written(self, tmp_path: Path):
        def parts():
            for _ in range(3):
                assert not (tmp_path / "x").exists()
                yield memoryview(b"part")

        assert write_file(tmp_path / "x", parts())[0] == 12
        assert (tmp_path / "x").read_bytes() == b"part" * 3


class TestSidecars:
    def test_what_travels_what_is_ours_and_what_is_left(self, tmp_path: Path):
        travel = ["LICENSE.txt", "NOTICE", "chat_template.jinja", "generation_config.json", "merges.txt",
                  "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
                  "tekken.json", "tiktoken.model", "qwen.tiktoken", "sentencepiece.bpe.model", "spiece.model", "entity_vocab.json",
                  "added_tokens.json", "preprocessor_config.json", "audio_preprocessor_config.json"]  # fmt: skip
        left = [
            "modeling_own.py",
            "tokenization_own.py",
            "tokenizer.py",
            "training_args.bin",
            "processing_own.py",
            "trainer_state.json",
            "hf_quant_config.json",
        ]
        ours = [
            "README.md",
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            ".gitattributes",
            "pytorch_model.bin",  # named with the source
        ]
        for name in [*travel, *left, *ours]:
            (tmp_path / name).write_text(name)
        (tmp_path / "original").mkdir()
        (tmp_path / "tokenizer_folder").mkdir()
        found = sidecars(tmp_path)
        assert found[0] == sorted(travel)
        assert found[1] == sorted([*left, "original", "tokenizer_folder"])

    def test_copies_bytes_and_permissions(self, tmp_path: Path):
        (tmp_path / "LICENSE").write_bytes(b"free\r\n\xff")
        (tmp_path / "LICENSE").chmod(0o444)
        (tmp_path / "out").mkdir()
        for _ in range(2):  # a resumed run copies again, over a file that is read-only
            copied = copy_sidecar(tmp_path, tmp_path / "out", "LICENSE")
        assert copied.nbytes == 7
        assert (tmp_path / "out" / "LICENSE").read_bytes() == b"free\r\n\xff"
        assert (tmp_path / "out" / "LICENSE").stat().st_mode & 0o777 == 0o444

    def test_follows_links_as_the_hub_cache_has_them(self, tmp_path: Path):
        snapshot, blobs, out = (tmp_path / name for name in ("snapshot", "blobs", "out"))
        for folder in (snapshot, blobs, out):
            folder.mkdir()
        (blobs / "a1b2").write_text("{}")
        (snapshot / "tokenizer.json").symlink_to(blobs / "a1b2")
        (snapshot / "vocab.json").symlink_to(blobs / "lost")
        assert sidecars(snapshot) == (["tokenizer.json"], ["vocab.json"])
        copy_sidecar(snapshot, out, "tokenizer.json")
        assert not (out / "tokenizer.json").is_symlink()
        assert (out / "tokenizer.json").read_text() == "{}"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder in the making."""
    (tmp_path / "out" / WORK).mkdir(parents=True)
    return tmp_path / "out"


def record(folder: Path, journal: Journal, name: str, text: str = "done") -> Written:
    written = Written(name, *write_text(folder / name, text))
    journal.record(written)
    return written


def manifest_of(*files: Written) -> Manifest:
    """The least that a manifest says."""
    facts = {file.name: FileFacts(file.nbytes, file.sha256) for file in files}
    return Manifest(identity="run", source=Origin("m", "mixtral", "x"), plan=Plan("x"), cost=Cost(1, 1, 1, 1, 1, 1),
                    layers=(), stock=True, files=facts, nonfinite={})  # fmt: skip


class TestJournal:
    def test_remembers_finished_files(self, out: Path):
        first = record(out, Journal(out, "run"), "one")
        second = record(out, Journal(out, "run"), "two")
        assert Journal(out, "run").finished == {"one": first, "two": second}

    @pytest.mark.parametrize("cut", range(1, 40, 6))
    def test_a_torn_last_line_did_not_happen(self, out: Path, cut: int):
        journal = Journal(out, "run")
        first = record(out, journal, "one")
        record(out, journal, "two")
        path = out / WORK / "journal.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
        again = Journal(out, "run")
        assert again.finished == {"one": first}
        second = record(out, again, "two")
        assert Journal(out, "run").finished == {"one": first, "two": second}

    def test_a_torn_first_line_is_a_fresh_run(self, out: Path):
        Journal(out, "run")
        path = out / WORK / "journal.jsonl"
        path.write_bytes(path.read_bytes()[:-3])
        first = record(out, Journal(out, "run"), "one")
        assert Journal(out, "run").finished == {"one": first}

    def test_a_file_of_the_wrong_size_or_gone_is_done_again(self, out: Path):
        journal = Journal(out, "run")
        for name in ("short", "gone", "good"):
            record(out, journal, name)
        (out / "short").write_text("do")
        (out / "gone").unlink()
        assert Journal(out, "run").finished.keys() == {"good"}

    def test_another_run_is_refused(self, out: Path):
        record(out, Journal(out, "run"), "one")
        with pytest.raises(UserError, match="unfinished run with other settings"):
            Journal(out, "another")

    def test_the_manifest_ends_it(self, out: Path):
        with pytest.raises(UserError, match="its run was not finished"):
            Manifest.load(out)
        finish(out, manifest_of())
        assert os.listdir(out) == [MANIFEST]
        assert Manifest.load(out) == manifest_of()


_HOLD = """
import sys, pathlib
from moespresso.checkpoint.journal import claim
with claim(pathlib.Path(sys.argv[1]), pathlib.Path("/nowhere")):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestClaim:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "config.json").write_text("{}")
        return tmp_path / "source"

    def test_makes_the_folder_and_locks_it(self, tmp_path: Path, source: Path):
        with claim(tmp_path / "deep" / "out", source) as work:
            assert work == tmp_path / "deep" / "out" / WORK
            with (work / "lock").open() as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @pytest.mark.parametrize("resume", [True, False])
    def test_a_foreign_folder_is_refused_untouched(self, tmp_path: Path, source: Path, resume: bool):
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        (foreign / "thesis.txt").write_text("years of work")
        with (
            pytest.raises(UserError, match="not empty and not a moespresso result"),
            claim(foreign, source, resume=resume),
        ):
            pass
        assert os.listdir(foreign) == ["thesis.txt"]

    @pytest.mark.parametrize(
        "place", [".", "inside", "inside/deeper", "../source", "../link", "../link/inside"]
    )
    @pytest.mark.parametrize("resume", [True, False])
    def test_the_source_and_what_is_in_it_are_refused(self, source: Path, place: str, resume: bool):
        (source.parent / "link").symlink_to(source)
        with (
            pytest.raises(UserError, match="lies in the source folder"),
            claim(source / place, source, resume=resume),
        ):
            pass
        assert os.listdir(source) == ["config.json"]

    def test_a_file_is_refused(self, tmp_path: Path, source: Path):
        (tmp_path / "out").write_text("precious")
        with pytest.raises(UserError, match="is a file"), claim(tmp_path / "out", source):
            pass
        assert (tmp_path / "out").read_text() == "precious"

    @pytest.mark.parametrize("resume", [True, False])
    @pytest.mark.few(1)
    def test_a_folder_in_use_is_refused_and_left_alone(self, tmp_path: Path, source: Path, resume: bool):
        out = tmp_path / "out"
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            record(out, Journal(out, "theirs"), "shard")
            with pytest.raises(UserError, match="in use by another run"), claim(out, source, resume=resume):
                pass
            assert (out / "shard").exists()
            assert Journal(out, "theirs").finished.keys() == {"shard"}
        with claim(out, source):  # free again
            pass

    def test_starting_over_clears_only_our_own_files(self, tmp_path: Path, source: Path):
        out, theirs = tmp_path / "out", ["adapter.safetensors", "draft.tmp", "my_notes.txt"]
        with claim(out, source):
            written = record(out, Journal(out, "run"), "shard")
            finish(out, manifest_of(written))
        for name in theirs:
            (out / name).write_text("mine")
        with claim(out, source, resume=False):
            assert sorted(os.listdir(out)) == [WORK, *theirs]
            record(out, Journal(out, "other"), "model-00001-of-00002.safetensors")
            for name in ("model-00002-of-00002.safetensors", ".config.json.tmp"):
                (out / name).write_text("not in the journal yet")
        with claim(out, source, resume=False):
            assert sorted(os.listdir(out)) == [WORK, *theirs]

    def test_a_resumed_run_finds_its_files(self, tmp_path: Path, source: Path):
        out = tmp_path / "out"
        with claim(out, source):
            record(out, Journal(out, "run"), "shard")
        with claim(out, source):
            assert Journal(out, "run").finished.keys() == {"shard"}
