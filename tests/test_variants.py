"""Where the hidden states of many candidates wait: once per beginning, in memory or on the disk, and no copy more."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import families
from conftest import Zoo
from depth_by_hand import parts
from moespresso.build import Tensors, open_view
from moespresso.core.runtime import Runtime
from moespresso.fit import Job
from moespresso.methods import LayerDrop
from moespresso.model import MetaModel
from moespresso.run import Decided, decide
from moespresso.stream import Variant, lanes_at_once, state_bytes, sweep_variants
from moespresso.stream.sweep import begin
from test_depth_kl import meta_of, other_folder
from test_more_families import DENSE, _random_model
from test_scores import tokens_for


def blocks(*layers: int) -> frozenset[tuple[int, Any]]:
    """Candidates that lose these blocks."""
    return frozenset(cut for layer in layers for cut in parts((layer, "block")))


# Two and three blocks in a row, so that what one handed on unchanged is handed on unchanged again, beside candidates
# that go on writing where it came from.
ROWS = [
    blocks(0, 1),
    blocks(0),
    blocks(0, 1, 2),
    blocks(1, 2),
    frozenset({(0, "mlp")}),
    blocks(0, 1),
    blocks(),
]


def found(
    folder: Path, cuts: Sequence[Any], spill: Path | None, monkeypatch: pytest.MonkeyPatch, *, rows: int = 5
) -> list[Tensor]:
    """Last hidden states of every candidate, over several batches of two rows."""
    monkeypatch.setattr("moespresso.stream.variants.rows_at_once", lambda *_: 2)
    view = open_view(folder)
    ids = families.random_ids(families.reference(folder).config, rows, 11)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 7:] = False
    with (
        Tensors(folder) as reader,
        sweep_variants(meta_of(view, reader), (ids, mask), list(map(Variant, cuts)), spill=spill) as states,
    ):
        assert {len(batches) for batches in states} == {3}
        return [torch.cat(batches) for batches in states]


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "gemma2"])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.few(3)
def test_states_on_the_disk_are_those_in_memory(
    family: str, order: int, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = zoo(family) if family in families.FAMILIES else other_folder(family, tmp_path)
    (spill := tmp_path / "spill").mkdir()
    cuts = ROWS[::order]
    held = found(folder, cuts, None, monkeypatch)
    spilled = found(folder, cuts, spill, monkeypatch)
    assert all(map(torch.equal, held, spilled))
    assert torch.equal(held[0 if order == 1 else -1], held[5 if order == 1 else 1])
    assert not torch.equal(held[0], held[1])
    assert not list(spill.iterdir())


def test_a_candidate_has_two_files_a_batch_at_most(zoo: Zoo, tmp_path: Path):
    view = open_view(zoo("gpt_oss"))
    ids = families.random_ids(families.reference(zoo("gpt_oss")).config, 2, 9)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with Tensors(zoo("gpt_oss")) as reader:
        meta = meta_of(view, reader)
        each = state_bytes(meta, ids, mask)
        assert each == 4 * ids.numel() * view.source.hidden
        with sweep_variants(meta, (ids, mask), list(map(Variant, ROWS)), spill=tmp_path) as states:
            files = [path.stat().st_size for path in tmp_path.glob("hidden-*/*")]
            assert all(lies_in(tmp_path, batch) for batches in states for batch in batches)
            assert len({batch.data_ptr() for batches in states for batch in batches}) == len(ROWS)
    assert len(files) <= 2 * len(ROWS)
    assert sum(files) <= 2 * len(ROWS) * each


def lies_in(folder: Path, tensor: Tensor) -> bool:
    """Whether a tensor is a map of a file in a folder."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    return any(start <= tensor.data_ptr() < end for start, end in spans)


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "gemma2", "nanochat"])
@pytest.mark.breadth
def test_candidates_that_start_hold_one_answer_of_the_embedding(family: str, zoo: Zoo, tmp_path: Path):
    """Most families hand it on as it is; granitemoe scales it and keeps that alone, nanochat norms it and keeps both."""
    folder = zoo(family) if family in families.FAMILIES else folder_of(family, tmp_path)
    ids = families.random_ids(families.reference(folder).config, 4, 700)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with Tensors(folder) as reader, torch.inference_mode():
        meta = meta_of(open_view(folder), reader)
        one, _ = started(meta, ids, mask, 1)
        many, waiting = started(meta, ids, mask, 6)
    places = [batch.hidden.data_ptr() for batch in waiting]
    assert places == places[:2] * 6
    assert len(set(places)) == 2
    assert many == one


