"""Stored integer matrices mean what we say they mean, to every reader.

compressed-tensors is held against its own library. GPTQ and AWQ are read by slow readers written here from the formats'
descriptions, one value at a time in plain Python numbers; and one tiny matrix per layout is written down by hand.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats import (
    IntegerLayout,
    Parts,
    QuantizedWeights,
    check_group,
    codec_named,
    codecs,
    decode,
    encode,
    spread,
)
from moespresso.formats.packing import pack_interleaved, pack_words, unpack_interleaved, unpack_words

quickly = settings(max_examples=60, deadline=None, derandomize=True, database=None)
LAYOUTS = {held.layout: held for held in codecs() if isinstance(held, IntegerLayout)}
every_layout = pytest.mark.parametrize("layout", sorted(LAYOUTS))
DTYPES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
}
SCALES = (torch.float16, torch.bfloat16, torch.float32)


def encode_parts(layout: str, codes: QuantizedWeights) -> dict[str, Tensor]:
    return codec_named(layout).encode(codes, codes.format)


def decode_parts(layout: str, parts: Parts, format: Format, shape: tuple[int, int]) -> QuantizedWeights:
    return codec_named(layout).numbers(parts, format, shape)


def random_codes(
    format: Format, count: int, out: int, width: int, scale: torch.dtype, seed: int, lowest_zero: int = 0
) -> QuantizedWeights:
    """Codes with every value of the grid, and scales that float16 holds exactly."""
    random = torch.Generator().manual_seed(seed)
    top, groups = 1 << format.bits, width // (format.group_size or width)
    values = torch.randint(top, (count, out, width), dtype=torch.uint8, generator=random)
    zero = torch.randint(lowest_zero, top, (count, out, groups), dtype=torch.uint8, generator=random)
    if format.symmetric:
        zero.fill_(top // 2)
    steps = torch.randint(1, 128, (count, out, groups), generator=random)
    return QuantizedWeights(format, values, (steps / 1024).to(scale), zero)


@st.composite
def stored_codes(draw: st.DrawFn, layout: str) -> QuantizedWeights:
    """Codes of every shape that `layout` holds, down to one row, one group and odd widths."""
    bits = draw(st.sampled_from(LAYOUTS[layout].bits))
    whole = 32 // math.gcd(32, bits)
    out_step, in_step = {"compressed-tensors": (1, 1), "gptq": (whole, whole), "awq": (8, 1)}[layout]
    out = draw(st.integers(1, 40 // out_step)) * out_step
    group = draw(st.sampled_from((0, 1, 3, 4, 8, 16, 32, 64)))
    width = draw(st.integers(1, max(1, 80 // math.lcm(group or 1, in_step)))) * math.lcm(group or 1, in_step)
    format = Format("integer", bits, group, symmetric=draw(st.booleans()))
    scale = draw(st.sampled_from(SCALES)) if layout == "compressed-tensors" else torch.float16
    seed = draw(st.integers(0, 1 << 30))
    return random_codes(format, draw(st.integers(1, 3)), out, width, scale, seed, int(layout == "gptq"))


def assert_same(ours: QuantizedWeights, theirs: QuantizedWeights) -> None:
    assert ours.format == theirs.format
    for field in ("values", "scale", "zero"):
        a, b = getattr(ours, field), getattr(theirs, field)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), field


# Every layout


@every_layout
def test_what_was_stored_comes_back(layout: str):
    @quickly
    @given(stored_codes(layout))
    def check(codes: QuantizedWeights) -> None:
        count, *shape = codes.values.shape
        parts = encode_parts(layout, codes)
        expected = LAYOUTS[layout].shapes(codes.format, *shape, DTYPES[codes.scale.dtype])
        stored = {name: (tuple(part.shape), DTYPES[part.dtype]) for name, part in parts.items()}
        assert stored == {name: ((count, *each), dtype) for name, (each, dtype) in expected.items()}
        for part in parts.values():
            part.view(torch.uint8)  # as a file takes it
        parts = {name: torch.empty(part.shape, dtype=part.dtype).copy_(part) for name, part in parts.items()}
        assert_same(decode_parts(layout, parts, codes.format, (shape[0], shape[1])), codes)

    check()


@every_layout
def test_matrices_of_a_stack_are_stored_one_by_one(layout: str):
    codes = random_codes(
        Format("integer", 4, 16, symmetric=False), 3, 32, 64, torch.float16, 1, lowest_zero=1
    )
    stack = encode_parts(layout, codes)
    for number in range(3):
        one = slice(number, number + 1)
        alone = encode_parts(
            layout, QuantizedWeights(codes.format, codes.values[one], codes.scale[one], codes.zero[one])
        )
        assert all(torch.equal(alone[name], stack[name][one]) for name in stack)


# Words


@quickly
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 70), st.integers(0, 1 << 30))
def test_words_are_those_of_the_library(bits: int, rows: int, count: int, seed: int):
    values = torch.randint(
        1 << bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    signed = (values.to(torch.int16) - (1 << bits - 1)).to(torch.int8)
    words = pack_words(values, bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(words.mT, pack_to_int32(signed.mT, bits, packed_dim=0))
    assert torch.equal(unpack_words(words, bits, count), values)
    assert torch.equal(unpack_from_int32(words, bits, signed.shape), signed)


@quickly
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 1 << 30))
def test_interleaved_words_come_back(blocks: int, columns: int, seed: int):
    random = torch.Generator().manual_seed(seed)
    values = torch.randint(16, (2, 8 * blocks, columns), dtype=torch.uint8, generator=random)
    words = pack_interleaved(values)
    assert words.shape == (2, columns, blocks)
    assert torch.equal(unpack_interleaved(words), values)


# compressed-tensors, by its own library


def library_weights(codes: QuantizedWeights, parts: dict[str, Tensor]) -> Tensor:
    format = codes.format
    arguments: dict[str, Any] = {"num_bits": format.bits, "type": "int", "symmetric": format.symmetric}
    arguments |= (
        {"strategy": "group", "group_size": format.group_size}
        if format.group_size
        else {"strategy": "channel"}
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    assert set(parts) == set(PackedQuantizationCompressor.compression_param_names(scheme))
    each = [{name: part[n] for name, part in parts.items()} for n in range(len(codes.values))]
    return torch.stack([PackedQuantizationCompressor.decompress(one, scheme)["weight"] for one in each])


@quickly
@given(stored_codes("compressed-tensors"))
def test_the_library_reads_what_we_store(codes: QuantizedWeights):
    # Its 0.20 cannot view a single row of packed zeros as bytes.
    assume(codes.format.symmetric or codes.values.shape[1] * codes.format.bits > 32)
    weights = library_weights(codes, encode_parts("compressed-tensors", codes))
    ours = decode(codes)
    assert weights.dtype == ours.dtype == codes.scale.dtype
    assert torch.equal(weights, ours)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_library_stores_what_we_store(bits: int, group: int, symmetric: bool, scale: torch.dtype):
    codes = random_codes(Format("integer", bits, group, symmetric), 2, 24, 96, scale, bits)
    parts = encode_parts("compressed-tensors", codes)
    assert torch.equal(library_weights(codes, parts), decode(codes))
    middle = 1 << bits - 1
    signed = (codes.values.to(torch.int16) - middle).to(torch.int8)
    assert torch.equal(parts["weight_packed"], pack_to_int32(signed, bits))
    if not symmetric:
        zero = (codes.zero.to(torch.int16) - middle).to(torch.int8)
        assert torch.equal(parts["weight_zero_point"], pack_to_int32(zero, bits, packed_dim=0))


# GPTQ and AWQ, by slow readers


def unsigned(word: Tensor) -> int:
    return int(word) & 0xFFFFFFFF


def gptq_value(words: Tensor, bits: int, index: int) -> int:
    """Value `index` of a line of GPTQ words, as the format describes it."""
    if bits != 3:
        word, place = divmod(index, 32 // bits)
        return unsigned(words[word]) >> bits * place & (1 << bits) - 1
    # 32 values lie in three words: ten, the eleventh split 2 + 1, ten, the 22nd split 1 + 2, ten.
    run, place = divmod(index, 32)
    first, second, third = (unsigned(word) for word in words[3 * run : 3 * run + 3])
    if place < 10:
        return first >> 3 * place & 7
    if place == 10:
        return first >> 30 | (second & 1) << 2
    if place < 21:
        return second >> 1 + 3 * (place - 11) & 7
    if place == 21:
        return second >> 31 | (third & 3) << 1
    return third >> 2 + 3 * (place - 22) & 7


def gptq_weights(parts: dict[str, Tensor], bits: int, out: int, width: int) -> Tensor:
    """One matrix [out, in] from its GPTQ parts."""
    weights = torch.empty(out, width, dtype=torch.float16)
    for row in range(out):
        for column in range(width):
            group = int(parts["g_idx"][column])
            zero = gptq_value(parts["qzeros"][group], bits, row) + 1
            value = gptq_value(parts["qweight"][:, row], bits, column)
            weights[row, column] = (value - zero) * parts["scales"][group, row]
    return weights


def awq_value(words: Tensor, index: int) -> int:
    """Value `index` of a line of AWQ words: nibbles from the lowest hold values 0 2 4 6 1 3 5 7 of eight."""
    word, place = divmod(index, 8)
    return unsigned(words[word]) >> 4 * [0, 2, 4, 6, 1, 3, 5, 7].index(place) & 15


def awq_weights(parts: dict[str, Tensor], group_size: int, out: int, width: int) -> Tensor:
    """One matrix [out, in] from its AWQ parts."""
    weights = torch.empty(out, width, dtype=torch.float16)
    for row in range(out):
        for column in range(width):
            group = column // group_size if group_size else 0
            steps = awq_value(parts["qweight"][column], row) - awq_value(parts["qzeros"][group], row)
            weights[row, column] = steps * parts["scales"][group, row]
    return weights


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_slow_reader_reads_gptq(bits: int, group: int, symmetric: bool):
    codes = random_codes(
        Format("integer", bits, group, symmetric), 2, 32, 64, torch.float16, bits, lowest_zero=1
    )
    parts = encode_parts("gptq", codes)
    for number, weights in enumerate(decode(codes)):
        one = {name: part[number] for name, part in parts.items()}
        assert torch.equal(gptq_weights(one, bits, 32, 64), weights)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 3, 32])
def test_a_slow_reader_reads_awq(group: int, symmetric: bool):
    codes = random_codes(Format("integer", 4, group, symmetric), 2, 24, 96, torch.float16, group)
    parts = encode_parts("awq", codes)
    for number, weights in enumerate(decode(codes)):
        one = {name: part[number] for name, part in parts.items()}
        assert torch.equal(awq_weights(one, group, 24, 96), weights)


# By hand


def in_hex(part: Tensor) -> str:
    """The bytes of a part as they lie in a file."""
    return (
        part.contiguous().view(torch.uint8).numpy().tobytes().hex(" ", 4 if part.dtype == torch.int32 else 2)
    )


def test_compressed_tensors_by_hand():
    # One row of eleven 3-bit values. The eleventh, 5 = 101 in bits, lies across the border: 01 above, 1 below.
    values = torch.tensor([[[7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 5]]], dtype=torch.uint8)
    zero = torch.tensor([[[6]]], dtype=torch.uint8)
    half = torch.tensor([[[0.5]]], dtype=torch.bfloat16)
    parts = encode_parts(
        "compressed-tensors", QuantizedWeights(Format("integer", 3, symmetric=False), values, half, zero)
    )
    # 0x40000007 + (1 << 27), then 1
    assert in_hex(parts["weight_packed"]) == "07000048 01000000"
    assert in_hex(parts["weight_zero_point"]) == "06000000"
    assert in_hex(parts["weight_scale"]) == "003f"
    assert parts["weight_shape"].tolist() == [[1, 11]]


def test_gptq_by_hand():
    # Output 0 counts up, output 7 is all fifteen; the others are zero. Zeros 8 are stored as 7, and zero 1 as 0.
    values = torch.zeros(1, 8, 8, dtype=torch.uint8)
    values[0, 0] = torch.arange(8)
    values[0, 7] = 15
    zero = torch.tensor([8, 8, 8, 8, 8, 8, 8, 1], dtype=torch.uint8).view(1, 8, 1)
    scale = torch.ones(1, 8, 1, dtype=torch.float16)
    parts = encode_parts(
        "gptq", QuantizedWeights(Format("integer", 4, 8, symmetric=False), values, scale, zero)
    )
    assert in_hex(parts["qweight"]) == " ".join(["10325476", *["00000000"] * 6, "ffffffff"])
    assert in_hex(parts["qzeros"]) == "77777707"
    assert in_hex(parts["scales"]) == " ".join(["003c"] * 8)
    assert in_hex(parts["g_idx"]) == " ".join(["00000000"] * 8)


def test_awq_by_hand():
    # One input, eight outputs that hold their own number: the word is 0x75316420.
    values = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    codes = QuantizedWeights(
        Format("integer", 4), values, torch.ones(1, 8, 1, dtype=torch.float16), torch.full_like(values, 8)
    )
    parts = encode_parts("awq", codes)
    assert in_hex(parts["qweight"]) == "20643175"
    assert in_hex(parts["qzeros"]) == "88888888"
    assert in_hex(parts["scales"]) == " ".join(["003c"] * 8)


# What does not fit


@pytest.mark.parametrize(
    ("layout", "format", "out", "width", "cure"),
    [
        ("awq", Format("integer", 3, 32), 32, 64, "use bits=4, or the layout compressed-tensors"),
        ("awq", Format("integer", 4, 32), 12, 64, "12 outputs .* use the layout compressed-tensors"),
        ("gptq", Format("integer", 4, 32), 36, 64, "36 outputs .* use the layout compressed-tensors"),
        ("gptq", Format("integer", 4), 32, 36, "36 inputs .* use the layout compressed-tensors"),
        ("gptq", Format("integer", 3), 32, 48, "packs 3-bit values by 32"),
        ("gptq", Format("integer", 5), 32, 64, "use bits=2 or bits=3 or bits=4 or bits=8, or the layout"),
        ("compressed-tensors", Format("integer", 5), 32, 64, "integers of 2, 3, 4 or 8 bits are$"),
        ("compressed-tensors", Format("integer", 4, 48), 32, 64, "32 x 64 has 64 inputs.*use group_size=64"),
    ],
)
def test_what_a_layout_cannot_hold(layout: str, format: Format, out: int, width: int, cure: str):
    with pytest.raises(UserError, match=cure):
        LAYOUTS[layout].shapes(format, out, width, "BF16")
    groups = max(1, width // (format.group_size or width))
    zero = torch.full((1, out, groups), 1 << format.bits - 1, dtype=torch.uint8)
    codes = QuantizedWeights(
        format, torch.zeros(1, out, width, dtype=torch.uint8), torch.ones(zero.shape), zero
    )
    with pytest.raises(UserError, match=cure):
        encode_parts(layout, codes)


@pytest.mark.parametrize("layout", ["gptq", "awq"])
@pytest.mark.parametrize("scale", [1e5, 1e-9, math.inf, math.nan])
def test_scales_that_float16_loses(layout: str, scale: float):
    codes = random_codes(Format("integer", 4, 32), 1, 8, 32, torch.float32, 0)
    codes.scale[0, 3] = scale
    with pytest.raises(UserError, match=r"outside float16.*use the layout compressed-tensors"):
        encode_parts(layout, codes)


@pytest.mark.parametrize("layout", ["gptq", "awq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_scales_become_float16(layout: str, dtype: torch.dtype):
    codes = random_codes(Format("integer", 4, 32), 1, 8, 64, dtype, 0)
    codes.scale[0, 0, 0] = 0  # a group of zeros is no loss
    back = decode_parts(layout, encode_parts(layout, codes), codes.format, (8, 64))
    assert back.scale.dtype == torch.float16
    assert torch.equal(back.scale.to(dtype), codes.scale)


def test_gptq_has_no_zero_of_0():
    codes = random_codes(Format("integer", 4, 32, symmetric=False), 1, 8, 32, torch.float16, 0)
    codes.zero[0, 5] = 0
    with pytest.raises(UserError, match="zero of 0: use the layout compressed-tensors, or symmetric=true"):
        encode_parts("gptq", codes)


def test_a_symmetric_zero_is_in_the_middle():
    codes = random_codes(Format("integer", 4, 32), 1, 8, 32, torch.float16, 0)
    codes.zero[0, 5] = 7
    with pytest.raises(AssertionError, match="zero in the middle"):
        encode_parts("compressed-tensors", codes)


@every_layout
def test_parts_of_another_matrix_are_refused(layout: str):
    codes = random_codes(Format("integer", 4, 32), 2, 16, 64, torch.float16, 0)
    parts = encode_parts(layout, codes)
    with pytest.raises(UserError, match="check bits and group_size"):
        decode_parts(layout, parts, dataclasses.replace(codes.format, group_size=16), (16, 64))
    packed = next(name for name in parts if name in ("weight_packed", "qweight"))
    with pytest.raises(UserError, match=f"a {packed} for every matrix, which is missing"):
        decode_parts(layout, {name: parts[name] for name in parts if name != packed}, codes.format, (16, 64))
    with pytest.raises(UserError, match=f"{packed} is torch.int64"):
        decode_parts(layout, parts | {packed: parts[packed].long()}, codes.format, (16, 64))


def test_a_width_that_only_weight_shape_tells_apart():
    codes = random_codes(Format("integer", 4), 2, 16, 63, torch.float16, 0)
    with pytest.raises(UserError, match="weight_shape does not say"):
        decode_parts("compressed-tensors", encode_parts("compressed-tensors", codes), codes.format, (16, 64))


def test_gptq_by_others_that_we_cannot_read():
    codes = random_codes(Format("integer", 4, 32), 1, 8, 64, torch.float16, 0)
    parts = encode_parts("gptq", codes)
    with pytest.raises(UserError, match="act-order"):
        decode_parts("gptq", parts | {"g_idx": parts["g_idx"].flip(-1)}, codes.format, (8, 64))
    with pytest.raises(UserError, match="readers of gptq do not agree"):
        decode_parts("gptq", parts | {"qzeros": torch.full_like(parts["qzeros"], -1)}, codes.format, (8, 64))


# Encoding


@pytest.mark.parametrize(
    ("width", "size", "cure"),
    [
        (192, 128, "use group_size=64"),
        (24, 16, "use group_size=8"),
        (9, 4, r"use group_size=0 \(one scale per"),
    ],
)
def test_groups_that_do_not_divide(width: int, size: int, cure: str):
    with pytest.raises(UserError, match=f"up_proj has {width} inputs, which groups of {size} .*{cure}"):
        check_group(width, Format("integer", 4, size), "up_proj")


def test_groups_that_divide():
    check_group(9, Format("integer", 4, 3), "up_proj")
    check_group(9, Format("integer", 4), "up_proj")


@quickly
@given(
    st.sampled_from((2, 3, 4, 8)),
    st.sampled_from((0, 8, 16)),
    st.booleans(),
    st.sampled_from(SCALES),
    st.data(),
)
def test_encoding_rounds_to_the_nearest_value(
    bits: int, group: int, symmetric: bool, dtype: torch.dtype, data: st.DataObject
):
    seed = data.draw(st.integers(0, 1 << 30))
    grid = random_codes(Format("integer", bits, group, symmetric), 2, 4, 32, dtype, seed)
    weights = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(seed)) * 0.3
    codes = encode(weights, grid.scale, grid.zero, grid.format)
    assert codes.values.dtype == torch.uint8
    assert int(codes.values.max()) < 1 << bits
    # All values of the grid [.., 2^bits]: none is nearer than the one taken.
    scale, zero = spread(grid.scale, 32).double(), spread(grid.zero, 32).double()
    every = (torch.arange(1 << bits) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
    chosen = (codes.values - zero) * scale
    error = (chosen - weights.double()).abs()
    nearest = (every - weights.double().unsqueeze(-1)).abs().amin(-1)
    rounding = 1e-4 * scale  # of float32, where a weight is halfway
    assert bool((error <= nearest + rounding).all())
    inside = (weights >= every[..., 0]) & (weights <= every[..., -1])
    assert bool((error <= scale / 2 + rounding)[inside].all())
    assert bool((codes.values[weights < every[..., 0]] == 0).all())
    assert bool((codes.values[weights > every[..., -1]] == (1 << bits) - 1).all())


@quickly
@given(stored_codes("compressed-tensors"))
def test_decoded_weights_encode_to_the_same_codes(codes: QuantizedWeights):
    assume(
        codes.format.bits < 8 or codes.scale.dtype != torch.bfloat16
    )  # 8 bits x 8 bits: bfloat16 rounds products
    assert_same(encode(decode(codes), codes.scale, codes.zero, codes.format), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_formats_keep_zero(bits: int):
    format = Format("integer", bits, 8)
    zero = torch.full((1, 2, 2), 1 << bits - 1, dtype=torch.uint8)
    codes = encode(torch.zeros(1, 2, 16), torch.rand(zero.shape) + 0.1, zero, format)
    assert bool((codes.values == 1 << bits - 1).all())
    assert bool((decode(codes) == 0).all())
