"""Numbers: how a matrix is encoded, decoded and stored. Pure functions on tensors; no file is seen here."""

from moespresso.formats.grids import minmax, searched
from moespresso.formats.integer import Codes, decode, encode, in_groups, levels, spread
from moespresso.formats.layouts import SMALL_PARTS, check_small, decode_parts, encode_parts
from moespresso.formats.packing import pack_interleaved, pack_words, unpack_interleaved, unpack_words
from moespresso.formats.plain import based, decode_plain, encode_plain, product
from moespresso.formats.rounding import Scales, round_nearest, unbias

__all__ = [
    "SMALL_PARTS", "Codes", "Scales", "based", "check_small", "decode", "decode_parts", "decode_plain", "encode", "encode_parts", "encode_plain", "in_groups", "levels", "minmax",
    "pack_interleaved", "pack_words", "product", "round_nearest", "searched", "spread", "unbias", "unpack_interleaved", "unpack_words",
]  # fmt: skip
