"""Scores of routed experts: how much a model needs each, one function a score.

A score is a function under `@score`: its name is what `expert_drop:score=` says, the first line of its
docstring its formula, and the statistics that it needs stand in the decorator. Whether it must see text is
what those say. It answers with a number for every expert of a layer, higher for those that are needed more;
what is no number counts as least. A user's own file may register one, with a statistic of its own
(docs/extending.md).
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moespresso.core.blueprint import LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.stats import Stats, indexed
from moespresso.core.unit import Unit
from moespresso.statistics import needs_text

if TYPE_CHECKING:  # a step knows its scores
    from moespresso.methods.expert_drop import ExpertDrop

Scoring = Callable[[Stats, LayerSpec, "ExpertDrop"], list[float]]
# Of a layer that keeps so many experts, the best ones; None where they are those of the highest scores.
Choosing = Callable[[Stats, LayerSpec, int], frozenset[int] | None]


def _by_rank(stats: Stats, layer: LayerSpec, count: int) -> frozenset[int] | None:
    _ = stats, layer, count


@dataclass(frozen=True, slots=True)
class Score:
    """One score: its function `of` a layer, the statistics that it `needs`, and which experts are `best`
    by it."""

    name: str
    formula: str
    needs: frozenset[str]
    of: Scoring
    best: Choosing = _by_rank

    @property
    def sees_text(self) -> bool:
        """Whether it is found on text."""
        return needs_text(self.needs)


_SCORES: dict[str, Score] = {}
# What is said instead of a score's name to have the best that a model has.
AUTO = "auto"


def score(*needs: str, best: Choosing = _by_rank) -> Callable[[Scoring], Scoring]:
    """Register a function under its name as the score that stands on these statistics."""

    def registered(of: Scoring) -> Scoring:
        name = of.__name__
        known = _SCORES.get(name)
        assert known is None or known.of.__module__ == of.__module__, f"two scores named {name}"
        formula = (inspect.getdoc(of) or "").partition("\n")[0]
        _SCORES[name] = Score(name, formula, frozenset(needs), of, best)
        return of

    return registered


def scores() -> dict[str, Score]:
    """All registered scores by name, in the order in which they came."""
    return dict(_SCORES)


def score_choices() -> tuple[str, ...]:
    """What `score=` may say."""
    return (AUTO, *_SCORES)


def turn_unknown(stats: Stats, layer: LayerSpec) -> str:
    """Why it cannot be told how far the experts of a layer turn the residual stream, as measured; empty
    where it can."""
    measured = stats.values.get(Unit(layer.index, "experts", 0), {})
    if "norm" not in measured or "change_gate_norm" in measured:
        return ""
    if stats.values.get(Unit(layer.index, "experts"), {}).get("latent"):
        return "compares answers with the residual stream, and the experts of this model answer in a latent width"
    return "needs one residual stream, and this model has several"


@score("routing")
def routing(stats: Stats, layer: LayerSpec, settings: ExpertDrop) -> list[float]:
    """mean over all tokens of s_j"""
    _ = settings
    return _over_all(stats, layer, "score")


@score("routing")
def routing_topk(stats: Stats, layer: LayerSpec, settings: ExpertDrop) -> list[float]:
    """the same, counting s_j only where j is selected"""
    _ = settings
    return _over_all(stats, layer, "score_selected")


@score("routing")
def frequency(stats: Stats, layer: LayerSpec, settings: ExpertDrop) -> list[float]:
    """|X_j| / N"""
    _ = settings
    return _over_all(stats, layer, "tokens")


@score("routing")
def reap(stats: Stats, layer: LayerSpec, settings: ExpertDrop) -> list[float]:
    """mean over X_j of g ||f||"""
    return _mean(stats, layer, "gate_norm" if settings.gates == "model" else "score_norm")


@score("routing")
def ean(stats: Stats, layer: LayerSpec, settings: ExpertDrop) -> list[float]:
    """sum over X_j of ||f||"""
    _ = settings
    return _sum(stats, layer, "norm")


@score("routing")
def man(stats: Stats, layer: LayerSpec, settings: ExpertDrop) -> list[float]:
    """mean over X_j of ||f||"""
    _ = settings
    return _mean(stats, layer, "norm")


@score("routing")
def msan(stats: Stats, layer: LayerSpec, settings: ExpertDrop) -> list[float]:
    """mean over X_j of ||f||^2"""
    _ = settings
    return _mean(stats, layer, "norm_squared")


@score("routing")
def easy_ep(stats: Stats, layer: LayerSpec, settings: ExpertDrop) -> list[float]:
    """sum over X_j of (1 - cos(before, after)) g ||f||"""
    _ = settings
    if unknown := turn_unknown(stats, layer):
        raise UserError(f"score=easy_ep {unknown}: use score=reap")
    return _sum(stats, layer, "change_gate_norm")


@score("weights")
def aimer(stats: Stats, layer: LayerSpec, settings: ExpertDrop) -> list[float]:
    """- mean|W| / rms(W), no data"""
    _ = settings
    pairs = zip(_sum(stats, layer, "mean_abs"), _sum(stats, layer, "rms"), strict=True)
    return [-mean / rms if rms else -math.inf for mean, rms in pairs]


def _tried(stats: Stats, layer: LayerSpec, count: int) -> frozenset[int] | None:
    """The best set of exactly this size, where all of them were tried."""
    name = indexed("reconstruction", count)
    if name not in stats.values.get(Unit(layer.index, "experts", 0), {}):
        return None
    return frozenset(expert for expert, value in enumerate(_sum(stats, layer, name)) if value)


@score("routing", "reconstruction", best=_tried)
def reconstruction(stats: Stats, layer: LayerSpec, settings: ExpertDrop) -> list[float]:
    """least error of the re-routed output"""
    _ = settings
    return _sum(stats, layer, "reconstruction")


@score()
def random(stats: Stats, layer: LayerSpec, settings: ExpertDrop) -> list[float]:
    """seeded; the control every score must beat"""
    _ = stats
    return [_drawn(settings.seed, layer.index, expert) for expert in range(layer.experts)]


def _sum(stats: Stats, layer: LayerSpec, name: str) -> list[float]:
    return stats.of(layer.index, layer.experts, name)


def _over_all(stats: Stats, layer: LayerSpec, name: str) -> list[float]:
    """Mean over all tokens of a layer."""
    total = stats.layer(layer.index, "tokens")
    return [value / total for value in _sum(stats, layer, name)]


def _mean(stats: Stats, layer: LayerSpec, name: str) -> list[float]:
    """Mean per routed token; an expert that no token reached is needed least."""
    sums: Sequence[float] = _sum(stats, layer, name)
    counts = _sum(stats, layer, "tokens")
    return [value / count if count else -math.inf for value, count in zip(sums, counts, strict=True)]


def _drawn(seed: int, layer: int, expert: int) -> float:
    # A hash instead of a generator: the same on every platform and independent of the order of asking.
    return int.from_bytes(hashlib.sha256(f"{seed}/{layer}/{expert}".encode()).digest()[:8], "big") / 2**64
