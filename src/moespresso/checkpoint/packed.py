"""Checkpoints whose matrices are stored packed: several tensors on disk are one matrix to everybody else.

Three layouts are understood, with integers of 2 to 8 bits and scales per group or channel: compressed-tensors'
`pack-quantized`, in which `config.json` says by regular expressions which modules have how many bits, and those of GPTQ and
AWQ, which have one format for all (`section` reads what it says). `joined` replaces the tensors of each matrix by one
reference with the shape and dtype of what it decodes to, and refuses tensors beside them that it does not know;
`packing_config` writes the section of `config.json` again.
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
from moespresso.core.format import OWN_LAYOUTS, SHARED_PARTS, Format, Layout, layout_of

# The part of a matrix by which it is found, and all its parts.
_PARTS: dict[Layout, tuple[str, ...]] = {
    "compressed-tensors": (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    ),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "bitmask": ("weight_values", "weight_mask", "weight_shape"),
    "factors": ("weight_left", "weight_right"),
    "bases": ("weight_own", "weight_shares", "weight_bases"),
    "slices": ("weight_kept", "weight_index", "weight_shape"),
}

# Where AutoGPTQ and AutoAWQ keep what they did.
_TOOLS_OWN = ("quantize_config.json", "quant_config.json")
# The end of the name of what the experts of a layer share.
_SHARED = ".weight_bases"


# Ends of the names of tensors that belong to packed matrices, or to what is computed with them.
_STRANGE = frozenset(suffix for parts in _PARTS.values() for suffix in parts) | frozenset(
    {"weight_global_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "input_zero_point", "input_global_scale",
     "input_g_idx", "output_scale", "output_zero_point", "output_global_scale", "q_scale", "k_scale", "v_scale", "kv_scale",
     "k_zero_point", "v_zero_point", "k_global_scale", "v_global_scale", "q_zero_point", "channel_scale"}
)  # fmt: skip


def joined(config: Mapping[str, Any], tensors: Mapping[str, TensorRef], folder: Path) -> dict[str, TensorRef]:
    """`tensors` with the parts of every packed matrix as one reference; raises `UserError` where they do not fit, and for
    every tensor beside them that is not understood."""
    place = str(folder)
    section = read_section(config, place)
    if section is None:
        _check_plain(tensors, folder)
        return dict(tensors)
    layouts: list[Layout] = [section.layout, *OWN_LAYOUTS] if section.own else [section.layout]
    firsts: dict[str, Layout] = {_PARTS[layout][0]: layout for layout in layouts}
    stems: dict[str, Layout] = {
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
    found: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        stem, _, suffix = name.rpartition(".")
        here = stems.get(stem)
        if here is None or suffix not in _PARTS[here]:
            _check_beside(name, stems, place)
            found[name] = ref
        elif suffix == _PARTS[here][0]:
            format = section.format_of(stem)
            if here in OWN_LAYOUTS and here != layout_of(format):
                raise UserError(
                    f"{place}: {stem} is stored as {here}, and config.json's {SECTION} says {format.kind}: press the model again"
                )
            found[f"{stem}.weight"] = _whole(stem, tensors, shared, format, here, folder)
    return found


def _check_plain(tensors: Mapping[str, TensorRef], folder: Path) -> None:
    """A config that says nothing of packed matrices must have none."""
    odd = next((name for name in tensors if name.endswith((".weight_packed", ".qweight"))), None)
    if odd is not None:
        raise UserError(
            f"{folder}: {odd} is packed, but config.json has no {SECTION} that says how: {_to_add(odd, tensors, folder)}, or give "
            "the unquantized checkpoint"
        )


def _to_add(odd: str, tensors: Mapping[str, TensorRef], folder: Path) -> str:
    """How a config gets its section: of the tool's own file where that is there, with the names that config.json uses."""
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
    said = {
        AUTOAWQ.get(key, key): value for key, value in read_json(folder / file).items() if value is not None
    }
    return f'add "{SECTION}": {json.dumps({"quant_method": method} | said)} (what {file} says, in the names of config.json)'


def _check_beside(name: str, stems: Mapping[str, Layout], place: str) -> None:
    """A tensor that is no part of a packed matrix must be none that changes what such matrices compute."""
    stem, _, suffix = name.rpartition(".")
    inside = stem if stem in stems else next((above for above in _above(stem) if above in stems), None)
    if (inside is not None and (inside, suffix) != (stem, "bias")) or suffix in _STRANGE:
        what = (
            f"of the packed {inside}" if inside is not None else f"as packed checkpoints have it ({suffix})"
        )
        raise UserError(
            f"{place}: {name} is a tensor {what}, of which this version does not know what it does to values: give the unquantized "
            "checkpoint, or one packed without it"
        )


