"""What the weights alone tell about an expert: no text, one pass over the shards.

AIMER (arXiv 2603.18492) scores an expert by mean|W| / rms(W) over gate, up and down projections together; the
sums of |W| and W^2 per expert are gathered tensor by tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor
from torch.linalg import vector_norm

from moespresso.build import Tensors, View
from moespresso.core.progress import Progress
from moespresso.core.unit import Unit
from moespresso.statistics.base import OfWeights, Rows
from moespresso.statistics.registry import statistic


@statistic
@dataclass(frozen=True)
class Weights(OfWeights):
    """Sums over the weights of every expert."""

    name = "weights"
    measures = ("mean_abs", "rms")

    def measure(self, view: View, tensors: Tensors, progress: Progress) -> Rows:
        """`mean_abs` and `rms` of each expert of `view`, by position."""
        progress.stage("experts' weights", len(view.pieces))

        def matrices() -> Iterator[tuple[Unit, Tensor]]:
            for piece in view.pieces:
                progress.advance()
                if piece.source.unit.part == "experts":
                    yield replace(piece.unit, matrix=piece.source.unit.matrix), tensors.whole(piece)

        return spread(matrices())


def spread(matrices: Iterable[tuple[Unit, Tensor]]) -> Rows:
    """`mean_abs` and `rms` of each expert over all of its `matrices`, biases aside; of a stack [E, out, in]
    those of every expert in it."""
    sums: dict[Unit, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for unit, matrix in matrices:
        if not (unit.matrix or "").endswith("_bias"):
            _add(sums, unit, matrix)
    return {unit: {"mean_abs": total / count, "rms": (squares / count) ** 0.5}
            for unit, (count, total, squares) in sums.items()}  # fmt: skip


def _add(sums: dict[Unit, list[float]], unit: Unit, tensor: Tensor) -> None:
    parts = list(enumerate(tensor)) if unit.expert is None else [(unit.expert, tensor)]
    for expert, part in parts:
        rows = part.float()
        total = sums[Unit(unit.layer, "experts", expert)]
        total[0] += rows.numel()
        # Norms row by row, added up in float64: at memory speed, without losing digits in one long float32 sum.
        total[1] += float(vector_norm(rows, 1, dim=-1).double().sum())
        total[2] += float(vector_norm(rows, 2, dim=-1).double().square().sum())