def folder_of(family: str, folder: Path) -> Path:
    _random_model(family, DENSE.get(family, {})).save_pretrained(folder)
    return folder


def started(meta: MetaModel, ids: Tensor, mask: Tensor, count: int) -> tuple[int, list[Any]]:
    """Start so many candidates of two batches; how many tensors of the size of hidden states there are more, by memory."""
    before = states_alive(ids)
    waiting = begin(meta, ids.split(2) * count, mask.split(2) * count)
    return len(states_alive(ids) - before), waiting


def states_alive(ids: Tensor) -> set[int]:
    """Where floating-point tensors [2, L, H] lie that Python knows of."""
    gc.collect()
    return {value.data_ptr() for value in gc.get_objects()
            if type(value) is Tensor and value.is_floating_point() and value.shape[:-1] == (2, ids.shape[1])}  # fmt: skip


def searched(zoo: Zoo, folder: Path, **options: Any) -> Decided:
    view = open_view(zoo("gpt_oss"))
    step = LayerDrop(drop=2, score="kl")
    return decide(Job(view, folder, tokens_for(view, 2, 15), Runtime(**options)), [step])


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each layer was loaded."""
    counts: Counter[int] = Counter()
    load = MetaModel.layer

    def layer(self: MetaModel, index: int) -> Any:
        counts[index] += 1
        return load(self, index)

    monkeypatch.setattr(MetaModel, "layer", layer)
    return counts


# The original; two rounds and the swaps of both choices.
ROUNDS = 1 + 2 + 2


@pytest.mark.parametrize("limit", ["of its own", "max_memory"])
@pytest.mark.few(1)
def test_a_search_that_spills_chooses_the_same_by_the_same_figures(
    limit: str, zoo: Zoo, tmp_path: Path, loads: Counter[int], monkeypatch: pytest.MonkeyPatch
):
    spills: list[Any] = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: spills.append(a) or from_file(*a, **k))
    held = searched(zoo, tmp_path)
    assert not spills
    assert loads == dict.fromkeys(range(4), ROUNDS)
    loads.clear()
    if limit == "of its own":
        monkeypatch.setattr("moespresso.stream.variants.LANE_BYTES", 1)
    spilled = searched(zoo, tmp_path, max_memory=1 if limit == "max_memory" else None)
    assert spills
    assert (spilled.plan, spilled.scores) == (held.plan, held.scores)
    assert loads == dict.fromkeys(range(4), ROUNDS)
    assert not list(tmp_path.iterdir())


def test_only_a_full_disk_parts_the_candidates_and_it_is_said(
    zoo: Zoo, tmp_path: Path, loads: Counter[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):  # fmt: skip
    whole = searched(zoo, tmp_path)
    loads.clear()
    monkeypatch.setattr("moespresso.stream.variants.LANE_BYTES", 1)
    each = 2 * 15 * 4 * open_view(zoo("gpt_oss")).source.hidden
    leave_free(monkeypatch, 2 * 2 * 3 * each)
    with caplog.at_level("INFO", "moespresso"):
        parted = searched(zoo, tmp_path)
    assert caplog.messages[0] == "3 of 4 candidates are tried at once, for lack of disk space"
    assert len(caplog.messages) == 1
    assert loads == dict.fromkeys(range(4), ROUNDS + 1)
    assert (parted.plan, parted.notes) == (whole.plan, whole.notes)
    assert parted.scores == pytest.approx(whole.scores)


def leave_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("moespresso.stream.variants.shutil.disk_usage", lambda _: usage)


@pytest.mark.parametrize(
    ("count", "memory", "free", "wanted"),
    [
        (16, 99, 0, (16, None)),
        (17, 99, 999, (17, "disk")),
        (17, 99, 2 * 2 * 16, (16, None)),
        (60, 99, 2 * 2 * 20, (20, "disk")),
        (4, 9, 0, (4, None)),
        (4, 8, 999, (4, "disk")),
        (4, -9, 999, (4, "disk")),
        (4, 0, 3, (1, None)),
    ],
)
def test_where_candidates_wait(
    count: int, memory: int, free: int, wanted: tuple[int, str | None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    """In bytes of one candidate: before and behind the layer, and the embedding's answer; on half of the disk, two files."""
    monkeypatch.setattr("moespresso.stream.variants.LANE_BYTES", 7 * 33)
    leave_free(monkeypatch, 7 * free)
    most, place = lanes_at_once(count, 7, 7 * memory, tmp_path)
    assert (most, place and "disk") == wanted