def _above(module: str) -> Iterator[str]:
    """The modules that a module is in, inner ones first."""
    while module := module.rpartition(".")[0]:
        yield module


def _shared_parts(tensors: Mapping[str, TensorRef], place: str) -> dict[str, TensorRef]:
    """What experts share, by its name without the number of the one that stores it; raises `UserError` where that is not one."""
    found: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        if not name.endswith(_SHARED):
            continue
        if _alike(name) in found or name.removesuffix(_SHARED) + ".weight_own" not in tensors:
            raise UserError(
                f"{place}: {name} is not the one that its layer's experts share: download it again"
            )
        found[_alike(name)] = ref
    return found


def check_readable(config: Mapping[str, Any], place: str) -> None:
    """Raise `UserError` where a config says that its checkpoint is quantized in a way that is not read."""
    read_section(config, place)


def _whole(
    stem: str,
    tensors: Mapping[str, TensorRef],
    shared: Mapping[str, TensorRef],
    format: Format,
    layout: Layout,
    folder: Path,
) -> TensorRef:
    """The reference to one packed matrix; every part must have the shape and dtype that its format says."""
    place = str(folder)
    parts = {
        suffix: tensors[f"{stem}.{suffix}"] for suffix in _PARTS[layout] if f"{stem}.{suffix}" in tensors
    }
    leads = "weight_bases" in parts
    if layout == "bases" and not leads and _alike(stem + _SHARED) in shared:
        parts["weight_bases"] = shared[_alike(stem + _SHARED)]
    found, first = dict(parts), next(iter(parts.values()))
    scale = parts.get(_SCALES[layout])
    if layout == "bitmask" and len(parts) == len(_PARTS[layout]) and scale is not None:
        first, width = parts["weight_mask"], parts["weight_shape"]
        stored_width = _stored_width(width, 8 * first.shape[-1], folder) if len(first.shape) == 2 else 0
        shape = first.shape[0], stored_width
    elif scale is None or any(len(part.shape) != 2 for part in (first, scale)):
        raise UserError(f"{place}: {stem} lacks a part of its packed weight: download it again")
    elif layout == "slices":
        shape = _stored_shape(parts.get("weight_shape"), first, format, folder)
    else:
        shape = _shape(first, scale, format, layout)
    if layout == "bases" and len(found.get("weight_bases", first).shape) == 3:
        shape = shape[0], found["weight_bases"].shape[2]
    if layout == "compressed-tensors" and not format.group_size and "weight_shape" in parts:
        shape = shape[0], _stored_width(parts["weight_shape"], shape[1], folder)
    whole = TensorRef(
        f"{stem}.weight", shape, scale.dtype, first.file, first.offset, packed=Packed(format, layout)
    )
    for suffix, wanted in whole.parts.items():
        part = parts.pop(suffix, None)
        if part is None or (part.shape, part.dtype) != (wanted.shape, wanted.dtype):
            have = "missing" if part is None else f"{part.dtype} {list(part.shape)}"
            raise UserError(
                f"{place}: {wanted.name} is {have}, not {wanted.dtype} {list(wanted.shape)} as its format says: compare the "
                f"{SECTION} of config.json with where the checkpoint came from, and download what differs again"
            )
    if parts:
        raise UserError(
            f"{place}: {stem} has a {next(iter(parts))}, which its format does not know: compare the {SECTION} of config.json with "
            "where the checkpoint came from"
        )
    if scale.dtype not in ("F16", "BF16", "F32"):
        raise UserError(
            f"{place}: {scale.name} is {scale.dtype}, which is not read: give the unquantized checkpoint"
        )
    return replace(
        whole, packed=Packed(format, layout, found, leads=leads or not SHARED_PARTS & found.keys())
    )


# The part of a matrix whose dtype is its own.
_SCALES: dict[Layout, str] = {"compressed-tensors": "weight_scale", "gptq": "scales", "awq": "scales",
                              "bitmask": "weight_values", "factors": "weight_right", "bases": "weight_own", "slices": "weight_kept"}  # fmt: skip


def _shape(first: TensorRef, scale: TensorRef, format: Format, layout: Layout) -> tuple[int, int]:
    """Outputs and inputs, from the shapes of the packed values and the scales."""
    if layout == "gptq":
        return first.shape[1], first.shape[0] * 32 // format.bits
    if layout == "awq":
        return first.shape[1] * 32 // format.bits, first.shape[0]
    if layout in ("factors", "bases"):
        return first.shape[0], scale.shape[1]
    out, groups = scale.shape
    return out, groups * format.group_size if format.group_size else first.shape[1] * 32 // format.bits


