"""Refit: what earlier steps of a recipe took away, the experts that are left make up for together.

    W = argmin  sum over tokens |y - sum_j g_j W_j a_j|^2  +  sum_j lambda_j |W_j - W0_j|^2
                (`kernels/joint_refit.py`)

y is what the routed part would have to add for the layer to answer as the original layer does on the same
input: with all experts and the original's routing, with attention or shared experts that have gone since. The
sum runs over the experts j that a token goes to now. Only down projections change, so the result is as large
and loads as before. Layers are refitted one after the other, each on what the ones before let through. After
steps that round weights it would undo them: put it before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from moespresso.core.blueprint import Blueprint
from moespresso.core.errors import UserError
from moespresso.core.method import Sight
from moespresso.core.plan import Decision, Plan, Stage, Treatment
from moespresso.core.registry import method
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.effect import remains
from moespresso.kernels import joint_refit
from moespresso.methods._counts import need_experts
from moespresso.methods._on_text import LayerContext, LayerResult, OnText


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class Refit(OnText):
    """Settings of one refit.

    damping: share of an expert's mean second moment that is added to every one; more for experts with few
        tokens. What is missing is mostly noise to them, so it is large.
    sweeps: rounds over all experts.
    sequential: later layers see what the refitted ones before let through.
    """

    kind: ClassVar[str] = "refit"
    able: ClassVar[tuple[str, ...]] = ("experts",)

    damping: float = joint_refit.MISSING_DAMPING
    sweeps: int = 2
    sequential: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name, least in (("damping", 0), ("sweeps", 1)):
            if not least <= getattr(self, name) < float("inf"):
                raise UserError(f"refit: {name}={getattr(self, name)} must be a number of at least {least}")

    @property
    def shows(self) -> frozenset[Sight]:
        """What the original layer answers."""
        return frozenset({"original"})

    @property
    def without_text(self) -> str:
        """What makes up for dropped experts by scales alone."""
        return "expert_drop with renormalise=compensate"

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        need_experts(self.kind, blueprint)

    def outline(self, source: Blueprint, before: Plan) -> Stage:
        """The stage, before anything is measured."""
        left, specs = remains(before, source), {layer.index: layer for layer in source.layers}
        widths = {
            at: left.widths.get(at) or dict.fromkeys(kept, specs[at].width)
            for at, kept in left.experts.items()
        }
        return Stage(self.describe(), _kept(widths))

    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Every expert keeps its channels."""
        _ = stats
        return Decision(_kept({
            layer.index: dict(enumerate(layer.widths or (layer.width,) * layer.experts)) for layer in blueprint.moe_layers
        }))  # fmt: skip

    def solve(self, context: LayerContext) -> LayerResult:
        """The refitted experts of one layer."""
        experts, widths = context.experts, context.channels
        assert experts is not None
        assert widths is not None
        result = LayerResult(weights={"up": experts.up, "down": experts.down})
        if context.missing is None:
            result.warnings.append(
                f"refit: L{context.layer} stays as it is: no earlier step of this recipe changed it, or its answer is normed before "
                "it is added"
            )
            return result
        down, raised = joint_refit.refit_missing(
            experts, context.missing, widths, damping=self.damping, sweeps=self.sweeps
        )
        result.weights["down"] = down
        result.warnings += joint_refit.damping_warnings(context.layer, raised)
        return result


def _kept(widths: Mapping[int, Mapping[int, int]]) -> dict[Unit, Treatment]:
    """Treatments that leave all channels: of a layer as a whole where its experts are alike."""
    made: dict[Unit, Treatment] = {}
    for layer, own in widths.items():
        if len(set(own.values())) == 1:
            made[Unit(layer, "experts")] = Treatment(channels=max(own.values()))
        else:
            made |= {
                Unit(layer, "experts", expert): Treatment(channels=width) for expert, width in own.items()
            }
    return made
