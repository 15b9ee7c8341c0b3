"""What all steps that prune single weights share: how many go, in which pattern, and where.

`sparsity` is the share that goes (0.5), or n:m (2:4): n of every m neighbouring inputs stay. Routed experts
alone are pruned by default; shared experts, which see every token, lose far more quality than they weigh
(arXiv 2406.02500, table 8). Pruned weights are zeros in ordinary files: neither these nor any engine get
smaller or faster by that.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from moespresso.core.blueprint import Blueprint, Entry
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.formats import QuantizedWeights, decode, kept_in_row
from moespresso.kernels import RoutedExperts, masks
from moespresso.methods._matrices import OnMatrices
from moespresso.methods._on_text import LayerContext, LayerResult, OnText, joined, patched


class Sparsity(str):
    """A share of weights that goes, or a pattern N:M of which N of M stay; text or a number makes one."""

    written: ClassVar[str] = "SHARE or N:M"

    def __new__(cls, value: object) -> Sparsity:
        """Raise `UserError` for what is neither."""
        made = super().__new__(cls, str(value))
        _ = made.pattern
        return made

    @property
    def pattern(self) -> Format:
        """What is left of a matrix."""
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", self)
        if match is not None:
            stay, of = int(match[1]), int(match[2])
            if not 0 < stay <= of:
                raise UserError(
                    f"sparsity {self!r}: of every M weights 1 to M stay, written N:M, such as 2:4"
                )
            return Format("source", density=stay / of, group_size=of)
        try:
            share = float(self)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise UserError(
                f"sparsity {self!r} is neither a share of at least 0 and below 1 nor a pattern: say 0.5, or 2:4"
            )
        return Format("source", density=1 - share)


HALF = Sparsity("0.5")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruning(OnMatrices):
    """Settings of every step that prunes weights.

    sparsity: share of the weights that goes, or N:M (of every M neighbouring inputs N stay).
    pack: store what stays with a mask, in fewer bytes that only moespresso reads (moespresso.load; --target
        plugin).
    """

    verb: ClassVar[tuple[str, str]] = ("prune", "pruned")
    sparsity: Sparsity = HALF
    pack: bool = False

    def __post_init__(self) -> None:
        """Read what was given in other forms."""
        object.__setattr__(self, "sparsity", Sparsity(self.sparsity))
        OnMatrices.__post_init__(self)

    @property
    def without_text(self) -> str:
        """The one that sees weights alone."""
        return "magnitude"

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of formats that it makes."""
        return frozenset({"source", "sparse"})

    @property
    def instead_of_stacks(self) -> str:
        """What to do where a layer has one tensor of all experts, which can have zeros but no mask."""
        return "say pack=false" if self.pack else ""

    def amounts(self, blueprint: Blueprint) -> list[Any]:
        """This step with every share, least first (for a byte budget); none without `pack`: zeros weigh
        what weights weigh."""
        if self.pack and not self.sparsity.pattern.group_size:
            return [replace(self, sparsity=Sparsity(share / 100)) for share in range(100)]
        why = (
            "in a pattern has one size"
            if self.pack
            else "leaves zeros in place of weights, which take as many bytes"
        )
        raise UserError(
            f"{self.kind} {why}: use pack=true with a plain sparsity, channel_prune or rtn for --size"
        )

    def form(self, chosen: list[Entry]) -> Callable[[Entry, int | None], Format]:
        """Weights pruned in its pattern, packed or in place."""
        pattern = self.sparsity.pattern
        return lambda entry, layer: replace(pattern, kind="sparse") if self.pack else pattern

    def _told(self, blueprint: Blueprint) -> tuple[str, ...]:
        how = (
            "what stays is stored with a mask; in memory it is dense again, and no engine gets faster"
            if self.pack
            else "pruned weights are stored as zeros, so no bytes are saved and no engine gets faster"
        )
        return (f"{self.kind}: {how}", *self._off(blueprint))

    def _off(self, blueprint: Blueprint) -> tuple[str, ...]:
        """How many weights go, where that is not the share asked for."""
        pattern, total, stay = self.sparsity.pattern, 0, 0
        for entry, _ in self._formats(blueprint):
            width = entry.ref.shape[-1]
            total += entry.ref.numel
            stay += entry.ref.numel // width * kept_in_row(pattern, width)
        gone, asked = 1 - stay / total, 1 - pattern.density
        off = f"{self.kind}: {gone:.2%} of the weights go instead of {asked:.2%}, since rows keep whole numbers of weights"
        return (off,) if abs(gone - asked) >= 0.0005 else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PruningOnText(Pruning, OnText):
    """Settings of steps that see what every matrix is given.

    sequential: later layers see what the pruned ones before let through.
    """

    able: ClassVar[tuple[str, ...]] = ("experts", "shared", "attention", "dense")
    sequential: bool = True

    def seen(self, experts: RoutedExperts, some: range, up: Tensor | None) -> Tensor:
        """What is known of the inputs of `some` experts' gate and up, or with their weights `up` [N, R, H]
        of down's."""
        raise NotImplementedError

    def of_hessian(self, hessian: Tensor) -> Tensor:
        """The same [1, ...] of one matrix, from the mean of x x^T [in, in]."""
        raise NotImplementedError

    def left(
        self, weights: Tensor, seen: Tensor, format: Format, dtype: torch.dtype, halves: int = 1
    ) -> tuple[Tensor | QuantizedWeights, list[tuple[int, str]]]:
        """What is left of `weights` [N, out, in], and what went wrong with which of them. Each holds so
        many `halves`, one below the other, that are pruned alike."""
        raise NotImplementedError

    def unseen(self, weights: Tensor, format: Format, dtype: torch.dtype) -> Tensor | QuantizedWeights:
        """The same for matrices that were given nothing: the smallest weights go."""
        _ = dtype
        return weights.masked_fill(~masks.keep_largest(weights.abs(), format), 0.0)

    def solve(self, context: LayerContext) -> LayerResult:
        """What is left of one layer."""
        result = LayerResult()
        if context.experts is not None:
            self._experts(context, context.experts, result)
        for name, (weight, hessian) in context.linears.items():
            found, warnings = self.left(
                weight[None], self.of_hessian(hessian), context.formats[name], context.dtypes[name]
            )
            if isinstance(found, QuantizedWeights):
                result.numbers[name] = found
            else:
                result.weights[name] = found[0]
            result.warnings += [f"L{context.layer}.{name}: {what}" for _, what in warnings]
        return result

    def _experts(self, context: LayerContext, experts: RoutedExperts, result: LayerResult) -> None:
        ups: list[Tensor | QuantizedWeights] = []
        downs: list[Tensor | QuantizedWeights] = []
        for some in experts.groups():
            here = slice(some.start, some.stop)
            up = self._projection(
                context, "up", experts.up[here], self.seen(experts, some, None), some, result
            )
            weights = decode(up).float() if isinstance(up, QuantizedWeights) else up
            seen = self.seen(experts, some, weights.to(context.dtypes["up"]).to(experts.up.dtype))
            downs.append(self._projection(context, "down", experts.down[here], seen, some, result))
            ups.append(up)
        for name, found in (("up", ups), ("down", downs)):
            codes = [each for each in found if isinstance(each, QuantizedWeights)]
            if codes:
                result.numbers[name] = joined(codes)
            else:
                result.weights[name] = torch.cat([each for each in found if isinstance(each, Tensor)])

    def _projection(
        self,
        context: LayerContext,
        matrix: str,
        weights: Tensor,
        seen: Tensor,
        some: range,
        result: LayerResult,
    ) -> Tensor | QuantizedWeights:
        """One projection of `some` experts; those that no token reaches go by their weights."""
        assert context.experts is not None
        format, dtype, weights = context.formats[matrix], context.dtypes[matrix], weights.float()
        halves = weights.shape[1] // context.experts.down.shape[2] if matrix == "up" else 1
        found, warnings = self.left(weights, seen, format, dtype, halves)
        empty = [at for at, expert in enumerate(some) if not len(context.experts.rows(expert)[0])]
        result.remedies |= {some[at]: "magnitude" for at in empty}
        result.warnings += [
            f"L{context.layer}.E{some[at]}.{matrix}: {what}" for at, what in warnings if at not in empty
        ]
        if not empty:
            return found
        others = self.unseen(weights[empty], format, dtype)
        if isinstance(found, QuantizedWeights):
            assert isinstance(others, QuantizedWeights)
            return patched(found, empty, others)
        assert isinstance(others, Tensor)
        return found.index_copy(0, torch.tensor(empty, device=found.device), others)
