"""What a step on text answers for a layer, kept in the form that it is written in at last, a file a layer.

A killed run goes on with the next layer, and nothing is held for longer than one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from moespresso.checkpoint import TORCH_DTYPES, as_bytes, header, write_file
from moespresso.core.blueprint import TensorRef
from moespresso.core.layer import Layer
from moespresso.effect import Piece, fitted_key, key, narrowed
from moespresso.fit.treated import Treated
from moespresso.formats import codec_of
from moespresso.methods import LayerContext, LayerResult

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass
class Fitted:
    """Fitted tensors by name, what went wrong, and by layer how many tokens reached each expert and which
    were helped."""

    fits: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    warnings: list[str] = field(default_factory=list[str])
    coverage: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


def kept(treated: Treated, pieces: list[Piece], result: LayerResult, layer: Layer) -> dict[str, Tensor]:
    """What is kept of an answer, by the names of fits."""
    fits: dict[str, Tensor] = {}
    for piece in pieces:
        unit, parts = piece.source.unit, _parts(treated, piece, result, layer)
        shared = codec_of(treated.format(piece)).shared
        for suffix, tensor in parts.items():
            own = fitted_key(treated.number, piece.source.ref.name, suffix)
            fits[key(treated.number, replace(unit, expert=None), suffix) if suffix in shared else own] = (
                tensor
            )
    for name, tensor in result.replaced.items():
        ref = treated.named[layer.spec.index, name].source.ref
        fits[fitted_key(treated.number, ref.name, "dense")] = tensor
    return fits


def _parts(treated: Treated, piece: Piece, result: LayerResult, layer: Layer) -> Mapping[str, Tensor]:
    """What one matrix is kept as: its parts, packed, or `dense` as a whole."""
    format, held = treated.format(piece), codec_of(treated.format(piece))
    expert = piece.unit.expert
    # Not all experts are as wide as the widest.
    experts = piece.unit.part == "experts"
    rows, columns = (narrowed(piece.source, treated.after) if experts else piece.shape)[-2:]
    if experts:
        name, first = _place(piece.unit.matrix or "", result, layer)
    else:
        name, first = treated.module(piece, layer), 0
    some = slice(first, first + rows)
    if name in result.numbers:
        numbers = held.cut(result.numbers[name], expert or 0, some, columns)
    else:
        whole = result.weights[name]
        whole = whole.unsqueeze(0) if whole.ndim == 2 else whole
        which = slice(None) if expert is None else slice(expert, expert + 1)
        numbers = whole[which, some, :columns].to(TORCH_DTYPES[piece.ref.dtype])
    if not held.packs:
        return {"dense": numbers if len(piece.shape) == 3 else numbers[0]}
    parts = held.encode(numbers, format)
    shapes = held.shapes(format, rows, columns, piece.ref.dtype) if held.own else {}
    return {
        suffix: (tensor.to(TORCH_DTYPES[shapes[suffix][1]]) if shapes else tensor).squeeze(0)
        for suffix, tensor in parts.items()
    }


def _place(matrix: str, result: LayerResult, layer: Layer) -> tuple[str, int]:
    """What an answer holds a stored matrix of experts in, and from which row on: gate and up may be solved
    as one."""
    if matrix == "down" or ("gate" in result.numbers and matrix != "gate_up"):
        return matrix, 0
    both = matrix == "up" and getattr(layer.experts, "has_gate", True)
    return "up", result.rows("up") // 2 if both else 0


def write_layer(
    path: Path, tensors: Mapping[str, Tensor], result: LayerResult, coverage: Mapping[str, Any]
) -> None:
    """Keep what a layer's answer comes to, and what is said of it."""
    write_tensors(path, tensors, {"notes": json.dumps({"warnings": result.warnings, "coverage": coverage})})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Keep tensors in a file that is there as a whole or not at all."""
    refs = [TensorRef(name, tuple(t.shape), _NAMES[t.dtype], "") for name, t in sorted(tensors.items())]
    bodies = (as_bytes(tensors[ref.name].cpu().reshape(-1)) for ref in refs)
    write_file(path, [memoryview(header(refs, metadata)), *bodies])


def coverage_of(context: LayerContext, result: LayerResult) -> dict[str, Any]:
    """How many tokens reached each expert of a layer, and which of them were helped otherwise."""
    if context.experts is None:
        return {}
    remedies = {str(expert): word for expert, word in sorted(result.remedies.items())}
    return {f"L{context.layer}": {"tokens": context.experts.tokens.tolist(), "remedies": remedies}}


def gathered(files: list[Path]) -> Fitted:
    """What all layers found; tensors stay in their files until they are looked at."""
    everything = Fitted()
    for file in files:
        everything.fits |= load_file(file)
        with safe_open(file, "pt") as opened:
            notes = json.loads(opened.metadata()["notes"])
        everything.warnings += notes["warnings"]
        everything.coverage |= notes["coverage"]
    return everything
