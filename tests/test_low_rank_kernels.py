"""Low rank, channels, attention heads and the shares of layers, against slow references from the formulas.

References go another way than the code: explicit square roots and singular values where that has Gram matrices, least
squares on the samples where that has their moments, a whole attention with its rotary embedding where that has scores.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moespresso.kernels import attention_rank, conditioning, low_rank, neurons
from samples import error, matrices, moments, root, samples, tail

SHAPES = [(12, 20), (20, 12), (16, 16)]
shapes = pytest.mark.parametrize(("rows", "width"), SHAPES)
seeds = st.integers(0, 100_000)


def refitted_on(down: Tensor, moments: Tensor, kept: Tensor, damping: float) -> Tensor:
    return neurons.refit(down, conditioning.finite_or_identity(moments)[0], kept, damping)[0]


def nystrom_kept(moments: Tensor, scores: Tensor | None, keep: int, damping: float) -> Tensor:
    return neurons.keep_last(
        neurons.rank_ascending(low_rank.leverage(moments, damping) if scores is None else scores), keep
    )


# --- low rank ----------------------------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("rank", [1, 3, 8, 11])
@pytest.mark.parametrize("known", [True, False])
def test_no_matrix_of_its_rank_is_nearer_in_the_norm_of_the_data(
    rows: int, width: int, rank: int, known: bool
):
    weights = matrices(0, 3, rows, width)
    seen = moments(samples(0, 3, width)) if known else None
    left, right = low_rank.truncate(weights, seen, rank)
    assert (left.shape, right.shape) == ((3, rows, rank), (3, rank, width))
    assert left.dtype == right.dtype == torch.float32
    torch.testing.assert_close(
        error(weights - left @ right, seen), tail(weights, seen, rank), rtol=1e-4, atol=0
    )


@given(seed=seeds, shape=st.sampled_from(SHAPES), rank=st.integers(1, 12), kept=st.sampled_from([3, 8, 200]))
@settings(max_examples=60, deadline=None)
def test_with_few_tokens_the_answer_is_still_the_best(
    seed: int, shape: tuple[int, int], rank: int, kept: int
):
    rows, width = shape
    weights, seen = matrices(seed, 2, rows, width), moments(samples(seed, 2, width, tokens=kept))
    left, right = low_rank.truncate(weights, seen, rank)
    least, whole = tail(weights, seen, rank), error(weights, seen)
    assert bool((error(weights - left @ right, seen) <= least * (1 + 1e-3) + 1e-6 * whole).all())


@shapes
def test_the_data_decide_which_directions_stay(rows: int, width: int):
    weights, seen = matrices(1, 3, rows, width), moments(samples(1, 3, width, rank=6))
    informed, plain = (low_rank.truncate(weights, each, 4) for each in (seen, None))
    assert bool(
        (
            error(weights - informed[0] @ informed[1], seen)
            < 0.8 * error(weights - plain[0] @ plain[1], seen)
        ).all()
    )


@shapes
@pytest.mark.parametrize("tokens", [0, 1, 5, 200])
def test_full_rank_gives_the_matrix_itself_however_little_was_seen(rows: int, width: int, tokens: int):
    weights = matrices(2, 3, rows, width)
    inputs = samples(2, 3, width)[:, :tokens]
    seen = inputs.mT @ inputs / 200
    left, right = low_rank.truncate(weights, seen, min(rows, width))
    assert float((left @ right - weights).abs().max()) < 1e-5
    left, right = low_rank.truncate(weights, None, min(rows, width))
    assert float((left @ right - weights).abs().max()) < 1e-5


@shapes
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_data_of_a_rank_need_no_more_than_it(rows: int, width: int, rank: int):
    weights, inputs = matrices(3, 3, rows, width), samples(3, 3, width, rank=rank)
    left, right = low_rank.truncate(weights, moments(inputs), rank)
    assert float((inputs @ (weights - left @ right).mT).abs().max()) < 1e-4
    if rank > 1:
        left, right = low_rank.truncate(weights, moments(inputs), rank - 1)
        assert float((inputs @ (weights - left @ right).mT).abs().max()) > 1e-2


def test_rank_that_the_data_leave_over_goes_to_the_weights():
    weights, seen = matrices(4, 2, 12, 20), moments(samples(4, 2, 20, rank=3))
    left, right = low_rank.truncate(weights, seen, 7, damping=1e-4)
    moved = weights.double() @ root(seen)
    used = torch.linalg.svd(moved).U[..., :3]
    unused = weights.double() - used @ used.mT @ weights.double()
    torch.testing.assert_close(error(weights - left @ right, None), tail(unused, None, 4), rtol=1e-3, atol=0)


@shapes
def test_a_lower_rank_is_a_prefix(rows: int, width: int):
    weights, seen = matrices(5, 3, rows, width), moments(samples(5, 3, width))
    left, right = low_rank.truncate(weights, seen, 9)
    fewer = low_rank.truncate(weights, seen, 4)
    torch.testing.assert_close(left[..., :4] @ right[:, :4], fewer[0] @ fewer[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left.mT @ left, torch.eye(9).expand(3, 9, 9), rtol=0, atol=1e-5)


@shapes
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_moments_that_say_nothing_count_as_none(rows: int, width: int, value: float):
    weights, seen = matrices(6, 2, rows, width), moments(samples(6, 2, width))
    seen[1] = value
    left, right = low_rank.truncate(weights, seen, 5)
    plain = low_rank.truncate(weights, None, 5)
    torch.testing.assert_close((left @ right)[1], (plain[0] @ plain[1])[1])
    alone = low_rank.truncate(weights[:1], seen[:1], 5)
    torch.testing.assert_close((left @ right)[0], (alone[0] @ alone[1])[0])


def test_what_no_data_show_is_never_made_larger():
    # Oblique answers of the same error could blow up inputs that calibration has not seen; this one is a projection.
    weights, seen = matrices(7, 2, 12, 20), moments(samples(7, 2, 20, tokens=4))
    left, right = low_rank.truncate(weights, seen, 6)
    size = torch.linalg.matrix_norm((left @ right).double(), 2)
    assert bool((size <= torch.linalg.matrix_norm(weights.double(), 2) * (1 + 1e-5)).all())


# --- channels -------------------------------------------------------------------------------------------------------------------


@given(
    seed=seeds, damping=st.sampled_from([1e-3, 0.1, 1.0, 30.0]), tokens=st.sampled_from([3, 200]), keep=st.integers(1, 16)
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_channels_stay_by_ridge_leverage(seed: int, damping: float, tokens: int, keep: int):
    seen = moments(samples(seed, 3, 16, tokens=tokens))
    kept = nystrom_kept(seen, None, keep, damping)
    for own, matrix in zip(kept, seen.double(), strict=True):
        ridge = damping * matrix.diagonal().mean() * torch.eye(16, dtype=torch.float64)
        leverage = (matrix @ torch.linalg.inv(matrix + ridge)).diagonal()
        assert own.tolist() == sorted(set(own.tolist()))
        dropped = sorted(set(range(16)) - set(own.tolist()))
        if dropped:
            assert float(leverage[own].min()) >= float(leverage[dropped].max()) - 1e-6


def test_copies_share_their_leverage():
    # Three channels: one of its own, two alike. Their scores are 1, 1/2 and 1/2 however loud the copies are.
    inputs = samples(22, 1, 2)
    inputs = torch.cat([inputs[..., :1], 10 * inputs[..., 1:], 10 * inputs[..., 1:]], dim=2)
    assert nystrom_kept(moments(inputs), None, 1, 1e-5).tolist() == [[0]]
    assert nystrom_kept(moments(inputs), None, 1, 1e3).tolist() == [[1]]


def test_other_scores_may_choose():
    scores = torch.tensor([[1.0, 5.0, 2.0, 5.0], [0.0, 0.0, 0.0, 0.0]])
    seen = moments(samples(23, 2, 4))
    assert nystrom_kept(seen, scores, 2, 0.1).tolist() == [[1, 3], [0, 1]]
    assert nystrom_kept(seen, scores, 3, 0.1).tolist() == [[1, 2, 3], [0, 1, 2]]


def test_channels_that_never_fired_go_first():
    seen = moments(samples(24, 2, 8))
    seen[0, [1, 4]], seen[0][:, [1, 4]], seen[1] = 0, 0, 0
    kept = nystrom_kept(seen, None, 6, 0.1)
    assert kept[0].tolist() == [0, 2, 3, 5, 6, 7]
    assert kept[1].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("damping", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("tokens", [5, 200])
def test_the_refit_is_ridge_regression_from_the_columns_that_stay(damping: float, tokens: int):
    down, inputs = matrices(25, 3, 10, 16), samples(25, 3, 16, tokens=tokens)
    seen = moments(inputs)
    kept = nystrom_kept(seen, None, 7, 0.1)
    found = refitted_on(down, seen, kept, damping)
    assert found.shape == (3, 10, 7)
    for number, own in enumerate(kept):
        x, w = inputs[number].double(), down[number].double()
        ridge = damping * seen[number].diagonal()[own].double().mean() * tokens
        tall = torch.cat([x[:, own], ridge.sqrt() * torch.eye(7)])
        goal = torch.cat([x @ w.T, ridge.sqrt() * w[:, own].T])
        torch.testing.assert_close(
            found[number].double(), torch.linalg.lstsq(tall, goal).solution.T, rtol=1e-3, atol=1e-3
        )


def test_without_damping_it_is_the_published_correction():
    down, seen = matrices(26, 3, 10, 16), moments(samples(26, 3, 16))
    kept = nystrom_kept(seen, None, 7, 0.1)
    found = refitted_on(down, seen, kept, 1e-9)
    for number, own in enumerate(kept):
        select = torch.eye(16, dtype=torch.float64)[:, own]
        matrix = seen[number].double()
        expected = down[number].double() @ matrix @ select @ torch.linalg.inv(select.T @ matrix @ select)
        torch.testing.assert_close(found[number].double(), expected, rtol=1e-4, atol=1e-4)


def cut_errors(down: Tensor, seen: Tensor, kept: Tensor, narrow: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of `narrow` in the place of `down`, and of the bare cut."""
    index = kept.unsqueeze(1).expand(-1, down.shape[1], -1)
    wide, bare = torch.zeros_like(down).scatter(2, index, narrow), down.gather(2, index)
    return error(down - wide, seen), error(down - torch.zeros_like(down).scatter(2, index, bare), seen)


