"""Bytes on disk to tensors, one at a time and never more than asked for.

Shards are mapped into memory read-only: the pages belong to the file cache, not to the process, until
somebody asks for a copy. A matrix that is stored packed is decoded from its parts.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.formats import codec_in, times

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
# Shared parts that are kept: those of gate and up of one layer.
_LENT = 2

# torch warns, once in a process, that tensors over read-only memory must not be written to. Nobody does.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(1), dtype=torch.uint8)


class Reader:
    """Opens the shards of one folder as they are needed; use it as a context manager to let them go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, mmap.mmap] = {}
        self._lent: dict[tuple[str, int], torch.Tensor] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the files go. Tensors handed out may still look into a map, which is freed once they are
        gone."""
        self._maps.clear()
        self._lent.clear()

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """The tensor: a view of the mapped file (do not write into it), a copy where it has a factor, or
        zeros; a packed matrix is decoded."""
        if ref.packed is not None:
            out, width = ref.shape
            parts = self.parts(ref)
            with self.named(ref):
                return codec_in(ref).decode(parts, ref.packed.format, (out, width)).squeeze(0)
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
        return stored if ref.factor == 1 else times(stored, ref.factor)

    def parts(self, ref: TensorRef) -> dict[str, torch.Tensor]:
        """What a packed matrix is decoded from, a stack of one; what experts share in float32."""
        assert ref.packed is not None
        held = codec_in(ref)
        parts = {
            suffix: self._shared(part) if suffix in held.shared else self.tensor(part).unsqueeze(0)
            for suffix, part in ref.packed.parts.items()
        }
        return parts if ref.factor == 1 else held.rescale(parts, ref.factor)

    def _shared(self, ref: TensorRef) -> torch.Tensor:
        """What a layer's experts share, in float32, kept until other layers are read: all of its experts ask
        for it."""
        key = ref.file, ref.offset
        if key not in self._lent:
            while len(self._lent) >= _LENT:
                self._lent.pop(next(iter(self._lent)))
            self._lent[key] = self.tensor(ref).unsqueeze(0).float()
        return self._lent[key]

    def check_small(self, ref: TensorRef) -> None:
        """Raise `UserError` where the zeros or groups of a matrix that is stored packed contradict its
        format."""
        assert ref.packed is not None
        out, width = ref.shape
        held = codec_in(ref)
        parts = {
            suffix: self.tensor(part).unsqueeze(0)
            for suffix, part in ref.packed.parts.items()
            if suffix in held.small
        }
        with self.named(ref):
            held.check_small(parts, ref.packed.format, (out, width))

    @contextmanager
    def named(self, ref: TensorRef) -> Generator[None]:
        """Say which matrix it is that cannot be decoded."""
        try:
            yield
        except UserError as error:
            raise UserError(f"{self._folder}: {ref.name}: {error}") from error

    def will_need(self, ref: TensorRef) -> None:
        """Tell the kernel that a tensor is asked for soon."""
        start = ref.offset // mmap.PAGESIZE * mmap.PAGESIZE
        if ref.packed is None and ref.nbytes and ref.file:
            self._map(ref.file).madvise(mmap.MADV_WILLNEED, start, ref.offset + ref.nbytes - start)

    def drop_pages(self, file: str) -> None:
        """Tell the kernel that the mapped pages of `file` are not needed any more by this process."""
        if file in self._maps:
            self._maps[file].madvise(mmap.MADV_DONTNEED)

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            with (self._folder / file).open("rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def count_nonfinite(chunk: torch.Tensor) -> int:
    """Number of NaN and infinities; one pass at memory speed tells that there are none (both show in the
    extremes)."""
    if not chunk.is_floating_point() or chunk.numel() == 0:
        return 0
    values = chunk if chunk.element_size() > 1 else chunk.float()
    if all(bool(extreme.isfinite()) for extreme in torch.aminmax(values)):
        return 0
    return int((~values.isfinite()).sum())
