"""Stored sparse matrices are, bit for bit, the weights that were kept, and a damaged one is refused.

A slow reader written here from the description, one weight at a time, reads what is stored; one tiny matrix per kind is
written down by hand. Most checks run with a small `SLAB` too, so that matrices of a few rows are cut as large ones are.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.format import DTYPE_BYTES, Format
from moespresso.formats import Bitmask, integer, kept_in_row
from moespresso.formats.bitmask import (
    decode_sparse,
    encode_sparse,
    kept_count,
    mask_of,
)

quickly = settings(max_examples=80, deadline=None, derandomize=True, database=None)
FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
NAMES = FLOATS | {torch.uint8: "U8", torch.int64: "I64"}
EVERY_OTHER = Format("sparse", density=0.5)
TWO_OF_FOUR = Format("sparse", density=0.5, group_size=4)


@dataclass(frozen=True)
class Pruned:
    format: Format
    weights: Tensor
    mask: Tensor
    slab: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.weights.shape[1], self.weights.shape[2]

    @property
    def dense(self) -> Tensor:
        return self.weights.masked_fill(~self.mask, 0)


def bits(weights: Tensor) -> Tensor:
    """Weights as integers, by which NaN is itself and -0.0 is not 0.0."""
    return weights.contiguous().view(torch.int32 if weights.dtype == torch.float32 else torch.int16)


def any_weights(count: int, out: int, width: int, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Weights of all bit patterns: NaNs of every kind, infinities, and many zeros of both signs."""
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(whole)
    patterns = torch.randint(limits.min, limits.max + 1, (count, out, width), generator=random).to(whole)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype)
    chosen = torch.randint(len(special), patterns.shape, generator=random)
    plain = torch.rand(patterns.shape, generator=random) < 0.6
    return torch.where(plain, patterns, bits(special)[chosen]).view(dtype)


