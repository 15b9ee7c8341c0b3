"""Which experts a layer can lose with the least change of its output, with the true re-routing.

After a drop the router picks the next-best experts, so what counts is ||F(X; C) - F(X)|| with the router cut
to C (NAEE, arXiv 2402.14800). Every expert's answer to a sample of tokens is computed once; each candidate
set then costs one router call and a weighted sum, both in float32 (`_only`). Sets of one size are all tried
when they are few (`EXHAUSTIVE`), else experts are removed greedily, one (per router group) at a time, which
gives a nested order for every ratio.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moespresso.core.layer import Call, Layer
from moespresso.core.stats import indexed
from moespresso.core.unit import Unit
from moespresso.statistics.base import LayerSums, Measurement, OfExperts, Rows
from moespresso.statistics.registry import statistic
from moespresso.statistics.sample import Sample

# Try all subsets of a size up to this many.
EXHAUSTIVE = 300
# A router logit that no softmax or sigmoid lets through.
_NEVER = -1e30


@statistic
@dataclass(frozen=True)
class Reconstruction(OfExperts):
    """Which experts a layer can lose: the order in which they go and, by number of experts, the best set."""

    name = "reconstruction"
    measures = ("reconstruction",)

    def begin(self, layer: Layer, measurement: Measurement) -> ReconstructionSample:
        """A sample of one layer's tokens."""
        return ReconstructionSample(layer, Sample.of(layer, measurement.num_tokens))


class ReconstructionSample(LayerSums):
    """Collects a sample of a layer's tokens, then searches for the experts to lose."""

    def __init__(self, layer: Layer, sample: Sample) -> None:
        self._layer, self._sample = layer, sample

    def add(self, call: Call) -> None:
        """Take the batch's share."""
        self._sample.add(call)

    def values(self) -> Rows:
        """Every expert's place in what was found."""
        columns, spec = search(self._layer, self._sample), self._layer.spec
        return {
            Unit(spec.index, "experts", expert): {name: column[expert] for name, column in columns.items()}
            for expert in range(spec.experts)
        }


def search(layer: Layer, sample: Sample) -> dict[str, list[float]]:
    """Per expert: `reconstruction` (position in the greedy order of removal, last removed highest) and,
    indexed by K, 1 in the best set of K and 0 outside, for every K whose sets were all tried."""
    problem = _Problem(layer, sample)
    spec = layer.spec
    values = {"reconstruction": _greedy(problem, spec.experts, spec.groups, spec.floor)}
    for keep in range(spec.floor, spec.experts):
        if spec.groups == 1 and math.comb(spec.experts, keep) <= EXHAUSTIVE:
            sets = list(itertools.combinations(range(spec.experts), keep))
            best = min(sets, key=problem.error)
            values[indexed("reconstruction", keep)] = [
                float(expert in best) for expert in range(spec.experts)
            ]
    return values


class _Problem:
    """A layer's tokens, every expert's answer to them, and the output to come close to."""

    def __init__(self, layer: Layer, sample: Sample) -> None:
        assert layer.router is not None
        self._router, self._experts = layer.router, layer.spec.experts
        self._asked, self._extra = sample.asked, sample.extra
        self._answers = sample.answers(layer)
        self._target = self._output(tuple(range(self._experts)))

    def error(self, kept: tuple[int, ...]) -> float:
        """Mean squared distance of the output with only `kept` experts from the true one."""
        return float((self._output(kept) - self._target).square().mean())

    def _output(self, kept: tuple[int, ...]) -> Tensor:
        with _only(self._router, kept, self._experts, self._asked, self._extra) as (hidden, extra):
            _, weights, index = self._router(hidden, *extra)
        chosen = self._answers.gather(1, index.unsqueeze(-1).expand(-1, -1, self._answers.shape[-1]))
        return (chosen * weights.float().unsqueeze(-1)).sum(1)


@contextmanager
def _only(
    router: nn.Module, kept: tuple[int, ...], experts: int, hidden: Tensor, extra: tuple[Tensor, ...]
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Make the router blind to all but `kept`, by a constant input feature whose weight is -1e30 for the
    others and, where selection adds a bias to the scores, a bias of -inf. Exact: what is not picked has no
    share in any sum.

    It is asked in float32, whatever the model is computed in: float16 ends long before -1e30, and nothing
    nearer is sure to be below what a router says. It is small, and so is the sample.
    """
    gone = torch.ones(experts, dtype=torch.bool, device=hidden.device)
    gone[list(kept)] = False
    saved: list[tuple[nn.Module, str, Tensor]] = []
    for module in router.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            saved.append((module, name, tensor))
            _assign(module, name, _blinded(_wide(tensor.data), gone, name))
    width = getattr(router, "hidden_dim", None)
    if width is not None:
        router.hidden_dim = width + 1
    try:
        yield (
            torch.cat([hidden.float(), hidden.new_ones(*hidden.shape[:-1], 1, dtype=torch.float32)], -1),
            tuple(_blinded(_wide(e), gone, "bias") for e in extra),
        )
    finally:
        if width is not None:
            router.hidden_dim = width
        for module, name, tensor in saved:
            _assign(module, name, tensor)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _blinded(tensor: Tensor, gone: Tensor, name: str) -> Tensor:
    if tensor.ndim == 2 and tensor.shape[0] == gone.numel():
        feature = torch.zeros(len(gone), 1, dtype=tensor.dtype, device=tensor.device)
        return torch.cat([tensor, feature.masked_fill(gone.unsqueeze(1), _NEVER)], 1)
    if "bias" in name and tensor.shape[-1] == gone.numel():
        return tensor.masked_fill(gone, -math.inf)
    return tensor


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = (
            tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        )
    else:
        module._buffers[name] = tensor


def _greedy(problem: _Problem, experts: int, groups: int, floor: int) -> list[float]:
    """Remove the least missed expert (of every group) until the floor; return each expert's rank, last
    removed highest."""
    kept, rank = set(range(experts)), [math.inf] * experts
    size, removed = experts // groups, 0
    while len(kept) - groups >= floor:
        for group in range(groups):
            inside = [expert for expert in kept if expert // size == group]
            worst = min(inside, key=lambda expert: problem.error(tuple(sorted(kept - {expert}))))
            kept.discard(worst)
            rank[worst] = float(removed)
            removed += 1
    order = {expert: removed + place for place, expert in enumerate(sorted(kept))}
    return [float(order.get(expert, 0)) if value == math.inf else value for expert, value in enumerate(rank)]
