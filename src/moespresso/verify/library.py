"""Packed matrices by another reader: what compressed-tensors' own library makes of the same files and the
same config.

Our reader finds the format of a matrix itself (`checkpoint.section`) and unpacks it itself. Had it misread a
key, it would write its mistake into the result, and every check made with it would hold. So the section is
given to the library as it stands, which decides with its own rules what means a matrix and decodes it; every
value must be equal to ours, bit for bit.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets

from moespresso.checkpoint import OWN_KIND, SECTION, Checkpoint, Reader
from moespresso.core.blueprint import TensorRef
from moespresso.formats import CompressedTensors, codec_in

_KIND = "pack-quantized"
# Weights that are decoded at most; of larger checkpoints as many matrices, evenly spaced, as have so many.
_WEIGHTS = 1 << 28


def decoded_alike(checkpoint: Checkpoint) -> str:
    """Compare; raises `AssertionError` where the library decodes other values. Returns what was compared,
    or nothing where it reads no such files."""
    refs = [ref for ref in checkpoint.tensors.values() if ref.packed is not None]
    known = [ref for ref in refs if _of_library(ref)]
    if not known:
        return ""
    step = max(1, -(-sum(ref.numel for ref in known) // _WEIGHTS))
    config = _config(checkpoint.config[SECTION])
    targets = {target: scheme for scheme in config.config_groups.values() for target in scheme.targets}
    with Reader(checkpoint.folder) as reader:
        for ref in known[::step]:
            _compare(ref, reader, targets, config.ignore or [])
    rest = len(refs) - len(known)
    return f"{len(known[::step])} of {len(known)} as its own library decodes them" + (
        f", which cannot decode {rest} more" if rest else ""
    )


def _of_library(ref: TensorRef) -> bool:
    packed = ref.packed
    return packed is not None and isinstance(codec_in(ref), CompressedTensors) and not packed.format.ordered


def _config(section: dict[str, Any]) -> Any:
    """The section as the library's own object, without what only moespresso says."""
    groups = {
        name: {**group, "format": _KIND if group.get("format") == OWN_KIND else group.get("format")}
        if isinstance(group, dict)
        else group
        for name, group in section["config_groups"].items()
        if not _is_own(group)
    }
    return QuantizationConfig.model_validate({**section, "format": _KIND, "config_groups": groups})


def _is_own(group: Any) -> bool:
    """Whether a group is none that the library can read: other numbers than integers, or groups in an
    order of their own."""
    weights = cast("dict[str, Any]", (group.get("weights") or {}) if isinstance(group, dict) else {})
    return weights.get("type", "int") not in ("int", "float") or weights.get("actorder") in (
        True,
        "group",
        "dynamic",
    )


def _compare(ref: TensorRef, reader: Reader, targets: dict[str, Any], ignore: list[str]) -> None:
    assert ref.packed is not None
    stem, linear = (
        ref.packed.parts["weight_packed"].name.removesuffix(".weight_packed"),
        torch.nn.Linear(1, 1, device="meta"),
    )
    found = match_targets(stem, linear, targets)
    ignored = bool(ignore) and is_match(stem, linear, ignore)
    assert found, f"{ref.name} is packed, but its library finds no group that means it"
    assert not ignored, f"{ref.name} is packed, but its library would leave it alone"
    state: dict[str, torch.Tensor | None] = {
        suffix: reader.tensor(part).clone() for suffix, part in ref.packed.parts.items()
    }
    scheme = targets[found[0]]
    theirs = BaseCompressor.get_value_from_registry(_KIND).decompress(state, scheme)["weight"]
    assert theirs is not None
    assert torch.equal(theirs, reader.tensor(ref)), f"{ref.name} is not what its own library decodes"
