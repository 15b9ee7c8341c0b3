"""Bases that the experts of a layer share: against slow references from the formula."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moespresso.core.layer import Fed
from moespresso.kernels import RoutedExperts, shared_bases
from samples import error, matrices, moments, samples, tail


def shared(
    weights: Tensor,
    seen: Tensor | None,
    rank: int,
    count: int,
    importance: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return shared_bases.fit(weights, seen, rank, count, importance, shared_bases.Settings(**settings))


def shared_basis(weights: Tensor, seen: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    left, bases, shares = shared(weights, seen, rank, 1, rounds=0)
    assert shares.unique().numel() == 1
    return left * shares.unsqueeze(2), bases[0]


# --- a basis that experts share -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 12, 19])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rows", [3, 12])
def test_the_shared_basis_is_the_best_of_all_experts_together(rank: int, known: bool, rows: int):
    weights = matrices(8, 7, rows, 20)
    seen = moments(samples(8, 1, 20))[0] if known else None
    left, basis = shared_basis(weights, seen, rank)
    assert (left.shape, basis.shape) == ((7, rows, rank), (rank, 20))
    torch.testing.assert_close(
        error(weights - left @ basis, seen).sum(),
        tail(weights.flatten(0, 1), seen, rank),
        rtol=1e-3,
        atol=1e-9,
    )


@pytest.mark.parametrize("tokens", [0, 3, 200])
def test_a_basis_of_full_rank_gives_every_expert_back(tokens: int):
    inputs = samples(9, 1, 20)[0, :tokens]
    for weights in (matrices(9, 7, 12, 20), matrices(9, 2, 4, 20)):
        left, basis = shared_basis(weights, inputs.mT @ inputs, 20)
        assert float((left @ basis - weights).abs().max()) < 1e-3


def test_experts_that_share_a_basis_lose_nothing():
    weights = matrices(10, 7, 12, 5) @ matrices(11, 5, 20)
    for seen in (None, moments(samples(10, 1, 20))[0]):
        left, basis = shared_basis(weights, seen, 5)
        torch.testing.assert_close(left @ basis, weights, rtol=1e-4, atol=1e-4)
        left, basis = shared_basis(weights, seen, 9)
        torch.testing.assert_close(left @ basis, weights, rtol=1e-4, atol=1e-4)


def test_data_of_a_rank_need_no_wider_basis():
    weights, inputs = matrices(12, 7, 12, 20), samples(12, 1, 20, rank=6)
    left, basis = shared_basis(weights, moments(inputs)[0], 6)
    assert float((inputs @ (weights - left @ basis).mT).abs().max()) < 1e-3


def test_a_narrower_shared_basis_is_a_prefix():
    weights, seen = matrices(13, 7, 12, 20), moments(samples(13, 1, 20))[0]
    left, basis = shared_basis(weights, seen, 9)
    fewer = shared_basis(weights, seen, 4)
    torch.testing.assert_close(left[..., :4] @ basis[:4], fewer[0] @ fewer[1], rtol=1e-3, atol=1e-5)


def test_empty_experts_stay_empty():
    weights = matrices(14, 3, 4, 20)
    weights[1] = 0
    left, basis = shared_basis(weights, None, 10)
    assert not bool(left[1].any())
    left, basis = shared_basis(torch.zeros(3, 4, 20), moments(samples(14, 1, 20))[0], 10)
    assert not bool((left @ basis).any())
    left, bases, shares = shared(torch.zeros(3, 4, 20), None, 2, 2, rounds=3)
    assert not bool((left @ torch.einsum("em,mri->eri", shares, bases)).any())


# --- several bases ------------------------------------------------------------------------------------------------------------


def mixed(fitted: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    left, bases, shares = fitted
    return torch.stack([a @ sum(s * b for s, b in zip(alpha, bases, strict=True))
                        for a, alpha in zip(left, shares, strict=True)])  # fmt: skip


@given(
    seed=st.integers(0, 100_000),
    rank=st.integers(1, 12),
    count=st.integers(1, 5),
    iterations=st.integers(0, 6),
    known=st.booleans(),
    tokens=st.sampled_from([4, 200]),
)
@settings(max_examples=60, deadline=None)
def test_several_bases_are_never_worse_than_one(
    seed: int, rank: int, count: int, iterations: int, known: bool, tokens: int
):
    weights = matrices(seed, 6, 8, 12)
    seen = moments(samples(seed, 1, 12, tokens=tokens))[0] if known else None
    one = shared_basis(weights, seen, rank)
    several = mixed(shared(weights, seen, rank, count, rounds=iterations, seed=seed))
    whole = float(error(weights, seen).sum())
    # The damping, a millionth, may turn a hair of what was seen into something unseen.
    assert float(error(weights - several, seen).sum()) <= (
        float(error(weights - one[0] @ one[1], seen).sum()) * (1 + 1e-5) + 1e-5 * whole
    )


@pytest.mark.parametrize("rank", [4, 12])
@pytest.mark.parametrize("known", [True, False])
def test_every_iteration_lowers_the_error(rank: int, known: bool):
    weights = matrices(15, 10, 12, 20)
    seen = moments(samples(15, 1, 20))[0] if known else None
    errors = [
        float(error(weights - mixed(shared(weights, seen, rank, 4, rounds=n)), seen).sum()) for n in range(8)
    ]
    assert all(after < before * (1 - 1e-4) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_one_basis_has_nothing_left_to_fit():
    weights, seen = matrices(16, 7, 12, 20), moments(samples(16, 1, 20))[0]
    left, basis = shared_basis(weights, seen, 5)
    torch.testing.assert_close(
        mixed(shared(weights, seen, 5, 1, rounds=10)), left @ basis, rtol=1e-3, atol=1e-4
    )


def test_the_experts_own_factors_are_least_squares_on_the_samples():
    weights, inputs = matrices(17, 4, 8, 12), samples(17, 1, 12)[0]
    left, bases, shares = shared(weights, moments(inputs), 5, 3, rounds=2)
    for own, alpha, weight in zip(left, shares, weights, strict=True):
        narrow = inputs.double() @ torch.einsum("m,mri->ri", alpha, bases).double().T
        expected = torch.linalg.lstsq(narrow, inputs.double() @ weight.double().T).solution.T
        torch.testing.assert_close(own.double(), expected, rtol=1e-3, atol=1e-3)


def test_planted_bases_are_found():
    shares, bases = matrices(18, 24, 3), matrices(19, 3, 6, 40)
    weights = matrices(20, 24, 16, 6) @ torch.einsum("em,mri->eri", shares, bases)
    whole = float(error(weights, None).sum())
    one = shared_basis(weights, None, 6)
    assert float(error(weights - one[0] @ one[1], None).sum()) > 0.2 * whole
    found = [mixed(shared(weights, None, 6, 3, rounds=100, seed=seed)) for seed in range(3)]
    assert min(float(error(weights - each, None).sum()) for each in found) < 1e-3 * whole


def test_the_seed_says_it_all():
    weights = matrices(21, 5, 8, 12)
    one, same, other = (shared(weights, None, 4, 3, rounds=2, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[1], other[1])
    assert [tuple(each.shape) for each in one] == [(5, 8, 4), (3, 4, 12), (5, 3)]


def by_turns(weights: Tensor, rank: int, count: int, rounds: int) -> float:
    """What is off after plain alternating least squares, by another solver."""
    left, first = (each.double() for each in shared_basis(weights, None, rank))
    wide = weights.double()
    others = torch.randn(count - 1, *first.shape, generator=torch.Generator().manual_seed(0)).double()
    bases = torch.cat([first[None], others * first.square().mean().sqrt()])
    shares = torch.zeros(len(weights), count).double()
    for _ in range(rounds):
        for own, part, whole in zip(left, shares, wide, strict=True):
            parts = (own @ bases).flatten(1).T
            part.copy_(torch.linalg.lstsq(parts, whole.flatten()[:, None], driver="gelsd").solution[:, 0])
        columns = torch.cat([torch.kron(part, own) for own, part in zip(left, shares, strict=True)])
        found = torch.linalg.lstsq(columns, wide.flatten(0, 1), driver="gelsd").solution
        bases = found.view_as(bases)
        for own, part, whole in zip(left, shares, wide, strict=True):
            narrow = torch.einsum("m,mri->ri", part, bases)
            own.copy_(torch.linalg.lstsq(narrow.T, whole.T, driver="gelsd").solution.T)
    return float((wide - left @ torch.einsum("em,mri->eri", shares, bases)).square().sum())


def test_looking_ahead_saves_rounds():
    weights = matrices(30, 16, 10, 24)
    ahead = [
        float(error(weights - mixed(shared(weights, None, 6, 4, rounds=n)), None).sum()) for n in (1, 40)
    ]
    exact = [by_turns(weights, 6, 4, rounds) for rounds in (1, 40, 80)]
    assert ahead[0] == pytest.approx(exact[0], rel=0.05)
    assert ahead[1] < exact[2] < exact[1]


def test_rows_that_count_more_are_nearer():
    weights, weight = matrices(31, 6, 10, 24), torch.rand(6, 10, generator=torch.Generator().manual_seed(1))
    seen = moments(samples(31, 1, 24))[0]
    plain, heeded = (mixed(shared(weights, seen, 6, 3, importance=each)) for each in (None, 0.1 + weight))
    scaled = (0.1 + weight).unsqueeze(2)
    assert error((weights - heeded) * scaled, seen).sum() < error((weights - plain) * scaled, seen).sum()
    assert error(weights - plain, seen).sum() < error(weights - heeded, seen).sum()
    by_hand = mixed(shared(weights * scaled, seen, 6, 3)) / scaled
    torch.testing.assert_close(heeded, by_hand, rtol=1e-3, atol=1e-3)


def test_a_few_experts_at_a_time_are_the_same_experts(monkeypatch: pytest.MonkeyPatch):
    weights, seen = matrices(32, 7, 10, 24), moments(samples(32, 1, 24))[0]
    whole = shared(weights, seen, 6, 3, rounds=5)
    monkeypatch.setattr(shared_bases, "BYTES", 2 * 8 * 10 * 24)
    for mine, other in zip(shared(weights, seen, 6, 3, rounds=5), whole, strict=True):
        torch.testing.assert_close(mine, other, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("gate", [True, False])
def test_squared_slopes_are_how_answers_move(gate: bool):
    torch.manual_seed(2)
    halves = 2 if gate else 1

    def apply(mixed: Tensor) -> Tensor:
        first, second = mixed.chunk(2, dim=-1)
        return torch.nn.functional.silu(first) * second

    module = SimpleNamespace(
        has_gate=gate,
        is_transposed=False,
        act_fn=torch.tanh,
        _apply_gate=apply,
        down_proj=torch.randn(2, 5, 4),
    )
    module.gate_up_proj = module.up_proj = torch.randn(2, 4 * halves, 5)
    fed = Fed(torch.randn(9, 5), torch.randint(2, (9, 1)), torch.rand(9, 1))
    experts = RoutedExperts.of(module, [fed])
    with torch.inference_mode():
        found = experts.squared_slopes(range(2), experts.up)
    step = 1e-3
    for expert in range(2):
        tokens, gates = experts.rows(expert)
        mixed = fed.hidden[tokens] @ experts.up[expert].T
        for row in range(4 * halves):
            moved = mixed.clone()
            moved[:, row] += step
            act = apply if gate else torch.tanh
            slope = (act(moved) - act(mixed)).sum(1) / step * gates
            assert float(found[expert, row]) == pytest.approx(
                float(slope.square().sum()) / 9, rel=2e-2, abs=1e-4
            )


@given(
    seed=st.integers(0, 100_000),
    count=st.integers(1, 5),
    rank=st.integers(1, 8),
    inner=st.integers(1, 10),
    alive=st.integers(0, 6),
    known=st.booleans(),
    weighted=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_what_is_exact_or_empty_already_is_left_alone(
    seed: int, count: int, rank: int, inner: int, alive: int, known: bool, weighted: bool
):
    # Weights of a lower rank than asked for, experts of zeros, more bases than experts: nothing is left to find.
    weights = matrices(seed, 6, 10, inner) @ matrices(seed + 7, inner, 16)
    weights[alive:] = 0
    seen = moments(samples(seed, 1, 16))[0] if known else None
    importance = matrices(seed, 6, 10).abs() if weighted else None
    found = shared(weights, seen, rank, count, importance=importance)
    assert all(bool(each.isfinite().all()) for each in found)
    stored = [found[0].bfloat16().float(), found[1].bfloat16().float(), found[2]]
    off, whole = (
        float(each.square().sum()) for each in (weights - mixed((stored[0], stored[1], stored[2])), weights)
    )
    first = float(
        (weights - mixed(shared(weights, seen, rank, count, rounds=0, importance=importance))).square().sum()
    )
    if not known and not weighted:
        assert off <= first * (1 + 1e-3) + 1e-3 * whole
    assert off <= 1.5 * whole


def test_bases_are_of_unit_size_and_rows_that_move_nothing_are_alike():
    weights = matrices(33, 6, 10, 24)
    left, bases, shares = shared(1e-4 * weights, None, 6, 3)
    torch.testing.assert_close(bases.square().mean((1, 2)), torch.ones(3))
    assert float(left.abs().max()) < 100
    for one, other in zip(
        shared(weights, None, 6, 3, importance=torch.zeros(6, 10)),
        shared(weights, None, 6, 3),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert bool(shares.isfinite().all())
