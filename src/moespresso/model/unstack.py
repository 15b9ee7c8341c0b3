"""Unstacking: a checkpoint that has all experts of a layer in one tensor, presented as one that has each by
itself.

transformers 5 may save a model as it lies in memory (`save_original_format=False`): one
`mlp.experts.gate_up_proj` a layer, where the family's own layout has `experts.3.gate_proj.weight` and so on,
and only that has a packed form that engines load. In a stack [E, out, in] every expert's matrix is a run of
bytes, and so are its halves where gate lies above up: each becomes a tensor by itself on the headers alone,
under the name that the library would write it with. Like conversion it is done on the `Checkpoint`, and
nothing above it knows; it is done only where a request cannot be met on the stacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile

from moespresso.checkpoint import Checkpoint
from moespresso.core.blueprint import TensorRef
from moespresso.core.format import DTYPE_BYTES
from moespresso.model.names import Names, Slice
from moespresso.model.skeleton import skeleton


@dataclass(frozen=True)
class Unstacked(Checkpoint):
    """A checkpoint with the experts of its stacks apart; plans and stats stay those of `source`."""

    source: Checkpoint = field(kw_only=True, repr=False)

    @cached_property
    def digest(self) -> str:
        """The source's: the content is the same."""
        return self.source.digest


def unstacked(checkpoint: Checkpoint) -> Unstacked | None:
    """The checkpoint in its family's own layout, or None where that has no experts by themselves, or has them
    already."""
    place = str(checkpoint.folder)
    names = skeleton(checkpoint.config, place).names
    renamed, slices = names.own_layout()
    refs = [part for ref in checkpoint.tensors.values() for part in _apart(ref, names, renamed, slices)]
    tensors = {ref.name: ref for ref in refs}
    if len(refs) == len(checkpoint.tensors) or len(tensors) < len(refs):
        return None
    return Unstacked(checkpoint.folder, checkpoint.config, tensors, checkpoint.files, source=checkpoint)


def _apart(
    ref: TensorRef, names: Names, renamed: dict[str, str], slices: dict[str, list[Slice]]
) -> Iterator[TensorRef]:
    """What a stored tensor becomes: the matrices of a stack, or itself under the name that goes with them."""
    name, pattern = names.in_memory(ref.name)
    if pattern is None and name in slices and ref.packed is None:
        yield from (_matrix(ref, part, _with_prefix(part.name, ref.name, name)) for part in slices[name])
    elif pattern is None and renamed.get(name, name) != name:
        yield replace(ref, name=_with_prefix(renamed[name], ref.name, name))
    else:
        yield ref


def _with_prefix(written: str, stored: str, name: str) -> str:
    """A name of the own layout with what the files put before the `name` in memory of what is `stored`."""
    pairs = zip(reversed(stored), reversed(name), strict=False)
    tail = len([*takewhile(lambda pair: pair[0] == pair[1], pairs)])
    before, within = stored[: len(stored) - tail], name[: len(name) - tail]
    return before + written.removeprefix(within) if written.startswith(within) else written


def _matrix(ref: TensorRef, part: Slice, name: str) -> TensorRef:
    """One expert's matrix of a stack."""
    _, height, width = ref.shape
    first, rows = int(part.first * height), int(part.share * height)
    start = int((part.expert * height + first) * width * DTYPE_BYTES[ref.dtype])
    return replace(ref, name=name, shape=(rows, width), offset=ref.offset + start)
