"""Numbers: how a matrix is encoded, decoded and stored. Pure functions on tensors; no file is seen here."""

from moespresso.formats.awq import AwqLayout
from moespresso.formats.bases import Bases, Mixture, based
from moespresso.formats.bitmask import Bitmask
from moespresso.formats.codec import (
    FLOATS,
    Codec,
    Obstacle,
    Parts,
    Shapes,
    codec,
    codec_in,
    codec_named,
    codec_of,
    codecs,
    pack,
    times,
)
from moespresso.formats.compressed_tensors import CompressedTensors
from moespresso.formats.factors import Factors, Pair, product
from moespresso.formats.fp8 import Blocks, Fp8Blocks
from moespresso.formats.gptq import GptqLayout
from moespresso.formats.grids import Grid, Search, chosen, loss, minmax, raised, searched, spanned, stored
from moespresso.formats.integer import (
    SLAB,
    QuantizedWeights,
    decode,
    encode,
    in_groups,
    levels,
    slabs,
    spread,
)
from moespresso.formats.integer_layout import IntegerLayout
from moespresso.formats.pattern import check_group, check_pattern, kept_in_row, staying
from moespresso.formats.rounding import Scales, round_nearest, unbias
from moespresso.formats.slices import Slices
from moespresso.formats.source import Plain

__all__ = [
    "FLOATS",
    "SLAB",
    "AwqLayout",
    "Bases",
    "Bitmask",
    "Blocks",
    "Codec",
    "CompressedTensors",
    "Factors",
    "Fp8Blocks",
    "GptqLayout",
    "Grid",
    "IntegerLayout",
    "Mixture",
    "Obstacle",
    "Pair",
    "Parts",
    "Plain",
    "QuantizedWeights",
    "Scales",
    "Search",
    "Shapes",
    "Slices",
    "based",
    "check_group",
    "check_pattern",
    "chosen",
    "codec",
    "codec_in",
    "codec_named",
    "codec_of",
    "codecs",
    "decode",
    "encode",
    "in_groups",
    "kept_in_row",
    "levels",
    "loss",
    "minmax",
    "pack",
    "product",
    "raised",
    "round_nearest",
    "searched",
    "slabs",
    "spanned",
    "spread",
    "staying",
    "stored",
    "times",
    "unbias",
]  # fmt: skip
