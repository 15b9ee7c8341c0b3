"""All down projections of a layer, fitted together to what the layer answered before.

    minimise  sum over tokens |y - sum_j g_j W_j a_j|^2  +  sum_j lambda_j |W_j - W0_j|^2

with y the answer of the routed part as it was, or is to be, and j the experts that a token now goes to: what one expert can no longer say,
the others that see the same token may. The normal equations of a whole layer are too large to hold (experts x channels squared),
so experts take turns: each is solved exactly against what the others leave over. Every turn lowers the same sum, and
features are computed anew in each, so memory holds one expert's and one vector a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moespresso.kernels.hessians import factored, usable
from moespresso.kernels.routed import RoutedExperts


def joint_refit(
    experts: RoutedExperts,
    up: Tensor,
    down: Tensor,
    kept: Sequence[Tensor],
    *,
    damping: Sequence[float],
    sweeps: int,
    missing: Tensor | None = None,
) -> tuple[Tensor, dict[int, float]]:
    """Down projections [E, H, K] that start from `down` and are drawn to the original columns `kept` [K_e] of each, with `up`
    the narrower [E, R', H] and every expert's own `damping`; and that of experts for which it had to be raised. Where an
    expert has fewer channels than others, the rest of its matrices is zero and stays so. `missing` [T, H] is what `experts`
    themselves lack of the answer wanted."""
    narrow = replace(experts, up=up, down=down)
    down, raised = down.float().clone(), {}
    left = answers(experts, experts.up, experts.down) - answers(narrow, up, down)
    left = left if missing is None else left + missing
    for _ in range(sweeps):
        for expert in range(experts.count):
            tokens, features = featured(experts, expert, up[expert])
            if not len(tokens):
                continue
            here, features = kept[expert], features[:, : len(kept[expert])]
            away = down[expert, :, : len(here)] - experts.down[expert].float()[:, here]
            change, ridge = _step(features, left[tokens], away, damping[expert])
            raised |= {expert: ridge} if ridge is not None else {}
            down[expert, :, : len(here)] += change
            left.index_add_(0, tokens, features @ change.T, alpha=-1)
    return down, raised


# Share of the mean second moment that is added where `missing` is fitted: most of what is missing is noise to the experts there.
TO_ORIGINAL = 0.3


def made_up(
    experts: RoutedExperts, missing: Tensor, widths: Sequence[int], *, damping: float, sweeps: int
) -> tuple[Tensor, dict[int, float]]:
    """Down projections [E, H, K] of `experts` that answer with what is `missing` [T, H] as well, drawn to what they are."""
    every, shares = whole(experts, widths), damped(experts, widths, damping)
    return joint_refit(
        experts, experts.up, experts.down, every, damping=shares, sweeps=sweeps, missing=missing
    )


def whole(experts: RoutedExperts, widths: Sequence[int]) -> list[Tensor]:
    """All channels of each expert."""
    return [torch.arange(width, device=experts.down.device) for width in widths]


def damped(experts: RoutedExperts, widths: Sequence[int], damping: float) -> list[float]:
    """The damping of each expert: as many times `damping` as it has channels for each of its tokens, where those are more."""
    tokens = experts.tokens.clamp(min=1).float()
    return (damping * (tokens.new_tensor(widths) / tokens).clamp(min=1)).tolist()


def thin(layer: int, raised: Mapping[int, float]) -> list[str]:
    """What is to be told of experts whose damping had to be raised."""
    return [
        f"L{layer}.E{expert}: too few tokens for a refit at the damping asked for: damping raised to {ridge:g}"
        for expert, ridge in raised.items()
    ]


def refitted_layer(
    experts: RoutedExperts,
    up: Tensor,
    down: Tensor,
    kept: Sequence[Tensor],
    *,
    damping: Sequence[float],
    sweeps: int,
    missing: Tensor | None,
) -> tuple[Tensor, dict[int, float]]:
    """`joint_refit` to what `experts` answer; then, where that lacked something of the original, to the original's answer."""
    down, raised = joint_refit(experts, up, down, kept, damping=damping, sweeps=sweeps)
    if missing is None:
        return down, raised
    narrow = replace(experts, up=up, down=down)
    left = answers(experts, experts.up, experts.down) - answers(narrow, up, down) + missing
    down, more = made_up(narrow, left, [len(each) for each in kept], damping=TO_ORIGINAL, sweeps=sweeps)
    return down, raised | more


def featured(experts: RoutedExperts, expert: int, up: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens [n] of an expert, and what its channels hold for them times the gate [n, K]."""
    tokens, gates = experts.rows(expert)
    inner = experts.inner(expert, experts.hidden[tokens], up).float()
    return tokens, inner * gates.float().unsqueeze(1)


def answers(experts: RoutedExperts, up: Tensor, down: Tensor) -> Tensor:
    """What the routed part answers [T, H], in float32."""
    total = experts.hidden.new_zeros(len(experts.hidden), down.shape[1], dtype=torch.float32)
    for expert in range(experts.count):
        tokens, features = featured(experts, expert, up[expert])
        total.index_add_(0, tokens, features @ down[expert].float().T)
    return total


def _step(features: Tensor, left: Tensor, away: Tensor, damping: float) -> tuple[Tensor, float | None]:
    """The change [H, K] of one expert's matrix that is best for what is `left` [n, H], with itself `away` from its anchor."""
    moment, _ = usable((features.T @ features)[None])
    upper, ridge, raised = factored(moment.flip(1, 2), damping)
    pull = features.T @ left - ridge * away.T
    return torch.cholesky_solve(pull, upper[0].flip(0, 1)).T, raised.get(0)
