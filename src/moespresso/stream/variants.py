"""Many candidates through the model at once: each layer is loaded once, and what candidates share is computed
once.

A candidate lacks some branches, and has other weights in some layers. Up to the first in which two candidates
differ they are the same model, so at every layer there is one run, and one set of hidden states, per distinct
*beginning*, not per candidate: a greedy round over all n layers costs about half of n full passes, and one
load of each layer (and of each of its changed forms). Hidden states that would not fit in memory
(`lanes_at_once`) wait in mapped files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moespresso.core.blueprint import BRANCHES, Branch
from moespresso.core.errors import UserError
from moespresso.core.layer import Layer
from moespresso.model import MetaModel, PausedBatch, quirks, without
from moespresso.stream.sweep import UNWATCHED, Watch, begin, parking, rows_at_once, within

# Bytes of hidden states of all candidates together that are held in memory, whatever there is of it.
LANE_BYTES = 1 << 30


# Branches that go: the number of a layer, and which of it.
Cuts = frozenset[tuple[int, Branch]]
# What a candidate has become by some layer: equal beginnings are the same model so far.
Beginning = frozenset[tuple[int, Hashable]]
# Loads a layer in a changed form.
Load = Callable[[int, Hashable], AbstractContextManager[Layer]]


@dataclass(frozen=True)
class Variant:
    """A candidate: the branches that are `cut`, and by layer the form that one with other weights has
    (equal forms are equal layers)."""

    cut: Cuts = frozenset()
    forms: Mapping[int, Hashable] = field(default_factory=dict[int, Hashable])

    def at(self, index: int) -> Beginning:
        """What is done to one layer."""
        changed: Beginning = frozenset({(index, self.forms[index])} if index in self.forms else ())
        return changed | frozenset((at, branch) for at, branch in self.cut if at == index)


@dataclass(slots=True)
class _Lane:
    """One candidate on its way: its batches, and what it has become so far."""

    variant: Variant
    batches: list[PausedBatch]
    begun: Beginning = frozenset()


@dataclass(frozen=True)
class _Round:
    """One pass of all candidates over the layers."""

    meta_model: MetaModel
    lanes: list[_Lane]
    masks: Sequence[Tensor]
    parked: Callable[[int, Tensor], Tensor]
    load: Load | None


@torch.inference_mode()
def state_bytes(meta: MetaModel, ids: Tensor, mask: Tensor) -> int:
    """Bytes of the hidden states of `ids` [N, L] between two layers, seen on the first row."""
    return len(ids) * begin(meta, [ids[:1]], [mask[:1]])[0].hidden.nbytes


def lanes_at_once(count: int, each: int, memory: int, folder: Path) -> tuple[int, Path | None]:
    """How many of `count` candidates go through the model together, and where their states wait (None: in
    memory).

    `each` is what one candidate's hidden states take, `memory` what all may take at most, both in bytes. On
    the disk of `folder` they may take half of what is free.
    """
    # Before and behind the layer at hand every candidate may have states of its own; beside them, the embedding's answer.
    held = max(0, min(LANE_BYTES, memory) // each - 1) // 2
    if held >= count:
        return count, None
    spilled = shutil.disk_usage(folder).free // 2 // (2 * each)
    return (min(count, spilled), folder) if spilled > held else (max(1, held), None)


@contextmanager
@torch.inference_mode()
def sweep_variants(
    meta: MetaModel,
    text: tuple[Tensor, Tensor],
    variants: Sequence[Variant],
    *,
    load: Load | None = None,
    spill: Path | None = None,
    watch: Watch = UNWATCHED,
) -> Iterator[list[list[Tensor]]]:
    """Last hidden states of the model as each of `variants`: batches [B, L, H], in their order.

    `text` is ids and mask [N, L]. A block goes with both its branches; layers that have another form are
    loaded by `load`. With `spill`, a folder, hidden states wait in files there; they last as long as the
    context does. Raises `UserError` for families whose layers hand on more than hidden states, and when the
    disk is full.
    """
    if meta.config.model_type in quirks.HANDS_ON:
        raise UserError(
            f"candidates cannot be compared on {meta.place}: its layers hand on more than hidden states; use score=cosine"
        )
    ids, mask = text
    lanes, masks = _start(meta, ids, mask, variants), mask.split(_rows(meta, ids))
    with parking(spill) as parked:
        this = _Round(meta, lanes, masks, parked, load)
        watch.begin(len(meta.layers))
        for index in range(len(meta.layers)):
            answers = _pass(this, index)
            _go_on(lanes, answers, meta.device, parked if index == len(meta.layers) - 1 else None)
            del answers
            watch.advance()
        yield [[batch.hidden.cpu() for batch in lane.batches] for lane in lanes]


def _start(meta: MetaModel, ids: Tensor, mask: Tensor, variants: Sequence[Variant]) -> list[_Lane]:
    """All candidates at the first layer, where they hold the same hidden states."""
    rows = _rows(meta, ids)
    started = begin(meta, ids.split(rows) * len(variants), mask.split(rows) * len(variants))
    each = len(started) // len(variants)
    return [_Lane(variant, started[at * each : (at + 1) * each]) for at, variant in enumerate(variants)]


def _rows(meta: MetaModel, ids: Tensor) -> int:
    return rows_at_once(ids.shape[1], meta.specs, meta.config.get_text_config().hidden_size)


def _pass(this: _Round, index: int) -> dict[Beginning, list[Tensor]]:
    """Take all candidates through one layer, each distinct beginning once; what it answers, by beginning."""
    first: dict[Beginning, int] = {}
    for number, lane in enumerate(this.lanes):
        lane.begun |= lane.variant.at(index)
        first.setdefault(lane.begun, number)
    by_form: dict[Hashable, list[Beginning]] = {}
    for beginning, number in first.items():
        by_form.setdefault(this.lanes[number].variant.forms.get(index), []).append(beginning)
    answers: dict[Beginning, list[Tensor]] = {}
    for form, beginnings in by_form.items():
        with _layer(this, index, form) as layer:
            for beginning in beginnings:
                # Parked under the first lane with this beginning. Lanes only ever part, so the beginning kept its number
                # from the layer before, or has one that was never used. Also what a block that goes hands on as it was is
                # parked anew: it lies in a file of the beginning it parts from, which writes there again two layers on.
                lane = this.lanes[first[beginning]]
                place = first[beginning] * len(lane.batches)
                outputs = _run(this, layer, index, lane)
                answers[beginning] = [this.parked(place + at, output) for at, output in enumerate(outputs)]
    return answers


def _layer(this: _Round, index: int, form: Hashable) -> AbstractContextManager[Layer]:
    if form is None:
        return this.meta_model.layer(index)
    assert this.load is not None, "somebody must load layers that have another form"
    return this.load(index, form)


def _run(this: _Round, layer: Layer, index: int, lane: _Lane) -> Iterator[Tensor]:
    """A lane's batches behind the layer, one after the other, so that each can be parked before the next."""
    gone: list[Branch] = [branch for branch in BRANCHES if (index, branch) in lane.variant.cut]
    if len(gone) == len(BRANCHES) or (layer.spec.bodies and layer.spec.bodies.keys() <= set(gone)):
        yield from (batch.hidden for batch in lane.batches)
        return
    with without(layer.module, layer.anatomy, gone):
        for batch, valid in zip(lane.batches, this.masks, strict=True):
            yield within(batch.run(layer.module, batch.hidden.to(this.meta_model.device)), valid, index)


def _go_on(
    lanes: list[_Lane],
    answers: dict[Beginning, list[Tensor]],
    device: torch.device,
    parked: Callable[[int, Tensor], Tensor] | None,
) -> None:
    """Let all candidates run on to the next layer; with `parked`, to the end, where each has states of its
    own."""
    for number, lane in enumerate(lanes):
        for at, (batch, output) in enumerate(zip(lane.batches, answers[lane.begun], strict=True)):
            batch.go_on(output if parked is None else output.to(device))
            if parked is not None:
                batch.hidden = parked(number * len(lane.batches) + at, batch.hidden)
