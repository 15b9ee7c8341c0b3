"""Stored layouts: encoded matrices as the tensors that engines load, and back.

Three families of engines read the same numbers from different tensors (`core.format.stored_parts` lists their shapes;
a stack of N matrices has N in front of each):

- *compressed-tensors* (pack-quantized): rows of values end to end. Its library counts values from -2^(bits-1) and adds
  that offset when it packs, so the stored bits are the unsigned values of `Codes`. Zeros exist in asymmetric formats
  only, packed along the outputs. Scales keep their dtype. Formats that are `ordered` store the group of every input
  (`weight_g_idx`; an entry of -1 says that groups are counted off after all). (Versions before 0.18 put ten 3-bit values into a word and
  never went over its border: they cannot read what is written here in 3 bits. 2, 4 and 8 bits are the same.)
- *GPTQ* (the first version of the format, which all its readers know): transposed, packed along the inputs; zeros are
  always stored, less one, packed along the outputs; `g_idx` names the group of every input.
- *AWQ* (the "gemm" order): transposed, packed along the outputs, interleaved; zeros likewise, as they are.

GPTQ and AWQ have float16 scales. A scale that float16 rounds makes the stored matrix differ from `decode(codes)`: give
such codes float16 scales from the start, and what was measured is what is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.format import Format, Layout, check_layout, stored_parts
from moespresso.formats.integer import Codes, levels
from moespresso.formats.packing import pack_interleaved, pack_words, plain, unpack_interleaved, unpack_words

# The dtypes of parts under their safetensors names.
_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
}
# Parts that say how others are to be read.
SMALL_PARTS = frozenset({"weight_g_idx", "g_idx", "qzeros"})
_KEEPS = "use the layout compressed-tensors"


def encode_parts(layout: Layout, codes: Codes) -> dict[str, Tensor]:
    """Return what `layout` stores of `codes`: suffix -> tensor [N, ...], shaped and typed as `stored_parts` says.

    Raises `UserError` where the layout cannot hold the matrices: their shape, a scale that float16 turns into zero or
    infinity, or (GPTQ) a zero of 0.
    """
    _, out, width = codes.values.shape
    check_layout(layout, codes.format, out, width)
    middle = levels(codes.format) // 2
    assert not codes.format.symmetric or bool((codes.zero == middle).all()), "symmetric: zero in the middle"
    assert codes.format.ordered or codes.groups is None, "groups are stored where they are ordered"
    if layout == "compressed-tensors":
        return _to_compressed_tensors(codes)
    return _to_gptq(codes) if layout == "gptq" else _to_awq(codes)


def decode_parts(
    layout: Layout, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]
) -> Codes:
    """Undo `encode_parts` for matrices of `shape` (out, in): the parts [N, ...] as `Codes`.

    Raises `UserError` where a part is missing or is not what the format and the shape say.
    """
    _check_parts(layout, parts, format, shape)
    if layout == "compressed-tensors":
        return _from_compressed_tensors(parts, format, shape)
    return _from_gptq(parts, format, shape) if layout == "gptq" else _from_awq(parts, format)


def _to_compressed_tensors(codes: Codes) -> dict[str, Tensor]:
    count, *shape = codes.values.shape
    parts = {
        "weight_packed": pack_words(codes.values, codes.format.bits),
        "weight_scale": plain(codes.scale),
        "weight_shape": torch.tensor([shape] * count),
    }
    if not codes.format.symmetric:
        parts["weight_zero_point"] = plain(pack_words(codes.zero.mT, codes.format.bits).mT)
    if codes.format.ordered:
        parts["weight_g_idx"] = _stored_order(codes)
    return parts


def _from_compressed_tensors(parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Codes:
    out, width = shape
    scale = parts["weight_scale"]
    if format.symmetric:
        zero = torch.full(scale.shape, levels(format) // 2, dtype=torch.uint8)
    else:
        zero = plain(unpack_words(parts["weight_zero_point"].mT, format.bits, out).mT)
    values = unpack_words(parts["weight_packed"], format.bits, width)
    return Codes(format, values, scale, zero, _order(parts.get("weight_g_idx"), format))


def _to_gptq(codes: Codes) -> dict[str, Tensor]:
    bits = codes.format.bits
    if bool((codes.zero == 0).any()):
        # Less one it would be -1: some readers wrap it around, some do not, and some spoil its neighbours.
        raise UserError(
            f"gptq stores zeros less one and cannot store a zero of 0: {_KEEPS}, or symmetric=true"
        )
    return {
        "qweight": plain(pack_words(codes.values, bits).mT),
        "qzeros": pack_words((codes.zero - 1).mT, bits),
        "scales": plain(_half(codes.scale, "gptq").mT),
        "g_idx": _stored_order(codes),
    }


def _from_gptq(parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> Codes:
    out, width = shape
    groups, zero = _order(parts["g_idx"], format), _zeros_of_gptq(parts["qzeros"], format, out)
    values = unpack_words(parts["qweight"].mT, format.bits, width)
    return Codes(format, values, plain(parts["scales"].mT), zero, groups)


def _order(stored: Tensor | None, format: Format) -> Tensor | None:
    """The stored group of every input [N, in]; None where groups are counted off. Raises `UserError` where that contradicts
    the format."""
    if stored is None:
        return None
    width = stored.shape[-1]
    counted = _groups(format, width).expand_as(stored)
    if not format.ordered:
        if not torch.equal(stored, counted):
            raise UserError(
                "g_idx does not count groups from left to right, which is act-order: set desc_act to true in its config.json"
            )
        return None
    if bool((stored == -1).any()):  # never filled in: readers count off then
        return counted
    if not bool(((stored >= 0) & (stored <= counted[..., -1:])).all()):
        raise UserError("g_idx names groups that there are not: download the checkpoint again")
    return stored


def _zeros_of_gptq(packed: Tensor, format: Format, out: int) -> Tensor:
    stored = plain(unpack_words(packed, format.bits, out).mT)
    if bool((stored == levels(format) - 1).any()):
        raise UserError(
            "qzeros hold a zero that readers of gptq do not agree on: take a source in another layout"
        )
    return _as_said(stored + 1, format, "sym is true", "sym to false")


def _as_said(zero: Tensor, format: Format, said: str, cure: str) -> Tensor:
    """The zeros; raises `UserError` where they are not in the middle though the format is said to be symmetric: some engines
    then read them, and some do not."""
    if format.symmetric and not bool((zero == levels(format) // 2).all()):
        raise UserError(
            f"qzeros hold other zeros than the middle, but {said}, so engines do not agree on its values: set {cure} in its "
            "config.json where its zeros are right, or take the unquantized checkpoint"
        )
    return zero


def check_small(layout: Layout, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> None:
    """Raise `UserError` where the small parts of stored matrices (groups and zeros) contradict the format."""
    if layout == "compressed-tensors":
        _order(parts.get("weight_g_idx"), format)
    elif layout == "gptq":
        _order(parts["g_idx"], format)
        _zeros_of_gptq(parts["qzeros"], format, shape[0])
    elif layout == "awq":
        _zeros_of_awq(parts["qzeros"], format)


def _zeros_of_awq(packed: Tensor, format: Format) -> Tensor:
    return _as_said(unpack_interleaved(packed), format, "zero_point is false", "zero_point to true")


def _to_awq(codes: Codes) -> dict[str, Tensor]:
    return {
        "qweight": pack_interleaved(codes.values),
        "qzeros": pack_interleaved(codes.zero),
        "scales": plain(_half(codes.scale, "awq").mT),
    }


def _from_awq(parts: Mapping[str, Tensor], format: Format) -> Codes:
    values, zero = unpack_interleaved(parts["qweight"]), _zeros_of_awq(parts["qzeros"], format)
    return Codes(format, values, plain(parts["scales"].mT), zero)


def _groups(format: Format, width: int) -> Tensor:
    """The group of every input, int32 [in]."""
    return torch.arange(width, dtype=torch.int32) // (format.group_size or width)


def _stored_order(codes: Codes) -> Tensor:
    """The group of every input of every matrix, int32 [N, in]: counted off too where values were rounded anew."""
    count, _, width = codes.values.shape
    return _groups(codes.format, width).repeat(count, 1) if codes.groups is None else codes.groups.int()


def _half(scale: Tensor, layout: str) -> Tensor:
    """Scales as float16; `UserError` where one leaves its range."""
    half = scale.to(torch.float16)
    lost = ~half.isfinite() | ((half == 0) & (scale != 0))
    if bool(lost.any()):
        worst = float(scale[lost][0])
        raise UserError(
            f"a scale of {worst:.3g} is outside float16, the dtype of {layout}'s scales: {_KEEPS}"
        )
    return half


def _check_parts(layout: Layout, parts: Mapping[str, Tensor], format: Format, shape: tuple[int, int]) -> None:
    """Raise `UserError` where the parts are not those of matrices of `shape`."""
    given = parts.get("weight_scale")
    scale_dtype = "BF16" if given is None else _NAMES.get(given.dtype, "BF16")
    for name, (expected, dtype) in stored_parts(layout, format, *shape, scale_dtype).items():
        if name not in parts:
            raise UserError(
                f"{layout} stores a {name} for every matrix, which is missing: fetch the files again"
            )
        part = parts[name]
        if part.shape[1:] != expected or _NAMES.get(part.dtype) != dtype:
            raise UserError(
                f"{name} is {part.dtype} {tuple(part.shape[1:])}, not {dtype} {expected}: "
                f"check bits and group_size of the {layout} matrix against its config"
            )
    if "weight_shape" in parts and not bool((parts["weight_shape"] == torch.tensor(shape)).all()):
        raise UserError(f"weight_shape does not say {shape}: fetch the files again")
