"""Plain tensors that transformers joins as it reads, stored joined where it could not join them.

Beside packed matrices transformers 5.23 unpacks before it converts: every conversion whose sources end in
`.weight` (the short convolutions of queries, keys and values; the shards of an n-gram table) is then given
packed parts only, finds none, and stops. Names that are the model's own need no conversion, so what would
only be laid end to end is written laid end to end. What would be converted in another way is `unreadable`;
so is what lies beside the language model in the class that config.json names, and is converted at all. What
is packed where the model has no linear layer is `packed_alone`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moespresso.checkpoint import SECTION
from moespresso.effect import Piece
from moespresso.formats import CompressedTensors, codec_in
from moespresso.model.names import Names
from moespresso.model.skeleton import skeleton, whole_names

Config = Mapping[str, Any]


def joined(pieces: Sequence[Piece], config: Config, place: str) -> list[Piece]:
    """`pieces` with those laid end to end that the library could not convert; `config` is that of the
    source."""
    if not _beside_packed(pieces):
        return list(pieces)
    names = _names_of(config, place)
    groups = _by_conversion(pieces, names)
    firsts = {together[0].name: name for name, together in groups.items() if _can_join(name, together, names)}
    gone = {piece.name for name in firsts.values() for piece in groups[name]}
    result: list[Piece] = []
    for piece in pieces:
        if piece.name in firsts:
            name = firsts[piece.name]
            result.append(_end_to_end(_as_whole(name, piece.name, config, place), groups[name]))
        elif piece.name not in gone:
            result.append(piece)
    return result


def unreadable(pieces: Sequence[Piece], config: Config, place: str) -> list[str]:
    """Names of plain pieces that the library would have to convert beside packed ones, which it cannot."""
    if not _beside_packed(pieces):
        return []
    groups = _by_conversion(pieces, _names_of(config, place))
    inside = [piece.name for together in groups.values() for piece in together]
    return [*inside, *_outside(pieces, config, place)]


def _outside(pieces: Sequence[Piece], config: Config, place: str) -> list[str]:
    """The same of what lies outside the language model (experts of a vision tower), as the class that
    config.json names converts it."""
    names = whole_names(config, place)
    if names is None:
        return []
    plain = [piece for piece in pieces if not piece.source.in_graph and piece.ref.packed is None]
    found = [(piece.name, *names.in_memory(piece.name)) for piece in plain]
    return [on_disk for on_disk, name, pattern in found
            if pattern is not None and name in names.state and names.of_weights(pattern)]  # fmt: skip


def packed_alone(pieces: Sequence[Piece], config: Config, place: str) -> list[str]:
    """Names of packed matrices for which the model has no linear layer, so that transformers leaves what it
    has there random: most routers. Experts aside, which it knows as such, and what it converts."""
    asked = [piece for piece in pieces
             if piece.ref.packed is not None and piece.unit.part != "experts" and piece.source.in_graph]  # fmt: skip
    if not asked:
        return []
    names = _names_of(config, place)
    converted = {piece.name for piece in asked if names.in_memory(piece.source.ref.name)[1] is not None}
    return [piece.name for piece in asked
            if piece.name not in converted and not names.is_linear(piece.source.ref.name)]  # fmt: skip


def _beside_packed(pieces: Sequence[Piece]) -> bool:
    return any(
        isinstance(codec_in(piece.ref), CompressedTensors) for piece in pieces if piece.ref.packed is not None
    )


def _by_conversion(pieces: Sequence[Piece], names: Names) -> dict[str, list[Piece]]:
    """Plain pieces behind a conversion that waits for packed parts, in the order it takes them, by the name
    they get."""
    waiting: dict[str, list[tuple[Any, Piece]]] = {}
    for piece in pieces:
        name, pattern = names.in_memory(piece.name)
        if piece.ref.packed is None and pattern is not None and names.waits_for_packed(pattern):
            waiting.setdefault(name, []).append((names.order(piece.name, pattern), piece))
    return {
        name: [piece for _, piece in sorted(ordered, key=lambda pair: pair[0])]
        for name, ordered in waiting.items()
    }


def _can_join(name: str, together: Sequence[Piece], names: Names) -> bool:
    """Whether laying these end to end is all that the library would do, and what comes of it is read as it
    is."""
    alike = {(piece.ref.dtype, piece.shape[1:]) for piece in together}
    patterns = [names.in_memory(piece.name)[1] or "" for piece in together]
    return (
        len(alike) == 1
        and all(map(names.only_lays_end_to_end, patterns))
        and names.in_memory(name) == (name, None)
    )


def _as_whole(name: str, part: str, config: Config, place: str) -> str:
    """What is called `name` in the language model, as the class that config.json names calls it: what
    `part` of it becomes there. The language model alone must know it by that too."""
    names = whole_names(config, place)
    other = name if names is None else names.in_memory(part)[0]
    return other if _names_of(config, place).in_memory(other) == (name, None) else name


def _end_to_end(name: str, together: Sequence[Piece]) -> Piece:
    first = together[0]
    rows = sum(piece.shape[0] for piece in together)
    return Piece(name, (rows, *first.shape[1:]), first.source, place=first.unit, joins=tuple(together))


def _names_of(config: Config, place: str) -> Names:
    return skeleton({key: value for key, value in config.items() if key != SECTION}, place).names
