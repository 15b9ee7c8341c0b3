"""What loaders make of packed matrices: which of them read a view, and at what the others stop or go
wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moespresso.checkpoint import OWN_KIND, SECTION
from moespresso.formats import Obstacle, codec_in, codecs
from moespresso.model import quirks

if TYPE_CHECKING:  # a view asks for its own packing
    from moespresso.build.view import View


def own_packing(view: View) -> bool:
    """Whether a checkpoint has packed matrices that transformers stops at, or (in folders of others) reads
    wrongly."""
    format_name = (view.checkpoint.config.get(SECTION) or {}).get("format")
    return format_name == OWN_KIND or half_packed(view) or not (one_format(view) or other_layout(view))


def half_packed(view: View) -> bool:
    """Whether experts are plain matrices beside others that are packed: then transformers 5.23 looks for
    packed experts, finds none and stops."""
    if view.source.family in quirks.TAKEN_APART:
        return bool(view.formats)
    experts = [
        piece.ref.packed
        for piece in view.pieces
        if piece.unit.part == "experts" and piece.unit.expert is not None
    ]
    return bool(experts) and not any(experts) and bool(view.formats)


def other_layout(view: View) -> bool:
    """Whether a checkpoint is packed in a layout that transformers needs another engine for."""
    return needs_engine(engine_of(view.checkpoint.config))


def needs_engine(engine: str) -> bool:
    """Whether transformers does not read what a library packs."""
    return engine in {held.engine for held in codecs() if held.one_format}


def engine_of(config: Mapping[str, Any]) -> str:
    """The library that a config says its packed matrices by; nothing where it has none."""
    return str((config.get(SECTION) or {}).get("quant_method") or "")


def in_order(view: View) -> bool:
    """Whether compressed-tensors stores the groups of inputs, which its library took out in 0.20 (it stops at
    such a config)."""
    return any(obstacle == "order" for _, obstacle in _obstacles(view))


def _obstacles(view: View) -> list[tuple[str, Obstacle]]:
    """By part, why stock transformers does not read a packed matrix; nothing where it does."""
    packed = ((piece.unit.part, piece.ref, piece.ref.packed) for piece in view.pieces)
    return [
        (part, codec_in(ref).obstacle(packing.format)) for part, ref, packing in packed if packing is not None
    ]


def one_format(view: View) -> bool:
    """Whether stock loaders read a packed view rightly: all experts in one format, which in
    compressed-tensors must be symmetric and count groups off, and beside them nothing that they cannot read
    there, packed or not."""
    experts = {
        piece.ref.packed and piece.ref.packed.format for piece in view.pieces if piece.unit.part == "experts"
    }
    ragged = any(layer.widths for layer in view.blueprint.layers) and any(experts)
    if ragged or view.unreadable or view.packed_alone or in_order(view) or tied_head(view) or zeros_of(view):
        return False
    return len(experts) <= 1 and not any(obstacle == "own" for _, obstacle in _obstacles(view))


def zeros_of(view: View) -> str:
    """A part of a view whose packed matrices have zeros of their own, which transformers 5.23 does not read;
    nothing where there is none."""
    return next((part for part, obstacle in _obstacles(view) if obstacle == "zeros"), "")


def tied_head(view: View) -> bool:
    """Whether the head or the embedding is packed though the config ties the two: transformers then ties
    matrices that it has packed, and stops."""
    tied = view.source.tied or view.source.both_stored
    return tied and any(
        piece.unit.part in ("embedding", "head") and piece.ref.packed is not None for piece in view.pieces
    )
