"""Many candidates through the model at once: each layer is loaded once, and what candidates share is computed once.

A candidate is a set of branches that go. Up to the first branch in which two candidates differ they are the same model,
so at every layer there is one run per distinct *beginning*, not per candidate: a greedy round over all n layers costs
about half of n full passes, and one load of each layer. Where all their hidden states would not fit (`lanes_at_once`), they
go in waves, and each wave loads the layers again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moespresso.core.blueprint import BRANCHES, Branch
from moespresso.core.errors import UserError
from moespresso.core.layer import Layer
from moespresso.core.progress import Progress, Silent
from moespresso.model import Skeleton, Waiting, quirks, without
from moespresso.stream.sweep import begin, rows_at_once

# Bytes of hidden states of all candidates together.
LANE_BYTES = 1 << 30

Cuts = frozenset[tuple[int, Branch]]


@dataclass(slots=True)
class _Lane:
    """One candidate on its way: its batches, and what it has lost so far."""

    cuts: Cuts
    waiting: list[Waiting]
    begun: Cuts = frozenset()


def lanes_at_once(elements: int) -> int:
    """How many candidates of so many elements of hidden states go through the model together."""
    return max(1, LANE_BYTES // (4 * 2 * elements))


@torch.inference_mode()
def sweep_variants(
    skeleton: Skeleton,
    ids: Tensor,
    mask: Tensor,
    variants: Sequence[Collection[tuple[int, Branch]]],
    *,
    progress: Progress | None = None,
    label: str = "layers",
) -> list[Tensor]:
    """Last hidden states [N, L, H] of the model without each of `variants` (layer and branch), in their order.

    A block goes with both its branches. Raises `UserError` for families whose layers hand on more than hidden states.
    """
    if skeleton.config.model_type in quirks.HANDS_ON:
        raise UserError(
            f"candidates cannot be compared on {skeleton.place}: its layers hand on more than hidden states; use score=cosine"
        )
    watch = progress or Silent()
    rows = rows_at_once(ids.shape[1], skeleton.specs, skeleton.config.get_text_config().hidden_size)
    started = begin(skeleton, ids.split(rows) * len(variants), mask.split(rows) * len(variants))
    each = len(started) // len(variants)
    lanes = [_Lane(frozenset(cuts), started[at * each : (at + 1) * each]) for at, cuts in enumerate(variants)]
    watch.stage(label, len(skeleton.layers))
    for index in range(len(skeleton.layers)):
        with skeleton.layer(index) as layer:
            _pass(layer, index, lanes)
        watch.advance()
    return [torch.cat([batch.hidden.cpu() for batch in lane.waiting]) for lane in lanes]


def _pass(layer: Layer, index: int, lanes: list[_Lane]) -> None:
    """Take all candidates through one layer, each distinct beginning once."""
    answers: dict[Cuts, list[Tensor]] = {}
    for lane in lanes:
        lane.begun |= frozenset((at, branch) for at, branch in lane.cuts if at == index)
        if lane.begun not in answers:
            answers[lane.begun] = _run(layer, index, lane)
    for lane in lanes:
        for batch, output in zip(lane.waiting, answers[lane.begun], strict=True):
            batch.go_on(output)


def _run(layer: Layer, index: int, lane: _Lane) -> list[Tensor]:
    gone: list[Branch] = [branch for branch in BRANCHES if (index, branch) in lane.begun]
    if len(gone) == len(BRANCHES) or (layer.spec.bodies and layer.spec.bodies.keys() <= set(gone)):
        return [batch.hidden for batch in lane.waiting]
    with without(layer.module, layer.anatomy, gone):
        return [batch.run(layer.module) for batch in lane.waiting]
