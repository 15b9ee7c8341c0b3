"""Expert merging: groups of experts become one by a weighted average, so that fewer remain and none is thrown
away.

    hc_smoe  average-linkage clustering of the experts' mean outputs over all tokens, averaged by how often
             each is
             selected; the most selected one of a cluster gives the router's row                    arXiv
               2410.08589
    m_smoe   the most selected experts lead, each other one joins the leader whose router logits are most like
             its own;
             neurons are put in line with the leader's first, averaged by selections                arXiv
               2310.01334
    ream     the experts with the highest REAP saliency lead; from the most salient leader on, each fills its
             group of at most `group`, itself included, with the most similar others (half the cosine of gated
             outputs, mapped to [0, 1], half that of the
             routing profiles): most leaders stay alone; neurons put in line, averaged by saliency   arXiv
               2604.04356

Putting in line: neurons of an expert are permuted (which changes nothing it computes) so that their weights
match the leader's best, by a linear assignment. The result is an ordinary checkpoint: rows of the router that
led to a member go, or are averaged like the members with `router=mean`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import squareform

from moespresso.core.blueprint import Blueprint, LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.method import Selects
from moespresso.core.plan import Decision, Plan, Stage, Treatment
from moespresso.core.registry import method
from moespresso.core.stats import Stats, indexed
from moespresso.core.unit import Unit
from moespresso.effect import remains
from moespresso.methods._counts import keep_count, outlined, refuse_skipped, refuse_widths

# A leader, and its members with their weights (the leader among them).
Groups = dict[int, dict[int, float]]


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertMerge(Selects):
    """Settings of one expert merging.

    keep: experts that remain in every MoE layer.
    ratio: share of the routed experts to remove, instead of `keep` (0.25 when neither is given).
    method: how experts are grouped and averaged (see the module's docstring).
    router: `leader` keeps the router's row of each group's leader, `mean` averages the rows of its members.
    align: put neurons in line before they are averaged (default: as the method does).
    group: the most experts in one group, its leader included (method=ream).
    sequential: decide on each layer on the text as the layers before it, already merged, let it through (as
        published for ream; such a measurement starts afresh when it is interrupted).
    rescore: measure on the model as the earlier steps leave it.
    """

    kind: ClassVar[str] = "expert_merge"
    keep: int | None = None
    ratio: float | None = None
    method: Literal["hc_smoe", "m_smoe", "ream"] = "hc_smoe"
    router: Literal["leader", "mean"] = "leader"
    align: bool | None = None
    group: int = 16
    sequential: bool = False
    rescore: bool = True

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.keep is not None and self.ratio is not None:
            raise UserError("expert_merge: give keep or ratio, not both")
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise UserError(f"expert_merge: ratio={self.ratio} is the share removed and must be in [0, 1)")
        if self.group < 2:
            raise UserError(f"expert_merge: group={self.group} must be at least 2, a leader and one more")

    def needs(self) -> frozenset[str]:
        """What must be measured for this step."""
        return frozenset({"routing", "pairs"})

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        if not blueprint.moe_layers:
            raise UserError(
                f"expert_merge needs routed experts, but {blueprint.place} ({blueprint.family}) {blueprint.no_experts}"
            )
        refuse_skipped(self.kind, blueprint)
        refuse_widths(self.kind, blueprint)
        for layer in blueprint.moe_layers:
            keep_count(self, layer)

    def amounts(self, blueprint: Blueprint) -> list[ExpertMerge]:
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
        return Stage(self.describe(), outlined(self, source, remains(before, source)))

    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Choose groups in every MoE layer: what is kept is the leaders, members merge into them."""
        treatments: dict[Unit, Treatment] = {}
        saliency: dict[Unit, float] = {}
        for layer in blueprint.moe_layers:
            groups: Groups = {}
            weights = self._weights(stats, layer)
            size, each = layer.experts // layer.groups, keep_count(self, layer) // layer.groups
            for first in range(0, layer.experts, size):
                groups |= self._grouped(stats, layer, range(first, first + size), each, weights)
            treatments |= self._treatments(layer.index, groups)
            saliency |= {
                Unit(layer.index, "experts", expert): weight for expert, weight in enumerate(weights)
            }
        return Decision(treatments, (), saliency)

    def _weights(self, stats: Stats, layer: LayerSpec) -> list[float]:
        """What an expert counts for in an average: how often it is selected, or its saliency."""
        tokens = stats.of(layer.index, layer.experts, "tokens")
        if self.method != "ream":
            return tokens
        norms = stats.of(layer.index, layer.experts, "gate_norm")
        return [norm / count if count else 0.0 for norm, count in zip(norms, tokens, strict=True)]

    def _grouped(
        self, stats: Stats, layer: LayerSpec, experts: Sequence[int], count: int, weights: list[float]
    ) -> Groups:
        """`count` groups of `experts`, leaders first named."""
        if count >= len(experts):
            return {expert: {expert: 1.0} for expert in experts}
        if self.method == "hc_smoe":
            members = _clusters(_table(stats, layer, "output_distance", experts), experts, count)
            led = {max(group, key=lambda expert: (weights[expert], -expert)): group for group in members}
        else:
            led = self._led(stats, layer, experts, count, weights)
        return {leader: _shares(group, weights) for leader, group in led.items()}

    def _led(
        self, stats: Stats, layer: LayerSpec, experts: Sequence[int], count: int, weights: list[float]
    ) -> dict[int, list[int]]:
        """Members of each of the `count` experts that count most."""
        order = sorted(experts, key=lambda expert: (-weights[expert], expert))
        leaders, others = order[:count], order[count:]
        alike = self._similarity(stats, layer, experts)
        place = {expert: row for row, expert in enumerate(experts)}
        groups = {leader: [leader] for leader in leaders}
        if self.method == "m_smoe":
            for other in others:
                leader = max(leaders, key=lambda leader: (alike[place[other], place[leader]], -leader))
                groups[leader].append(other)
            return groups
        for leader in leaders:
            nearest = sorted(others, key=lambda other: (-alike[place[other], place[leader]], other))[
                : self.group - 1
            ]
            groups[leader] += nearest
            others = [other for other in others if other not in nearest]
        if others:  # more than all leaders may take: the last one takes the rest
            groups[leaders[-1]] += others
        return groups

    def _similarity(self, stats: Stats, layer: LayerSpec, experts: Sequence[int]) -> np.ndarray:
        if self.method == "m_smoe":
            return _table(stats, layer, "logit_cosine", experts)
        gated = _table(stats, layer, "gated_cosine", experts)
        return ((1 + gated) / 2 + _table(stats, layer, "profile_cosine", experts)) / 2

    def _treatments(self, layer: int, groups: Groups) -> dict[Unit, Treatment]:
        found = {Unit(layer, "experts"): Treatment(keep=tuple(sorted(groups)))}
        align = self.method != "hc_smoe" if self.align is None else self.align
        merged = {leader: shares for leader, shares in groups.items() if len(shares) > 1}
        for leader, shares in merged.items():
            for expert, share in shares.items():
                repair = "align" if align and expert != leader else None
                found[Unit(layer, "experts", expert)] = Treatment(into=leader, share=share, repair=repair)
        if merged and self.router == "mean":
            found[Unit(layer, "router")] = Treatment(repair="mean")
        return found


def _shares(group: Sequence[int], weights: Sequence[float]) -> dict[int, float]:
    """Weights of a group as shares of one; equal where nobody counts."""
    total = sum(weights[expert] for expert in group)
    if len(group) == 1 or not total:
        return {expert: 1 / len(group) for expert in group}
    return {expert: weights[expert] / total for expert in group}


def _table(stats: Stats, layer: LayerSpec, name: str, experts: Sequence[int]) -> np.ndarray:
    """A measured table of pairs, rows and columns of `experts`."""
    columns = [stats.of(layer.index, layer.experts, indexed(name, other)) for other in experts]
    return np.array([[column[expert] for column in columns] for expert in experts])


def _clusters(distances: np.ndarray, experts: Sequence[int], count: int) -> list[list[int]]:
    """`count` clusters by average linkage."""
    tree = linkage(squareform((distances + distances.T) / 2, checks=False), "average")
    labels = cut_tree(tree, n_clusters=count).ravel()
    return [
        [expert for expert, label in zip(experts, labels, strict=True) if label == number]
        for number in range(count)
    ]
