"""Wanda: of the weights of an output those go whose input carries them least.

    score_ij  =  |W_ij| |x_j|        x_j = what input j is, over all tokens (arXiv 2306.11695)

Made for experts: |x_j| is taken over the tokens that the router sends to an expert, with `gate` weighted by
how much the token asks of it (MoE-Pruner, arXiv 2410.12013). Down is scored on what the pruned gate and up
really hand on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.registry import method
from moespresso.kernels import RoutedExperts, masks
from moespresso.methods._pruning import PruningOnText


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class Wanda(PruningOnText):
    """Settings of one Wanda pruning.

    variant: rows give up equal shares of their scores instead of equally many weights (plain shares only).
    gate: weight what an expert is given by its gate.
    """

    kind: ClassVar[str] = "wanda"
    variant: bool = False
    gate: bool = False

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        PruningOnText.__post_init__(self)
        if self.variant and self.sparsity.pattern.group_size:
            raise UserError(
                f"wanda: variant=true shares out a plain sparsity such as 0.5, not the pattern {self.sparsity}"
            )

    def seen(self, experts: RoutedExperts, some: range, up: Tensor | None) -> Tensor:
        """Means of the squares of the inputs [N, in]."""
        if up is None:
            return experts.squares_in(some, by_gate=self.gate)
        return experts.squares_inner(some, up, by_gate=self.gate)

    def of_hessian(self, hessian: Tensor) -> Tensor:
        """The same of one matrix."""
        return hessian.diagonal()[None]

    def left(
        self, weights: Tensor, seen: Tensor, format: Format, dtype: torch.dtype, halves: int = 1
    ) -> tuple[Tensor, list[tuple[int, str]]]:
        """`weights` [N, out, in] with zeros for those that go."""
        _ = dtype
        scores = weights.abs() * seen.sqrt().unsqueeze(1)
        if self.variant:
            apart = [masks.keep_equal_shares(half, format) for half in scores.chunk(halves, dim=1)]
            mask = torch.cat(apart, dim=1)
        else:
            mask = masks.keep_largest(scores, format)
        return weights.masked_fill(~mask, 0.0), []
