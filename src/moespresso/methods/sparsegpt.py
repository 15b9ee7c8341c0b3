"""SparseGPT: weights go column by column, and those still to come make up for what went.

    minimise  sum over tokens of |(W - Q) x|^2     Q = W with a share of zeros

An approximate Optimal Brain Surgeon for whole layers (arXiv 2301.00774), with Hessians of the tokens that the
router sends to each expert; all experts of a layer are solved at once (`kernels/sparsegpt.py`). With `bits`
what stays is rounded in the same pass, so that each of the two makes up for the other. Down is solved on what
the pruned gate and up really hand on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from moespresso.core.blueprint import Blueprint, Entry
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.registry import method
from moespresso.formats import QuantizedWeights, check_pattern
from moespresso.kernels import RoutedExperts, hqq, sparsegpt
from moespresso.methods._pruning import PruningOnText


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class SparseGpt(PruningOnText):
    """Settings of one SparseGPT.

    damping: share of the mean diagonal added to every Hessian; raised tenfold where that does not do.
    block: columns whose weights compete, where there is no pattern.
    weighting: `gate2` weights what reaches an expert's down by the square of its gate, `none` does not.
    bits: round what stays to 2, 3, 4 or 8 bits in the same pass; 0 for not at all.
    group_size: inputs that share a scale, with bits; 0 for one scale per output channel.
    symmetric: a fixed zero in the middle, with bits; stock engines load experts in this form only.
    """

    kind: ClassVar[str] = "sparsegpt"
    damping: float = 0.01
    block: int = 128
    weighting: Literal["none", "gate2"] = "none"
    bits: int = 0
    group_size: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        PruningOnText.__post_init__(self)
        if not 0 <= self.damping < float("inf") or self.block < 1:
            raise UserError("sparsegpt: damping must not be negative, and block at least 1")
        if self.bits not in (0, 2, 3, 4, 8):
            raise UserError(f"sparsegpt: bits={self.bits} must be 2, 3, 4 or 8, or 0 for not at all")
        if self.group_size < 0 or self.group_size % 8:
            raise UserError(
                f"sparsegpt: group_size={self.group_size} must be 0 or a multiple of 8, such as 32 or 128"
            )

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of formats that it makes."""
        return frozenset({"integer"} if self.bits else {"source", "sparse"})

    @property
    def instead_of_stacks(self) -> str:
        """What to do where a layer has one tensor of all experts, which cannot be packed as integers
        either."""
        return "say bits=0" if self.bits else "say pack=false" if self.pack else ""

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        PruningOnText.check(self, blueprint)
        if self.bits and self.pack:
            raise UserError("sparsegpt: bits are packed as integers, zeros included: leave pack out")
        widths = {entry.ref.shape[-1]: entry.ref.name for entry, _ in self._formats(blueprint)}
        for width, name in widths.items():
            check_pattern(width, self.sparsity.pattern, name, widths)

    def amounts(self, blueprint: Blueprint) -> list[Any]:
        """This step with every share (for a byte budget); with bits, which weigh the same whatever is
        zero, it has one size."""
        return [self] if self.bits else PruningOnText.amounts(self, blueprint)

    def seen(self, experts: RoutedExperts, some: range, up: Tensor | None) -> Tensor:
        """Hessians of the inputs [N, in, in]."""
        if up is None:
            return experts.hessians_in(some)
        return experts.hessians_inner(some, up, by_gate=self.weighting == "gate2")

    def of_hessian(self, hessian: Tensor) -> Tensor:
        """The same of one matrix."""
        return hessian[None]

    def left(
        self, weights: Tensor, seen: Tensor, format: Format, dtype: torch.dtype, halves: int = 1
    ) -> tuple[Tensor | QuantizedWeights, list[tuple[int, str]]]:
        """`weights` [N, out, in] with zeros for those that go, or their codes."""
        settings = sparsegpt.Settings(self.damping, self.block, format if self.bits else None, dtype, halves)
        new, _, codes, warnings = sparsegpt.solve(weights, seen, self.sparsity.pattern, settings)
        told = [(number, f"its second moment was not positive, damping raised to {damping:g}")
                for number, damping in sorted(warnings.damped.items())]  # fmt: skip
        told += [
            (number, "its second moment was not finite, pruned by size alone")
            for number in warnings.nonfinite
        ]
        return codes if codes is not None else new, told

    def unseen(self, weights: Tensor, format: Format, dtype: torch.dtype) -> Tensor | QuantizedWeights:
        """The same for matrices that were given nothing."""
        new = PruningOnText.unseen(self, weights, self.sparsity.pattern, dtype)
        assert isinstance(new, Tensor)
        return hqq.quantize(new, format, dtype, hqq.Settings(unbiased=False)) if self.bits else new

    def form(self, chosen: list[Entry]) -> Callable[[Entry, int | None], Format]:
        """Pruned in its pattern, and rounded where bits are asked for."""
        if not self.bits:
            return PruningOnText.form(self, chosen)
        grid = Format("integer", self.bits, self.group_size, self.symmetric)
        return lambda entry, layer: grid

    def _told(self, blueprint: Blueprint) -> tuple[str, ...]:
        return self._off(blueprint) if self.bits else PruningOnText._told(self, blueprint)
