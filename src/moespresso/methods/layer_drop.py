"""Layer Drop: remove whole MoE sublayers with their norms and keep the attention, or the other way round.

What a residual branch adds is small where the stream leaves it as it came. With x' the stream before the
norm:

    cosine      mean cos(x', x' + MoE(Norm(x')))       S^NM of arXiv 2406.02500: the branch with its norm;
                highest go
    cosine_moe  mean cos(Norm(x'), MoE(Norm(x')))      its S^M: the MoE alone; to show why that fails
    kl          true mean token KL of the whole model, greedily, all candidates scored again after each
                removal, and
                one pass of swaps

In a model without experts the dense feed-forward parts go; beside experts they are never touched. What goes
may be `repair`ed without a new weight: the output of the branch before it is mapped so that the stream comes
closest to what it was in the mean square, by a full matrix (ReplaceMe, arXiv 2505.02819) or its diagonal. A
`bias` is the mean of what was added; most families have no place for it, and the plugin target makes one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from moespresso.core.blueprint import Blueprint, Branch, LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.method import Losses, Searches
from moespresso.core.plan import Decision, Plan, Stage, Treatment
from moespresso.core.registry import method
from moespresso.core.stats import Stats
from moespresso.effect import is_left, remains
from moespresso.methods._depth import (
    RepairChoice,
    check_comparable,
    check_divisible,
    greedy,
    most_similar,
    treatment,
)


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDrop(Searches):
    """Settings of one Layer Drop.

    drop: how many layers lose the part.
    part: `moe` removes feed-forward parts, `attention` attention.
    score: how layers are ranked (see the module's docstring).
    repair: what stands in for what goes.
    rows: rows of the calibration text that score=kl compares on.
    rescore: measure on the model as the earlier steps leave it.
    """

    kind: ClassVar[str] = "layer_drop"
    drop: int = 1
    part: Literal["moe", "attention"] = "moe"
    score: Literal["cosine", "cosine_moe", "kl"] = "cosine"
    repair: RepairChoice = "none"
    rows: int = 16
    rescore: bool = True

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.drop < 1:
            raise UserError(f"layer_drop: drop={self.drop} must be at least 1")
        if self.rows < 1:
            raise UserError(f"layer_drop: rows={self.rows} must be at least 1")
        if self.part == "attention" and self.score == "cosine_moe":
            raise UserError(
                "layer_drop: score=cosine_moe is of the MoE alone: use score=cosine for part=attention"
            )

    @property
    def searches(self) -> bool:
        """Whether it asks for the whole model's KL instead of stats."""
        return self.score == "kl"

    def needs(self) -> frozenset[str]:
        """What must be measured for this step."""
        return frozenset(() if self.searches else {"similarity"})

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        check_divisible(self.kind, blueprint)
        if self.searches:
            check_comparable(self.kind, blueprint)
        there = len(self._candidates(blueprint))
        if self.drop > there:
            what = (
                "attention"
                if self.part == "attention"
                else "experts"
                if blueprint.moe_layers
                else "a dense feed-forward part"
            )
            raise UserError(
                f"layer_drop: drop={self.drop}, but {blueprint.place} has only {there} layers with {what} to drop"
            )

    def amounts(self, blueprint: Blueprint) -> list[LayerDrop]:
        """This step with every number of layers it could drop, fewest first (for a byte budget)."""
        return [replace(self, drop=drop) for drop in range(1, len(self._candidates(blueprint)) + 1)]

    def outline(self, source: Blueprint, before: Plan) -> Stage:
        """A stage of the right size, before anything is measured: the deepest go."""
        left = remains(before, source)
        there = [layer for layer in self._candidates(source) if is_left((layer.index, self._branch), left)]
        return Stage(
            self.describe(),
            {layer.unit(self._branch): treatment(self.repair) for layer in there[-self.drop :]},
        )

    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Choose the layers whose part turns the stream least."""
        units = [layer.unit(self._branch) for layer in self._candidates(blueprint)]
        values = {unit: stats.at(unit, self.score) for unit in units}
        chosen, notes = most_similar(values, self.drop)
        return Decision({unit: treatment(self.repair) for unit in chosen}, tuple(notes), values)

    def search(self, blueprint: Blueprint, judge: Losses) -> Decision:
        """Choose the layers that the whole model misses least, one after another."""
        units = [layer.unit(self._branch) for layer in self._candidates(blueprint)]
        chosen, notes = greedy({unit: {unit: Treatment(drop=True)} for unit in units}, self.drop, judge)
        return Decision({unit: treatment(self.repair) for unit in chosen}, tuple(notes), chosen)

    @property
    def _branch(self) -> Branch:
        return "attention" if self.part == "attention" else "mlp"

    def _candidates(self, blueprint: Blueprint) -> list[LayerSpec]:
        """Layers that have the part; dense ones do not count beside mixtures, nor other mixers beside
        attention."""
        there = [layer for layer in blueprint.layers if self._branch in layer.bodies]
        if self.part == "attention":
            return [layer for layer in there if layer.mixer == "attention"]
        return [layer for layer in there if layer.experts] if blueprint.moe_layers else there
