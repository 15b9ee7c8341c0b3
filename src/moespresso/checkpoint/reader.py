"""Bytes on disk to tensors, one at a time and never more than asked for.

Shards are mapped into memory read-only: the pages belong to the file cache, not to the process, until somebody asks
for a copy. `Lazy` is a tensor that has not been read: it answers `lazy[...]`, which is all that the layer
loader of transformers wants, and applies what a plan does to the tensor (rows taken, a scale) on the way.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import NonFiniteError, UserError
from moespresso.core.format import OWN_LAYOUTS, SHARED_PARTS
from moespresso.effect import Fold, Member, Piece
from moespresso.formats import (
    SMALL_PARTS,
    Codes,
    check_small,
    decode,
    decode_parts,
    decode_plain,
    encode_parts,
    encode_plain,
    round_nearest,
)

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_CHUNK = 16 << 20
# Shared parts that are kept: those of gate and up of one layer.
_LENT = 2
_AHEAD = 64 << 20

# torch warns, once in a process, that tensors over read-only memory must not be written to. Nobody does.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(1), dtype=torch.uint8)


class Reader:
    """Opens the shards of one folder as they are needed; use it as a context manager to let them go.

    Whatever is read through `piece` or `chunks` is looked at for NaN and infinities: they raise `NonFiniteError`, or
    with `allow_nonfinite` are counted in `nonfinite` by tensor name.
    """

    def __init__(self, folder: Path, *, allow_nonfinite: bool = False) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}
        self._allow = allow_nonfinite
        self.nonfinite: dict[str, int] = {}
        self._stash: dict[tuple[str, str], torch.Tensor] = {}
        self._lent: dict[tuple[str, int], torch.Tensor] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        # Tensors handed out may still look into a map; dropping our reference frees it once they are gone.
        self._maps.clear()
        self._stash.clear()
        self._lent.clear()

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """The tensor: a view of the mapped file (do not write into it), a copy where it has a factor, or zeros."""
        if ref.packed is not None and ref.packed.layout in OWN_LAYOUTS:
            parts = {suffix: self._shared(part) if suffix in SHARED_PARTS else self.tensor(part).unsqueeze(0)
                     for suffix, part in ref.parts.items()}  # fmt: skip
            whole = decode_plain(ref.packed.layout, parts, ref.packed.format, _two(ref.shape)).squeeze(0)
            return whole if ref.factor == 1 else _times(whole, ref.factor)
        if ref.packed is not None:
            return decode(self.codes_of(ref)).squeeze(0)
        if ref.dtype not in TORCH_DTYPES:
            raise UserError(
                f"{self._folder / ref.file}: {ref.name} has dtype {ref.dtype}, which torch cannot hold"
            )
        dtype = TORCH_DTYPES[ref.dtype]
        if ref.numel == 0:
            return torch.empty(ref.shape, dtype=dtype)
        if not ref.file:
            return torch.zeros(ref.shape, dtype=dtype)
        flat = torch.frombuffer(self._map(ref.file), dtype=torch.uint8, count=ref.nbytes, offset=ref.offset)
        # Shards of other writers may be unaligned; torch refuses such views, so copy those.
        flat = flat.clone() if ref.offset % dtype.itemsize else flat
        stored = flat.view(dtype).view(ref.shape)
        return stored if ref.factor == 1 else _times(stored, ref.factor)

    def _shared(self, ref: TensorRef) -> torch.Tensor:
        """What a layer's experts share, in float32, kept until other layers are read: all of its experts ask for it."""
        key = ref.file, ref.offset
        if key not in self._lent:
            while len(self._lent) >= _LENT:
                self._lent.pop(next(iter(self._lent)))
            self._lent[key] = self.tensor(ref).unsqueeze(0).float()
        return self._lent[key]

    def drop_pages(self, file: str) -> None:
        """Tell the kernel that the mapped pages of `file` are not needed any more by this process."""
        if file in self._maps:
            self._maps[file].madvise(mmap.MADV_DONTNEED)

    def piece(self, piece: Piece) -> torch.Tensor:
        """The tensor as a plan leaves it (a view of the mapped file where nothing is done to it)."""
        if piece.code is not None and piece.code.packed.layout in OWN_LAYOUTS:
            return self._stored_small(piece)
        if piece.code is not None:
            return decode(self.codes(piece)).squeeze(0)
        if piece.take is None and piece.copied:
            tensor = self.tensor(piece.source.ref)
            self._look(piece, tensor)
            return tensor
        return torch.cat([*self.chunks(piece)]).view(piece.shape)

    def chunks(self, piece: Piece) -> Iterator[torch.Tensor]:
        """The piece's elements in stored order, as flat tensors of its dtype and bounded size."""
        if piece.joins:
            for each in piece.joins:
                yield from self.chunks(each)
            return
        if piece.whole is not None:
            yield self._part(piece.whole, piece.part).reshape(-1)
            return
        if piece.filled:
            yield self._filled(piece).reshape(-1)
            return
        if piece.pruned:
            yield self._pruned(piece).reshape(-1)
            return
        if piece.given is not None:
            flat = piece.given.to(TORCH_DTYPES[piece.ref.dtype]).reshape(-1)
            yield flat if piece.scale == 1 else _times(flat, piece.scale)
            return
        assert not piece.refit, f"{piece.name} was never fitted"
        if piece.blend or piece.folds:
            for values in self._computed(piece):
                yield values.to(TORCH_DTYPES[piece.ref.dtype]).reshape(-1)
            return
        tensor = self.tensor(piece.source.ref)
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
                yield chunk if piece.scale == 1 else _times(chunk, piece.scale)

    def codes(self, piece: Piece) -> Codes:
        """The codes of a piece that is encoded, as one matrix [1, out, in]."""
        code = piece.code
        assert code is not None
        if code.step is not None or code.again:
            plain = replace(piece, code=None)
            weights = self.piece(plain).float().unsqueeze(0)
            dtype, format = TORCH_DTYPES[piece.ref.dtype], code.packed.format
            step = code.step
            codes = (
                round_nearest(weights, format, dtype)
                if step is None
                else step.quantize(weights, format, dtype)
            )
        elif code.on_text:
            assert code.found, f"{piece.name} was never fitted"
            parts = {suffix: tensor.unsqueeze(0) for suffix, tensor in code.found.items()}
            codes = decode_parts("compressed-tensors", parts, code.packed.format, _two(piece.shape))
        else:
            codes = self.codes_of(piece.source.ref)
        return codes if code.factor == 1 else replace(codes, scale=_times(codes.scale, code.factor))

    def codes_of(self, ref: TensorRef) -> Codes:
        """The codes of a matrix that is stored packed."""
        assert ref.packed is not None
        parts = {suffix: self.tensor(part).unsqueeze(0) for suffix, part in ref.stored().items()}
        with self._named(ref):
            codes = decode_parts(ref.packed.layout, parts, ref.packed.format, _two(ref.shape))
        return codes if ref.factor == 1 else replace(codes, scale=_times(codes.scale, ref.factor))

    def check_small(self, ref: TensorRef) -> None:
        """Raise `UserError` where the zeros or groups of a matrix that is stored packed contradict its format."""
        assert ref.packed is not None
        parts = {
            suffix: self.tensor(part).unsqueeze(0)
            for suffix, part in ref.packed.parts.items()
            if suffix in SMALL_PARTS
        }
        with self._named(ref):
            check_small(ref.packed.layout, parts, ref.packed.format, _two(ref.shape))

    @contextmanager
    def _named(self, ref: TensorRef) -> Generator[None]:
        """Say which matrix it is that cannot be decoded."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self._folder}: {ref.name}: {error}") from error

    def _part(self, whole: Piece, part: str) -> torch.Tensor:
        """One of the tensors that an encoded matrix is stored as. Writing asks for the largest first; the others are kept
        until they are asked for."""
        if part == "weight_shape":  # comes before all others in a shard
            return torch.tensor(whole.shape)
        key, code = (whole.name, part), whole.code
        assert code is not None
        known = code.packed.layout == "compressed-tensors" or code.packed.layout in OWN_LAYOUTS
        if part in code.found and known and code.factor == 1:
            return code.found[part]  # it was found in this very form
        if key not in self._stash:
            made = self._encoded(whole)
            self._stash |= {(whole.name, name): tensor.squeeze(0) for name, tensor in made.items()}
        return self._stash.pop(key)

    def _encoded(self, whole: Piece) -> dict[str, torch.Tensor]:
        """All tensors that an encoded matrix is stored as, a stack of one."""
        code = whole.code
        assert code is not None
        if code.packed.layout in ("bitmask", "slices"):
            return encode_plain(self._stored_small(whole).unsqueeze(0), code.packed.format)
        if code.packed.layout == "factors":
            return {name: (_times(tensor, code.factor) if name == "weight_left" else tensor).unsqueeze(0)
                    for name, tensor in code.found.items()}  # fmt: skip
        return encode_parts(code.packed.layout, self.codes(whole))

    def _stored_small(self, piece: Piece) -> torch.Tensor:
        """A piece that is stored as less than it is: as its parts were found, or what its steps leave of it."""
        code = piece.code
        assert code is not None
        if not code.on_text:
            return self.piece(replace(piece, code=None))
        assert code.found, f"{piece.name} was never fitted"
        parts = {suffix: tensor.unsqueeze(0) for suffix, tensor in code.found.items()}
        whole = decode_plain(code.packed.layout, parts, code.packed.format, _two(piece.shape)).squeeze(0)
        return whole if code.factor == 1 else _times(whole, code.factor)

    def _filled(self, piece: Piece) -> torch.Tensor:
        """The piece in the first corner of its shape, zeros around it."""
        values = self.piece(replace(piece, filled=False, shape=piece.source.ref.shape))
        wide = values.new_zeros(piece.shape)
        wide[tuple(slice(size) for size in values.shape)] = values
        return wide

    def _pruned(self, piece: Piece) -> torch.Tensor:
        """The piece with what its steps prune as zeros."""
        values = self.piece(replace(piece, pruned=()))
        for step, format in piece.pruned:
            values = step.prune(values.reshape(-1, *values.shape[-2:]), format).view(values.shape)
        return values

    def _computed(self, piece: Piece) -> Iterator[torch.Tensor]:
        """A piece whose values are new, in float32: averaged, scaled, mapped, in that order. A stack of experts comes one
        by one, since each is a matrix of its own."""
        for values in self._ingredients(piece):
            result = values * piece.scale if piece.scale != 1 else values
            for fold in piece.folds:
                result = folded(result, fold)
            yield result

    def _ingredients(self, piece: Piece) -> Iterator[torch.Tensor]:
        if piece.blend and piece.axis in (None, 0):
            yield from (self._average(piece, members) for members in piece.blend)
        elif piece.blend:
            yield torch.stack([self._average(piece, members) for members in piece.blend], piece.axis or 0)
        else:
            values = self.tensor(piece.source.ref)
            self._look(piece, values)
            taken = (
                values
                if piece.take is None
                else values.index_select(piece.axis or 0, torch.tensor(piece.take))
            )
            yield from (part.float() for part in (taken if taken.ndim == 3 else [taken]))

    def _average(self, piece: Piece, members: Sequence[Member]) -> torch.Tensor:
        total: torch.Tensor | None = None
        for member in members:
            values = self.tensor(member.entry.ref)
            self._look(piece, values)
            values = values if piece.axis is None else values.select(piece.axis, member.expert)
            part = in_order(values.float(), member) * member.share
            total = part if total is None else total + part
        assert total is not None
        return total

    def ahead(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """Go through `pieces` in order, with the kernel reading a little ahead (page faults alone read in small bites)."""
        asked, coming = 0, 0
        for number, piece in enumerate(pieces):
            while asked < len(pieces) and coming < _AHEAD:
                self._will_need(pieces[asked].source.ref)
                coming += pieces[asked].source.ref.nbytes
                asked = max(asked, number) + 1
            coming -= piece.source.ref.nbytes
            yield piece

    def _will_need(self, ref: TensorRef) -> None:
        start = ref.offset // mmap.PAGESIZE * mmap.PAGESIZE
        if ref.packed is None and ref.nbytes and ref.file:
            self._map(ref.file).madvise(mmap.MADV_WILLNEED, start, ref.offset + ref.nbytes - start)

    def _look(self, piece: Piece, values: torch.Tensor) -> None:
        count = count_nonfinite(values)
        if not count:
            return
        name = piece.source.ref.name
        if not self._allow:
            raise NonFiniteError(
                f"tensor {name} in {self._folder / piece.source.ref.file} holds {count} NaN or infinite values: repair "
                "the source, or pass --allow-nonfinite to count them as trouble and go on"
            )
        self.nonfinite[name] = self.nonfinite.get(name, 0) + count

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with (self._folder / file).open("rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


class Lazy:
    """A piece that is read when it is indexed with `...`."""

    def __init__(self, reader: Reader, piece: Piece) -> None:
        self._reader, self.piece = reader, piece

    def __getitem__(self, index: object) -> torch.Tensor:
        assert index is Ellipsis
        return self._reader.piece(self.piece)


def _two(shape: tuple[int, ...]) -> tuple[int, int]:
    out, width = shape
    return out, width


def _times(values: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply in float32, then back: powers of two are exact."""
    return (values.float() * factor).to(values.dtype)


def folded(values: torch.Tensor, fold: Fold) -> torch.Tensor:
    """`values` with what `fold` does to their output axis. Raises `AssertionError` when it was never fitted."""
    assert fold.values is not None, f"a {fold.kind} repair has no values: it was never fitted"
    given = fold.values.float()
    if fold.kind == "bias":
        return values + given
    moved = values.movedim(fold.axis, -1)
    return (moved @ given.T if fold.kind == "linear" else moved * given).movedim(-1, fold.axis)


def in_order(values: torch.Tensor, member: Member) -> torch.Tensor:
    """One expert's tensor with its channels in the member's order (channel c of the result is its channel order[c])."""
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
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def count_nonfinite(chunk: torch.Tensor) -> int:
    """Number of NaN and infinities; one pass at memory speed tells that there are none (both show in the extremes)."""
    if not chunk.is_floating_point() or chunk.numel() == 0:
        return 0
    values = chunk if chunk.element_size() > 1 else chunk.float()
    if all(bool(extreme.isfinite()) for extreme in torch.aminmax(values)):
        return 0
    return int((~values.isfinite()).sum())
