"""Tensors of a result, made from those of the source as a plan says: taken, averaged, mapped, pruned, packed.

`Tensors` reads what a `Piece` needs and answers with the piece as a whole, or chunk by chunk as it is
written: nothing is held for longer than a matrix. `Lazy` is one that has not been made yet: it answers
`lazy[...]`, which is all that the layer loader of transformers wants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moespresso.checkpoint import TORCH_DTYPES, Reader, count_nonfinite
from moespresso.core.blueprint import Entry, TensorRef
from moespresso.core.errors import NonFiniteError
from moespresso.core.method import Prunes, Quantizes
from moespresso.effect import Encoding, Fold, Member, Piece, Slim
from moespresso.formats import Codec, codec_in, codec_named, times

_CHUNK = 16 << 20
_AHEAD = 64 << 20


class Tensors:
    """Makes pieces from the files of one folder; use it as a context manager to let the files go.

    Whatever is read for a piece is looked at for NaN and infinities: they raise `NonFiniteError`, or with
    `allow_nonfinite` are counted in `nonfinite` by the source's name.
    """

    def __init__(self, folder: Path, *, allow_nonfinite: bool = False) -> None:
        self._folder, self._allow = folder, allow_nonfinite
        self.reader = Reader(folder)
        self.nonfinite: dict[str, int] = {}
        self._parts: dict[tuple[str, str], Tensor] = {}
        self._strong: tuple[str, Tensor] = "", torch.empty(0)  # which channels stay, of the last expert

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()
        self._parts.clear()

    def whole(self, piece: Piece) -> Tensor:
        """The tensor as a plan leaves it, decoded (a view of the mapped file where nothing is done to it)."""
        if piece.encoding is not None:
            codec, format = codec_named(piece.encoding.layout), piece.encoding.format
            return codec.decode(self._encode_parts(piece), format, two(piece.shape)).squeeze(0)
        if piece.take is None and piece.copied:
            tensor = self.reader.tensor(piece.source.ref)
            self._look(piece, tensor)
            return _as_plain(piece, tensor)
        return torch.cat([*self.chunks(piece)]).view(piece.shape)

    def chunks(self, piece: Piece) -> Iterator[Tensor]:
        """The piece's elements in stored order, as flat tensors of its dtype and bounded size."""
        if piece.joins:
            for joined in piece.joins:
                yield from self.chunks(joined)
            return
        if piece.matrix is not None:
            yield self._part(piece.matrix, piece.part).reshape(-1)
            return
        if piece.slim is not None:
            yield self._slimmed(piece, piece.slim).reshape(-1)
            return
        if piece.filled:
            yield self._with_zeros(piece).reshape(-1)
            return
        if piece.pruned:
            yield self._pruned_values(piece).reshape(-1)
            return
        if piece.values is not None:
            flat = piece.values.to(TORCH_DTYPES[piece.ref.dtype]).reshape(-1)
            yield flat if piece.scale == 1 else times(flat, piece.scale)
            return
        assert not piece.refit, f"{piece.name} was never fitted"
        if piece.blend or piece.folds:
            for values in self._compute(piece):
                yield values.to(TORCH_DTYPES[piece.ref.dtype]).reshape(-1)
            return
        yield from self._copy_rows(piece)

    def _copy_rows(self, piece: Piece) -> Iterator[Tensor]:
        """Bytes of the source, of some rows or all, scaled."""
        tensor = self.reader.tensor(piece.source.ref)
        if piece.take is None:
            slabs = [tensor]
        elif piece.axis == 0:
            slabs = [tensor[start:stop] for start, stop in runs(piece.take)]
        else:
            assert piece.axis is not None
            slabs = [tensor.index_select(piece.axis, torch.tensor(piece.take))]
        for slab in slabs:
            flat = slab.reshape(-1)
            step = _CHUNK // flat.element_size()
            for chunk in (flat[start : start + step] for start in range(0, flat.numel(), step)):
                self._look(piece, chunk)
                yield _as_plain(piece, chunk if piece.scale == 1 else times(chunk, piece.scale))

    def _slimmed(self, piece: Piece, slim: Slim) -> Tensor:
        """One matrix of an expert with the channels that are strongest over all of its matrices."""
        expert = slim.matrices[0].ref.name
        if self._strong[0] != expert:
            norms = [self._channel_norms(entry) for entry in slim.matrices if entry.channel_axis is not None]
            scores = torch.stack(norms).log().sum(0)
            order = torch.argsort(scores, descending=True, stable=True)
            self._strong = expert, order[: slim.channels].sort().values
        axis = piece.source.channel_axis
        assert axis is not None
        tensor = self.reader.tensor(piece.source.ref)
        self._look(piece, tensor)
        return tensor.index_select(axis, self._strong[1])

    def _channel_norms(self, entry: Entry) -> Tensor:
        """How much each channel has of a matrix [out, in]: the norm of its row or column."""
        values = self.reader.tensor(entry.ref).double()
        return values.norm(dim=-2 if entry.channel_axis == -1 else -1) if values.dim() > 1 else values.abs()

    # Packed matrices

    def _part(self, matrix: Piece, part: str) -> Tensor:
        """One of the tensors that a matrix is packed as. Writing asks for those of wide dtypes first; the
        others are kept until they are asked for."""
        how = matrix.encoding
        assert how is not None
        if part == "weight_shape":  # comes before all others in a shard
            return torch.tensor(matrix.shape)
        if part in how.parts and how.factor == 1:
            return how.parts[part]
        key = matrix.name, part
        if key not in self._parts:
            self._parts |= {
                (matrix.name, name): tensor.squeeze(0) for name, tensor in self._encode_parts(matrix).items()
            }
        return self._parts.pop(key)

    def _encode_parts(self, matrix: Piece) -> Mapping[str, Tensor]:
        """All parts of a packed matrix, a stack of one."""
        how = matrix.encoding
        assert how is not None
        codec = codec_named(how.layout)
        parts = self._encode_unscaled(matrix, how, codec)
        return parts if how.factor == 1 else codec.rescale(parts, how.factor)

    def _encode_unscaled(self, matrix: Piece, how: Encoding, codec: Codec) -> Mapping[str, Tensor]:
        bare, dtype = replace(matrix, encoding=None), TORCH_DTYPES[matrix.ref.dtype]
        if how.parts:
            return {suffix: tensor.unsqueeze(0) for suffix, tensor in how.parts.items()}
        if how.again:
            weights = self.whole(bare).float().unsqueeze(0)
            return codec.encode(codec.nearest(weights, how.format, dtype), how.format)
        if how.by is None:
            return self._laid_out(matrix.source.ref, how, codec)
        step = how.by.step
        if isinstance(step, Quantizes):
            weights = self.whole(bare).float().unsqueeze(0)
            return codec.encode(step.quantize(weights, how.format, dtype), how.format)
        assert isinstance(step, Prunes), f"{matrix.name} was never fitted"
        return codec.encode(self.whole(bare).unsqueeze(0), how.format)

    def _laid_out(self, ref: TensorRef, how: Encoding, codec: Codec) -> Mapping[str, Tensor]:
        """The numbers of a matrix that is packed already, in the layout asked for."""
        parts, before = self.reader.parts(ref), codec_in(ref)
        if before is codec:
            return parts
        with self.reader.named(ref):
            return codec.encode(before.numbers(parts, how.format, two(ref.shape)), how.format)

    # New values

    def _with_zeros(self, piece: Piece) -> Tensor:
        """The piece in the first corner of its shape, zeros around it."""
        values = self.whole(replace(piece, filled=False, shape=piece.source.ref.shape))
        wide = values.new_zeros(piece.shape)
        wide[tuple(slice(size) for size in values.shape)] = values
        return wide

    def _pruned_values(self, piece: Piece) -> Tensor:
        """The piece with zeros in place of what its stages prune by weights alone."""
        values = self.whole(replace(piece, pruned=()))
        for pruned in piece.pruned:
            step = pruned.stage.step
            assert isinstance(step, Prunes), f"{piece.name} was never fitted"
            values = step.prune(values.reshape(-1, *values.shape[-2:]), pruned.format).view(values.shape)
        return values

    def _compute(self, piece: Piece) -> Iterator[Tensor]:
        """A piece whose values are new, in float32: averaged, scaled, mapped, in that order. A stack of
        experts comes one by one, since each is a matrix of its own."""
        for values in self._ingredients(piece):
            result = values * piece.scale if piece.scale != 1 else values
            for fold in piece.folds:
                result = folded(result, fold)
            yield result

    def _ingredients(self, piece: Piece) -> Iterator[Tensor]:
        if piece.blend and piece.axis in (None, 0):
            yield from (self._average(piece, members) for members in piece.blend)
        elif piece.blend:
            yield torch.stack([self._average(piece, members) for members in piece.blend], piece.axis or 0)
        else:
            values = self.reader.tensor(piece.source.ref)
            self._look(piece, values)
            taken = (
                values
                if piece.take is None
                else values.index_select(piece.axis or 0, torch.tensor(piece.take))
            )
            yield from (part.float() for part in (taken if taken.ndim == 3 else [taken]))

    def _average(self, piece: Piece, members: Sequence[Member]) -> Tensor:
        total: Tensor | None = None
        for member in members:
            values = self.reader.tensor(member.entry.ref)
            self._look(piece, values)
            values = values if piece.axis is None else values.select(piece.axis, member.expert)
            part = in_order(values.float(), member) * member.share
            total = part if total is None else total + part
        assert total is not None
        return total

    def ahead(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """Go through `pieces` in order, with the system reading a little ahead (page faults alone read in
        small bites)."""
        asked, coming = 0, 0
        for number, piece in enumerate(pieces):
            while asked < len(pieces) and coming < _AHEAD:
                self.reader.will_need(pieces[asked].source.ref)
                coming += pieces[asked].source.ref.nbytes
                asked = max(asked, number) + 1
            coming -= piece.source.ref.nbytes
            yield piece

    def _look(self, piece: Piece, values: Tensor) -> None:
        count = count_nonfinite(values)
        if not count:
            return
        name = piece.source.ref.name
        if not self._allow:
            raise NonFiniteError(
                f"tensor {name} in {self._folder / piece.source.ref.file} holds {count} NaN or infinite values: repair "
                "the source, or pass --allow-nonfinite to count them as warnings and go on"
            )
        self.nonfinite[name] = self.nonfinite.get(name, 0) + count


class Lazy:
    """A piece that is made when it is indexed with `...`."""

    def __init__(self, tensors: Tensors, piece: Piece) -> None:
        self._tensors, self.piece = tensors, piece

    def __getitem__(self, index: object) -> Tensor:
        assert index is Ellipsis
        return self._tensors.whole(self.piece)


def _as_plain(piece: Piece, values: Tensor) -> Tensor:
    """Values of a matrix that is packed no longer, in the dtype that it is written in."""
    return values.to(TORCH_DTYPES[piece.ref.dtype]) if piece.plain else values


def two(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a matrix."""
    out, width = shape
    return out, width


def folded(values: Tensor, fold: Fold) -> Tensor:
    """`values` with what `fold` does to their output axis. Raises `AssertionError` when it was never
    fitted."""
    assert fold.values is not None, f"a {fold.kind} repair has no values: it was never fitted"
    factors = fold.values.float()
    if fold.kind == "bias":
        return values + factors
    moved = values.movedim(fold.axis, -1)
    return (moved @ factors.T if fold.kind == "linear" else moved * factors).movedim(-1, fold.axis)


def in_order(values: Tensor, member: Member) -> Tensor:
    """One expert's tensor with its channels in the member's order (channel c of the result is its channel
    order[c])."""
    axis, joined, order = member.entry.channel_axis, member.entry.joined, member.order
    if order is None or axis is None:
        return values
    if joined == "interleaved":
        order = torch.stack([2 * order, 2 * order + 1], 1).flatten()
    elif joined == "halves":
        order = torch.cat([order, order + len(order)])
    return values.index_select(axis, order)


def runs(numbers: tuple[int, ...]) -> list[tuple[int, int]]:
    """Half-open ranges that cover ascending `numbers`: (0, 1, 4) gives [(0, 2), (4, 5)]."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return ranges
