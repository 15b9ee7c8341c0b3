"""AutoRound made for experts: how each weight is rounded is learned, for all experts of a layer at once.

    minimise  mean over tokens of |sum_e g_e (E_e(x) - Ê_e(x))|^2     over V in [-1/2, 1/2] and ranges, by
              signed descent

with the routing as it is. Nearest rounding takes every error for itself; here errors of one expert make up
for each other, gate, up and down for each other, and the experts that share a token too (SignRound, arXiv
2309.05516). The descent starts from the searched grid and follows the signs of the slopes by ever smaller
steps; what was best on one fixed sample of the tokens is kept, so that sample's error is never above the
start's. An answer of least error is too short, though, and that adds up from layer to layer: at last the
scales of down are lengthened until sum y ŷ = sum y^2 in every channel of the sum over experts. Experts that
no token reaches are rounded by HQQ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.registry import method
from moespresso.formats import searched
from moespresso.kernels import RoutedExperts, autoround, hqq
from moespresso.methods._on_text import LayerContext, LayerResult, OnText, patched
from moespresso.methods._quantization import Quantization

# How many tokens parameters are judged on, and how often.
_JUDGED = 4096
_LOOKS = 8


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRound(Quantization, OnText):
    """Settings of one AutoRound.

    iterations: steps of the descent.
    rate: how far offsets move in the first step, times the number of iterations; steps shrink to nothing.
    range_rate: the same for the ranges of groups; 0 leaves them as they are searched.
    batch: tokens seen in one step.
    unbiased: lengthen what the experts of a layer answer, channel by channel, by what rounding took from it.
    """

    kind: ClassVar[str] = "autoround"
    able: ClassVar[tuple[str, ...]] = ("experts",)
    iterations: int = 200
    rate: float = 1.0
    range_rate: float = 1.0
    batch: int = 512
    unbiased: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        Quantization.__post_init__(self)
        if self.iterations < 0 or self.batch < 1:
            raise UserError(
                f"autoround: iterations={self.iterations} must not be negative and batch={self.batch} not below 1"
            )
        for name in ("rate", "range_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"autoround: {name}={getattr(self, name)} must not be negative")

    def solve(self, context: LayerContext) -> LayerResult:
        """Codes of all experts of one layer."""
        experts = context.experts
        assert experts is not None
        result = LayerResult()
        with torch.inference_mode(False), torch.no_grad():
            up, down = self._start(context, "up"), self._start(context, "down")
            if len(experts.hidden):
                _Descent(self, experts, up, down).run()
            result.numbers |= {"up": up.codes(), "down": down.codes()}
        _help_empty(context, experts, result)
        return result

    def _start(self, context: LayerContext, name: str) -> autoround.LearnedRounding:
        weights, format = getattr(context.experts, name).float(), context.formats[name]
        return autoround.LearnedRounding(weights, searched(weights, format, context.dtypes[name]), format)


def _help_empty(context: LayerContext, experts: RoutedExperts, result: LayerResult) -> None:
    """Experts that no token reaches learn nothing: HQQ needs no text."""
    empty = (experts.tokens == 0).nonzero().flatten().tolist()
    for name in ("up", "down") if empty else ():
        weights = getattr(experts, name)[empty].float()
        helped = hqq.quantize(weights, context.formats[name], context.dtypes[name])
        result.numbers[name] = patched(result.numbers[name], empty, helped)
    result.remedies |= dict.fromkeys(empty, "hqq")


class _Descent:
    """Learns the rounding of one layer's experts, and leaves the best that it has seen."""

    def __init__(
        self,
        step: AutoRound,
        experts: RoutedExperts,
        up: autoround.LearnedRounding,
        down: autoround.LearnedRounding,
    ) -> None:
        self._step, self._experts, self._up, self._down = step, experts, up, down
        self._order = torch.randperm(len(experts.hidden), generator=torch.Generator().manual_seed(0))
        self._order = self._order.to(experts.hidden.device)
        self._judged = self._order[:_JUDGED].split(step.batch)
        whole = experts.up.float().unbind(), experts.down.float().unbind()
        # What the experts answer as they are: as much memory as what they are given.
        self._answers = torch.empty(experts.hidden.shape, device=experts.hidden.device)
        for tokens in self._order.split(step.batch):
            self._answers[tokens] = autoround.routed_sum(experts, *whole, tokens)

    def run(self) -> None:
        """All steps."""
        count = self._step.iterations
        lowest, best = self.loss(), self._kept()
        looks = {count * look // _LOOKS for look in range(1, _LOOKS + 1)}
        for number in range(count):
            self._move(self._batch(number), (1 - number / count) / count)
            if number + 1 in looks and (found := self.loss()) < lowest:
                lowest, best = found, self._kept()
        self._up.offsets, self._down.offsets = best
        if self._step.unbiased:
            self._down.lengthen(self.shrinkage())

    def loss(self) -> float:
        """Squared error of the routed sum over the sample."""
        up, down = self._up.decoded().unbind(), self._down.decoded().unbind()
        total = 0.0
        for tokens in self._judged:
            error = autoround.routed_sum(self._experts, up, down, tokens) - self._answers[tokens]
            total += float(error.square().sum(dtype=torch.float64))
        return total

    def shrinkage(self) -> Tensor:
        """What each channel [H] of the answer must be multiplied with so that sum y ŷ = sum y^2 over the
        sample."""
        up, down = self._up.decoded().unbind(), self._down.decoded().unbind()
        own = found = torch.zeros(len(down[0]), device=self._order.device)
        for tokens in self._judged:
            wanted = self._answers[tokens]
            own = own + wanted.square().sum(0)
            found = found + (wanted * autoround.routed_sum(self._experts, up, down, tokens)).sum(0)
        return own / found

    def _kept(self) -> tuple[autoround.Offsets, autoround.Offsets]:
        return self._up.offsets.copy(), self._down.offsets.copy()

    def _batch(self, number: int) -> Tensor:
        """The tokens of a step: one stretch of the shuffled tokens after the other, round and round."""
        size = min(self._step.batch, len(self._order))
        places = torch.arange(number * size, (number + 1) * size, device=self._order.device)
        return self._order[places % len(self._order)]

    def _move(self, tokens: Tensor, share: float) -> None:
        with torch.enable_grad():
            up, down = autoround.gradients(
                self._experts, self._up.decoded(), self._down.decoded(), tokens, self._answers[tokens]
            )
        self._up.step(up, self._step.rate * share, self._step.range_rate * share)
        self._down.step(down, self._step.rate * share, self._step.range_rate * share)
