"""Magnitude pruning: the smallest weights of every matrix go, whatever they are given.

The oldest way (Han et al., arXiv 1506.02626) and the mark that others must beat. It needs no text. With a
plain share all weights of a matrix compete, in a pattern those of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moespresso.core.format import Format
from moespresso.core.method import Prunes
from moespresso.core.registry import method
from moespresso.kernels import masks
from moespresso.methods._pruning import Pruning


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitude(Pruning, Prunes):
    """Settings of one magnitude pruning."""

    kind: ClassVar[str] = "magnitude"

    @property
    def by_matrix(self) -> bool:
        """Whether all weights of a matrix compete, so that gate and up must not be taken for one."""
        return not self.sparsity.pattern.group_size and "experts" in self.parts.each()

    def prune(self, weights: Tensor, format: Format) -> Tensor:
        """`weights` [N, out, in] with zeros for those that go."""
        return weights.masked_fill(~masks.keep_largest(weights.float().abs(), format, whole=True), 0.0)
