"""GPTQ made for experts: columns are rounded one by one, and those still to come make up for the errors so
far.

    minimise  sum over tokens of c^2 |(W - Q) x|^2     over the tokens that the router really sends to an
              expert

with c = 1, or for down c = the gate, with which its output is multiplied; gate and up share one Hessian. All
experts of a layer are solved at once (`kernels/gptq.py`; arXiv 2210.17323). Experts that no token reaches are
rounded by HQQ, those with few may be drawn towards the mean over all tokens. Down is solved on what the
rounded gate and up really hand on, and later layers on what the rounded ones before let through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.method import Sight
from moespresso.core.registry import method
from moespresso.formats import QuantizedWeights, decode
from moespresso.kernels import RoutedExperts, conditioning, gptq, hqq
from moespresso.methods._on_text import LayerContext, LayerResult, OnText, joined, patched
from moespresso.methods._quantization import Quantization

# Zeros among the weights, of all, from which on they are taken as pruned.
_PRUNED = 0.1


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(Quantization, OnText):
    """Settings of one GPTQ.

    damping: share of the mean diagonal added to every Hessian; raised tenfold where that does not do.
    act_order: round the inputs that carry most first.
    sweeps: rounds of coordinate descent on scales and codes that follow; 0 for the published algorithm.
    unbiased: lengthen the scales of each row by what rounding took from its output.
    weighted: search scales with errors weighted by what the inputs carry.
    weighting: `gate2` weights what reaches down by the square of its gate, `none` does not.
    shrink: tokens' worth of the mean over all tokens that every expert's Hessian is mixed with.
    calibrate_all_experts: show every expert every token, whatever the router says.
    sequential: later layers see what the rounded ones before let through.
    """

    kind: ClassVar[str] = "gptq"
    able: ClassVar[tuple[str, ...]] = ("experts", "shared", "attention", "dense")
    damping: float = 0.03
    act_order: bool = True
    sweeps: int = 2
    unbiased: bool = True
    weighted: bool = True
    weighting: Literal["none", "gate2"] = "none"
    shrink: float = 0.0
    calibrate_all_experts: bool = False
    sequential: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        Quantization.__post_init__(self)
        for name in ("damping", "shrink", "sweeps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"gptq: {name}={getattr(self, name)} must not be negative")

    @property
    def shows(self) -> frozenset[Sight]:
        """Every token at every expert, where that is asked for."""
        return frozenset({"all_tokens"} if self.calibrate_all_experts else ())

    def solve(self, context: LayerContext) -> LayerResult:
        """Codes of everything that is to be rounded in one layer."""
        result = LayerResult()
        if context.experts is not None:
            self._experts(context, context.experts, result)
        for name, (weight, hessian) in context.linears.items():
            codes, warnings = self.solved(
                weight[None], hessian[None], context.formats[name], context.dtypes[name]
            )
            result.numbers[name] = codes
            result.warnings += _told(warnings, lambda _, name=name: f"L{context.layer}.{name}")
            result.warnings += _refilled(weight[None], codes, f"L{context.layer}.{name}")
        return result

    def _experts(self, context: LayerContext, experts: RoutedExperts, result: LayerResult) -> None:
        ups: list[QuantizedWeights] = []
        downs: list[QuantizedWeights] = []
        pooled = experts.pooled_hessian() if self.shrink else None
        for some in experts.groups():
            empty = [expert for expert in some if not len(experts.rows(expert)[0])]
            hessians = experts.hessians_in(some)
            if pooled is not None:
                tokens = experts.tokens[some.start : some.stop]
                hessians = conditioning.shrink(hessians, tokens, pooled, self.shrink)
            up = self._rounded(context, "up", some, hessians, [] if pooled is not None else empty, result)
            rounded = decode(up).to(torch.float32)
            hessians = experts.hessians_inner(some, rounded, by_gate=self.weighting == "gate2")
            down = self._rounded(context, "down", some, hessians, empty, result)
            ups.append(up)
            downs.append(down)
            result.remedies |= dict.fromkeys(empty, "hqq")
        result.numbers |= {"up": joined(ups), "down": joined(downs)}

    def _rounded(
        self,
        context: LayerContext,
        matrix: str,
        some: range,
        hessians: Tensor,
        empty: list[int],
        result: LayerResult,
    ) -> QuantizedWeights:
        """Codes of one projection of `some` experts; `empty` ones without any token's help."""
        format, dtype = context.formats[matrix], context.dtypes[matrix]
        weights = getattr(context.experts, matrix)[some.start : some.stop].float()
        codes, warnings = self.solved(weights, hessians, format, dtype)
        result.warnings += _told(warnings, lambda number: f"L{context.layer}.E{some[number]}.{matrix}")
        result.warnings += _refilled(
            weights, codes, f"L{context.layer}.E{some[0]}.{matrix} and those beside it"
        )
        places = [expert - some.start for expert in empty]
        return patched(codes, places, hqq.quantize(weights[places], format, dtype)) if places else codes

    def solved(
        self, weights: Tensor, hessians: Tensor, format: Format, dtype: torch.dtype
    ) -> tuple[QuantizedWeights, conditioning.Warnings]:
        """Codes of `weights` [N, out, in] under the Hessians [N, in, in] of their inputs, and what went
        wrong."""
        settings = gptq.Settings(
            self.damping, self.act_order, sweeps=self.sweeps, unbiased=self.unbiased, weighted=self.weighted
        )
        return gptq.solve(weights, hessians, format, dtype, settings)


def _refilled(weights: Tensor, codes: QuantizedWeights, name: str) -> list[str]:
    """What becomes of weights that an earlier step pruned: errors that are handed on fill some of them."""
    pruned = weights == 0
    if int(pruned.sum()) < _PRUNED * pruned.numel():
        return []
    share = float((decode(codes)[pruned] != 0).float().mean())
    return (
        [
            f"{name}: {share:.0%} of the weights that had been pruned are no longer zero; rtn keeps them, sparsegpt:bits=4 prunes and "
            "rounds in one pass"
        ]
        if share
        else []
    )


def _told(warnings: conditioning.Warnings, name: Callable[[int], str]) -> list[str]:
    """What went wrong with matrices, called by their numbers, in sentences."""
    lines = [f"{name(number)}: its second moment was not positive, damping raised to {damping:g}"
             for number, damping in sorted(warnings.damped.items())]  # fmt: skip
    lines += [
        f"{name(number)}: its second moment was not finite, rounded to nearest"
        for number in warnings.nonfinite
    ]
    if warnings.clipped:
        lines.append(
            f"{name(0)} and those beside it: {warnings.clipped} scales were too large for their dtype and were clipped"
        )
    return lines
