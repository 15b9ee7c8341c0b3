"""All down projections of a layer, fitted together to what the layer answered before.

    minimise  sum over tokens |y - sum_j g_j W_j a_j|^2  +  sum_j lambda_j |W_j - W0_j|^2

with y the output of the routed part as it was, or is to be, and j the experts that a token now goes to: what
one expert can no longer say, the others that see the same token may. The normal equations of a whole layer
are too large to hold (experts x neurons, squared), so experts take turns: each is solved exactly against what
the others leave over. Every turn lowers the same sum, and features are computed anew in each, so memory holds
one expert's and one vector a token.

Shapes: E experts, T tokens, n tokens of one expert, H hidden values, I neurons, K of them kept at most, R
    rows of gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moespresso.kernels.conditioning import damped_factors, finite_or_identity
from moespresso.kernels.routed import RoutedExperts

# Share of the mean second moment that is added where `missing` is fitted: most of it is noise to the experts there.
MISSING_DAMPING = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class Narrowed:
    """The same experts with some of their neurons: the matrices, and which of the original neurons each has
    `kept`.

    Where an expert has fewer neurons than others, the rest of its matrices is zero and stays so.
    """

    up: Float[Tensor, "E R H"]
    down: Float[Tensor, "E H K"]
    kept: Sequence[Int[Tensor, " _"]]


def refit(
    experts: RoutedExperts,
    narrowed: Narrowed,
    *,
    damping: Sequence[float],
    sweeps: int,
    missing: Float[Tensor, "T H"] | None = None,
) -> tuple[Float[Tensor, "E H K"], dict[int, float]]:
    """Down projections that start from those of `narrowed` and are drawn to the original columns, with
    every expert's own `damping`; and that of experts for which it had to be raised. `missing` is what
    `experts` themselves lack of the target."""
    narrow = replace(experts, up=narrowed.up, down=narrowed.down)
    down_EHK, raised = narrowed.down.float().clone(), {}
    rest_TH = outputs(experts, experts.up, experts.down) - outputs(narrow, narrowed.up, narrowed.down)
    rest_TH = rest_TH if missing is None else rest_TH + missing
    for _ in range(sweeps):
        for expert in range(experts.count):
            tokens, features_nK = expert_features(experts, expert, narrowed.up[expert])
            if not len(tokens):
                continue
            kept, features_nK = narrowed.kept[expert], features_nK[:, : len(narrowed.kept[expert])]
            away_HK = down_EHK[expert, :, : len(kept)] - experts.down[expert].float()[:, kept]
            change_HK, ridge = _step(features_nK, rest_TH[tokens], away_HK, damping[expert])
            raised |= {expert: ridge} if ridge is not None else {}
            down_EHK[expert, :, : len(kept)] += change_HK
            rest_TH.index_add_(0, tokens, features_nK @ change_HK.T, alpha=-1)
    return down_EHK, raised


def refit_missing(
    experts: RoutedExperts,
    missing: Float[Tensor, "T H"],
    widths: Sequence[int],
    *,
    damping: float,
    sweeps: int,
) -> tuple[Float[Tensor, "E H I"], dict[int, float]]:
    """Down projections of `experts` that answer with what is `missing` as well, drawn to what they are."""
    narrowed = Narrowed(experts.up, experts.down, all_neurons(experts, widths))
    shares = damping_by_expert(experts, widths, damping)
    return refit(experts, narrowed, damping=shares, sweeps=sweeps, missing=missing)


def refit_layer(
    experts: RoutedExperts,
    narrowed: Narrowed,
    *,
    damping: Sequence[float],
    sweeps: int,
    missing: Float[Tensor, "T H"] | None,
) -> tuple[Float[Tensor, "E H K"], dict[int, float]]:
    """`refit` to the outputs of `experts`; then, where these lacked something of the original, to the
    original's output."""
    down, raised = refit(experts, narrowed, damping=damping, sweeps=sweeps)
    if missing is None:
        return down, raised
    narrow = replace(experts, up=narrowed.up, down=down)
    rest = outputs(experts, experts.up, experts.down) - outputs(narrow, narrowed.up, down) + missing
    widths = [len(each) for each in narrowed.kept]
    down, more = refit_missing(narrow, rest, widths, damping=MISSING_DAMPING, sweeps=sweeps)
    return down, raised | more


def all_neurons(experts: RoutedExperts, widths: Sequence[int]) -> list[Int[Tensor, " _"]]:
    """All neurons of each expert."""
    return [torch.arange(width, device=experts.down.device) for width in widths]


def damping_by_expert(experts: RoutedExperts, widths: Sequence[int], damping: float) -> list[float]:
    """The damping of each expert: as many times `damping` as it has neurons for each of its tokens, where
    those are more."""
    tokens = experts.tokens.clamp(min=1).float()
    return (damping * (tokens.new_tensor(widths) / tokens).clamp(min=1)).tolist()


def damping_warnings(layer: int, raised: Mapping[int, float]) -> list[str]:
    """What is to be told of experts whose damping had to be raised."""
    return [
        f"L{layer}.E{expert}: too few tokens for a refit at the damping asked for: damping raised to {ridge:g}"
        for expert, ridge in raised.items()
    ]


def expert_features(
    experts: RoutedExperts, expert: int, up: Float[Tensor, "R H"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n K"]]:
    """The tokens of an expert, and the activations of its neurons for them times the gate."""
    tokens, gates = experts.rows(expert)
    inner = experts.inner(expert, experts.hidden[tokens], up).float()
    return tokens, inner * gates.float().unsqueeze(1)


def outputs(
    experts: RoutedExperts, up: Float[Tensor, "E R H"], down: Float[Tensor, "E H K"]
) -> Float[Tensor, "T H"]:
    """The output of the routed part, in float32."""
    total_TH = experts.hidden.new_zeros(len(experts.hidden), down.shape[1], dtype=torch.float32)
    for expert in range(experts.count):
        tokens, features_nK = expert_features(experts, expert, up[expert])
        total_TH.index_add_(0, tokens, features_nK @ down[expert].float().T)
    return total_TH


def _step(
    features: Float[Tensor, "n K"], rest: Float[Tensor, "n H"], away: Float[Tensor, "H K"], damping: float
) -> tuple[Float[Tensor, "H K"], float | None]:
    """The change of one expert's matrix that is best for the `rest` of the output, with itself `away` from
    its anchor."""
    hessian_1KK, _ = finite_or_identity((features.T @ features)[None])
    upper_1KK, ridge, raised = damped_factors(hessian_1KK.flip(1, 2), damping)
    pull_KH = features.T @ rest - ridge * away.T
    return torch.cholesky_solve(pull_KH, upper_1KK[0].flip(0, 1)).T, raised.get(0)
