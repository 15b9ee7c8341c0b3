"""Many candidates through the model at once: each layer is loaded once, and what candidates share is computed once.

A candidate is a set of branches that go. Up to the first branch in which two candidates differ they are the same model,
so at every layer there is one run, and one set of hidden states, per distinct *beginning*, not per candidate: a greedy
round over all n layers costs about half of n full passes, and one load of each layer. Hidden states that would not fit
in memory (`lanes_at_once`) wait in mapped files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moespresso.core.blueprint import BRANCHES, Branch
from moespresso.core.errors import UserError
from moespresso.core.layer import Layer
from moespresso.core.method import Cuts
from moespresso.model import PausedBatch, Skeleton, quirks, without
from moespresso.stream.sweep import UNWATCHED, Watch, begin, parking, rows_at_once, within

# Bytes of hidden states of all candidates together that are held in memory, whatever there is of it.
LANE_BYTES = 1 << 30


@dataclass(slots=True)
class _Lane:
    """One candidate on its way: its batches, and what it has lost so far."""

    cuts: Cuts
    batches: list[PausedBatch]
    begun: Cuts = frozenset()


@torch.inference_mode()
def state_bytes(skeleton: Skeleton, ids: Tensor, mask: Tensor) -> int:
    """Bytes of the hidden states of `ids` [N, L] between two layers, seen on the first row."""
    return len(ids) * begin(skeleton, [ids[:1]], [mask[:1]])[0].hidden.nbytes


def lanes_at_once(count: int, each: int, memory: int, folder: Path) -> tuple[int, Path | None]:
    """How many of `count` candidates go through the model together, and where their states wait (None: in memory).

    `each` is what one candidate's hidden states take, `memory` what all may take at most, both in bytes. On the disk of
    `folder` they may take half of what is free.
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
    skeleton: Skeleton,
    ids: Tensor,
    mask: Tensor,
    variants: Sequence[Collection[tuple[int, Branch]]],
    *,
    spill: Path | None = None,
    watch: Watch = UNWATCHED,
) -> Iterator[list[list[Tensor]]]:
    """Last hidden states of the model without each of `variants` (layer and branch): batches [B, L, H], in their order.

    A block goes with both its branches. With `spill`, a folder, hidden states wait in files there; they last as long as
    the context does. Raises `UserError` for families whose layers hand on more than hidden states, and when the disk is
    full.
    """
    if skeleton.config.model_type in quirks.HANDS_ON:
        raise UserError(
            f"candidates cannot be compared on {skeleton.place}: its layers hand on more than hidden states; use score=cosine"
        )
    lanes, masks = _start(skeleton, ids, mask, variants), mask.split(_rows(skeleton, ids))
    with parking(spill) as parked:
        watch.begin(len(skeleton.layers))
        for index in range(len(skeleton.layers)):
            with skeleton.layer(index) as layer:
                answers = _pass(layer, index, lanes, masks, skeleton.device, parked)
            _go_on(lanes, answers, skeleton.device, parked if index == len(skeleton.layers) - 1 else None)
            del answers
            watch.advance()
        yield [[batch.hidden.cpu() for batch in lane.batches] for lane in lanes]


def _start(
    skeleton: Skeleton, ids: Tensor, mask: Tensor, variants: Sequence[Collection[tuple[int, Branch]]]
) -> list[_Lane]:
    """All candidates at the first layer, where they hold the same hidden states."""
    rows = _rows(skeleton, ids)
    started = begin(skeleton, ids.split(rows) * len(variants), mask.split(rows) * len(variants))
    each = len(started) // len(variants)
    return [_Lane(frozenset(cuts), started[at * each : (at + 1) * each]) for at, cuts in enumerate(variants)]


def _rows(skeleton: Skeleton, ids: Tensor) -> int:
    return rows_at_once(ids.shape[1], skeleton.specs, skeleton.config.get_text_config().hidden_size)


def _pass(
    layer: Layer,
    index: int,
    lanes: list[_Lane],
    masks: Sequence[Tensor],
    device: torch.device,
    parked: Callable[[int, Tensor], Tensor],
) -> dict[Cuts, list[Tensor]]:
    """Take all candidates through one layer, each distinct beginning once; what it answers, by beginning."""
    answers: dict[Cuts, list[Tensor]] = {}
    for number, lane in enumerate(lanes):
        lane.begun |= frozenset((at, branch) for at, branch in lane.cuts if at == index)
        if lane.begun not in answers:
            # Parked under the first lane with this beginning. Lanes only ever part, so the beginning kept its number
            # from the layer before, or has one that was never used. Also what a block that goes hands on as it was is
            # parked anew: it lies in a file of the beginning it parts from, which writes there again two layers on.
            first = number * len(lane.batches)
            answers[lane.begun] = [
                parked(first + at, output)
                for at, output in enumerate(_run(layer, index, lane, masks, device))
            ]
    return answers


def _run(
    layer: Layer, index: int, lane: _Lane, masks: Sequence[Tensor], device: torch.device
) -> Iterator[Tensor]:
    """A lane's batches behind the layer, one after the other, so that each can be parked before the next."""
    gone: list[Branch] = [branch for branch in BRANCHES if (index, branch) in lane.begun]
    if len(gone) == len(BRANCHES) or (layer.spec.bodies and layer.spec.bodies.keys() <= set(gone)):
        yield from (batch.hidden for batch in lane.batches)
        return
    with without(layer.module, layer.anatomy, gone):
        for batch, valid in zip(lane.batches, masks, strict=True):
            yield within(batch.run(layer.module, batch.hidden.to(device)), valid, index)


def _go_on(
    lanes: list[_Lane],
    answers: dict[Cuts, list[Tensor]],
    device: torch.device,
    parked: Callable[[int, Tensor], Tensor] | None,
) -> None:
    """Let all candidates run on to the next layer; with `parked`, to the end, where each has states of its own."""
    for number, lane in enumerate(lanes):
        for at, (batch, output) in enumerate(zip(lane.batches, answers[lane.begun], strict=True)):
            batch.go_on(output if parked is None else output.to(device))
            if parked is not None:
                batch.hidden = parked(number * len(lane.batches) + at, batch.hidden)
