"""Block Drop: remove whole decoder blocks, attention and feed-forward part; the rest is numbered anew.

    cosine  mean cos(input, output) of a block, highest go; with `contiguous`, of the run that goes, across
            exactly its
            blocks: cos(h_i, h_{i+n})                                                             arXiv
              2406.02500
    kl      true mean token KL of the whole model, greedily with swaps; of every run with `contiguous`

Where other blocks mix tokens otherwise, one with attention stays: a cache counts its tokens by that. The
key-value cache shrinks with the blocks. What goes may be `repair`ed as in Layer Drop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    one_stays,
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
        if self.contiguous and not self._firsts(blueprint):
            raise UserError(
                f"block_drop: every run of {self.drop} blocks takes all with attention from {blueprint.place}, which could then "
                f"not generate: say contiguous=false or drop={self._longest(blueprint)}"
            )

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
        every = (replace(self, drop=drop) for drop in range(1, len(blueprint.layers)))
        return [step for step in every if not step.contiguous or step._firsts(blueprint)]

    def outline(self, source: Blueprint, before: Plan) -> Stage:
        """A stage of the right size, before anything is measured: the deepest go that may."""
        there = remains(before, source).layers
        deepest = self._deepest(there, source.counting & set(there))
        return Stage(self.describe(), {Unit(layer): treatment(self.repair) for layer in deepest})

    def _deepest(self, there: tuple[int, ...], counting: frozenset[int]) -> Sequence[int]:
        if self.contiguous:
            runs = (there[end - self.drop : end] for end in range(len(there), self.drop - 1, -1))
            return next(run for run in runs if one_stays(run, counting))
        spared = None if one_stays(there[-self.drop :], counting) else min(counting)
        return [layer for layer in there if layer != spared][-self.drop :]

    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Choose the blocks, or the run, that turn the stream least."""
        if self.contiguous:
            return self._decide_run(stats, blueprint)
        values = {Unit(layer.index): stats.at(Unit(layer.index), "cosine") for layer in blueprint.layers}
        chosen, notes = most_similar(values, self.drop)
        if not one_stays(_numbers(chosen), blueprint.counting):
            spared = [unit for unit in chosen if unit.layer in blueprint.counting][-1]
            chosen, notes = most_similar(
                {unit: value for unit, value in values.items() if unit != spared}, self.drop
            )
            notes.append(f"{spared} would go by its score, but is the last block with attention, so it stays")
        return Decision({unit: treatment(self.repair) for unit in chosen}, tuple(notes), values)

    def _decide_run(self, stats: Stats, blueprint: Blueprint) -> Decision:
        every = range(len(blueprint.layers) - self.drop + 1)
        runs = {Unit(first): stats.at(Unit(first), self._run_name) for first in every}
        [best], _ = most_similar(runs, 1)
        [first], notes = most_similar({Unit(at): runs[Unit(at)] for at in self._firsts(blueprint)}, 1)
        if first != best:
            notes.append(f"the run from {best} would go by its score, but holds all blocks with attention")
        return self._run(first, notes, runs)

    def search(self, blueprint: Blueprint, judge: Losses) -> Decision:
        """Choose the blocks, or the run, that the whole model misses least."""
        if self.contiguous:
            firsts = self._firsts(blueprint)
            losses = judge(
                [{Unit(la): Treatment(drop=True) for la in self._blocks(first)} for first in firsts]
            )
            runs = {Unit(first): loss for first, loss in zip(firsts, losses, strict=True)}
            spared = len(blueprint.layers) - self.drop + 1 - len(firsts)
            notes = [f"{spared} runs were not tried, which hold all blocks with attention"] if spared else []
            return self._run(min(runs, key=lambda unit: (runs[unit], unit)), notes, runs)
        chosen, notes = greedy(
            {Unit(la.index): {Unit(la.index): Treatment(drop=True)} for la in blueprint.layers},
            self.drop,
            judge,
            lambda units: one_stays(_numbers(units), blueprint.counting),
        )
        left = blueprint.counting - {*_numbers(chosen)}
        if len(left) == 1 and len(blueprint.layers) > self.drop + 1:
            notes.append(f"L{min(left)} was not tried once it was the last block with attention")
        return Decision({unit: treatment(self.repair) for unit in chosen}, tuple(notes), chosen)

    @property
    def _run_name(self) -> str:
        return indexed("run", self.drop)

    def _firsts(self, blueprint: Blueprint) -> list[int]:
        """Where the run that goes may begin."""
        every = range(len(blueprint.layers) - self.drop + 1)
        return [first for first in every if one_stays(self._blocks(first), blueprint.counting)]

    def _longest(self, blueprint: Blueprint) -> int:
        shorter = (replace(self, drop=drop) for drop in range(self.drop - 1, 0, -1))
        return next(step.drop for step in shorter if step._firsts(blueprint))

    def _blocks(self, first: int) -> range:
        return range(first, first + self.drop)

    def _run(self, first: Unit, notes: list[str], runs: dict[Unit, float]) -> Decision:
        assert first.layer is not None
        treatments = {Unit(layer): treatment(self.repair) for layer in self._blocks(first.layer)}
        return Decision(treatments, tuple(notes), runs)


def _numbers(blocks: Iterable[Unit]) -> list[int]:
    return [unit.layer for unit in blocks if unit.layer is not None]