def any_mask(count: int, out: int, width: int, format: Format, random: torch.Generator) -> Tensor:
    """A mask that keeps as many weights as `format` says: anywhere in a matrix, or in each group."""
    size = format.group_size or out * width
    kept = kept_in_row(format, size) if format.group_size else kept_count(format, out, width)
    order = torch.rand(count, out * width // size, size, generator=random).argsort(-1).argsort(-1)
    return (order < kept).view(count, out, width)


@st.composite
def pruned(draw: st.DrawFn) -> Pruned:
    """Matrices of every kind, down to one weight, one row, nothing kept and all kept."""
    group = draw(st.sampled_from((0, 0, 1, 2, 4, 5, 8, 16)))
    share = draw(st.sampled_from((0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.75, 1.0)))
    format = Format("sparse", density=share, group_size=group)
    count, out = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    width = draw(st.integers(1, 70 // (group or 1))) * (group or 1)
    random = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    weights = any_weights(count, out, width, draw(st.sampled_from(list(FLOATS))), random)
    slab = draw(st.sampled_from((1, 40, 200, integer.SLAB)))
    return Pruned(format, weights, any_mask(count, out, width, format, random), slab)


def slow_reader(parts: dict[str, Tensor]) -> Tensor:
    """One matrix from its parts, as the description says: the integers of its weights [out, in]."""
    out, width = parts["weight_shape"].tolist()
    values, dense = bits(parts["weight_values"]).tolist(), []
    assert len(values) == sum(int(byte).bit_count() for byte in parts["weight_mask"].flatten())
    for row in range(out):
        for column in range(width):
            stays = int(parts["weight_mask"][row, column // 8]) >> column % 8 & 1
            dense.append(values.pop(0) if stays else 0)
    return torch.tensor(dense).view(out, width)


def stay(format: Format, inputs: int) -> int:
    return max(round(format.density * inputs), 1) if format.density else 0


def slow_mask(weights: Tensor, format: Format) -> list[bool]:
    """The mask of one matrix, row by row: what is not zero, then the first zeros of each cell."""
    out, width = weights.shape
    size = format.group_size or out * width
    kept = stay(format, size) if format.group_size else out * stay(format, width)
    flat, mask = [value != 0 for value in weights.flatten().tolist()], []
    for first in range(0, out * width, size):
        cell = flat[first : first + size]
        while sum(cell) < kept:
            cell[cell.index(False)] = True
        mask += cell
    return mask


# What is stored


@quickly
@given(pruned())
def test_what_was_kept_comes_back_bit_for_bit(case: Pruned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer, "SLAB", case.slab)
        parts = encode_sparse(case.weights, case.mask, case.format)
        back = decode_sparse(parts, case.format, case.shape)
    assert back.dtype == case.weights.dtype
    assert torch.equal(bits(back), bits(case.dense))


@quickly
@given(pruned())
def test_a_slow_reader_reads_what_is_stored(case: Pruned):
    parts = encode_sparse(case.weights, case.mask, case.format)
    for number, dense in enumerate(case.dense):
        one = {name: part[number] for name, part in parts.items()}
        assert torch.equal(slow_reader(one), bits(dense).long())
    assert np.array_equal(parts["weight_mask"].numpy(), np.packbits(case.mask.numpy(), -1, bitorder="little"))


@quickly
@given(pruned())
def test_the_price_is_what_is_stored(case: Pruned):
    count, out, width = case.weights.shape
    parts = encode_sparse(case.weights, case.mask, case.format)
    priced = Bitmask().shapes(case.format, out, width, FLOATS[case.weights.dtype])
    stored = {name: (tuple(part.shape), NAMES[part.dtype]) for name, part in parts.items()}
    assert stored == {name: ((count, *shape), dtype) for name, (shape, dtype) in priced.items()}
    assert all(part.is_contiguous() for part in parts.values())
    one = {name: part[0] for name, part in parts.items()}
    data = safetensors.torch.save(one)
    header = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - header == sum(
        math.prod(shape) * DTYPE_BYTES[dtype] for shape, dtype in priced.values()
    )
    loaded = {name: part.unsqueeze(0) for name, part in safetensors.torch.load(data).items()}
    assert torch.equal(bits(decode_sparse(loaded, case.format, case.shape)), bits(case.dense[:1]))


def test_matrices_of_a_stack_are_stored_one_by_one():
    random = torch.Generator().manual_seed(0)
    weights, mask = torch.randn(3, 6, 20, generator=random), any_mask(3, 6, 20, EVERY_OTHER, random)
    stack = encode_sparse(weights, mask, EVERY_OTHER)
    for number in range(3):
        one = slice(number, number + 1)
        alone = encode_sparse(weights[one], mask[one], EVERY_OTHER)
        assert all(torch.equal(alone[name], stack[name][one]) for name in stack)


@pytest.mark.parametrize("format", [EVERY_OTHER, TWO_OF_FOUR])
def test_transposed_matrices_are_stored_as_they_read(format: Format):
    random = torch.Generator().manual_seed(0)
    weights, mask = torch.randn(2, 32, 8, generator=random).mT, any_mask(2, 8, 32, format, random)
    transposed = mask.mT.contiguous().mT
    parts = encode_sparse(weights, transposed, format)
    turned = {name: part.movedim(-1, 0).contiguous().movedim(0, -1) for name, part in parts.items()}
    for each in (parts, turned):
        assert torch.equal(decode_sparse(each, format, (8, 32)), weights * mask)
    assert torch.equal(mask_of(weights * mask, format), mask)


def test_a_threshold_over_a_matrix_by_hand():
    # One row keeps three of ten, the other seven: 3 + 7 = 2 x round(0.5 x 10).
    weights = torch.tensor([[-0.0, 2, 9, 9, 9, 9, 9, 9, 9, 3], [4, 9, 5, 6, 9, 7, 8, 9, 10, 11]])
    weights = weights.unsqueeze(0).bfloat16()
    parts = encode_sparse(weights, weights != 9, EVERY_OTHER)
    assert parts["weight_mask"].tolist() == [[[0b00000011, 0b10], [0b01101101, 0b11]]]
    assert parts["weight_values"].view(torch.int16).tolist()[0][0] == -0x8000
    assert parts["weight_values"].tolist() == [[0, 2, 3, 4, 5, 6, 7, 8, 10, 11]]
    assert parts["weight_shape"].tolist() == [[2, 10]]


def test_two_of_four_by_hand():
    weights = torch.tensor([[[0, 1, 0, 2, 0, 0, 0, 3, 4, 5, 0, 0]]], dtype=torch.float16)
    mask = mask_of(weights, TWO_OF_FOUR)
    parts = encode_sparse(weights, mask, TWO_OF_FOUR)
    assert parts["weight_mask"].tolist() == [[[0b10011010, 0b0011]]]
    assert parts["weight_values"].tolist() == [[1, 2, 0, 3, 4, 5]]


@pytest.mark.parametrize(
    ("density", "group", "width", "kept"),
    [
        (0.5, 4, 12, 6),
        (0.5, 8, 16, 8),
        (0.3, 4, 8, 2),  # 1.2 of four is one
        (0.3, 10, 20, 6),
        (0.5, 0, 12, 6),
        (0.3, 0, 7, 2),
        (0.0, 0, 7, 0),
        (0.01, 0, 7, 1),
        (0.1, 4, 8, 2),
        (1.0, 0, 7, 7),
    ],
)
def test_how_many_stay(density: float, group: int, width: int, kept: int):
    format = Format("sparse", density=density, group_size=group)
    assert kept_in_row(format, width) == kept
    assert kept_count(format, 3, width) == 3 * kept


def test_rows_that_are_not_whole_groups():
    for refused in (
        lambda: Bitmask().shapes(TWO_OF_FOUR, 2, 10, "BF16"),
        lambda: mask_of(torch.zeros(1, 2, 10), TWO_OF_FOUR),
    ):
        with pytest.raises(UserError, match="rows of 10 inputs are not whole groups of 4"):
            refused()


def test_masks_of_another_format_are_our_mistake():
    weights = torch.ones(2, 2, 8)
    mask = weights.cumsum(-1) <= 4
    encode_sparse(weights, mask, EVERY_OTHER)
    with pytest.raises(AssertionError, match="each group keeps its share"):
        encode_sparse(weights, mask, TWO_OF_FOUR)
    mask[1, 0, 0] = False
    mask[0, 0, 7] = True
    with pytest.raises(AssertionError, match="each matrix keeps 8 weights"):
        encode_sparse(weights, mask, EVERY_OTHER)


# The mask of a pruned matrix


@quickly
@given(pruned())
def test_the_mask_of_what_was_pruned(case: Pruned):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer, "SLAB", case.slab)
        mask = mask_of(case.dense, case.format)
    assert mask.dtype == torch.bool
    assert [each.flatten().tolist() for each in mask] == [slow_mask(each, case.format) for each in case.dense]
    back = decode_sparse(encode_sparse(case.dense, mask, case.format), case.format, case.shape)
    assert torch.equal(bits(back[mask]), bits(case.dense[mask]))
    assert bool((case.dense[~mask] == 0).all())
    if case.format.group_size:
        groups = mask.unflatten(-1, (-1, case.format.group_size)).sum(-1)
        assert bool((groups == stay(case.format, case.format.group_size)).all())


def test_products_with_a_mask_leave_zeros_of_both_signs():
    random = torch.Generator().manual_seed(0)
    weights, mask = torch.randn(3, 4, 20, generator=random), any_mask(3, 4, 20, TWO_OF_FOUR, random)
    assert bool((weights * mask).signbit()[~mask].any())
    for format in (EVERY_OTHER, TWO_OF_FOUR):
        assert torch.equal(mask_of(weights * mask, format), mask)


def test_a_matrix_of_zeros_keeps_the_first():
    assert mask_of(torch.zeros(1, 2, 8), TWO_OF_FOUR).int().tolist() == [[[1, 1, 0, 0] * 2] * 2]
    assert mask_of(torch.zeros(1, 2, 6), EVERY_OTHER).int().tolist() == [[[1] * 6, [0] * 6]]


def test_too_many_weights_that_are_not_zero():
    weights = torch.zeros(2, 3, 8)
    weights[1, 2, 4:7] = math.nan
    mask_of(weights, EVERY_OTHER)
    with pytest.raises(UserError, match=r"3 weights of a group of 4 are not zero, .* keeps 2: prune to the"):
        mask_of(weights, TWO_OF_FOUR)
    weights[1] = 1
    with pytest.raises(UserError, match=r"24 weights of a matrix of 3 x 8 are not zero, .* keeps 12: prune"):
        mask_of(weights, EVERY_OTHER)


# Damage


def stored(format: Format, width: int = 20) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return encode_sparse(
        torch.randn(2, 4, width, generator=random), any_mask(2, 4, width, format, random), format
    )


@pytest.mark.parametrize("name", ["weight_values", "weight_mask", "weight_shape"])
@pytest.mark.parametrize("format", [EVERY_OTHER, TWO_OF_FOUR])
def test_parts_that_are_missing_or_misshaped(format: Format, name: str):
    parts = stored(format)
    with pytest.raises(UserError, match=f"a {name} for every matrix, which is missing: fetch the files"):
        decode_sparse({each: parts[each] for each in parts if each != name}, format, (4, 20))
    part = parts[name]
    for wrong in (part[..., :-1], part.flatten(), part.sum(), part[:1], part.to(torch.int32)):
        with pytest.raises(UserError, match=r"is torch\..*check density and group_size"):
            decode_sparse(parts | {name: wrong}, format, (4, 20))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float64])
def test_values_are_floats(dtype: torch.dtype):
    parts = stored(EVERY_OTHER)
    with pytest.raises(UserError, match=f"weight_values is {dtype}"):
        decode_sparse(parts | {"weight_values": parts["weight_values"].to(dtype)}, EVERY_OTHER, (4, 20))


def test_parts_of_another_format_or_shape():
    parts = stored(EVERY_OTHER)
    with pytest.raises(UserError, match=r"weight_values .* check density"):
        decode_sparse(parts, dataclasses.replace(EVERY_OTHER, density=0.25), (4, 20))
    with pytest.raises(UserError, match="does not keep 2 of every 4 weights: fetch the files again"):
        decode_sparse(parts, TWO_OF_FOUR, (4, 20))
    with pytest.raises(UserError, match=r"weight_shape does not say \(4, 21\)"):
        decode_sparse(parts, EVERY_OTHER, (4, 21))


@pytest.mark.parametrize("width", [16, 20])
@pytest.mark.parametrize("format", [EVERY_OTHER, TWO_OF_FOUR])
def test_every_bit_of_the_mask_counts(format: Format, width: int):
    parts = stored(format, width)
    for place in range(parts["weight_mask"].numel()):
        for bit in range(8):
            mask = parts["weight_mask"].clone()
            mask.view(-1)[place] ^= 1 << bit
            with pytest.raises(UserError, match=r"^weight_mask marks .*: fetch the files again$"):
                decode_sparse(parts | {"weight_mask": mask}, format, (4, width))


def test_weights_that_moved():
    # Each pair of changes leaves the number of bits as it was: into the next matrix, past the row, into the next group.
    weights = torch.ones(2, 2, 12)
    parts = encode_sparse(weights, mask_of(torch.zeros(2, 2, 12), TWO_OF_FOUR), TWO_OF_FOUR)
    assert parts["weight_mask"][0, 0].tolist() == [0b00110011, 0b0011]
    for changed, message in (
        ({(0, 0, 0): 0b00110001, (1, 0, 0): 0b00110111}, "marks 11 weights for 12 values"),
        ({(0, 0, 0): 0b00110001, (0, 0, 1): 0b00010011}, "marks 11 weights for 12 values"),
        ({(0, 0, 0): 0b01110001}, "does not keep 2 of every 4"),
        ({(0, 0, 1): 0b00010011}, "past the 12 of a row"),
    ):
        mask = parts["weight_mask"].clone()
        for place, byte in changed.items():
            mask[place] = byte
        with pytest.raises(UserError, match=message):
            decode_sparse(parts | {"weight_mask": mask}, TWO_OF_FOUR, (2, 12))
