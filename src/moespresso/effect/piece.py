"""One tensor of the result: which bytes of the source it takes, and what is done to them on the way.

`core.rewrite` makes pieces of a plan, the reader turns them into tensors, the writer writes them in order. A matrix that is
stored packed is one piece until the last moment: `stored` says which tensors it becomes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from moespresso.core.blueprint import Entry, Packed, TensorRef
from moespresso.core.format import Form, Format
from moespresso.core.method import Prunes, Quantizes
from moespresso.core.unit import Unit
from moespresso.effect.cuts import Repair


@dataclass(frozen=True, slots=True)
class Member:
    """One expert of an average: its tensor (its entry along the expert axis, in a stack), share and channel order, which
    is fitted where it is `aligned`."""

    entry: Entry
    expert: int
    share: float
    order: Tensor | None = None
    aligned: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Code:
    """How a matrix is encoded.

    `step` rounds what the piece would hold otherwise, or the nearest values are taken (`again`); without either its codes
    are known: `found` on text, by suffix, or as the source has them. Its scales are then multiplied by `factor`, and stored as
    `dtype` (empty: the source's).
    """

    packed: Packed
    dtype: str = ""
    step: Quantizes | None = None
    again: bool = False
    on_text: bool = False
    found: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    factor: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """What a branch's output is mapped by, for a tensor whose output runs along `axis`.

    `values` [H, H], or [H] for scale; for `bias` whatever is added. None where it is not fitted yet.
    """

    kind: Repair
    axis: int
    values: Tensor | None


@dataclass(frozen=True)
class Piece:
    """One tensor to write: `source` bytes, of which only `take` along `axis` (None: all), times `scale`.

    `pruned` are steps that prune it by what it holds alone, each with its format. With `blend` it is an average of experts:
    of one expert's tensors, or along `axis` one average per kept expert. `folds` come last, in order. `filled`: with zeros,
    up to its shape, which is that of something wider. `given` is what stands in its place, where that was fitted (`refit`:
    whether or not it is known yet); with `code` all of that is encoded, and what was stored as less than it is becomes
    `plain` again where its values change, as does a packed matrix that loses rows. `unit` is its address in the result. `part` of the matrix `whole` is one of the
    tensors that it is stored as. Where it `joins` others, these are laid end to end, and `source` is that of the first.
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
    pruned: tuple[tuple[Prunes, Format], ...] = ()
    filled: bool = False
    refit: bool = False
    given: Tensor | None = None
    code: Code | None = None
    part: str = ""
    whole: Piece | None = None
    joins: tuple[Piece, ...] = ()

    @property
    def unit(self) -> Unit:
        """Address in the result."""
        return self.place or self.source.unit

    @cached_property
    def parts(self) -> Mapping[str, TensorRef]:
        """The tensors that it is written as, by suffix, where it is packed."""
        return self.ref.stored()

    @cached_property
    def ref(self) -> TensorRef:
        """The tensor as it will be written (its file is not known yet)."""
        if self.whole is not None:
            return self.whole.parts[self.part]
        ref = replace(self.source.ref, name=self.name, shape=self.shape, file="", offset=0, factor=1.0)
        if self.code is not None:
            return replace(ref, packed=self.code.packed, dtype=self.code.dtype or ref.dtype)
        if ref.packed is not None and self.plain:
            return replace(ref, packed=None)
        if ref.packed is not None:
            return replace(ref, packed=replace(ref.packed, parts={}))
        return ref

    @property
    def fitted(self) -> bool:
        """Whether its values depend on what was fitted, known or not."""
        if self.whole is not None:
            return self.whole.fitted
        on_text = self.code is not None and self.code.on_text
        if self.joins:
            return any(piece.fitted for piece in self.joins)
        aligned = any(member.aligned for members in self.blend for member in members)
        return on_text or self.refit or bool(self.folds) or aligned

    @property
    def changed(self) -> bool:
        """Whether its values are others than the source's, encoding aside."""
        return self.scale != 1 or self.refit or self.filled or bool(self.blend or self.folds or self.pruned)

    @property
    def copied(self) -> bool:
        """Whether every byte of it is a byte of the source."""
        if self.joins or self.code is not None or self.whole is not None:
            return False
        return not self.changed and self.source.ref.factor == 1

    @property
    def inputs(self) -> tuple[TensorRef, ...]:
        """The tensors of the source that it is made of, experts that are averaged aside."""
        return tuple(ref for piece in self.joins for ref in piece.inputs) or (self.source.ref,)


def stored(piece: Piece) -> list[Piece]:
    """The tensors that a piece is written as: itself, or the parts of a packed matrix."""
    if piece.ref.packed is None:
        return [piece]
    if piece.code is None:
        stem = piece.name.removesuffix("weight")
        return [
            Piece(stem + suffix, ref.shape, replace(piece.source, ref=ref), place=piece.unit)
            for suffix, ref in piece.source.ref.stored().items()
        ]
    return [
        Piece(ref.name, ref.shape, piece.source, place=piece.unit, part=suffix, whole=piece)
        for suffix, ref in piece.parts.items()
    ]


def led(piece: Piece, *, leads: bool) -> Piece:
    """A packed piece that stores what it shares with others, or leaves that to one of them."""
    packed = piece.ref.packed
    assert packed is not None
    if packed.leads == leads:
        return piece
    if piece.code is not None:
        return replace(piece, code=replace(piece.code, packed=replace(piece.code.packed, leads=leads)))
    ref = piece.source.ref
    assert ref.packed is not None
    return replace(
        piece, source=replace(piece.source, ref=replace(ref, packed=replace(ref.packed, leads=leads)))
    )


def laid_out(piece: Piece, layout: Form | None) -> Piece:
    """The piece, if it is packed, in another layout, or as what it decodes to."""
    packed = piece.ref.packed
    if packed is None or layout is None or packed.layout == layout:
        return piece
    if layout == "plain":
        assert piece.code is None, "only what is stored is laid out plainly"
        return replace(piece, plain=True)
    code = piece.code or Code(packed)
    return replace(piece, code=replace(code, packed=Packed(packed.format, layout)))
