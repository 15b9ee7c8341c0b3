"""Checkpoints whose matrices are stored packed: several tensors on disk are one matrix to everybody else.

Three layouts are understood, with integers of 2 to 8 bits and scales per group or channel:
compressed-tensors' `pack-quantized`, in which `config.json` says by regular expressions which modules have
how many bits, and those of GPTQ and AWQ, which have one format for all (`section` reads what it says). Those
whose codec reads its own section, such as FP8 by blocks, need nothing here.
`joined` replaces the tensors of each matrix by one reference with the shape and dtype of what it decodes to,
and refuses tensors beside them that it does not know; `packing_config` writes the section of `config.json`
again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moespresso.checkpoint.files import read_json
from moespresso.checkpoint.section import AUTOAWQ, KIND, METHOD, OWN_KIND, SECTION, read_section
from moespresso.core.blueprint import Packed, TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats import FLOATS, Codec, codec_named, codec_of, codecs, pack

# Where AutoGPTQ and AutoAWQ keep what they did.
_TOOLS_OWN = ("quantize_config.json", "quant_config.json")

# Ends of the names of tensors that belong to packed matrices in ways that no codec here has.
_FOREIGN = frozenset(
    {"weight_global_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "input_zero_point", "input_global_scale",
     "input_g_idx", "output_scale", "output_zero_point", "output_global_scale", "q_scale", "k_scale", "v_scale", "kv_scale",
     "k_zero_point", "v_zero_point", "k_global_scale", "v_global_scale", "q_zero_point", "channel_scale"}
)  # fmt: skip


def joined(config: Mapping[str, Any], tensors: Mapping[str, TensorRef], folder: Path) -> dict[str, TensorRef]:
    """`tensors` with the parts of every packed matrix as one reference; raises `UserError` where they do not
    fit, and for every tensor beside them that is not understood."""
    place = str(folder)
    section = read_section(config, place)
    if section is None:
        _check_plain(tensors, folder)
        return dict(tensors)
    known = [codec_named(section.layout), *(codec for codec in codecs() if codec.own and section.own)]
    firsts = {codec.parts[0]: codec for codec in known}
    stems = {
        stem: firsts[suffix]
        for stem, _, suffix in (name.rpartition(".") for name in tensors)
        if suffix in firsts
    }
    if not stems:
        raise UserError(
            f"{place} is already quantized ({section.method}), says the {SECTION} of its config.json, but none of its tensors "
            f"is packed: give the unquantized checkpoint, or take {SECTION} out where these are its weights"
        )
    shared = _shared_parts(tensors, place)
    joined_refs: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        stem, _, suffix = name.rpartition(".")
        codec = stems.get(stem)
        if codec is None or suffix not in codec.parts:
            _check_beside(name, stems, place)
            _check_whole(ref, place)
            joined_refs[name] = ref
        elif suffix == codec.parts[0]:
            format = section.format_of(stem)
            if codec.own and codec is not codec_of(format):
                raise UserError(
                    f"{place}: {stem} is stored as {codec.layout}, and config.json's {SECTION} says {format.kind}: press the model again"
                )
            parts = _parts_of(stem, tensors, shared, codec)
            joined_refs[f"{stem}.weight"] = _packed_ref(stem, parts, format, codec, folder)
    return joined_refs


def _check_plain(tensors: Mapping[str, TensorRef], folder: Path) -> None:
    """A config that says nothing of packed matrices must have none."""
    for ref in tensors.values():
        _check_whole(ref, str(folder))
    odd = next((name for name in tensors if name.endswith((".weight_packed", ".qweight"))), None)
    if odd is not None:
        raise UserError(
            f"{folder}: {odd} is packed, but config.json has no {SECTION} that says how: {_to_add(odd, tensors, folder)}, or give "
            "the unquantized checkpoint"
        )


def _to_add(odd: str, tensors: Mapping[str, TensorRef], folder: Path) -> str:
    """How a config gets its section: of the tool's own file where that is there, with the names that
    config.json uses."""
    if odd.endswith(".weight_packed"):
        return "download its config.json again"
    method = "gptq" if any(name.endswith(".g_idx") for name in tensors) else "awq"
    file = next((name for name in _TOOLS_OWN if (folder / name).is_file()), None)
    if file is None:
        more = (
            '"sym": SYM, "desc_act": DESC_ACT'
            if method == "gptq"
            else '"zero_point": ZERO_POINT, "version": "gemm"'
        )
        return (
            f'add "{SECTION}": {{"quant_method": "{method}", "bits": BITS, "group_size": SIZE, {more}}} with the values that its '
            "tool was given"
        )
    section = {
        AUTOAWQ.get(key, key): value for key, value in read_json(folder / file).items() if value is not None
    }
    return f'add "{SECTION}": {json.dumps({"quant_method": method} | section)} (what {file} says, in the names of config.json)'


def _check_whole(ref: TensorRef, place: str) -> None:
    """A tensor that is no part of a packed matrix must be one by itself, which floats of eight bits are
    not."""
    if ref.dtype.startswith("F8_"):
        raise UserError(
            f"{place}: {ref.name} holds floats of eight bits without the scales (weight_scale_inv) or the {SECTION} of "
            "config.json that say what they stand for: download the checkpoint again"
        )


def _check_beside(name: str, stems: Mapping[str, Codec], place: str) -> None:
    """A tensor that is no part of a packed matrix must be none that changes what such matrices compute."""
    stem, _, suffix = name.rpartition(".")
    inside = stem if stem in stems else next((above for above in _above(stem) if above in stems), None)
    if (inside is not None and (inside, suffix) != (stem, "bias")) or suffix in _packed_suffixes():
        what = (
            f"of the packed {inside}" if inside is not None else f"as packed checkpoints have it ({suffix})"
        )
        raise UserError(
            f"{place}: {name} is a tensor {what}, of which this version does not know what it does to values: give the unquantized "
            "checkpoint, or one packed without it"
        )


def _packed_suffixes() -> frozenset[str]:
    """Ends of the names of tensors that belong to packed matrices, or to what is computed with them."""
    suffixes = (suffix for codec in codecs() if codec.packs for suffix in codec.parts)
    return _FOREIGN.union(suffixes) - {"weight"}


def _above(module: str) -> Iterator[str]:
    """The modules that a module is in, inner ones first."""
    while module := module.rpartition(".")[0]:
        yield module


def _shared_parts(tensors: Mapping[str, TensorRef], place: str) -> dict[str, TensorRef]:
    """What experts share, by its name without the number of the one that stores it; raises `UserError` where
    that is not one."""
    ends = {f".{suffix}": f".{codec.parts[0]}" for codec in codecs() for suffix in codec.shared}
    by_name: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            continue
        if _without_number(name) in by_name or name.removesuffix(end) + ends[end] not in tensors:
            raise UserError(
                f"{place}: {name} is not the one that its layer's experts share: download it again"
            )
        by_name[_without_number(name)] = ref
    return by_name


def check_readable(config: Mapping[str, Any], place: str) -> None:
    """Raise `UserError` where a config says that its checkpoint is quantized in a way that is not read."""
    read_section(config, place)


def _parts_of(
    stem: str, tensors: Mapping[str, TensorRef], shared: Mapping[str, TensorRef], codec: Codec
) -> dict[str, TensorRef]:
    """The stored parts of a matrix, by suffix, with what others store for it."""
    lent_refs = {suffix: shared.get(_without_number(f"{stem}.{suffix}")) for suffix in codec.shared}
    refs = {suffix: tensors.get(f"{stem}.{suffix}", lent_refs.get(suffix)) for suffix in codec.parts}
    return {suffix: ref for suffix, ref in refs.items() if ref is not None}


def _packed_ref(
    stem: str, parts: Mapping[str, TensorRef], format: Format, codec: Codec, folder: Path
) -> TensorRef:
    """The reference to one packed matrix; every part must have the shape and dtype that its format says."""
    first = parts[codec.parts[0]]
    shape, scaled = _size(stem, parts, format, codec, folder), parts[codec.scaled]
    dtype = codec.decoded or scaled.dtype
    ref = pack(TensorRef(f"{stem}.weight", shape, dtype, first.file, first.offset), format, codec.layout)
    assert ref.packed is not None
    for suffix, wanted in ref.packed.parts.items():
        part = parts.get(suffix)
        if part is None or (part.shape, part.dtype) != (wanted.shape, wanted.dtype):
            have = "missing" if part is None else f"{part.dtype} {list(part.shape)}"
            raise UserError(
                f"{folder}: {wanted.name} is {have}, not {wanted.dtype} {list(wanted.shape)} as its format says: compare the "
                f"{SECTION} of config.json with where the checkpoint came from, and download what differs again"
            )
    if more := [suffix for suffix in parts if suffix not in ref.packed.parts]:
        raise UserError(
            f"{folder}: {stem} has a {more[0]}, which its format does not know: compare the {SECTION} of config.json with "
            "where the checkpoint came from"
        )
    if scaled.dtype not in FLOATS.values():
        raise UserError(
            f"{folder}: {scaled.name} is {scaled.dtype}, which is not read: give the unquantized checkpoint"
        )
    leads = all(parts[suffix].name == f"{stem}.{suffix}" for suffix in codec.shared)
    return replace(ref, packed=Packed(format, codec.layout, parts, codec.shared, leads))


def _size(
    stem: str, parts: Mapping[str, TensorRef], format: Format, codec: Codec, folder: Path
) -> tuple[int, int]:
    """Outputs and inputs of a packed matrix; raises `UserError` where its parts do not say them."""

    def read(ref: TensorRef) -> list[int]:
        with (folder / ref.file).open("rb") as file:
            raw = os.pread(file.fileno(), ref.nbytes, ref.offset)
        return [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]

    try:
        return codec.size(parts, format, read)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{folder}: {stem} lacks a part of its packed weight: download it again") from error
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def packing_config(
    packed: Mapping[str, Format], plain: Iterable[str], *, layout: str, stock: bool
) -> dict[str, Any]:
    """The section for modules `packed`, by name, beside the `plain` ones that hold a matrix too.

    In compressed-tensors one format for all is said of every `Linear` but the plain ones, as engines expect;
    several by a regular expression each. Without `stock` the format's name is one that only moespresso reads.
    Raises `UserError` where another layout cannot say it.
    """
    # transformers takes the first group whose pattern speaks of experts for that of the routed ones.
    formats = list(
        dict.fromkeys(packed[name] for name in sorted(packed, key=lambda name: _without_number(name) == name))
    )
    one = len(formats) == 1
    codec = codec_named(layout)
    if codec.one_format:
        if not one:
            raise UserError(
                f"the layout {layout} has one format for all matrices, here are {len(formats)}: keep compressed-tensors"
            )
        return codec.section(formats[0], packed, sorted(set(plain)))
    stems = _stems(packed)
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if one else [f"re:{_pattern(stems[format])}"],
            "weights": codec_of(format).say(format),
            "input_activations": None,
            "output_activations": None,
            "format": KIND if stock else OWN_KIND,
        }
        for number, format in enumerate(formats)
    }  # fmt: skip
    return {
        "quant_method": METHOD,
        "format": KIND if stock else OWN_KIND,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(set(plain)) if one else [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _without_number(name: str) -> str:
    """A name with # for the number of an expert."""
    return re.sub(r"(?<=experts\.)\d+(?=\.)", "#", name)


def _stems(packed: Mapping[str, Format]) -> dict[Format, set[str]]:
    """The modules of each format, the numbers of experts summed up where those of a layer have one format."""
    formats: dict[str, set[Format]] = {}
    for name, format in packed.items():
        formats.setdefault(_without_number(name), set()).add(format)
    by_format: dict[Format, set[str]] = {}
    for name, format in packed.items():
        stem = _without_number(name)
        by_format.setdefault(format, set()).add(stem if len(formats[stem]) == 1 else name)
    return by_format


def _pattern(stems: Iterable[str]) -> str:
    """A regular expression for exactly these modules."""
    return (
        "^("
        + "|".join(re.escape(stem).replace(r"\#", r"\d+").replace("#", r"\d+") for stem in sorted(stems))
        + ")$"
    )
