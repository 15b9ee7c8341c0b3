"""Small values in 32-bit words: the two orders that stored integer matrices know.

*End to end* (compressed-tensors, GPTQ): value j takes the bits from j x bits on, counted from the lowest bit
of the first word, and goes over the border of a word where 3 bits meet one. *Interleaved* (AWQ): a word holds
eight 4-bit values of neighbouring outputs, the even ones before the odd ones, which is the order its kernels
split them in.

Both are done on bytes, of which a 32-bit word is four, the lowest first: no value is widened to 32 bits, so a
whole layer of experts takes little more memory than its values. Values must be below 2^bits; nothing here
checks them.

Shapes: n values, in so many words; `*rows` are any leading axes, `out` outputs, `blocks` of eight outputs.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int32, Shaped, UInt8
from torch import Tensor
from torch.nn.functional import pad

# The outputs of a block of eight, from the lowest four bits of an AWQ word to the highest.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_words(values: UInt8[Tensor, "*rows n"], bits: int) -> Int32[Tensor, "*rows words"]:
    """Pack end to end along the last dimension: into ceil(n x bits / 32) words, the rest zero bits."""
    count = values.shape[-1]
    whole = pad(values, (0, -count % 32)) if count % 32 else values  # padding by nothing copies, too
    blocks = whole.view(*whole.shape[:-1], -1, _period(bits))
    packed = torch.stack([_byte(blocks, bits, number) for number in range(_period(bits) * bits // 8)], -1)
    words = packed.flatten(-2).view(torch.int32)
    return words[..., : -(-count * bits // 32)].contiguous()


def unpack_words(words: Int32[Tensor, "*rows words"], bits: int, count: int) -> UInt8[Tensor, "*rows n"]:
    """Undo `pack_words`: the first `count` values."""
    # Three bits: three words are the shortest run of words that ends with a value.
    lacking = -words.shape[-1] % (bits // math.gcd(bits, 32))
    whole = plain(pad(words, (0, lacking)) if lacking else words)
    packed = whole.view(torch.uint8).view(*whole.shape[:-1], -1, _period(bits) * bits // 8)
    values = packed.new_empty(*packed.shape[:-1], _period(bits))
    for number in range(_period(bits)):
        byte, shift = divmod(number * bits, 8)
        low = packed[..., byte] >> shift
        if shift + bits > 8:
            low |= packed[..., byte + 1] << (8 - shift)
        torch.bitwise_and(low, (1 << bits) - 1, out=values[..., number])
    return values.flatten(-2)[..., :count].contiguous()


def pack_interleaved(values: UInt8[Tensor, "*rows out n"]) -> Int32[Tensor, "*rows n out//8"]:
    """Pack 4-bit values as AWQ does. `out` is a multiple of 8."""
    blocks = values.view(*values.shape[:-2], -1, 8, values.shape[-1])
    pairs = zip(AWQ_ORDER[::2], AWQ_ORDER[1::2], strict=True)
    packed = [blocks[..., low, :] | (blocks[..., high, :] << 4) for low, high in pairs]
    return plain(torch.stack(packed, -1).view(torch.int32).squeeze(-1).mT)


def unpack_interleaved(words: Int32[Tensor, "*rows n blocks"]) -> UInt8[Tensor, "*rows 8*blocks n"]:
    """Undo `pack_interleaved`."""
    packed = plain(words.mT).unsqueeze(-1).view(torch.uint8)
    values = packed.new_empty(*packed.shape[:-2], 8, packed.shape[-2])
    for nibble, output in enumerate(AWQ_ORDER):
        byte, high = divmod(nibble, 2)
        torch.bitwise_and(packed[..., byte] >> 4 * high, 15, out=values[..., output, :])
    return values.flatten(-3, -2)


def plain(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """A copy that lies in memory as its shape says.

    `contiguous` leaves a dimension of one element its stride, which then forbids to view words as bytes.
    """
    return tensor.clone(memory_format=torch.contiguous_format)


def _period(bits: int) -> int:
    """The number of values after which the end of a value is the end of a byte again."""
    return math.lcm(bits, 8) // bits


def _byte(blocks: UInt8[Tensor, "*rows period"], bits: int, number: int) -> UInt8[Tensor, "*rows"]:
    """Byte `number` of every block of values that are laid end to end."""
    first, last = number * 8 // bits, (number * 8 + 7) // bits
    byte = _shifted(blocks[..., first], first * bits - number * 8)
    for each in range(first + 1, last + 1):
        byte |= _shifted(blocks[..., each], each * bits - number * 8)
    return byte


def _shifted(values: UInt8[Tensor, "*rows"], by: int) -> UInt8[Tensor, "*rows"]:
    """Values moved up by so many bits (down where negative); what leaves the byte is lost."""
    return values << by if by >= 0 else values >> -by