@given(
    seed=seeds,
    keep=st.integers(1, 15),
    damping=st.sampled_from([1e-4, 0.01, 1.0, 100.0]),
    tokens=st.sampled_from([3, 200]),
)
@settings(max_examples=60, deadline=None)
def test_the_refit_lowers_every_experts_error_below_that_of_the_bare_cut(
    seed: int, keep: int, damping: float, tokens: int
):
    down, seen = matrices(seed, 3, 10, 16), moments(samples(seed, 3, 16, tokens=tokens))
    kept = torch.randperm(16, generator=torch.Generator().manual_seed(seed))[:keep].sort().values
    kept = kept.expand(3, -1)
    after, before = cut_errors(down, seen, kept, refitted_on(down, seen, kept, damping))
    assert bool((after < before).all())


def test_the_refit_helps_on_other_tokens_too():
    down, inputs = matrices(27, 3, 10, 16), samples(27, 3, 16, tokens=2000, rank=12)
    seen, unseen = moments(inputs[:, :1000]), moments(inputs[:, 1000:])
    kept = nystrom_kept(seen, None, 10, 0.1)
    after, before = cut_errors(down, unseen, kept, refitted_on(down, seen, kept, 1e-3))
    assert bool((after < 0.5 * before).all())


@pytest.mark.parametrize("tokens", [0, 3, 200])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_all_channels_give_the_matrix_itself(tokens: int, damping: float):
    down, inputs = matrices(28, 3, 10, 16), samples(28, 3, 16)[:, :tokens]
    seen = inputs.mT @ inputs
    kept = nystrom_kept(seen, None, 16, 0.1)
    assert float((refitted_on(down, seen, kept, damping) - down).abs().max()) < 1e-5


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_channels_of_a_rank_need_no_more_than_it(rank: int):
    down, inputs = matrices(29, 3, 10, 16), samples(29, 3, 16, rank=rank)
    seen = moments(inputs)
    kept = nystrom_kept(seen, None, rank, 1e-4)
    narrow = refitted_on(down, seen, kept, 1e-7)
    index = kept.unsqueeze(1).expand(-1, inputs.shape[1], -1)
    assert float((inputs.gather(2, index) @ narrow.mT - inputs @ down.mT).abs().max()) < 1e-2
    after, before = cut_errors(down, seen, kept, narrow)
    assert bool((after < 1e-5 * before).all())


