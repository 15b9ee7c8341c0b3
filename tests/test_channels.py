"""Kernels of channel pruning against plain statements of what they should find."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moespresso.kernels import RoutedExperts, joint_refit, neurons, obs

N, H, I, K = 3, 5, 8, 5


def problem(seed: int, rank: int = I) -> tuple[Tensor, Tensor, Tensor]:
    """Activations [N, T, I] that hang together, their Hessians, and down projections."""
    torch.manual_seed(seed)
    features = torch.randn(N, 60, rank) @ torch.randn(N, rank, I)
    return features, features.mT @ features / 60, torch.randn(N, H, I)


def pruned(
    down: Tensor, hessians: Tensor, keep: int, damping: float, turns: int = 64
) -> tuple[Tensor, Tensor, dict[int, float]]:
    """The channels that stay, and `down` refitted on them."""
    order, _, raised = obs.remove(down, hessians, damping, obs.portions(I - keep, turns))
    kept = neurons.keep_last(order, keep)
    new, more = neurons.refit(down, hessians, kept, damping)
    return kept, new, raised | more


def error(features: Tensor, down: Tensor, kept: Tensor, new: Tensor) -> Tensor:
    """|W a - W' a_K|^2, mean over tokens [N]."""
    short = neurons.select(features, kept, 2)
    return (features @ down.mT - short @ new.mT).square().sum(2).mean(1)


@pytest.mark.parametrize("seed", range(5))
def test_a_refit_is_the_least_squares_of_what_stays(seed: int):
    features, hessians, down = problem(seed)
    kept = torch.stack([torch.randperm(I)[:K].sort().values for _ in range(N)])
    new, raised = neurons.refit(down, hessians, kept, 1e-7)
    assert not raised
    for each in range(N):
        direct = torch.linalg.lstsq(features[each][:, kept[each]], features[each] @ down[each].T).solution.T
        torch.testing.assert_close(new[each], direct, rtol=1e-2, atol=1e-3)
    bare = neurons.select(down, kept, 2)
    assert (error(features, down, kept, new) < error(features, down, kept, bare)).all()


