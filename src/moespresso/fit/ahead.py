"""Which experts the layers that predict tokens further ahead keep, where the trunk loses some.

They are not run: their experts are ranked by AIMER (arXiv 2603.18492), - mean|W| / rms(W) over the weights of
each, which needs no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from moespresso.build import Tensors
from moespresso.core.blueprint import Entry
from moespresso.core.plan import Plan
from moespresso.core.unit import Unit
from moespresso.effect import Piece, kept_ahead, mixtures_ahead, size_left, strongest
from moespresso.fit.job import Job
from moespresso.statistics import spread


def choose_ahead(job: Job, plan: Plan) -> tuple[Plan, list[str]]:
    """The plan with the experts that prediction layers keep, where it lacks them, and a note that says how
    they were chosen."""
    blueprint = job.view.source
    count = size_left(plan, blueprint).experts if blueprint.moe_layers else 0
    mixtures = mixtures_ahead(blueprint)
    open_layers = [layer for layer, kept in kept_ahead(plan, blueprint).items()
                   if layer not in plan.mtp.keep and len(kept) < blueprint.moe_layers[-1].experts]  # fmt: skip
    if not open_layers:
        return plan, []
    groups = max(layer.groups for layer in blueprint.moe_layers)
    with job.tensors() as tensors:
        chosen = {layer: strongest(_scores(mixtures[layer], tensors), count, groups) for layer in open_layers}
    names = ", ".join(map(str, open_layers))
    note = (
        f"prediction layers ({names}): the {count} experts that each keeps were ranked by AIMER, from their own weights alone; "
        "they were not run on text"
    )
    return replace(plan, mtp=replace(plan.mtp, keep={**plan.mtp.keep, **chosen})), [note]


def _scores(entries: Sequence[Entry], tensors: Tensors) -> list[float]:
    """AIMER of every expert of one prediction layer."""

    def matrices() -> Iterator[tuple[Unit, Tensor]]:
        for entry in entries:
            if entry.ahead is not None and entry.ahead.part == "experts":
                yield entry.ahead, tensors.whole(Piece(entry.ref.name, entry.ref.shape, entry))

    rows = sorted(spread(matrices()).items())
    return [-row["mean_abs"] / row["rms"] if row["rms"] else float("-inf") for _, row in rows]
