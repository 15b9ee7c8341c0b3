"""Low rank: every matrix becomes the product of two thin ones, which is closest to it on what it is given.

    minimise  sum over tokens of |(W - L R) x|^2     L [out, r], R [r, in]

Experts are nearly of full rank, so this is a mark for others more than a way to go; bases that experts share (MoBE, arXiv
2508.05257) were measured (`benchmarks/structures.py`) and have no stored form. The two factors are what is
stored; loading multiplies them (moespresso.load). Down is solved on what the products of gate and up really hand on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from moespresso.core.blueprint import Blueprint, Entry
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.registry import method
from moespresso.formats import product
from moespresso.measure import RoutedExperts
from moespresso.methods._counts import refuse_widths
from moespresso.methods._low_rank import truncated
from moespresso.methods._matrices import OnMatrices
from moespresso.methods._on_text import Answer, Shown

Factors = tuple[Tensor, Tensor]
# What other methods of this name are here.
_INSTEAD = {
    "modegpt": "method=modegpt is two steps here: channel_prune:score=leverage,refit=expert for the experts (the result loads in "
    "stock engines) and attention_rank for the attention",
    "shared_basis": "method=shared_basis has no stored form: bases shared by a layer's experts lose to channels with widths of "
    "their own at equal bytes (benchmarks/structures.py): use channel_prune:per_expert=true",
}


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank(OnMatrices):
    """Settings of one decomposition.

    ratio: share of every matrix's bytes that goes.
    method: `svd` (each matrix by itself); MoDeGPT's and MoBE's are steps of their own or were not worth building, and say so.
    damping: share of the mean diagonal added to every second moment.
    sequential: later layers see what the products before let through.
    """

    kind: ClassVar[str] = "low_rank"
    verb: ClassVar[tuple[str, str]] = ("decompose", "decomposed")
    on_text: ClassVar[bool] = True
    without_text: ClassVar[str] = "magnitude"
    able: ClassVar[tuple[str, ...]] = ("experts", "shared", "attention", "dense")
    ratio: float = 0.25
    method: Literal["svd", "modegpt", "shared_basis"] = "svd"
    damping: float = 0.01
    sequential: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        OnMatrices.__post_init__(self)
        if self.method != "svd":
            raise UserError(f"low_rank: {_INSTEAD[self.method]}")
        if not 0 < self.ratio < 1:
            raise UserError(f"low_rank: ratio={self.ratio} must lie between 0 and 1")
        if not 0 <= self.damping < float("inf"):
            raise UserError(f"low_rank: damping={self.damping} must not be negative")

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        if "experts" in self.parts.each():
            refuse_widths(self.kind, blueprint)
        OnMatrices.check(self, blueprint)

    def amounts(self, blueprint: Blueprint) -> list[Any]:
        """This step with every ratio, least first (for a byte budget)."""
        return [replace(self, ratio=share / 100) for share in range(1, 100)]

    def slim(self, shown: Shown) -> Answer:
        """Factors of everything that is to be decomposed in one layer, and their products."""
        answer = Answer()
        if shown.experts is not None:
            self._experts(shown, shown.experts, answer)
        for name, (weight, moment) in shown.linears.items():
            factors = self._factors(weight[None].float(), moment[None], shown, name)
            answer.factors[name], answer.weights[name] = factors, product(*factors)[0]
        return answer

    def _experts(self, shown: Shown, experts: RoutedExperts, answer: Answer) -> None:
        halves = ("gate", "up") if experts.up.shape[1] > experts.down.shape[2] else ("up",)
        found: dict[str, list[Factors]] = {name: [] for name in (*halves, "down")}
        for some in experts.groups():
            here, moments = slice(some.start, some.stop), experts.moments_in(some)
            for name, weights in zip(halves, experts.up[here].chunk(len(halves), dim=1), strict=True):
                found[name].append(self._factors(weights.float(), moments, shown, "up"))
            up = torch.cat([product(*found[name][-1]) for name in halves], dim=1).to(experts.up.dtype)
            moments = experts.moments_inner(some, up, by_gate=False)
            found["down"].append(self._factors(experts.down[here].float(), moments, shown, "down"))
            empty = [expert for expert in some if not len(experts.rows(expert)[0])]
            answer.remedies |= dict.fromkeys(empty, "their weights alone")
        for name, parts in found.items():
            answer.factors[name] = (
                torch.cat([left for left, _ in parts]),
                torch.cat([right for _, right in parts]),
            )
        answer.weights["up"] = torch.cat([product(*answer.factors[name]) for name in halves], dim=1)
        answer.weights["down"] = product(*answer.factors["down"])

    def _factors(self, weights: Tensor, moments: Tensor, shown: Shown, name: str) -> Factors:
        """Factors [N, out, r] and [N, r, in] as they are stored."""
        left, right = truncated(weights, moments, shown.formats[name].rank, self.damping)
        return left.to(shown.dtypes[name]), right.to(shown.dtypes[name])

    def _form(self, chosen: list[Entry]) -> Callable[[Entry, int | None], Format]:
        return lambda entry, layer: Format("factors", rank=self._rank(*entry.ref.shape))

    def _rank(self, out: int, width: int) -> int:
        """The rank at which two factors take what is left of the bytes of one matrix."""
        return max(1, int((1 - self.ratio) * out * width / (out + width)))

    def _told(self, blueprint: Blueprint) -> tuple[str, ...]:
        return ("low_rank: stored as two factors; in memory it is dense again, and no engine gets faster",)
