"""One tensor of the result: which bytes of the source it takes, and what is done to them on the way.

`rewrite` makes pieces of a plan, `build.tensors` turns them into tensors, and they are written in order. A
matrix that is stored packed is one piece until the last moment: `stored` says which tensors it becomes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from moespresso.core.blueprint import Entry, TensorRef
from moespresso.core.format import Format
from moespresso.core.plan import Stage
from moespresso.core.unit import Unit
from moespresso.effect.cuts import Repair
from moespresso.formats import codec_in, codec_named, pack

_EXPERT_NUMBER = re.compile(r"(?<=experts\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True)
class Member:
    """One expert of an average: its tensor (its entry along the expert axis, in a stack), share and channel
    order, which is fitted where it is `aligned`."""

    entry: Entry
    expert: int
    share: float
    order: Tensor | None = None
    aligned: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """How a matrix is packed, and where its numbers come from.

    The step of the stage it is packed `by` finds them: by weights alone, from what the piece holds otherwise;
    on text, as the parts `parts`, by suffix. Without one, what changed after it was packed takes the nearest
    values (`again`), or its numbers are those of the source. What is scaled is then multiplied by `factor`,
    and stored as `dtype` (empty: the source's).
    """

    format: Format
    layout: str
    leads: bool = True
    dtype: str = ""
    by: Stage | None = None
    again: bool = False
    parts: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    factor: float = 1.0

    @property
    def on_text(self) -> bool:
        """Whether its parts were found on text."""
        return self.by is not None and self.by.on_text


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """Stage number `at` of a plan leaves fewer weights of a matrix, or none of some rows, in the places of
    the others zeros."""

    at: int
    stage: Stage
    format: Format


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """What a branch's output is mapped by, for a tensor whose output runs along `axis`.

    `values` [H, H], or [H] for scale; for `bias` whatever is added. None where it is not fitted yet.
    """

    kind: Repair
    axis: int
    values: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Slim:
    """Of an expert whose `matrices` these are only the strongest `channels` stay: those with the largest
    product of what its matrices hold of each, as norms."""

    matrices: tuple[Entry, ...]
    channels: int


@dataclass(frozen=True)
class Piece:
    """One tensor to write: `source` bytes, of which only `take` along `axis` (None: all), times `scale`.

    `pruned` are the stages that prune it, in order. With `blend` it is an average of experts: of one expert's
    tensors, or along `axis` one average per kept expert. `folds` come last, in order. `filled`: with zeros,
    up to its shape, which is that of something wider. `values` is what stands in its place, where that was
    fitted (`refit`: whether or not it is known yet); with `encoding` all of that is packed, and what was
    stored as less than it is becomes `plain` again where its values change, as does a packed matrix that
    loses rows. With `slim` it loses channels by weights alone. `unit` is its address in the result. `part` of
    the matrix `matrix` is one of the tensors that it is stored as. Where it `joins` others, these are laid
    end to end, and `source` is that of the first.
    """

    name: str
    shape: tuple[int, ...]
    source: Entry
    axis: int | None = None
    take: tuple[int, ...] | None = None
    scale: float = 1.0
    blend: tuple[tuple[Member, ...], ...] = ()
    folds: tuple[Fold, ...] = ()
    plain: bool = False
    place: Unit | None = None
    pruned: tuple[Pruned, ...] = ()
    filled: bool = False
    refit: bool = False
    values: Tensor | None = None
    encoding: Encoding | None = None
    part: str = ""
    matrix: Piece | None = None
    joins: tuple[Piece, ...] = ()
    slim: Slim | None = None

    @property
    def unit(self) -> Unit:
        """Address in the result."""
        return self.place or self.source.unit

    @cached_property
    def ref(self) -> TensorRef:
        """The tensor as it will be written (its file is not known yet)."""
        if self.matrix is not None:
            return self.matrix.ref.stored()[self.part]
        ref = replace(self.source.ref, name=self.name, shape=self.shape, file="", offset=0, factor=1.0)
        packed, bare = ref.packed, replace(ref, packed=None)
        how = self.encoding
        if how is not None:
            return pack(replace(bare, dtype=how.dtype or ref.dtype), how.format, how.layout, leads=how.leads)
        if packed is None or self.plain:
            return bare
        return pack(bare, packed.format, packed.layout, leads=packed.leads)

    @property
    def fitted(self) -> bool:
        """Whether its values depend on what was fitted, known or not."""
        if self.matrix is not None:
            return self.matrix.fitted
        on_text = self.encoding is not None and self.encoding.on_text
        if self.joins:
            return any(piece.fitted for piece in self.joins)
        aligned = any(member.aligned for members in self.blend for member in members)
        pruned = any(pruning.stage.on_text for pruning in self.pruned)
        return on_text or pruned or self.refit or bool(self.folds) or aligned

    @property
    def changed(self) -> bool:
        """Whether its values are others than the source's, encoding aside."""
        marks = self.blend or self.folds or self.pruned or self.slim
        return self.scale != 1 or self.refit or self.filled or bool(marks)

    @property
    def copied(self) -> bool:
        """Whether every byte of it is a byte of the source."""
        if self.joins or self.encoding is not None or self.matrix is not None:
            return False
        return not self.changed and self.source.ref.factor == 1

    @property
    def inputs(self) -> tuple[TensorRef, ...]:
        """The tensors of the source that it is made of, experts that are averaged aside."""
        return tuple(ref for piece in self.joins for ref in piece.inputs) or (self.source.ref,)


def as_expert(name: str, number: int) -> str:
    """The name of an expert's tensor under another number."""
    return _EXPERT_NUMBER.sub(str(number), name)


def stored(piece: Piece) -> list[Piece]:
    """The tensors that a piece is written as: itself, or the parts of a packed matrix."""
    if piece.ref.packed is None:
        return [piece]
    if piece.encoding is None:
        stem = piece.name.removesuffix("weight")
        return [
            Piece(stem + suffix, ref.shape, replace(piece.source, ref=ref), place=piece.unit)
            for suffix, ref in piece.source.ref.stored().items()
        ]
    return [
        Piece(ref.name, ref.shape, piece.source, place=piece.unit, part=suffix, matrix=piece)
        for suffix, ref in piece.ref.stored().items()
    ]


def led(piece: Piece, *, leads: bool) -> Piece:
    """A packed piece that stores what it shares with others, or leaves that to one of them."""
    packed = piece.ref.packed
    assert packed is not None
    if packed.leads == leads:
        return piece
    if piece.encoding is not None:
        return replace(piece, encoding=replace(piece.encoding, leads=leads))
    ref = piece.source.ref
    assert ref.packed is not None
    return replace(
        piece, source=replace(piece.source, ref=replace(ref, packed=replace(ref.packed, leads=leads)))
    )


def laid_out(piece: Piece, layout: str) -> Piece:
    """The piece, if it is packed, in another layout, or as what it decodes to."""
    packed = piece.ref.packed
    target = codec_named(layout)
    if packed is None or codec_in(piece.ref) is target:
        return piece
    if not target.packs:
        assert piece.encoding is None, "only what is stored is laid out plainly"
        return replace(piece, plain=True)
    how = piece.encoding or Encoding(packed.format, packed.layout)
    return replace(piece, encoding=replace(how, layout=layout))