@pytest.mark.parametrize("seed", range(5))
def test_obs_takes_what_costs_least_after_a_refit_each_time(seed: int):
    features, hessians, down = problem(seed)
    kept, new, _ = pruned(down, hessians, K, 1e-7, turns=I)
    for each in range(N):
        left = list(range(I))
        while len(left) > K:
            costs = []
            for channel in left:
                rest = torch.tensor([[other for other in left if other != channel]])
                refit, _ = neurons.refit(down[each : each + 1], hessians[each : each + 1], rest, 1e-7)
                costs.append(float(error(features[each : each + 1], down[each : each + 1], rest, refit)[0]))
            left.pop(costs.index(min(costs)))
        assert kept[each].tolist() == left
    again, _ = neurons.refit(down, hessians, kept, 1e-7)
    torch.testing.assert_close(new, again, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("turns", [1, 2, 64])
def test_data_of_low_rank_needs_no_more_channels(turns: int):
    features, hessians, down = problem(0, rank=K)
    kept, new, _ = pruned(down, hessians, K, 1e-6, turns)
    whole = (features @ down.mT).square().sum(2).mean(1)
    assert (error(features, down, kept, new) < 1e-3 * whole).all()


def test_all_channels_are_the_identity():
    _, hessians, down = problem(1)
    kept, new, _ = pruned(down, hessians, I, 0.01)
    assert kept.tolist() == [list(range(I))] * N
    assert torch.equal(new, down)
    everything = torch.arange(I).expand(N, I)
    assert torch.equal(neurons.refit(down, hessians, everything, 0.01)[0], down)


def test_channels_that_never_fire_are_no_trouble():
    _, hessians, down = problem(4)
    hessians[:, :K] = 0
    hessians[:, :, :K] = 0
    kept = torch.arange(K).expand(N, K)
    new, raised = neurons.refit(down, hessians, kept, 0.0)
    assert torch.equal(new, down[:, :, :K])
    assert raised.keys() == {0, 1, 2}
    chosen, new, _ = pruned(down, hessians, K, 0.0)
    assert bool(new.isfinite().all())
    assert all(set(range(K, I)) <= set(row) for row in chosen.tolist())


def test_batches_are_what_single_ones_are():
    _, hessians, down = problem(2)
    kept, new, _ = pruned(down, hessians, K, 0.01)
    for each in range(N):
        one = slice(each, each + 1)
        alone = pruned(down[one], hessians[one], K, 0.01)
        assert torch.equal(alone[0][0], kept[each])
        torch.testing.assert_close(alone[1][0], new[each])


def test_scores_are_their_formulas():
    features, hessians, down = problem(3)
    up = torch.randn(N, 2 * I, H)
    for n in range(N):
        for k in range(I):
            w, a = down[n, :, k], features[n, :, k]
            wanted = {
                "energy": w.norm() ** 2 * a.square().mean(),
                "wanda": w.abs().sum() * a.square().mean().sqrt(),
                "weights": up[n, k].norm() * up[n, I + k].norm() * w.norm(),
                "camera": w.norm() ** 2 * (0.7 * a.square().sum() + 0.3 * a.square().max()),
            }
            squares = hessians.diagonal(dim1=1, dim2=2)
            sums, maxima = features.square().sum(1), features.square().amax(1)
            found = {
                "energy": neurons.energy(down, squares),
                "wanda": neurons.wanda(down, squares),
                "weights": neurons.weight_norms(up, down),
                "camera": neurons.camera_energy(down, sums, maxima, 0.3),
            }
            for name, value in wanted.items():
                torch.testing.assert_close(found[name][n, k], value)


def routed(seed: int, tokens: int = 40, experts: int = 4, top_k: int = 2) -> RoutedExperts:
    torch.manual_seed(seed)
    module = SimpleNamespace(has_gate=False, act_fn=torch.relu)
    index = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    up, down = torch.randn(experts, I, H), torch.randn(experts, H, I)
    return RoutedExperts(up, down, module, torch.randn(tokens, H), index, torch.rand(tokens, top_k) + 0.1)


def narrow(experts: RoutedExperts, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.stack(
        [torch.randperm(I, generator=generator)[:3].sort().values for _ in range(experts.count)]
    )
    return (
        kept,
        torch.stack(
            [neurons.select_rows(each, here, I)[0] for each, here in zip(experts.up, kept, strict=True)]
        ),
        neurons.select(experts.down, kept, 2),
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_joint_refit_ends_where_the_whole_systems_solution_is(seed: int):
    experts = routed(seed)
    kept, up, down = narrow(experts, seed)
    new, _ = joint_refit.refit(
        experts, joint_refit.Narrowed(up, down, list(kept)), damping=[1e-4] * 4, sweeps=400
    )
    wide = torch.zeros(40, experts.count, 3)
    for token in range(40):
        for slot in range(2):
            expert = int(experts.index[token, slot])
            wide[token, expert] = (
                torch.relu(up[expert] @ experts.hidden[token]) * experts.weights[token, slot]
            )
    features, target = wide.flatten(1), joint_refit.outputs(experts, experts.up, experts.down)
    ridge = torch.cat([
        1e-4 * wide[:, e].square().sum(0).mean().expand(3) for e in range(experts.count)
    ])  # fmt: skip
    anchor = down.permute(0, 2, 1).flatten(0, 1)
    solved = torch.linalg.solve(
        features.T @ features + ridge.diag(), features.T @ target + ridge[:, None] * anchor
    )
    torch.testing.assert_close(new.permute(0, 2, 1).flatten(0, 1), solved, rtol=2e-2, atol=2e-2)


def test_every_turn_lowers_the_error_and_no_channel_gone_changes_nothing():
    experts = routed(7)
    kept, up, down = narrow(experts, 7)
    target, errors = joint_refit.outputs(experts, experts.up, experts.down), []
    for sweeps in (1, 2, 4, 16):
        new, _ = joint_refit.refit(
            experts, joint_refit.Narrowed(up, down, list(kept)), damping=[0.0] * 4, sweeps=sweeps
        )
        errors.append(float((target - joint_refit.outputs(experts, up, new)).square().sum()))
    start = float((target - joint_refit.outputs(experts, up, down)).square().sum())
    assert start > errors[0]
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in itertools.pairwise(errors))
    everything = torch.arange(I).expand(experts.count, I)
    same, _ = joint_refit.refit(
        experts,
        joint_refit.Narrowed(experts.up, experts.down, list(everything)),
        damping=[0.01] * 4,
        sweeps=2,
    )
    assert torch.equal(same, experts.down)
