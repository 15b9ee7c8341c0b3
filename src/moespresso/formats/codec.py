"""How matrices lie in a file: one codec for each layout, and all that anybody needs to know of it.

A `Format` says which numbers stand for a matrix; a codec says which tensors those are stored as (its parts),
turns weights into them and back, and answers what differs from layout to layout: what it can hold, what a
stock engine makes of it, what may be done to it afterwards, and how the config and people name it. So nobody
else asks what kind a format is of, and a new number format is one file: a class under `@codec`, here or in a
package of the user's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from moespresso.core.blueprint import Packed, TensorRef
from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.format import Format

# What a matrix is stored as: suffix -> tensor [N, ...], N matrices at once.
Parts = Mapping[str, Tensor]
# Suffix -> shape and safetensors dtype of what one matrix is stored as.
Shapes = dict[str, tuple[tuple[int, ...], str]]
# Why stock transformers does not read a packed matrix.
Obstacle = Literal["", "own", "order", "zeros"]

FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_NAMES = FLOATS | {torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8", torch.int8: "I8",
                   torch.float8_e4m3fn: "F8_E4M3"}  # fmt: skip


class Codec(ABC):
    """One layout of packed matrices. Matrices are [N, out, in], or `shape` (out, in) of one.

    `parts` are all tensors that it may store, by the suffix that stands in the place of `weight`; the first
    is in every matrix, and `scaled` the one that a factor is multiplied into, whose dtype is the matrix's. Of
    `shared` parts the experts of a layer store one; `small` ones say how others are read.
    """

    layout: ClassVar[str]
    kinds: ClassVar[frozenset[str]]
    parts: ClassVar[tuple[str, ...]]
    scaled: ClassVar[str]
    shared: ClassVar[frozenset[str]] = frozenset()
    small: ClassVar[frozenset[str]] = frozenset()
    # Whether matrices of its kinds are laid out so first, before anything is exported.
    first: ClassVar[bool] = True
    # Whether there is anything to pack at all.
    packs: ClassVar[bool] = True
    # Whether each value is one of few levels: then no weight can be pruned afterwards.
    rounds: ClassVar[bool] = False
    # Whether the matrix is fitted as a whole: then no weight may have been pruned before.
    fitted: ClassVar[bool] = False
    # The library whose section of the config says it; empty: moespresso's own, which no other reads.
    engine: ClassVar[str] = ""
    # Whether one section of the config says one format for all matrices, and in which dtype its engine computes.
    one_format: ClassVar[bool] = False
    computes_in: ClassVar[str] = ""
    # The safetensors dtype that matrices are written in when they are no longer packed; empty: that of what is scaled.
    decoded: ClassVar[str] = ""
    # Whether a scale of zero is a part of the matrix that is zero, and no damage.
    zero_scales: ClassVar[bool] = False
    # The settings of a format that its parts depend on, in a refusal; and what is stored, in another.
    said_by: ClassVar[str] = "the format"
    title: ClassVar[str] = ""
    # What a reader of a result should know of its engine.
    tried: ClassVar[str] = ""
    # Settings of a format that the config says; what it does not say is the default.
    settings: ClassVar[tuple[str, ...]] = ("group_size", "density", "rank")

    @property
    def own(self) -> bool:
        """Whether moespresso alone reads it."""
        return self.packs and not self.engine

    @abstractmethod
    def shapes(self, format: Format, out: int, width: int, dtype: str) -> Shapes:
        """Every part of a matrix of `out` x `width`; `dtype` is the safetensors dtype of what is scaled."""

    @abstractmethod
    def check(self, format: Format, shape: tuple[int, ...], name: str, beside: Iterable[int] = ()) -> None:
        """Raise `UserError` where matrix `name` of `shape` cannot be stored so; the cure is one that
        matrices `beside` it, of so many inputs, can take too."""

    @abstractmethod
    def encode(self, numbers: Any, format: Format) -> dict[str, Tensor]:
        """The parts of matrices that are given as what a step finds: weights, or the numbers that this
        codec stores."""

    @abstractmethod
    def decode(self, parts: Parts, format: Format, shape: tuple[int, int]) -> Tensor:
        """The weights that parts stand for, in the dtype of what is scaled; raises `UserError` where they
        do not fit."""

    @abstractmethod
    def size(
        self, parts: Mapping[str, TensorRef], format: Format, read: Callable[[TensorRef], list[int]]
    ) -> tuple[int, int]:
        """Outputs and inputs of a stored matrix, from the shapes of its parts; `read` reads one of whole
        numbers.

        Raises `UserError` where they contradict one another, `KeyError` or `ValueError` where one is missing
        or none.
        """

    @abstractmethod
    def words(self, format: Format, ranks: str) -> str:
        """What is stored, for a report; `ranks` are those that were met."""

    def check_entry(self, format: Format, expert: int | None, matrix: str, name: str) -> None:
        """Raise `UserError` where the matrix is of a part of the model that it is not for."""
        _ = format, expert, matrix, name

    def check_small(self, parts: Parts, format: Format, shape: tuple[int, int]) -> None:
        """Raise `UserError` where the `small` parts contradict the format."""
        _ = parts, format, shape

    def nearest(self, weights: Tensor, format: Format, dtype: torch.dtype) -> Any:
        """What stands for weights that changed after they were packed; None where they are stored plainly
        from then on."""
        _ = weights, format, dtype

    @property
    def renews(self) -> bool:
        """Whether weights that changed are encoded again."""
        return type(self).nearest is not Codec.nearest

    def check_anew(self, format: Format, shape: tuple[int, ...], name: str) -> None:
        """Raise `UserError` where a matrix of `shape` that is encoded again would be misread by an engine."""
        _ = format, shape, name

    def numbers(self, parts: Parts, format: Format, shape: tuple[int, int]) -> Any:
        """What `encode` takes, of parts: to lay the same out anew."""
        return self.decode(parts, format, shape)

    def values(self, numbers: Any, format: Format) -> Tensor:
        """The weights that numbers stand for, as they will be read; here they are the weights."""
        _ = format
        return numbers

    def cut(self, numbers: Any, expert: int, rows: slice, columns: int) -> Any:
        """The numbers of one of many experts: some of its rows, and its first columns."""
        return numbers[expert : expert + 1, rows, :columns]

    def rescale(self, parts: Parts, factor: float) -> dict[str, Tensor]:
        """The parts of the same matrices times a factor."""
        return {**parts, self.scaled: times(parts[self.scaled], factor)}

    def obstacle(self, format: Format) -> Obstacle:
        """Why stock transformers does not read such a matrix; nothing where it does, or leaves that to
        another engine."""
        _ = format
        return "own" if self.own else ""

    def loses_rows(self, format: Format) -> bool:
        """Whether rows are taken out as a whole, with the entries of a bias."""
        _ = format
        return False

    def label(self, format: Format) -> str:
        """What is counted, in a list."""
        _ = format
        return self.layout

    def unpacked(self, format: Format) -> Format:
        """What pack=false makes instead, where a step has that setting."""
        return format

    def say(self, format: Format) -> dict[str, Any]:
        """The format as the config says it."""
        return {"type": format.kind} | {name: getattr(format, name) for name in self.settings}

    def section(self, format: Format, packed: Collection[str], plain: list[str]) -> dict[str, Any]:
        """The whole section of the config, where it says `one_format` for all `packed` modules, and which
        others stay `plain`."""
        raise NotImplementedError

    def carried(self, section: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
        """The section of a result, with what stays of the one `before` that its source has in this layout."""
        _ = before
        return section

    def read_section(self, said: Mapping[str, Any]) -> Format | None:
        """The one format that such a section says; None where another room reads it (`checkpoint.section`:
        GPTQ's and AWQ's).

        Raises `UserError` for what it does not understand: a key that is passed over is gone from the result.
        """
        _ = said

    def check_parts(self, parts: Parts, format: Format, shape: tuple[int, int]) -> None:
        """Raise `UserError` where parts are missing or are not those of matrices of `shape`."""
        scaled = parts.get(self.scaled)
        dtype = "BF16" if scaled is None else FLOATS.get(scaled.dtype, "BF16")
        wanted = self.shapes(format, *shape, dtype)
        if lacking := [name for name in wanted if name not in parts]:
            raise UserError(
                f"{self.layout} stores a {lacking[0]} for every matrix, which is missing: fetch the files again"
            )
        count = parts[self.parts[0]].shape[:1]
        for name, (expected, kind) in wanted.items():
            part = parts[name]
            if part.shape != (*count, *expected) or _NAMES.get(part.dtype) != kind:
                raise UserError(
                    f"{name} is {part.dtype} {tuple(part.shape[1:])}, not {kind} {expected}: "
                    f"check {self.said_by} of the {self.layout} matrix against its config"
                )
        stated = parts.get("weight_shape")
        if stated is not None and not bool((stated == stated.new_tensor(shape)).all()):
            raise UserError(f"weight_shape does not say {shape}: fetch the files again")


_CODECS: dict[str, Codec] = {}
T = TypeVar("T", bound=Codec)


def codec(cls: type[T]) -> type[T]:
    """Register a codec under its layout."""
    _CODECS[cls.layout] = cls()
    return cls


def codecs() -> tuple[Codec, ...]:
    """All that are registered."""
    return tuple(_CODECS.values())


def codec_of(format: Format) -> Codec:
    """The codec that a format is stored by at first; raises `UserError` where there is none."""
    found = next((each for each in codecs() if each.first and format.kind in each.kinds), None)
    if found is None:
        known = [kind for each in codecs() for kind in sorted(each.kinds)]
        raise UserError(f"format kind {format.kind!r} is unknown{did_you_mean(format.kind, known)}")
    return found


def codec_named(layout: str) -> Codec:
    """The codec of a layout; raises `UserError` where there is none."""
    if layout not in _CODECS:
        raise UserError(f"layout {layout!r} is unknown{did_you_mean(layout, _CODECS)}")
    return _CODECS[layout]


def codec_in(ref: TensorRef) -> Codec:
    """The codec of a packed matrix."""
    assert ref.packed is not None
    return codec_named(ref.packed.layout)


def pack(ref: TensorRef, format: Format, layout: str, *, leads: bool = True) -> TensorRef:
    """The reference to a matrix that is to be stored in a layout, as the parts that it will be."""
    held = codec_named(layout)
    out, width = ref.shape
    stem = ref.name.removesuffix("weight")
    parts = {
        suffix: TensorRef(stem + suffix, shape, dtype, "")
        for suffix, (shape, dtype) in held.shapes(format, out, width, ref.dtype).items()
    }
    return replace(ref, packed=Packed(format, layout, parts, held.shared, leads))


def times(values: Tensor, factor: float) -> Tensor:
    """Multiply in float32, then back: powers of two are exact."""
    return (values.float() * factor).to(values.dtype)