def _stored_width(ref: TensorRef, most: int, folder: Path) -> int:
    """Inputs of a matrix with one scale a channel: its last word may be padded, so only its stored shape says it."""
    with (folder / ref.file).open("rb") as file:
        said = int.from_bytes(os.pread(file.fileno(), 8, ref.offset + 8), "little")
    if not most - 32 < said <= most:
        raise UserError(f"{folder}: {ref.name} says {said} inputs, its values hold {most}: download it again")
    return said


def _stored_shape(ref: TensorRef | None, kept: TensorRef, format: Format, folder: Path) -> tuple[int, int]:
    """Outputs and inputs of a matrix of which some rows or columns are stored: they say themselves no more than one of both."""
    if ref is None:
        raise UserError(f"{folder}: {kept.name} lacks the weight_shape beside it: download it again")
    with (folder / ref.file).open("rb") as file:
        raw = os.pread(file.fileno(), 16, ref.offset)
    out, width = (int.from_bytes(raw[at : at + 8], "little") for at in (0, 8))
    most, whole = (out, width == kept.shape[1]) if format.kind == "rows" else (width, out == kept.shape[0])
    if not whole or not format.rank <= most < 1 << 31:
        raise UserError(
            f"{folder}: {ref.name} says {out} x {width}, of which {list(kept.shape)} are no {format.kind}: download it again"
        )
    return out, width


def packing_config(
    packed: Mapping[str, Format], plain: Iterable[str], *, layout: Layout, stock: bool
) -> dict[str, Any]:
    """The section for modules `packed`, by name, beside the `plain` ones that hold a matrix too.

    In compressed-tensors one format for all is said of every `Linear` but the plain ones, as engines expect; several by a
    regular expression each. Without `stock` the format's name is one that only moespresso reads. Raises `UserError` where
    another layout cannot say it.
    """
    # transformers takes the first group whose pattern speaks of experts for that of the routed ones.
    formats = list(
        dict.fromkeys(packed[name] for name in sorted(packed, key=lambda name: _alike(name) == name))
    )
    one = len(formats) == 1
    if layout in ("gptq", "awq"):
        if not one:
            raise UserError(
                f"the layout {layout} has one format for all matrices, here are {len(formats)}: keep compressed-tensors"
            )
        heads = {"lm_head": "lm_head" in packed} if layout == "gptq" else {}
        return _OTHERS[layout](formats[0], sorted(set(plain))) | heads
    stems = _stems(packed)
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if one else [f"re:{_pattern(stems[format])}"],
            "weights": _weights(format),
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


def _weights(format: Format) -> dict[str, Any]:
    if format.kind != "integer":
        return {
            "type": format.kind,
            "group_size": format.group_size,
            "density": format.density,
            "rank": format.rank,
        } | ({"bases": format.bases} if format.bases else {})
    return {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": format.symmetric,
        "strategy": "group" if format.group_size else "channel",
        "group_size": format.group_size or None,
        "dynamic": False,
        "actorder": "group" if format.ordered else None,
        "observer": "minmax",
    }


def _gptq_section(format: Format, plain: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": format.bits,
        "group_size": format.group_size or -1,
        "sym": format.symmetric,
        "desc_act": format.ordered,
        "lm_head": False,
        "dynamic": _left_alone(plain),
    }


def _awq_section(format: Format, plain: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": format.bits,
        "group_size": format.group_size or -1,
        "zero_point": True,
        "modules_to_not_convert": plain,
        "dynamic": _left_alone(plain),
    }


def _left_alone(plain: list[str]) -> dict[str, dict[str, Any]]:
    """GPTQModel's own way to say so, in both layouts: a pattern with a minus in front."""
    return {f"-:^{re.escape(name)}$": {} for name in plain}


_OTHERS = {"gptq": _gptq_section, "awq": _awq_section}


def _alike(name: str) -> str:
    """A name with # for the number of an expert."""
    return re.sub(r"(?<=experts\.)\d+(?=\.)", "#", name)


def _stems(packed: Mapping[str, Format]) -> dict[Format, set[str]]:
    """The modules of each format, the numbers of experts summed up where those of a layer have one format."""
    formats: dict[str, set[Format]] = {}
    for name, format in packed.items():
        formats.setdefault(_alike(name), set()).add(format)
    found: dict[Format, set[str]] = {}
    for name, format in packed.items():
        stem = _alike(name)
        found.setdefault(format, set()).add(stem if len(formats[stem]) == 1 else name)
    return found


def _pattern(stems: Iterable[str]) -> str:
    """A regular expression for exactly these modules."""
    return (
        "^("
        + "|".join(re.escape(stem).replace(r"\#", r"\d+").replace("#", r"\d+") for stem in sorted(stems))
        + ")$"
    )
