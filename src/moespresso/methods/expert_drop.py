"""Expert Drop: remove the routed experts a model needs least, and the router rows that lead to them.

Scores, one value per expert j over its routed tokens X_j of N (gate weight g really used, routing score s,
answer f):

    routing          mean over all tokens of s_j                     arXiv 2406.02500 (its Mixtral code)
    routing_topk     the same, counting s_j only where j is selected  (its DeepSeek code)
    frequency        |X_j| / N
    reap             mean over X_j of g ||f||                        arXiv 2510.13999
    ean              sum over X_j of ||f||                            ibid., baseline
    man, msan        mean over X_j of ||f||, of ||f||^2               arXiv 2606.15716
    easy_ep          sum over X_j of (1 - cos(before, after)) g ||f|| EASY-EP
    aimer            - mean|W| / rms(W), no data                     arXiv 2603.18492
    reconstruction   least error of the re-routed output              arXiv 2402.14800
    random           seeded; the control every score must beat

The default, `auto`, is easy_ep, or reap where that cannot be told (several residual streams, latent
experts); the plan says which it was.

An expert that no token reached scores lowest, but for `routing`, which counts it like any other. Super
experts (an answer with a value above both the 99.5th percentile of all experts' largest and a tenth of the
global largest, first three quarters of the layers; arXiv 2507.23279; and, so that a model of few experts does
not always have one, ten times the median) are kept unless told otherwise. No layer goes under what its router
needs, and group-limited routers lose the same number in every group.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from moespresso.core.blueprint import Blueprint, LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.method import Selects
from moespresso.core.plan import Decision, Plan, Stage, Treatment
from moespresso.core.registry import OneOf, check_one_of, method
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.effect import remains
from moespresso.methods._counts import keep_count, outlined, refuse_skipped
from moespresso.methods._scores import AUTO, Score, score_choices, scores, turn_unknown

_PERCENTILE, _SHARE_OF_LARGEST, _TIMES_MEDIAN, _SUPER_DEPTH = 0.995, 0.1, 10.0, 0.75


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDrop(Selects):
    """Settings of one Expert Drop.

    keep: experts to keep in every MoE layer (with scope=global: on average).
    ratio: share of the routed experts to remove, instead of `keep` (0.25 when neither is given).
    score: how experts are ranked (see the module's docstring); `auto` is the best that this model has.
    gates: the weight that `reap` uses: `model`, the gate really used, or `softmax`, the routing score.
    scope: `layer` removes the same number everywhere; `global` ranks over the whole model (unequal layers).
    router: `rows` deletes the dropped experts' router rows; `preserve` keeps them and skips their terms
        (plugin target).
    replace: `novice` leaves a dropped expert's mean answer in its place, behind a whole router (MoNE, arXiv
        2507.00390; plugin target).
    renormalise: `model` leaves gates as the router makes them; `compensate` scales the routed part by the
        mean kept routing mass where the router does not renormalise.
    protect_super: never drop super experts (found on text: aimer and random do not know them).
    reverse: drop the best instead, as a control.
    rescore: measure on the model as the earlier steps leave it.
    seed: for score=random.
    """

    kind: ClassVar[str] = "expert_drop"
    keep: int | None = None
    ratio: float | None = None
    score: Annotated[str, OneOf(score_choices)] = AUTO
    gates: Literal["model", "softmax"] = "model"
    scope: Literal["layer", "global"] = "layer"
    router: Literal["rows", "preserve"] = "rows"
    replace: Literal["none", "novice"] = "none"
    renormalise: Literal["model", "compensate"] = "model"
    protect_super: bool = True
    reverse: bool = False
    rescore: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what contradicts itself or is not built yet."""
        check_one_of("expert_drop: score", self.score, score_choices())
        if self.keep is not None and self.ratio is not None:
            raise UserError("expert_drop: give keep or ratio, not both")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise UserError(f"expert_drop: ratio={self.ratio} is the share removed and must be in [0, 1)")
        if self.renormalise == "compensate" and self._repair:
            raise UserError(
                "expert_drop: renormalise=compensate is for routers that lose rows, which this one keeps"
            )

    def needs(self) -> frozenset[str]:
        """What must be measured for this step."""
        needs = set(self._score.needs)
        if self._knows_supers:
            needs.add("routing")
        if self.renormalise == "compensate":
            needs.add("routing")
        return frozenset(needs)

    @property
    def sees_text(self) -> bool:
        """Whether mean answers are found on text."""
        return self.replace == "novice"

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        if not blueprint.moe_layers:
            raise UserError(
                f"expert_drop needs routed experts, but {blueprint.place} ({blueprint.family}) {blueprint.no_experts}"
            )
        refuse_skipped(self.kind, blueprint)
        if self.replace == "novice" and blueprint.indivisible:
            raise UserError(
                f"expert_drop: replace=novice cannot be placed in {blueprint.place} ({blueprint.indivisible}): leave it out"
            )
        for layer in blueprint.moe_layers:
            self._keep_count(layer)

    @property
    def without_text(self) -> str:
        """The settings with which it needs none."""
        others = {"score": "aimer", "replace": "none", "renormalise": "model"}
        seen = {"replace": self.replace == "novice", "renormalise": self.renormalise == "compensate",
                "score": self._score.sees_text}  # fmt: skip
        return ",".join(f"{name}={value}" for name, value in others.items() if seen[name])

    @property
    def _score(self) -> Score:
        return scores()["easy_ep" if self.score == AUTO else self.score]

    @property
    def _knows_supers(self) -> bool:
        """Whether super experts are looked for: they show on text, which a score of weights alone does not
        see."""
        return self.protect_super and self._score.sees_text

    @property
    def _repair(self) -> str | None:
        """What stands in for dropped experts: their mean answer, nothing behind a whole router, or the
        next best."""
        if self.replace == "novice":
            return "novice"
        return "skip" if self.router == "preserve" else None

    @property
    def uneven(self) -> bool:
        """Whether layers may end with different numbers of experts."""
        return self.scope == "global"

    def even(self, blueprint: Blueprint) -> str:
        """The settings of the nearest plan with equal layers."""
        if self.ratio is not None:
            return f"ratio={self.ratio}"
        counts = [
            max(self._keep_count(layer) // layer.groups, -(-layer.floor // layer.groups)) * layer.groups
            for layer in blueprint.moe_layers
        ]
        return f"keep={max(counts)}"

    def amounts(self, blueprint: Blueprint) -> list[ExpertDrop]:
        """This step with every number of experts it could keep, largest first (for a byte budget)."""
        most = min(layer.experts for layer in blueprint.moe_layers)
        least = max(layer.floor for layer in blueprint.moe_layers)
        groups = max(layer.groups for layer in blueprint.moe_layers)
        return [
            replace(self, keep=keep, ratio=None) for keep in range(most, least - 1, -1) if keep % groups == 0
        ]

    def outline(self, source: Blueprint, before: Plan) -> Stage:
        """A stage of the right size, before anything is measured: the lowest numbers of every group are
        kept."""
        return Stage(self.describe(), outlined(self, source, remains(before, source), repair=self._repair))

    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Choose what to keep: a treatment per MoE layer, experts by position in `blueprint`."""
        if self.score == AUTO:
            return self._by_default(stats, blueprint)
        scores = {layer.index: expert_scores(self, stats, layer) for layer in blueprint.moe_layers}
        supers = super_experts(stats, blueprint) if self._knows_supers else frozenset[Unit]()
        ranked = {
            layer.index: self._ranking(layer, scores[layer.index], supers) for layer in blueprint.moe_layers
        }
        counts = self._counts(blueprint, ranked, scores, supers)
        treatments: dict[Unit, Treatment] = {}
        for layer in blueprint.moe_layers:
            kept = self._best(stats, layer, ranked[layer.index], counts[layer.index], supers)
            scale = kept_mass(stats, layer, kept) if self.renormalise == "compensate" else 1.0
            treatments[Unit(layer.index, "experts")] = Treatment(keep=kept, scale=scale, repair=self._repair)
        by_unit = {
            Unit(layer, "experts", expert): score
            for layer, row in scores.items()
            for expert, score in enumerate(row)
        }
        # Where a group holds more of them than it keeps, the rest go, and are not said to be protected.
        saved = frozenset(
            unit for unit in supers if unit.expert in (treatments[Unit(unit.layer, "experts")].keep or ())
        )
        return Decision(treatments, tuple(self._notes(blueprint, treatments, saved)), by_unit, saved)

    def _by_default(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """What easy_ep decides or, said aloud, reap where that cannot be told."""
        unknown = next(filter(None, (turn_unknown(stats, layer) for layer in blueprint.moe_layers)), "")
        score = "reap" if unknown else "easy_ep"
        decision = replace(self, score=score).decide(stats, blueprint)
        notes = [f"experts were ranked by score={score}, since easy_ep {unknown}"] if unknown else []
        return replace(decision, notes=(*notes, *decision.notes), settled={"score": score})

    def _notes(
        self, blueprint: Blueprint, treatments: dict[Unit, Treatment], supers: frozenset[Unit]
    ) -> Iterator[str]:
        yield from [note for layer in blueprint.moe_layers if (note := self._rounding(layer))][:1]
        if supers:
            yield f"super experts, protected: {', '.join(str(unit) for unit in sorted(supers))}"
        if self.renormalise == "compensate" and all(
            treatment.scale == 1 for treatment in treatments.values()
        ):
            yield "renormalise=compensate changes nothing here: this router's gates do not swell when experts go"

    def _keep_count(self, layer: LayerSpec) -> int:
        """Experts to keep in `layer`, a multiple of its groups."""
        return keep_count(self, layer, even=self.scope == "layer")

    def _rounding(self, layer: LayerSpec) -> str | None:
        exact = layer.experts * (1 - self.ratio) if self.ratio is not None else None
        if exact is None or math.isclose(exact, self._keep_count(layer)):
            return None
        return f"ratio={self.ratio} of {layer.experts} experts is not a whole number per group: {self._keep_count(layer)} are kept"

    def _ranking(self, layer: LayerSpec, scores: list[float], supers: frozenset[Unit]) -> list[list[int]]:
        """Experts from most to least needed, one list per router group; ties go to the lower number."""
        sign = 1 if self.reverse else -1
        size = layer.experts // layer.groups

        def key(expert: int) -> tuple[bool, float, int]:
            return Unit(layer.index, "experts", expert) not in supers, sign * scores[expert], expert

        return [sorted(range(group * size, (group + 1) * size), key=key) for group in range(layer.groups)]

    def _counts(
        self,
        blueprint: Blueprint,
        ranked: dict[int, list[list[int]]],
        scores: dict[int, list[float]],
        supers: frozenset[Unit],
    ) -> dict[int, int]:
        """How many experts each layer keeps."""
        counts = {layer.index: self._keep_count(layer) for layer in blueprint.moe_layers}
        if self.scope == "layer":
            return counts
        budget = sum(counts.values())
        counts = {layer.index: layer.floor for layer in blueprint.moe_layers}
        # A row takes the next best expert of every group of a layer, since groups must stay equal.
        rows = [
            (
                self._row_score(
                    [group[row] for group in ranked[layer.index]], layer, scores[layer.index], supers
                ),
                layer,
                row,
            )
            for layer in blueprint.moe_layers
            for row in range(layer.floor // layer.groups, layer.experts // layer.groups)
        ]
        rows.sort(key=lambda entry: (-entry[0], entry[1].index, entry[2]))
        for _, layer, _ in rows:
            if sum(counts.values()) + layer.groups <= budget:
                counts[layer.index] += layer.groups
        return counts

    def _row_score(
        self, experts: list[int], layer: LayerSpec, scores: list[float], supers: frozenset[Unit]
    ) -> float:
        """What a row of experts, one per group, is worth to keep; super experts above all."""
        if any(Unit(layer.index, "experts", expert) in supers for expert in experts):
            return math.inf
        return sum(scores[expert] for expert in experts) / len(experts) * (-1 if self.reverse else 1)

    def _best(
        self, stats: Stats, layer: LayerSpec, ranked: list[list[int]], count: int, supers: frozenset[Unit]
    ) -> tuple[int, ...]:
        kept = tuple(sorted(expert for group in ranked for expert in group[: count // layer.groups]))
        best = None if self.reverse else self._score.best(stats, layer, count)
        if best is None:
            return kept
        lost = any(unit.layer == layer.index and unit.expert not in best for unit in supers)
        return kept if lost else tuple(sorted(best))


def expert_scores(settings: ExpertDrop, stats: Stats, layer: LayerSpec) -> list[float]:
    """How much each expert of `layer` is needed, by the settings' score; higher is more, not a number is
    least."""
    found = scores()[settings.score].of(stats, layer, settings)
    return [-math.inf if math.isnan(score) else score for score in found]


def super_experts(stats: Stats, blueprint: Blueprint) -> frozenset[Unit]:
    """Experts whose answers reach extreme values; removing a handful of them can destroy a model."""
    layers = blueprint.moe_layers
    largest = {Unit(layer.index, "experts", expert): value
               for layer in layers
               for expert, value in enumerate(stats.of(layer.index, layer.experts, "largest"))}  # fmt: skip
    ordered = sorted(largest.values())
    percentile = ordered[math.floor(_PERCENTILE * (len(ordered) - 1))]
    threshold = max(percentile, _SHARE_OF_LARGEST * ordered[-1], _TIMES_MEDIAN * statistics.median(ordered))
    depth = _SUPER_DEPTH * len(blueprint.layers)
    return frozenset(
        unit for unit, value in largest.items() if value > threshold and (unit.layer or 0) < depth
    )


def kept_mass(stats: Stats, layer: LayerSpec, kept: Sequence[int]) -> float:
    """Mean softmax mass on the kept experts: the factor that undoes the swelling of gates when the softmax
    has fewer terms. 1 where gates do not swell: sigmoid routers, and those that renormalise over the
    selected experts."""
    if not stats.layer(layer.index, "softmax_gates"):
        return 1.0
    scores = stats.of(layer.index, layer.experts, "score")
    return sum(scores[expert] for expert in kept) / sum(scores)
