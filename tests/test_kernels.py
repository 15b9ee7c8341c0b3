"""The kernels of weight quantization, against formulas written out again, least squares, and facts that must hold.

GPTQ is compared code by code with the published algorithm (inverse, Cholesky factor of the inverse, one matrix, one
column after another, in float64), which shares nothing with ours but the grids. The rest are facts that no shared mistake
survives: what is optimal is solved for directly, what may not rise is measured.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moespresso.core.format import Format
from moespresso.formats import (
    SLAB,
    QuantizedWeights,
    Search,
    decode,
    encode,
    in_groups,
    minmax,
    round_nearest,
    searched,
    slabs,
    spread,
    unbias,
)
from moespresso.kernels import conditioning, gptq, hqq

FORMATS = [
    Format("integer", bits, size, symmetric)
    for bits, size, symmetric in itertools.product((2, 3, 4, 8), (0, 8), (True, False))
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PUBLISHED = {"sweeps": 0, "unbiased": False, "weighted": False}


def solve(
    weights: Tensor, hessians: Tensor, format: Format, dtype: torch.dtype, **settings: Any
) -> tuple[QuantizedWeights, conditioning.Warnings]:
    return gptq.solve(weights, hessians, format, dtype, gptq.Settings(**settings))


def half_quadratic(weights: Tensor, format: Format, dtype: torch.dtype, **settings: Any) -> QuantizedWeights:
    return hqq.quantize(weights, format, dtype, hqq.Settings(**settings))


def name(format: Format) -> str:
    return f"{format.bits}bit-g{format.group_size}-{'sym' if format.symmetric else 'asym'}"


formats = pytest.mark.parametrize("format", FORMATS, ids=name)


def problem(
    seed: int, count: int = 3, rows: int = 6, width: int = 40, tokens: int = 200
) -> tuple[Tensor, Tensor]:
    """Weights [N, out, in], and Hessians of correlated inputs of uneven size."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(count, width, width, generator=draw) / width**0.5
    size = 0.1 + torch.rand(count, 1, width, generator=draw)
    inputs = torch.randn(count, tokens, width, generator=draw) @ mix * size
    return torch.randn(count, rows, width, generator=draw) * 0.02, inputs.mT @ inputs / tokens


def output_error(weights: Tensor, codes: QuantizedWeights, hessians: Tensor) -> Tensor:
    """tr(dW H dW^T) of each matrix, in float64."""
    lost = (weights - decode(codes).float()).double()
    return ((lost @ hessians.double()) * lost).sum((1, 2))


def same(one: QuantizedWeights, other: QuantizedWeights) -> bool:
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("values", "scale", "zero"))


# --- grids -------------------------------------------------------------------------------------------------------------


def powers(weights: Tensor, grid: tuple[Tensor, Tensor], format: Format, power: float) -> Tensor:
    """Sums of |w - decoded|^power per group, from what a user would load."""
    lost = weights - decode(encode(weights, *grid, format)).float()
    return in_groups(lost.abs() ** power, format).sum(-1)


@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("side", [0, 1, -1])
def test_minmax_leaves_no_weight_much_over_half_a_step_from_a_level(
    format: Format, dtype: torch.dtype, signed: bool, side: int
):
    """Where all weights lie on one side of 0, too: no grid is without it."""
    weights, _ = problem(0)
    weights = side * (weights.abs() + 0.05) if side else weights
    scale, zero = minmax(weights, format, dtype, signed=signed)
    lost = (weights - decode(encode(weights, scale, zero, format)).float()).abs()
    # Rounding the scale moves the farthest level, and a whole zero the whole grid, by half a step at most.
    slack = 0.5 * (1 if format.symmetric else 2) + 2**format.bits * torch.finfo(dtype).eps
    assert bool((lost <= slack * spread(scale.float().abs(), weights.shape[-1]) + 1e-7).all())
    if format.symmetric:
        assert bool((zero == 2 ** (format.bits - 1)).all())
    assert (signed and format.symmetric) or bool((scale > 0).all())


