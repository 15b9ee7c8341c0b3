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


@pytest.mark.parametrize("seed", range(3))
def test_what_is_lost_by_each_turn_is_all_that_the_others_cannot_make_up_for(seed: int):
    """tr(W_R [(C + lambda I)^-1]_RR^-1 W_R^T), R being all that went so far."""
    _, moments, down = problem(seed)
    portions = [1, 2, 1]
    order, losses, _ = obs.remove(down, moments, 0.05, portions)
    for each in range(N):
        ridge = 0.05 * moments[each].diagonal().mean() * torch.eye(I)
        inverse = torch.linalg.inv(moments[each] + ridge)
        for turn, total in enumerate(itertools.accumulate(portions)):
            gone = order[each, :total]
            weights = down[each][:, gone]
            wanted = (weights @ torch.linalg.inv(inverse[gone][:, gone]) @ weights.T).trace()
            torch.testing.assert_close(losses[each, turn], wanted, rtol=1e-3, atol=1e-4)


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


def test_moments_are_means_over_what_each_expert_is_given_by_the_squares_of_gates():
    experts = routed(5)
    every = range(experts.count)
    for expert in every:
        inputs, inner, gates = [], [], []
        for token in range(40):
            for slot in range(2):
                if int(experts.index[token, slot]) == expert:
                    inputs.append(experts.hidden[token])
                    inner.append(torch.relu(experts.up[expert] @ experts.hidden[token]))
                    gates.append(experts.weights[token, slot])
        squares = torch.stack(gates).square()
        for weights, by_gate in ((torch.ones_like(squares), False), (squares, True)):
            total = weights.sum()
            given = sum(c * torch.outer(x, x) for c, x in zip(weights, inputs, strict=True)) / total
            held = sum(c * torch.outer(a, a) for c, a in zip(weights, inner, strict=True)) / total
            found = {
                "inner": experts.hessians_inner(every, experts.up, by_gate=by_gate)[expert],
                "squares inner": experts.squares_inner(every, experts.up, by_gate=by_gate)[expert],
                "squares in": experts.squares_in(every, by_gate=by_gate)[expert],
            }
            wanted = {"inner": held, "squares inner": held.diagonal(), "squares in": given.diagonal()}
            if not by_gate:
                torch.testing.assert_close(experts.hessians_in(every)[expert], given)
            for name, value in wanted.items():
                torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize(
    ("seed", "damping", "sweeps"),
    [(0, 1e-4, 400), (1, 1e-4, 400), (2, 1e-4, 400), (3, 0.3, 60), (4, 1.0, 60)],
)
@pytest.mark.few(2)
def test_the_joint_refit_ends_where_the_whole_systems_solution_is(seed: int, damping: float, sweeps: int):
    """Wherever it starts: what draws it are the original columns."""
    experts = routed(seed)
    kept, up, down = narrow(experts, seed)
    start = down + 0.5 * torch.randn(down.shape)
    narrowed = joint_refit.Narrowed(up, start, list(kept))
    new, _ = joint_refit.refit(experts, narrowed, damping=[damping] * 4, sweeps=sweeps)
    wide = torch.zeros(40, experts.count, 3)
    for token in range(40):
        for slot in range(2):
            expert = int(experts.index[token, slot])
            wide[token, expert] = (
                torch.relu(up[expert] @ experts.hidden[token]) * experts.weights[token, slot]
            )
    features, target = wide.flatten(1), joint_refit.outputs(experts, experts.up, experts.down)
    ridge = torch.cat([
        damping * wide[:, e].square().sum(0).mean().expand(3) for e in range(experts.count)
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
