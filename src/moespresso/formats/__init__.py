"""Numbers: how a matrix is encoded, decoded and stored. Pure functions on tensors; no file is seen here."""

from moespresso.formats.grids import Grid, chosen, loss, minmax, raised, searched, spanned, stored
from moespresso.formats.integer import SLAB, Codes, decode, encode, in_groups, levels, slabs, spread
from moespresso.formats.layouts import SMALL_PARTS, check_small, decode_parts, encode_parts
from moespresso.formats.packing import pack_interleaved, pack_words, unpack_interleaved, unpack_words
from moespresso.formats.plain import based, decode_plain, encode_plain, product
from moespresso.formats.rounding import Scales, round_nearest, unbias

__all__ = [
    "SLAB",
    "SMALL_PARTS",
    "Codes",
    "Grid",
    "Scales",
    "based",
    "check_small",
    "chosen",
    "decode",
    "decode_parts",
    "decode_plain",
    "encode",
    "encode_parts",
    "encode_plain",
    "in_groups",
    "levels",
    "loss",
    "minmax",
    "pack_interleaved",
    "pack_words",
    "product",
    "raised",
    "round_nearest",
    "searched",
    "slabs",
    "spanned",
    "spread",
    "stored",
    "unbias",
    "unpack_interleaved",
    "unpack_words",
]