def test_dead_or_broken_moments_leave_the_bare_cut():
    down, seen = matrices(30, 3, 10, 16), moments(samples(30, 3, 16))
    seen[0], seen[1, 2, 2] = 0, math.nan
    seen[2, :5], seen[2, :, :5] = 0, 0
    kept = torch.arange(4).expand(3, -1)
    narrow = refitted_on(down, seen, kept, 0.01)
    torch.testing.assert_close(narrow, down[..., :4])


# --- attention --------------------------------------------------------------------------------------------------------------


HIDDEN, WIDTH = 24, 8
GROUPS = [(4, 4), (4, 2), (6, 1)]
groups = pytest.mark.parametrize(("heads", "kv_heads"), GROUPS)
rotaries = pytest.mark.parametrize("rotary", ["halves", "interleaved", None])


# How a rotary embedding pairs the dims of a head: (i, i + d/2), or (2i, 2i + 1); None where there is none.
Rotary = Literal["halves", "interleaved"] | None


def units_of(rotary: Rotary) -> list[tuple[int, ...]]:
    if rotary is None:
        return [(dim,) for dim in range(WIDTH)]
    half = WIDTH // 2
    return [(i, i + half) if rotary == "halves" else (2 * i, 2 * i + 1) for i in range(half)]


def by_head(weight: Tensor, inputs: Tensor, heads: int) -> Tensor:
    """[heads, tokens, d] of a projection's answers."""
    return (inputs @ weight.T).unflatten(1, (heads, -1)).transpose(0, 1)


