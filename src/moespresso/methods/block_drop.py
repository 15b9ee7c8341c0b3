"""Block Drop: remove whole decoder blocks, attention and feed-forward part; the rest is numbered anew.

    cosine  mean cos(input, output) of a block, highest go; with `contiguous`, of the run that goes, across
            exactly its
            blocks: cos(h_i, h_{i+n})                                                             arXiv
              2406.02500
    kl      true mean token KL of the whole model, greedily with swaps; of every run with `contiguous`

The key-value cache shrinks with the blocks. What goes may be `repair`ed as in Layer Drop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from moespresso.core.blueprint import Blueprint
from moespresso.core.errors import UserError
from moespresso.core.method import Losses, Searches
from moespresso.core.plan import Decision, Plan, Stage, Treatment
from moespresso.core.registry import method
from moespresso.core.stats import Stats, indexed
from moespresso.core.unit import Unit
from moespresso.effect import remains
from moespresso.methods._depth import (
    RepairChoice,
    check_comparable,
    greedy,
    most_similar,
    treatment,
)


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDrop(Searches):
    """Settings of one Block Drop.

    drop: how many blocks go.
    score: how blocks are ranked (see the module's docstring).
    contiguous: drop one run of neighbours instead of the best blocks wherever they are.
    repair: what stands in for what goes.
    rows: rows of the calibration text that score=kl compares on.
    rescore: measure on the model as the earlier steps leave it.
    """

    kind: ClassVar[str] = "block_drop"
    drop: int = 1
    score: Literal["cosine", "kl"] = "cosine"
    contiguous: bool = False
    repair: RepairChoice = "none"
    rows: int = 16
    rescore: bool = True

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.drop < 1:
            raise UserError(f"block_drop: drop={self.drop} must be at least 1")
        if self.rows < 1:
            raise UserError(f"block_drop: rows={self.rows} must be at least 1")
        if self.contiguous and not self.rescore:
            raise UserError(
                "block_drop: contiguous=true is measured across the blocks that are left: leave rescore=false out"
            )

    @property
    def searches(self) -> bool:
        """Whether it asks for the whole model's KL instead of stats."""
        return self.score == "kl"

    def needs(self) -> frozenset[str]:
        """What must be measured for this step."""
        if self.searches:
            return frozenset()
        return frozenset({self._run_name} if self.contiguous else {"similarity"})

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        if self.searches:
            check_comparable(self.kind, blueprint)
        there = len(blueprint.layers)
        if self.drop >= there:
            what = "run of them" if self.contiguous else "one of them"
            raise UserError(
                f"block_drop: drop={self.drop}, but {blueprint.place} has {there} blocks and one must stay, so no such "
                f"{what} exists: drop at most {there - 1}"
            )
        self._check_period(blueprint)

    def _check_period(self, blueprint: Blueprint) -> None:
        """Where layers differ in a pattern that the config can only repeat, whole patterns in a row can
        go."""
        every, there = blueprint.period, len(blueprint.layers)
        if every == 1 or (self.contiguous and self.drop % every == 0):
            return
        # Runs as long as possible below what is there, the nearest to what was asked for.
        whole = min(range(every, there, every), key=lambda drop: abs(drop - self.drop), default=None)
        cure = f"say block_drop:drop={whole},contiguous=true" if whole else "drop experts or layers"
        raise UserError(
            f"block_drop: {blueprint.place} ({blueprint.family}) repeats a pattern of {every} unlike blocks, and its config "
            f"can say no other, so only whole patterns in a row can go: {cure}"
        )

    def amounts(self, blueprint: Blueprint) -> list[BlockDrop]:
        """This step with every number of blocks it could drop, fewest first (for a byte budget)."""
        return [replace(self, drop=drop) for drop in range(1, len(blueprint.layers))]

    def outline(self, source: Blueprint, before: Plan) -> Stage:
        """A stage of the right size, before anything is measured: the deepest go."""
        there = remains(before, source).layers
        return Stage(self.describe(), {Unit(layer): treatment(self.repair) for layer in there[-self.drop :]})

    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Choose the blocks, or the run, that turn the stream least."""
        if self.contiguous:
            runs = {Unit(first): stats.at(Unit(first), self._run_name) for first in self._firsts(blueprint)}
            [first], notes = most_similar(runs, 1)
            return self._run(first, notes, runs)
        values = {Unit(layer.index): stats.at(Unit(layer.index), "cosine") for layer in blueprint.layers}
        chosen, notes = most_similar(values, self.drop)
        return Decision({unit: treatment(self.repair) for unit in chosen}, tuple(notes), values)

    def search(self, blueprint: Blueprint, judge: Losses) -> Decision:
        """Choose the blocks, or the run, that the whole model misses least."""
        if self.contiguous:
            firsts = self._firsts(blueprint)
            losses = judge(
                [{Unit(la): Treatment(drop=True) for la in self._blocks(first)} for first in firsts]
            )
            runs = {Unit(first): loss for first, loss in zip(firsts, losses, strict=True)}
            return self._run(min(runs, key=lambda unit: (runs[unit], unit)), [], runs)
        chosen, notes = greedy(
            {Unit(la.index): {Unit(la.index): Treatment(drop=True)} for la in blueprint.layers},
            self.drop,
            judge,
        )
        return Decision({unit: treatment(self.repair) for unit in chosen}, tuple(notes), chosen)

    @property
    def _run_name(self) -> str:
        return indexed("run", self.drop)

    def _firsts(self, blueprint: Blueprint) -> range:
        return range(len(blueprint.layers) - self.drop + 1)

    def _blocks(self, first: int) -> range:
        return range(first, first + self.drop)

    def _run(self, first: Unit, notes: list[str], runs: dict[Unit, float]) -> Decision:
        assert first.layer is not None
        treatments = {Unit(layer): treatment(self.repair) for layer in self._blocks(first.layer)}
        return Decision(treatments, tuple(notes), runs)
