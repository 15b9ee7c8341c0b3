"""AWQ made for experts: inputs that carry much are made larger before rounding, so that they are rounded more
finely.

    W x  =  (W diag(s)) (x / s),     s = (rms of x)^alpha,     alpha of least  sum_e p_e tr((W_e - Q_e) H_e
         (W_e - Q_e)^T)

with Q = round(W s) / s, H_e the Hessian of the tokens that the router sends to expert e and p_e the sum of
their squared gates (arXiv 2306.00978). 1/s goes where it costs nothing: all experts of a layer, its router
and its shared experts read one norm, so they share one s and the norm's weight is divided by it. Between up
and down every expert has factors and an alpha of its own: up / t, down t. Where a layer lets no factor
through (`_awq.py`), it goes without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moespresso.core.blueprint import Blueprint, Entry
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.registry import method
from moespresso.core.unit import Unit
from moespresso.effect import REFIT
from moespresso.formats import QuantizedWeights, decode, encode, searched, unbias
from moespresso.kernels import RoutedExperts, conditioning
from moespresso.methods._awq import Entrance, UnknownEntrance, find_entrance, is_product, narrowed
from moespresso.methods._on_text import LayerContext, LayerResult, OnText, joined
from moespresso.methods._quantization import Quantization

# Inputs that never fire count as this much of the strongest one.
_FAINT = 1e-4


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class Awq(Quantization, OnText):
    """Settings of one AWQ.

    grid: alphas tried beside 0, up to 1.
    inputs: scale what all experts of a layer are given; changes the norm, router and shared experts of the
        layer too.
    inner: scale what the down projection of each expert is given.
    clip: narrow each group's range to where the output error is least, rather than the weights' own.
    unbiased: lengthen the scales of each row by what rounding took from its output.
    """

    kind: ClassVar[str] = "awq"
    able: ClassVar[tuple[str, ...]] = ("experts",)
    grid: int = 20
    inputs: bool = True
    inner: bool = True
    clip: bool = True
    unbiased: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        Quantization.__post_init__(self)
        if not 1 <= self.grid <= 1000:
            raise UserError(f"awq: grid={self.grid} must be between 1 and 1000")

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` also where shared experts are packed, so that no factor can be put into them."""
        Quantization.check(self, blueprint)
        layers = {layer.index for layer in blueprint.moe_layers}
        packed = [entry.ref.name for entry in blueprint.entries
                  if entry.ref.packed is not None and entry.unit.layer in layers and _is_beside(entry)]  # fmt: skip
        if self.inputs and packed:
            raise UserError(
                f"awq: {packed[0]} is packed already and takes no factor: run awq before that step, or use inputs=false"
            )

    def outline(self, source: Blueprint, before: Plan) -> Stage:
        """A stage of the right size; nothing around experts that are gone."""
        stage = Quantization.outline(self, source, before)
        there = {unit.layer for unit, treatment in stage.treatments.items() if treatment.format is not None}
        return Stage(
            stage.method, {unit: what for unit, what in stage.treatments.items() if unit.layer in there}
        )

    def _treatments(
        self, blueprint: Blueprint, positions: Mapping[int, int] | None = None
    ) -> dict[Unit, Treatment]:
        made = Quantization._treatments(self, blueprint, positions)
        layers = {unit.layer for unit in made} if self.inputs else set[int]()
        around = {Unit(entry.unit.layer, entry.unit.part) for entry in blueprint.entries
                  if entry.unit.layer in layers and _is_beside(entry)}  # fmt: skip
        return made | dict.fromkeys(sorted(around), Treatment(repair=REFIT))

    def solve(self, context: LayerContext) -> LayerResult:
        """Codes of all experts of one layer, and the tensors around them that took the factors."""
        result = LayerResult()
        experts = context.experts
        assert experts is not None
        factors = self._shared(context, experts, result) if self.inputs else None
        product = self.inner and is_product(experts.module, experts.down.shape[-1])
        made = [self._some(context, experts, some, factors, product) for some in experts.groups()]
        result.numbers |= {"up": joined([up for up, _ in made]), "down": joined([down for _, down in made])}
        return result

    def _some(
        self,
        context: LayerContext,
        experts: RoutedExperts,
        some: range,
        factors: Tensor | None,
        product: bool,
    ) -> tuple[QuantizedWeights, QuantizedWeights]:
        """Codes of gate and up, and of down, of `some` experts."""
        up, down = (matrix[some.start : some.stop].float() for matrix in (experts.up, experts.down))
        given, _ = conditioning.finite_or_identity(experts.hessians_in(some))
        heard, _ = conditioning.finite_or_identity(
            experts.hessians_inner(some, experts.up[some.start : some.stop], by_gate=True)
        )
        if product:
            own = self._own(down, heard, context.formats["down"], context.dtypes["down"])
            down, heard = spread(down, heard, own)
            gate, up = up.chunk(2, dim=1)
            up = torch.cat([gate, up / own.unsqueeze(-1)], 1)
        if factors is not None:
            up, given = spread(up, given, factors)
        return self._last(context, "up", up, given), self._last(context, "down", down, heard)

    def _shared(self, context: LayerContext, experts: RoutedExperts, result: LayerResult) -> Tensor | None:
        """The factors [H] of what all experts are given; puts what else takes them into the answer."""
        try:
            entrance = find_entrance(context.module, experts.module)
        except UnknownEntrance as reason:
            result.warnings.append(f"L{context.layer}: the inputs of its experts are not scaled: {reason}")
            return None
        norm = context.parameter(entrance.norm)
        scales = candidates(experts.hidden.float().square().sum(0), self.alphas())
        weights, factors = zip(*(divided(norm, scale) for scale in scales), strict=True)
        best = int(self._errors(context, experts, list(factors)).argmin())
        if best:
            result.replaced |= scaled(context, entrance, factors[best]) | {entrance.norm: weights[best]}
        return factors[best] if best else None

    def _errors(self, context: LayerContext, experts: RoutedExperts, factors: list[Tensor]) -> Tensor:
        """The error [A] of gate and up of all experts under each of the factors, experts counting by their
        squared gates."""
        total = torch.zeros(len(factors), dtype=torch.float64)
        for some in experts.groups():
            weights = experts.up[some.start : some.stop].float()
            hessians, _ = conditioning.finite_or_identity(experts.hessians_in(some))
            shares = torch.stack([experts.rows(expert)[1].float().square().sum() for expert in some])
            for number, factor in enumerate(factors):
                found = self._error(weights, hessians, factor, context.formats["up"], context.dtypes["up"])
                total[number] += (found * shares).sum(dtype=torch.float64).cpu()
        return total

    def _own(self, weights: Tensor, hessians: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
        """The factors [N, I] of least error of what each down projection [N, H, I] is given, 1 where that
        is nothing."""
        scales = candidates(hessians.diagonal(dim1=1, dim2=2), self.alphas())
        errors = torch.stack([self._error(weights, hessians, scale, format, dtype) for scale in scales])
        return torch.stack([scales[best][number] for number, best in enumerate(errors.argmin(0).tolist())])

    def _error(
        self, weights: Tensor, hessians: Tensor, factors: Tensor, format: Format, dtype: torch.dtype
    ) -> Tensor:
        """tr((W - Q) H (W - Q)^T) [N] for Q = round(W s) / s."""
        codes = self._rounded(*spread(weights, hessians, factors), format, dtype)
        errors = decode(codes).float() / factors.unsqueeze(-2) - weights
        return ((errors @ hessians) * errors).sum((1, 2))

    def _rounded(
        self, weights: Tensor, hessians: Tensor, format: Format, dtype: torch.dtype
    ) -> QuantizedWeights:
        grid = narrowed(weights, hessians, format, dtype) if self.clip else searched(weights, format, dtype)
        return encode(weights, *grid, format)

    def _last(self, context: LayerContext, name: str, weights: Tensor, hessians: Tensor) -> QuantizedWeights:
        codes = self._rounded(weights, hessians, context.formats[name], context.dtypes[name])
        return unbias(weights, codes, hessians) if self.unbiased else codes

    def alphas(self) -> list[float]:
        """The exponents that are tried, 0 first."""
        return [step / self.grid for step in range(self.grid + 1)]


def _is_beside(entry: Entry) -> bool:
    """Whether a tensor belongs to a feed-forward part and to none of its experts: its norm, or what may
    read that."""
    return entry.in_graph and entry.branch == "mlp" and entry.unit.part not in ("experts", "other")


def spread(weights: Tensor, hessians: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [N, out, in] times `factors` [in] or [N, in], and Hessians [N, in, in] of inputs divided by
    them."""
    column = factors.unsqueeze(-2)
    return weights * column, hessians / column / column.mT


def candidates(squares: Tensor, alphas: list[float]) -> list[Tensor]:
    """rms^alpha for mean squares (or sums of them) [..., W], with a geometric mean of 1."""
    squares = squares.clamp(min=squares.amax(-1, keepdim=True).clamp(min=1e-30) * _FAINT**2)
    logs = squares.log() / 2
    logs = logs - logs.mean(-1, keepdim=True)
    return [(alpha * logs).exp() for alpha in alphas]


def divided(norm: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's weight [H] over `scale`, with few enough digits for any dtype, and the factors that this
    really is.

    Eight digits after all: bfloat16 has no more, and every wider dtype holds those numbers too.
    """
    if bool((scale == 1).all()):
        return norm, scale
    stored = (norm.float() / scale).to(torch.bfloat16).float()
    return stored, torch.where(stored == 0, 1.0, norm.float() / stored)


def scaled(context: LayerContext, entrance: Entrance, factors: Tensor) -> dict[str, Tensor]:
    """All readers of the norm but the experts, with their inputs times `factors`."""
    return {name: context.parameter(name).float() * factors for name in entrance.readers}