@formats
def test_signed_scales_are_negative_where_the_largest_weight_is_positive_and_never_coarser(format: Format):
    weights, _ = problem(1)
    plain, _ = minmax(weights, format, torch.float32, signed=False)
    scale, _ = minmax(weights, format, torch.float32)
    low, high = in_groups(weights, format).aminmax(dim=-1)
    assert torch.equal(scale < 0, (high > -low) & format.symmetric)
    assert bool((scale.abs() <= plain).all())


@given(
    seed=st.integers(0, 10_000),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    power=st.sampled_from([1.0, 2.0, 2.4]),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
)
@settings(max_examples=60, deadline=None)
def test_a_search_is_never_worse_than_minmax_in_its_own_measure(
    seed: int, bits: int, symmetric: bool, dtype: torch.dtype, power: float, size: float
):
    format = Format("integer", bits, 8, symmetric)
    weights = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(seed)) ** 3 * size
    found, plain = (
        searched(weights, format, dtype, search=Search(power=power)),
        minmax(weights, format, dtype),
    )
    # Summed in another order: equal up to rounding.
    limit = powers(weights, plain, format, power) * (1 + 1e-5)
    assert bool((powers(weights, found, format, power) <= limit).all())
    assert bool(found[0].isfinite().all())
    assert bool((found[0] != 0).all())


def test_the_search_finds_the_best_of_its_ranges():
    format, (weights, _) = Format("integer", 3, 8, False), problem(2)
    scale, _ = searched(weights, format, torch.float32, search=Search(steps=4, min_share=0.6))
    ranges = [minmax(weights * share, format, torch.float32) for share in (1.0, 0.9, 0.8, 0.7)]
    errors = torch.stack([powers(weights, grid, format, 2.4) for grid in ranges])
    best = torch.stack([grid[0] for grid in ranges]).gather(0, errors.argmin(0, keepdim=True))[0]
    torch.testing.assert_close(scale, best)


def test_important_inputs_decide_where_a_range_is_cut():
    format = Format("integer", 2, 0, True)
    weights = torch.tensor([[[1.0, 0.22, -0.23, 0.21, -0.2, 0.19]]])
    importance = torch.tensor([[1e-6, 1, 1, 1, 1, 1]])
    plain, _ = searched(weights, format, torch.float32)
    cut, _ = searched(weights, format, torch.float32, importance=importance)
    assert float(cut.abs()) < float(plain.abs())
    swapped, _ = searched(weights.flip(-1), format, torch.float32, importance=importance.flip(-1))
    assert torch.equal(cut, swapped)


def test_a_group_that_does_not_count_keeps_its_whole_range():
    format, (weights, _) = Format("integer", 4, 8, True), problem(21)
    found = searched(weights, format, torch.bfloat16, importance=torch.zeros(3, 40))
    assert all(map(torch.equal, found, minmax(weights, format, torch.bfloat16)))


