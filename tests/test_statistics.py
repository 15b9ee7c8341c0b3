"""What is measured, by name: a statistic of one's own, what needs text, and what still holds when experts are gone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import moespresso.statistics
from conftest import Zoo
from moespresso.build import Tensors, make_meta_model, open_view
from moespresso.core.errors import UserError
from moespresso.core.layer import Call, Layer
from moespresso.core.runtime import Runtime
from moespresso.core.stats import Stats, indexed, split_index
from moespresso.core.unit import Unit
from moespresso.statistics import (
    LayerSums,
    Measurement,
    Measurer,
    OfText,
    Rows,
    Runs,
    Statistic,
    needs_text,
    registry,
    restricted,
    statistic,
    statistics_of,
)
from moespresso.stream import sweep
from test_scores import tokens_for


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that forgets afterwards."""
    monkeypatch.setattr(registry, "_STATISTICS", dict(registry._STATISTICS))


class Count(LayerSums):
    """Tokens of one layer, and of all before it."""

    def __init__(self, layer: Layer, held: list[int]) -> None:
        self.layer, self.held, self.tokens = layer.spec.index, held, 0

    def add(self, call: Call) -> None:
        self.tokens += int(call.valid.sum())

    def values(self) -> Rows:
        self.held.append(self.tokens)
        return {Unit(self.layer): {"seen": float(self.tokens), "so_far": float(sum(self.held))}}

    def warnings(self) -> list[str]:
        return [f"L{self.layer} counts"]


@pytest.mark.usefixtures("own_registry")
def test_a_statistic_of_ones_own_is_one_class(zoo: Zoo):
    @statistic
    @dataclass(frozen=True)
    class Seen(OfText):
        name = "seen"
        measures = ("seen", "so_far")

        def begin(self, layer: Layer, measurement: Measurement) -> Count:
            return Count(layer, measurement.held.setdefault(self, []))

    view = open_view(zoo("mixtral"))
    batches = tokens_for(view)
    measurer = Measurer(["seen", "routing"], batches.num_tokens)
    with Tensors(view.checkpoint.folder) as reader:
        sweep(make_meta_model(view, reader, Runtime()), batches.ids, batches.mask, measurer)
    assert needs_text(["seen"])
    for layer in range(3):
        row = measurer.values[Unit(layer)]
        assert (row["seen"], row["so_far"]) == (batches.num_tokens, batches.num_tokens * (layer + 1))
    assert [line for line in measurer.warnings if "counts" in line] == ["L0 counts", "L1 counts", "L2 counts"]


def test_what_needs_text_says_so_itself():
    assert not needs_text(["weights"])
    assert not needs_text([])
    assert needs_text(["weights", "run@2"])


def test_runs_are_asked_for_by_their_length():
    found = statistics_of({"weights", "run@12", "routing", "run@3"})
    assert [each.need for each in found] == ["routing", "run@3", "run@12", "weights"]
    assert found[1:3] == [Runs(3), Runs(12)]
    assert not Measurer(["routing", "run@3"], 1).resumable
    assert Measurer(["routing", "weights"], 1).resumable


@pytest.mark.parametrize("need", ["rooting", "text", "run", "run@", "run@x", "routing@2"])
def test_what_nothing_measures_is_refused(need: str):
    with pytest.raises(UserError, match=f"nothing is measured under the name {need!r}"):
        statistics_of([need])


def test_what_still_holds_when_experts_are_gone():
    row = {"tokens": 3.0, "cosine": 0.5, "mean_abs": 1.0, "reconstruction": 2.0, "reconstruction@3": 1.0,
           "removal@8": 0.1, "channels@8": 0.2, "run@2": 0.9,
           "logit_cosine@0": 1.0, "logit_cosine@1": 0.7, "logit_cosine@3": 0.4}  # fmt: skip
    assert restricted(row, (0, 3)) == {
        "tokens": 3.0,
        "cosine": 0.5,
        "mean_abs": 1.0,
        "reconstruction": 2.0,
        "logit_cosine@0": 1.0,
        "logit_cosine@1": 0.4,
    }


def test_values_of_a_kind_by_their_index():
    row = {"removal": 1.0, "removal@16": 2.0, "removal@8": 3.0, "channels@8": 4.0}
    stats = Stats("key", "", values={Unit(0, "experts", 1): row})
    assert stats.series(Unit(0, "experts", 1), "removal") == {16: 2.0, 8: 3.0}
    assert stats.series(Unit(1), "removal") == {}
    assert split_index(indexed("removal", 16)) == ("removal", 16)
    assert [split_index(name) for name in ("run@x", "run@", "run")] == [
        ("run@x", None),
        ("run@", None),
        ("run", None),
    ]


def test_every_statistic_is_a_file_and_names_its_values_alone():
    found: list[type[Statistic]] = list(registry._STATISTICS.values())
    assert len({cls.__module__ for cls in found}) == len(found)
    names = [name for cls in found for name in cls.measures]
    assert len(names) == len(set(names))
    room = Path(moespresso.statistics.__file__).parent
    for cls in found:
        story: Any = (room / f"{cls.__module__.rpartition('.')[2]}.py").read_text()
        assert any(name in story for name in cls.measures)