def turned(states: Tensor, frequencies: Tensor, rotary: Rotary) -> Tensor:
    """The rotary embedding as complex numbers; `frequencies` [heads, pairs]."""
    if rotary is None:
        return states
    real, imaginary = states.chunk(2, -1) if rotary == "halves" else (states[..., 0::2], states[..., 1::2])
    angle = torch.arange(states.shape[1])[:, None] * frequencies[:, None]
    after = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    if rotary == "halves":
        return torch.cat([after.real, after.imag], -1)
    return torch.stack([after.real, after.imag], -1).flatten(-2)


def scores(q: Tensor, k: Tensor, inputs: Tensor, heads: int, frequencies: Tensor, rotary: Rotary) -> Tensor:
    """Every head's q k^T [heads, tokens, tokens]; `frequencies` [Hkv, pairs]."""
    group = heads // len(frequencies)
    queries = turned(by_head(q, inputs, heads), frequencies.repeat_interleave(group, 0), rotary)
    keys = turned(by_head(k, inputs, len(frequencies)), frequencies, rotary)
    return queries @ keys.repeat_interleave(group, 0).mT


def attention(seed: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, o, the inputs of a sequence, and their moments."""
    q, k, v = (matrices(seed + n, h * WIDTH, HIDDEN) for n, h in enumerate((heads, kv_heads, kv_heads)))
    o, inputs = matrices(seed + 3, HIDDEN, heads * WIDTH), samples(seed, 1, HIDDEN, tokens=40)[0]
    return q, k, v, o, inputs, moments(inputs)


def everyones(kv_heads: int) -> Tensor:
    return (100.0 ** -(torch.arange(WIDTH // 2) / (WIDTH // 2))).expand(kv_heads, -1)


@groups
@rotaries
def test_queries_and_keys_of_full_width_stay(heads: int, kv_heads: int, rotary: Rotary):
    q, k, _, _, _, seen = attention(31, heads, kv_heads)
    kept = attention_rank.select_query_key(q, k, seen, WIDTH, heads, units_of(rotary))
    assert torch.equal(kept, torch.ones(kv_heads, WIDTH, dtype=torch.bool))


@groups
@pytest.mark.parametrize("rotary", ["halves", "interleaved"])
@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_pairs_stay_together_and_scores_lose_only_what_went(
    heads: int, kv_heads: int, rotary: Rotary, pairs: int
):
    q, k, _, _, inputs, seen = attention(32, heads, kv_heads)
    kept = attention_rank.select_query_key(q, k, seen, 2 * pairs, heads, units_of(rotary))
    assert kept.sum(1).tolist() == [2 * pairs] * kv_heads
    for own in kept:
        assert all(len({bool(own[dim]) for dim in unit}) == 1 for unit in units_of(rotary))
    group, before = heads // kv_heads, scores(q, k, inputs, heads, everyones(kv_heads), rotary)
    stay, gone = (
        scores(
            q * mask.repeat_interleave(group, 0).flatten()[:, None], k * mask.flatten()[:, None], inputs, heads,
            everyones(kv_heads), rotary,
        )
        for mask in (kept, ~kept)
    )  # fmt: skip
    torch.testing.assert_close(stay + gone, before, rtol=1e-4, atol=1e-4)


@groups
@rotaries
@pytest.mark.parametrize("pairs", [1, 3])
def test_dims_stay_by_what_they_hold_of_queries_and_keys(
    heads: int, kv_heads: int, rotary: Rotary, pairs: int
):
    q, k, _, _, inputs, seen = attention(33, heads, kv_heads)
    kept = attention_rank.select_query_key(q, k, seen, 2 * pairs, heads, units_of(rotary))
    queries = by_head(q, inputs, heads).square().mean(1).sqrt()
    keys = by_head(k, inputs, kv_heads).square().mean(1).sqrt()
    for number, own in enumerate(row.nonzero().flatten().tolist() for row in kept):
        members = [h for h in range(heads) if h * kv_heads // heads == number]
        of_dims = [sum(float(queries[h, i]) * float(keys[number, i]) for h in members) for i in range(WIDTH)]
        units = units_of(rotary)
        best = sorted(units, key=lambda unit: -sum(of_dims[i] for i in unit))[: 2 * pairs // len(units[0])]
        assert own == sorted(itertools.chain.from_iterable(best))


def test_dims_that_are_not_turned_stay_or_go_by_themselves():
    q, k, _, _, _, seen = attention(41, 4, 2)
    units = [(0, 2), (1, 3), (4,), (5,), (6,), (7,)]
    # The best pair does not fit beside a better single dim: the next single one takes what is left.
    for weight in (q, k):
        heads = weight.view(-1, WIDTH, HIDDEN)
        heads[:, 4:] *= torch.tensor([10.0, 1e-3, 1e-4, 1e-5])[:, None]
    assert [
        row.nonzero().flatten().tolist() for row in attention_rank.select_query_key(q, k, seen, 2, 4, units)
    ] == [[4, 5]] * 2
    kept = attention_rank.select_query_key(q, k, seen, 6, 4, units)
    assert [row.nonzero().flatten().tolist() for row in kept] == [[0, 1, 2, 3, 4, 5]] * 2


def test_dims_that_are_silent_in_keys_go_whatever_queries_say():
    q, k, _, _, _, seen = attention(34, 4, 2)
    k.view(2, WIDTH, HIDDEN)[:, [2, 6]] = 0
    q.view(4, WIDTH, HIDDEN)[:, [2, 6]] *= 100
    kept = attention_rank.select_query_key(q, k, seen, 6, 4, units_of("halves"))
    assert [row.nonzero().flatten().tolist() for row in kept] == [[0, 1, 3, 4, 5, 7]] * 2


def test_rounding_below_zero_is_no_reason_to_stay():
    q, k, _, _, _, seen = attention(40, 4, 2)
    seen[0], seen[:, 0], seen[0, 0] = 0, 0, -1e-9
    k.view(2, WIDTH, HIDDEN)[:, 3] = torch.eye(HIDDEN)[0]
    assert not attention_rank.select_query_key(q, k, seen, 6, 4, units_of(None))[:, 3].any()


def outputs(v: Tensor, o: Tensor, inputs: Tensor, heads: int, kv_heads: int, weights: Tensor) -> Tensor:
    """What attention answers, for given attention `weights` [heads, tokens, tokens]."""
    values = by_head(v, inputs, kv_heads).repeat_interleave(heads // kv_heads, 0)
    return (weights @ values).transpose(0, 1).flatten(1) @ o.T


@groups
@pytest.mark.parametrize("tokens", [0, 5, 40])
def test_values_of_full_rank_leave_attention_as_it_was(heads: int, kv_heads: int, tokens: int):
    q, k, v, o, inputs, _ = attention(35, heads, kv_heads)
    weights = scores(q, k, inputs, heads, everyones(kv_heads), "halves").softmax(-1)
    before = outputs(v, o, inputs, heads, kv_heads, weights)
    for seen in (inputs[:tokens].T @ inputs[:tokens], None):
        narrow = attention_rank.decompose_value_output(v, o, seen, WIDTH, heads)
        assert (narrow[0].shape, narrow[1].shape) == (v.shape, o.shape)
        after = outputs(*narrow, inputs, heads, kv_heads, weights)
        assert float((after - before).abs().max()) < 1e-5 * float(before.abs().max())


def products(v: Tensor, o: Tensor, heads: int, kv_heads: int) -> Tensor:
    """O V [Hkv, group hidden, hidden], block by block."""
    width, group = len(v) // kv_heads, heads // kv_heads
    return torch.stack([
        torch.cat([
            o[:, (h * group + g) * width : (h * group + g + 1) * width] @ v[h * width : (h + 1) * width]
            for g in range(group)
        ])
        for h in range(kv_heads)
    ])  # fmt: skip


@groups
@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("known", [True, False])
def test_values_and_outputs_are_the_best_of_their_rank(heads: int, kv_heads: int, rank: int, known: bool):
    _, _, v, o, _, seen = attention(36, heads, kv_heads)
    narrow = attention_rank.decompose_value_output(v, o, seen if known else None, rank, heads)
    assert (narrow[0].shape, narrow[1].shape) == ((kv_heads * rank, HIDDEN), (HIDDEN, heads * rank))
    whole = products(v, o, heads, kv_heads)
    lost = error(whole - products(*narrow, heads, kv_heads), seen if known else None)
    torch.testing.assert_close(lost, tail(whole, seen if known else None, rank), rtol=1e-3, atol=0)


def test_it_is_the_published_pair_of_decompositions():
    _, _, v, o, _, seen = attention(37, 4, 4)
    found = products(*attention_rank.decompose_value_output(v, o, seen, 3, 4), 4, 4)
    half = root(seen)
    for head in range(4):
        own = slice(head * WIDTH, (head + 1) * WIDTH)
        first = torch.linalg.svd(half @ v[own].double().T, full_matrices=False)
        second = torch.linalg.svd(torch.diag(first.S) @ first.Vh @ o[:, own].double().T, full_matrices=False)
        values = torch.linalg.inv(half) @ first.U @ second.U[:, :3]
        outputs = torch.diag(second.S[:3]) @ second.Vh[:3]
        torch.testing.assert_close(found[head].double(), (values @ outputs).T, rtol=1e-3, atol=1e-3)


def test_values_of_data_of_a_rank_need_no_more_than_it():
    q, k, v, o, _, _ = attention(38, 4, 2)
    inputs = samples(38, 1, HIDDEN, tokens=40, rank=3)[0]
    weights = scores(q, k, inputs, 4, everyones(2), "halves").softmax(-1)
    narrow = attention_rank.decompose_value_output(v, o, moments(inputs), 3, 4)
    before = outputs(v, o, inputs, 4, 2, weights)
    torch.testing.assert_close(outputs(*narrow, inputs, 4, 2, weights), before, rtol=1e-3, atol=1e-3)


def test_moments_of_few_tokens_give_numbers():
    q, k, v, o, inputs, _ = attention(39, 4, 2)
    for seen in (moments(inputs[:1]), torch.zeros(HIDDEN, HIDDEN)):
        assert attention_rank.select_query_key(q, k, seen, 4, 4, units_of("halves")).sum(1).tolist() == [4, 4]
        assert all(
            bool(each.isfinite().all()) for each in attention_rank.decompose_value_output(v, o, seen, 3, 4)
        )


# --- the shares of layers ------------------------------------------------------------------------------------------------------


importances = st.lists(st.floats(0, 1), min_size=1, max_size=24)
epsilons = st.sampled_from([None, 1e-4, 0.02, 0.1, 1.0, 50.0])


@given(importance=importances, ratio=st.floats(0, 0.99), epsilon=epsilons)
@settings(max_examples=200, deadline=None)
def test_shares_have_the_mean_keep_the_order_and_stay_below_the_cap(
    importance: list[float], ratio: float, epsilon: float | None
):
    shares = low_rank.entropy_allocation(importance, ratio, epsilon)
    assert sum(shares) / len(shares) == pytest.approx(ratio, abs=1e-12)
    assert all(0 <= share <= max(low_rank.CAP, ratio) + 1e-12 for share in shares)
    for (one, first), (other, second) in itertools.pairwise(sorted(zip(importance, shares, strict=True))):
        assert first >= second - 1e-12
        assert one < other or first == pytest.approx(second, abs=1e-9) or first >= low_rank.CAP - 1e-9


@given(importance=importances, ratio=st.floats(0.01, 0.9), epsilon=st.sampled_from([0.02, 0.1, 1.0]))
@settings(max_examples=100, deadline=None)
def test_no_exchange_between_two_layers_is_better(importance: list[float], ratio: float, epsilon: float):
    def gain(layer: int, share: float) -> float:
        return importance[layer] * (1 - share) - epsilon * (share * math.log(share) if share > 0 else 0.0)

    shares = low_rank.entropy_allocation(importance, ratio, epsilon)
    for one, other in itertools.permutations(range(len(shares)), 2):
        move = 0.05 * min(shares[one], low_rank.CAP - shares[other])
        after = gain(one, shares[one] - move) + gain(other, shares[other] + move)
        assert after <= gain(one, shares[one]) + gain(other, shares[other]) + 1e-9


def test_below_the_cap_it_is_the_published_formula():
    importance = [0.3, 0.1, 0.2, 0.15]
    soft = torch.tensor([-each / 0.1 for each in importance], dtype=torch.float64).softmax(0)
    assert low_rank.entropy_allocation(importance, 0.25, 0.1) == pytest.approx((4 * 0.25 * soft).tolist())
    deviation = float(torch.tensor(importance, dtype=torch.float64).std(correction=0))
    assert low_rank.entropy_allocation(importance, 0.25) == low_rank.entropy_allocation(
        importance, 0.25, deviation
    )


def test_what_the_cap_cuts_off_goes_to_the_others():
    shares = low_rank.entropy_allocation([0.0, 10.0, 10.0, 11.0], 0.5, 1.0)
    assert shares[0] == low_rank.CAP
    assert shares[1] == pytest.approx(shares[2])
    assert shares[3] / shares[1] == pytest.approx(math.exp(-1))
    assert sum(shares) == pytest.approx(2.0)


def test_layers_alike_lose_alike():
    assert low_rank.entropy_allocation([0.2] * 5, 0.3) == pytest.approx([0.3] * 5)
    assert low_rank.entropy_allocation([0.1, 0.9], 0.97, 0.01) == pytest.approx([0.97] * 2)
    assert low_rank.entropy_allocation([0.1, 0.9], 0.0, 0.01) == [0.0, 0.0]