@pytest.mark.parametrize("shape", [(1, 1, 4), (5, 3, 8), (3, 7, SLAB // 4), (2, 2, 2 * SLAB), (9, 100, 2048)])
def test_slabs_cover_everything_once_and_stay_small(shape: tuple[int, int, int]):
    seen = torch.zeros(shape[:2], dtype=torch.int32)
    for part in slabs(torch.Size(shape)):
        assert seen[part].numel() * shape[2] <= max(SLAB, shape[2])
        seen[part] += 1
    assert bool((seen == 1).all())


def test_slabs_do_not_show_in_the_result(monkeypatch: pytest.MonkeyPatch):
    format, (weights, hessians) = Format("integer", 3, 8, False), problem(3)
    importance = hessians.diagonal(dim1=1, dim2=2)

    def everything() -> list[Tensor]:
        plain = round_nearest(weights, format, torch.bfloat16)
        fitted = half_quadratic(weights, format, torch.bfloat16)
        codes = [plain, fitted, unbias(weights, plain, hessians)]
        grid = searched(weights, format, torch.bfloat16, importance=importance)
        return [*grid, *(part for each in codes for part in (each.values, each.scale, each.zero))]

    whole = everything()
    monkeypatch.setattr(sys.modules[slabs.__module__], "SLAB", 2 * weights.shape[-1])
    assert all(map(torch.equal, whole, everything()))


# --- round to nearest, and shrinkage -------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("scales", ["searched", "minmax"])
def test_rounding_takes_the_nearest_level(format: Format, scales: str):
    weights, _ = problem(4)
    codes = round_nearest(weights, format, torch.float32, scales, unbiased=False)
    levels = torch.arange(2**format.bits) - spread(codes.zero, weights.shape[-1]).unsqueeze(-1).float()
    levels = levels * spread(codes.scale, weights.shape[-1]).unsqueeze(-1)
    nearest = (levels - weights.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((decode(codes) - weights).abs(), nearest, atol=1e-7, rtol=1e-5)


@formats
@pytest.mark.parametrize("seen", [True, False])
def test_an_unbiased_row_answers_its_own_weights_at_full_length(format: Format, seen: bool):
    weights, hessians = problem(5)
    plain = round_nearest(weights, format, torch.float32, unbiased=False)
    codes = unbias(weights, plain, hessians if seen else None)
    toward = weights @ hessians if seen else weights
    torch.testing.assert_close((toward * decode(codes)).sum(-1), (toward * weights).sum(-1))
    assert torch.equal(codes.values, plain.values)
    if not seen:
        assert same(codes, round_nearest(weights, format, torch.float32))


def test_rows_that_cannot_be_freed_of_shrinkage_stay():
    format = Format("integer", 2, 0, True)
    weights = torch.tensor([[[0.0, 0, 0, 0], [1.0, 1, 1, 1], [1.0, 1, 1, 1]]])
    # The second row is met at a third of its length, the third in the wrong direction: grids that do not fit.
    values = torch.tensor([[[2, 2, 2, 2], [3, 3, 3, 3], [1, 1, 1, 1]]], dtype=torch.uint8)
    scale = torch.tensor([[[1.0], [0.3], [0.5]]])
    codes = QuantizedWeights(format, values, scale, torch.full((1, 3, 1), 2, dtype=torch.uint8))
    assert torch.equal(unbias(weights, codes).scale, scale)


# --- half-quadratic --------------------------------------------------------------------------------------------------------


def test_shrinking_is_the_generalized_soft_threshold():
    x, p, beta = torch.tensor([-2.0, -0.01, 0.0, 0.5]), 0.7, 10.0
    by_hand = [-(2 - 2**-0.3 / 10), 0.0, 0.0, 0.5 - 0.5**-0.3 / 10]
    torch.testing.assert_close(hqq.soft_threshold(x, p, beta), torch.tensor(by_hand))


def by_hand(weights: Tensor, bits: int, betas: list[float], p: float = 0.7) -> tuple[float, int]:
    """Scale and zero of one asymmetric group, all turns written out in float64; the first turn that does not help ends it."""
    low, high, top = min(weights.min().item(), 0.0), max(weights.max().item(), 0.0), 2**bits - 1
    scale = torch.tensor((high - low) / top, dtype=torch.float64)
    zero = (-low / scale).round()

    def lost(scale: Tensor, zero: Tensor) -> Tensor:
        return weights - ((weights / scale + zero).round().clamp(0, top) - zero) * scale

    best, lowest = (scale, zero), (lost(scale, zero).abs() ** p).sum()
    for beta in betas:
        values = (weights / scale + zero).round().clamp(0, top)
        error = lost(scale, zero) / scale
        given_up = error.sign() * (error.abs() - error.abs() ** (p - 1) / beta).clamp(min=0)
        rest = weights / scale - given_up
        zero = (values - rest).mean().round().clamp(0, top)
        scale = scale * ((values - zero) * rest).sum() / ((values - zero) ** 2).sum()
        if not (found := (lost(scale, zero).abs() ** p).sum()) < lowest:
            break
        best, lowest = (scale, zero), found
    return float(best[0]), int(best[1])


def test_half_quadratic_takes_the_turns_of_its_formulas():
    format, (weights, _) = Format("integer", 3, 8, False), problem(22)
    codes = half_quadratic(weights, format, torch.float32, beta=2.0, kappa=3.0, iterations=6, unbiased=False)
    betas = [2.0 * 3.0**turn for turn in range(6)]
    found = zip(codes.scale.flatten().tolist(), codes.zero.flatten().tolist(), strict=True)
    expected = [by_hand(group, 3, betas) for group in in_groups(weights, format).double().flatten(0, 2)]
    alike = [
        pair == (pytest.approx(each[0], rel=1e-4), each[1])
        for pair, each in zip(found, expected, strict=True)
    ]
    # In float32 a group may stop a turn earlier or later, where an error falls by a hair.
    assert sum(alike) >= 0.97 * len(alike)


@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_quadratic_is_never_worse_than_minmax_in_its_norm_and_mostly_better(
    format: Format, dtype: torch.dtype
):
    weights, _ = problem(6, rows=30)
    codes = half_quadratic(weights, format, dtype, unbiased=False)
    found = powers(weights, (codes.scale, codes.zero), format, 0.7)
    plain = powers(weights, minmax(weights, format, dtype), format, 0.7)
    assert bool((found <= plain * (1 + 1e-5)).all())
    if format.bits < 8:
        assert float((found < plain).float().mean()) > 0.5
        assert float(found.mean()) < 0.99 * float(plain.mean())


# --- GPTQ against the published algorithm --------------------------------------------------------------------------------


def published(
    weights: Tensor, hessian: Tensor, grid: QuantizedWeights, damping: float, act_order: bool
) -> Tensor:
    """Values [out, in] of one matrix, after arXiv 2210.17323: U upper with U^T U = H^-1, remaining columns updated."""
    rest, hessian = weights.double().clone(), hessian.double()
    width = rest.shape[1]
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(width)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    rest, values = rest[:, order], torch.empty_like(rest)
    scale, zero = (spread(each[0], width)[:, order].double() for each in (grid.scale, grid.zero))
    for j in range(width):
        values[:, j] = (rest[:, j] / scale[:, j] + zero[:, j]).round().clamp(0, 2**grid.format.bits - 1)
        error = (rest[:, j] - (values[:, j] - zero[:, j]) * scale[:, j]) / upper[j, j]
        rest[:, j:] -= error[:, None] * upper[j, j:]
    return values[:, order.argsort()].to(torch.uint8)


@formats
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.few(32)
def test_codes_are_those_of_the_published_algorithm(format: Format, act_order: bool, seed: int):
    weights, hessians = problem(seed)
    codes, warnings = solve(
        weights, hessians, format, torch.float32, act_order=act_order, block=16, damping=0.01, **PUBLISHED
    )
    for number in range(len(weights)):
        grid = QuantizedWeights(format, codes.values[[number]], codes.scale[[number]], codes.zero[[number]])
        assert torch.equal(
            codes.values[number], published(weights[number], hessians[number], grid, 0.01, act_order)
        )
    scale, zero = searched(weights, format, torch.float32)
    assert torch.equal(codes.scale, scale)
    assert torch.equal(codes.zero, zero)
    assert warnings.damped == {}


@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("seed", range(5))
def test_each_column_is_rounded_from_the_least_squares_optimum_given_those_before(size: int, seed: int):
    format, draw = Format("integer", 3, size, False), torch.Generator().manual_seed(seed)
    inputs = torch.randn(50, 6, generator=draw) @ torch.randn(6, 6, generator=draw)
    weights = torch.randn(1, 4, 6, generator=draw)
    codes, _ = solve(
        weights, inputs.T @ inputs[None], format, torch.float32, act_order=False, damping=0.0, **PUBLISHED
    )
    wanted, met, inputs = weights[0].double(), decode(codes)[0].double(), inputs.double()
    scale, zero = (spread(each[0], 6).double() for each in (codes.scale, codes.zero))
    for j in range(6):
        # What the outputs still lack when columns before j stand as rounded, met as well as the rest can.
        lacking = inputs @ wanted.T - inputs[:, :j] @ met[:, :j].T
        rest = torch.linalg.lstsq(inputs[:, j:], lacking).solution
        nearest = (rest[0] / scale[:, j] + zero[:, j]).round().clamp(0, 7)
        assert torch.equal(codes.values[0, :, j].double(), nearest)


@formats
@pytest.mark.parametrize("sweeps", [0, 1])
def test_with_uncorrelated_inputs_it_is_rounding_to_nearest(format: Format, sweeps: int):
    weights, _ = problem(7)
    eye = torch.eye(40).expand(3, 40, 40)
    codes, _ = solve(weights, eye, format, torch.bfloat16, **(PUBLISHED | {"sweeps": 0}))
    assert same(codes, round_nearest(weights, format, torch.bfloat16, unbiased=False))
    if sweeps:
        swept, _ = solve(weights, eye, format, torch.bfloat16, **(PUBLISHED | {"sweeps": 1}))
        assert bool((output_error(weights, swept, eye) <= output_error(weights, codes, eye)).all())


@given(seed=st.integers(0, 100_000), format=st.sampled_from(FORMATS), rank=st.sampled_from([20, 60, 400]))
@settings(max_examples=60, deadline=None)
def test_the_output_error_is_never_above_that_of_rounding_to_nearest(seed: int, format: Format, rank: int):
    weights, hessians = problem(seed, rows=16, tokens=rank)
    nearest = output_error(weights, round_nearest(weights, format, torch.bfloat16, unbiased=False), hessians)
    for settings_ in ({}, {"sweeps": 0}, {"unbiased": False}):
        codes, _ = solve(weights, hessians, format, torch.bfloat16, **settings_)
        assert bool((output_error(weights, codes, hessians) < nearest).all())


# --- coordinate descent ------------------------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.few(10)
def test_sweeps_never_raise_the_error_they_descend_on(format: Format, dtype: torch.dtype):
    weights, hessians = problem(8)
    damped = hessians + 0.05 * torch.diag_embed(
        hessians.diagonal(dim1=1, dim2=2).mean(1, keepdim=True).expand(-1, 40)
    )
    found = [
        solve(weights, hessians, format, dtype, sweeps=n, damping=0.05, unbiased=False)[0] for n in range(4)
    ]
    errors = [output_error(weights, codes, damped) for codes in found]
    # Products are rounded to the scales' dtype: a hair, next to steps of a whole level.
    slack = 1 + (1e-5 if dtype == torch.float32 else 2e-2)
    assert all(bool((after <= before * slack).all()) for before, after in itertools.pairwise(errors))
    assert float(errors[3].sum()) < 0.99 * float(errors[0].sum())


def test_in_the_end_no_single_code_and_no_scale_can_be_bettered():
    format, (weights, hessians) = Format("integer", 2, 8, False), problem(9, count=1, rows=2, width=16)
    codes, _ = solve(weights, hessians, format, torch.float32, sweeps=60, damping=0.0, unbiased=False)
    least = output_error(weights, codes, hessians)
    for row, column, value in itertools.product(range(2), range(16), range(4)):
        values = codes.values.clone()
        values[0, row, column] = value
        other = QuantizedWeights(format, values, codes.scale, codes.zero)
        assert float(output_error(weights, other, hessians)) >= float(least) * (1 - 1e-6)
    for row, group, factor in itertools.product(range(2), range(2), (0.99, 1.01)):
        scale = codes.scale.clone()
        scale[0, row, group] *= factor
        other = QuantizedWeights(format, codes.values, scale, codes.zero)
        assert float(output_error(weights, other, hessians)) >= float(least) * (1 - 1e-6)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("make", ["gptq", "hqq", "nearest"])
def test_scales_that_may_not_be_negative_are_positive(size: int, make: str):
    format, (weights, hessians) = Format("integer", 2, size, True), problem(19, rows=16, tokens=10)
    codes = {
        # Groups this small, of inputs this alike, would have scales of least squares beyond 0.
        "gptq": lambda: solve(weights, hessians, format, torch.float32, signed=False)[0],
        "hqq": lambda: half_quadratic(weights, format, torch.float32, signed=False),
        "nearest": lambda: round_nearest(weights, format, torch.float32, signed=False),
    }[make]()
    assert bool((codes.scale > 0).all())


def test_scales_are_searched_with_the_second_moments_unless_told_otherwise():
    format, (weights, hessians) = Format("integer", 3, 8, True), problem(20)
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    importance = diagonal + 0.2 * diagonal.mean(1, keepdim=True)
    for weighted in (True, False):
        expected = searched(
            weights, format, torch.float32, importance if weighted else None, Search(power=2.4)
        )
        codes, _ = solve(
            weights, hessians, format, torch.float32, **(PUBLISHED | {"damping": 0.2, "weighted": weighted})
        )
        assert torch.equal(codes.scale, expected[0])
    assert not torch.equal(codes.scale, searched(weights, format, torch.float32, importance=importance)[0])


def test_the_whole_of_it_answers_unbiased_under_the_damped_hessian():
    format, (weights, hessians) = Format("integer", 2, 8, True), problem(10)
    codes, _ = solve(weights, hessians, format, torch.float32, damping=0.0)
    toward = weights @ hessians
    torch.testing.assert_close((toward * decode(codes)).sum(-1), (toward * weights).sum(-1))


# --- many at once ------------------------------------------------------------------------------------------------------------


@formats
@pytest.mark.few(8)
def test_all_at_once_is_one_by_one(format: Format):
    weights, hessians = problem(11)
    many, _ = solve(weights, hessians, format, torch.bfloat16)
    for number in range(len(weights)):
        one, _ = solve(weights[[number]], hessians[[number]], format, torch.bfloat16)
        assert same(
            one, QuantizedWeights(format, many.values[[number]], many.scale[[number]], many.zero[[number]])
        )


@pytest.mark.parametrize("block", [1, 7, 16, 40, 128])
def test_blocks_do_not_show_in_the_codes(block: int):
    format, (weights, hessians) = Format("integer", 3, 8, False), problem(12)
    codes, _ = solve(weights, hessians, format, torch.float32, block=block)
    other, _ = solve(weights, hessians, format, torch.float32)
    assert torch.equal(codes.values, other.values)
    torch.testing.assert_close(codes.scale, other.scale)


@pytest.mark.parametrize(
    ("count", "rows", "width", "size"),
    [(1, 1, 1, 0), (1, 5, 8, 8), (4, 1, 24, 0), (2, 3, 136, 8), (2, 3, 130, 0)],
)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_all_shapes(count: int, rows: int, width: int, size: int, source: torch.dtype):
    format, (weights, hessians) = Format("integer", 4, size, True), problem(13, count, rows, width)
    weights = weights.to(source)
    found = [solve(weights, hessians, format, torch.float16)[0]]
    found += [make(weights, format, torch.float16) for make in (round_nearest, half_quadratic)]
    for codes in found:
        assert codes.values.shape == weights.shape
        assert codes.values.dtype == codes.zero.dtype == torch.uint8
        assert codes.scale.shape == codes.zero.shape == (count, rows, width // (size or width))
        assert codes.scale.dtype == torch.float16
        assert float((decode(codes).float() - weights.float()).abs().mean()) < 0.01


# --- warnings ------------------------------------------------------------------------------------------------------------------


def test_inputs_that_never_fired_are_rounded_to_nearest_and_counted():
    format, (weights, hessians) = Format("integer", 4, 8, True), problem(14)
    hessians[1, 5], hessians[1, :, 5] = 0.0, 0.0
    hessians[2] = 0.0
    codes, warnings = solve(weights, hessians, format, torch.float32, **PUBLISHED)
    nearest = round_nearest(weights, format, torch.float32, unbiased=False)
    assert warnings.dead == 1 + 40
    assert warnings.damped == {}
    assert torch.equal(codes.values[1, :, 5], nearest.values[1, :, 5])
    assert torch.equal(codes.values[2], nearest.values[2])


def test_a_singular_matrix_is_damped_alone_and_reported():
    format, (weights, hessians) = Format("integer", 4, 8, True), problem(15)
    hessians[1] = 1.0
    codes, warnings = solve(weights, hessians, format, torch.float32, damping=0.0)
    assert set(warnings.damped) == {1}
    assert warnings.damped[1] > 0
    alone, _ = solve(weights[[0]], hessians[[0]], format, torch.float32, damping=0.0)
    assert torch.equal(codes.values[0], alone.values[0])
    assert float(output_error(weights, codes, hessians)[1]) < 1e-2


def test_damping_goes_up_tenfold_until_it_does():
    eye = torch.eye(4)
    hessians = torch.stack(
        [eye, eye - 0.03 * torch.ones(4, 4) * 10, eye]
    )  # the second: one eigenvalue of -0.2
    factors, ridge, raised = conditioning.damped_factors(hessians, 0.01)
    assert raised == {1: pytest.approx(1.0)}
    torch.testing.assert_close(ridge, torch.tensor([0.01, 0.7, 0.01]))
    torch.testing.assert_close(factors @ factors.mT, hessians + ridge[:, None, None] * eye)
    assert torch.equal(factors, factors.triu())


@pytest.mark.parametrize(("place", "value"), [((0, 3, 3), torch.nan), ((0, 3, 4), torch.inf)])
def test_a_hessian_that_is_not_finite_falls_back_to_rounding_to_nearest(place: tuple[int, ...], value: float):
    format, (weights, hessians) = Format("integer", 4, 8, True), problem(16)
    hessians[place] = value
    codes, warnings = solve(weights, hessians, format, torch.float32, **PUBLISHED)
    assert warnings.nonfinite == (0,)
    nearest = round_nearest(weights, format, torch.float32, unbiased=False)
    assert torch.equal(codes.values[0], nearest.values[0])


@formats
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-38, 1e38])
@pytest.mark.few(24)
def test_scales_are_never_zero_nor_infinite(format: Format, dtype: torch.dtype, size: float):
    weights, hessians = problem(17)
    weights = weights.sign() * size
    found, warnings = solve(weights, hessians, format, dtype)
    everything = [found] + [make(weights, format, dtype) for make in (round_nearest, half_quadratic)]
    for codes in everything:
        assert bool(codes.scale.isfinite().all())
        assert bool((codes.scale != 0).all())
        if size == 0:
            assert not bool(decode(codes).any())
    assert (warnings.clipped > 0) == (size == 1e38 and dtype == torch.float16)


# --- shrinkage of Hessians -------------------------------------------------------------------------------------------------------


def test_few_tokens_are_pulled_to_the_pooled_mean():
    _, hessians = problem(18)
    pooled, tokens = hessians.mean(0), torch.tensor([0, 100, 10**9])
    found = conditioning.shrink(hessians, tokens, pooled, 100.0)
    torch.testing.assert_close(found[0], pooled)
    torch.testing.assert_close(found[1], (hessians[1] + pooled) / 2)
    torch.testing.assert_close(found[2], hessians[2])
    assert torch.equal(conditioning.shrink(hessians, tokens, pooled, 0.0), hessians)
