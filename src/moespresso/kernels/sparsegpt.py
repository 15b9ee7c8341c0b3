"""SparseGPT: weights are set to zero one column after another, and what is still to come makes up for the
    errors so far.

As in `gptq.py` (read its story first), with e = w - q and H = R R^T (R upper triangular) the output error is

    e H e^T  =  sum_j R_jj^2 (e_j + sum_{i<j} e_i R_ij / R_jj)^2

so what stays of column j becomes w_j + sum_{i<j} e_i R_ij / R_jj and costs nothing, and what is pruned costs
R_jj^2 times the square of that. This is the published algorithm (arXiv 2301.00774) without inverses: its U
with H^-1 = U^T U is R^-1, and its score (v_c / U_cc)^2 is v_c^2 R_cc^2. There v are the weights after all
corrections so far, the least squares optimum of the columns still to come; those of a span b are w + f
R_bb^-1 with f_j = sum_{i<b} e_i R_ij.

A mask is chosen for a span of columns at once: the m of a pattern in each row, or a block of all rows. Where
what stays is rounded too, that happens on the way, so that the same columns make up for both. All N matrices
of a layer advance together.

Shapes: N matrices, O outputs, I inputs, G groups of inputs, n columns of a span. Inside, matrices lie column
    by column: N x I x O.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from moespresso.core.format import Format
from moespresso.formats import QuantizedWeights, levels, searched, staying
from moespresso.kernels.conditioning import Warnings, damped_factors, finite_or_identity
from moespresso.kernels.masks import largest


@dataclass(frozen=True, slots=True)
class Settings:
    """How a SparseGPT is solved.

    damping: share of the mean of each diagonal that is added to it.
    block: columns whose errors reach the columns behind them in one product, and whose weights compete where
        the format has no pattern: each block then keeps its part of the density, and the matrix exactly as
        many as `masks.keep_largest`.
    code: round what stays to this integer grid on the way. The codes then decode to the weights that are
        returned.
    dtype: of the scales of `code`.
    halves: matrices that lie one below the other in each of the weights (gate and up), which do not compete.
    """

    damping: float = 0.01
    block: int = 128
    code: Format | None = None
    dtype: torch.dtype = torch.bfloat16
    halves: int = 1


DEFAULT = Settings()


def solve(
    weights: Float[Tensor, "N O I"],
    hessians: Float[Tensor, "N I I"],
    format: Format,
    settings: Settings = DEFAULT,
) -> tuple[Float[Tensor, "N O I"], Bool[Tensor, "N O I"], QuantizedWeights | None, Warnings]:
    """Prune `weights` under `hessians` (means or sums): weights in float32, which of them stayed, and their
    codes.

    Needs about the memory of four more `hessians` and four more `weights` in float32: give it fewer matrices
    at once where that is too much.
    """
    dead = int((hessians.diagonal(dim1=1, dim2=2) == 0).sum())
    hessians, nonfinite = finite_or_identity(hessians)
    factors, ridge, raised = damped_factors(hessians, settings.damping)
    columns, codes, clipped = _Columns.of(weights, factors), None, 0
    _pass(columns, format, settings.block, settings.halves)
    if code := settings.code:
        # Corrections make what stays larger than it was: scales for the weights of the start would cut it.
        importance_NI = hessians.diagonal(dim1=1, dim2=2) + ridge.unsqueeze(1)
        scale, zero = searched(_upright(columns.weights), code, settings.dtype, importance_NI)
        grid = _Grid.of(columns.weights, scale, zero, code)
        columns.restart(weights, grid)
        _pass(columns, format, settings.block, settings.halves)
        codes, clipped = grid.codes(), int((scale.abs() == torch.finfo(settings.dtype).max).sum())
    warnings = Warnings(raised, tuple(nonfinite), dead, clipped)
    return _upright(columns.weights), _upright(columns.mask), codes, warnings


def _upright(columns: Shaped[Tensor, "N X O"]) -> Shaped[Tensor, "N O X"]:
    """Columns, or their groups, in the usual layout (and back)."""
    return columns.mT.contiguous()


@dataclass(slots=True, eq=False)
class _Grid:
    """The values that columns were given, and their grids."""

    format: Format
    values: UInt8[Tensor, "N I O"]
    scale: Float[Tensor, "N G O"]
    zero: UInt8[Tensor, "N G O"]

    @classmethod
    def of(
        cls,
        like: Float[Tensor, "N I O"],
        scale: Float[Tensor, "N O G"],
        zero: UInt8[Tensor, "N O G"],
        format: Format,
    ) -> _Grid:
        """For columns `like` these, on grids in the usual layout."""
        return cls(format, torch.empty_like(like, dtype=torch.uint8), _upright(scale), _upright(zero))

    def round(
        self, column: int, target: Float[Tensor, "N O"], stays: Bool[Tensor, "N O"]
    ) -> Float[Tensor, "N O"]:
        """Give a column the values nearest to `target`, and the pruned the one that means 0; return
        weights."""
        group = column // (self.format.group_size or self.values.shape[1])
        scale, zero = self.scale[:, group], self.zero[:, group].float()
        values = (target / scale.float()).add_(zero).round_().clamp_(0, levels(self.format) - 1)
        values = torch.where(stays, values, zero)
        self.values[:, column] = values
        return ((values - zero).to(scale.dtype) * scale).float()

    def codes(self) -> QuantizedWeights:
        """The result in the usual layout."""
        return QuantizedWeights(self.format, _upright(self.values), _upright(self.scale), _upright(self.zero))


@dataclass(slots=True, eq=False)
class _Columns:
    """Weights, which become the new ones as they are settled, errors and mask; R_ij / R_jj as `feedback`
    to column j from column i, 0 on the diagonal; and R_jj^2 as `pivots`."""

    weights: Float[Tensor, "N I O"]
    error: Float[Tensor, "N I O"]
    mask: Bool[Tensor, "N I O"]
    feedback: Float[Tensor, "N I I"]
    pivots: Float[Tensor, "N I"]
    grid: _Grid | None = None

    @classmethod
    def of(cls, weights: Float[Tensor, "N O I"], factors: Float[Tensor, "N I I"]) -> _Columns:
        """`weights` with the upper `factors` R, nothing settled yet."""
        weights_NIO = weights.mT.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        diagonal_NI = factors.diagonal(dim1=1, dim2=2)
        feedback_NII = factors.mT / diagonal_NI.unsqueeze(-1)
        feedback_NII.diagonal(dim1=1, dim2=2).zero_()
        error_NIO, mask_NIO = torch.empty_like(weights_NIO), torch.empty_like(weights_NIO, dtype=torch.bool)
        return cls(weights_NIO, error_NIO, mask_NIO, feedback_NII, diagonal_NI.square())

    def restart(self, weights: Float[Tensor, "N O I"], grid: _Grid) -> None:
        """Unsettle everything, and from now on round what stays to `grid`."""
        self.weights.copy_(weights.mT)
        self.grid = grid

    def pull(self, target: Float[Tensor, "N n O"], to: slice, source: slice) -> Float[Tensor, "N n O"]:
        """`target` of columns `to`, corrected for the errors of columns `source`."""
        return torch.baddbmm(target, self.feedback[:, to, source], self.error[:, source])

    def scores(self, part: slice, target: Float[Tensor, "N n O"]) -> Float[Tensor, "N n O"]:
        """What pruning would cost each weight of the columns `part`: v^2 R_jj^2, v corrected for errors
        before `part`."""
        moved, local = target - self.weights[:, part], self.feedback[:, part, part]
        moved = torch.linalg.solve_triangular(local, moved, upper=False, unitriangular=True)
        return moved.add_(self.weights[:, part]).square_().mul_(self.pivots[:, part].unsqueeze(-1))

    def settle(self, column: int, target: Float[Tensor, "N O"]) -> None:
        """Give a column what it keeps of `target`."""
        stays = self.mask[:, column]
        new = self.grid.round(column, target, stays) if self.grid else target.masked_fill(~stays, 0.0)
        self.error[:, column] = self.weights[:, column] - new
        self.weights[:, column] = new


def _pass(columns: _Columns, format: Format, block: int, halves: int) -> None:
    """Choose the mask of one span of columns after another, and settle its columns one by one."""
    width, span = columns.weights.shape[1], format.group_size or block
    block = -(-block // span) * span  # no group of a pattern lies across a border
    for start in range(0, width, block):
        whole = slice(start, min(start + block, width))
        target = columns.pull(columns.weights[:, whole], whole, slice(0, start))
        for first in range(start, whole.stop, span):
            part = slice(first, min(first + span, whole.stop))
            local = columns.pull(target[:, first - start : part.stop - start], part, slice(start, first))
            columns.mask[:, part] = _chosen(columns.scores(part, local), format, part, width, halves)
            for j in range(first, part.stop):
                corrected = columns.pull(local[:, j - first, None], slice(j, j + 1), slice(first, j))
                columns.settle(j, corrected.squeeze(1))


def _chosen(
    scores: Float[Tensor, "N n O"], format: Format, part: slice, width: int, halves: int
) -> Bool[Tensor, "N n O"]:
    """Those of the columns `part` of `width` that stay."""
    count, size, rows = scores.shape
    if format.group_size:
        best = largest(scores.mT.reshape(-1, size), staying(size, format))
        return best.view(count, rows, size).mT
    total = rows // halves * staying(width, format)
    share = total * part.stop // width - total * part.start // width  # blocks add up to the total
    apart = scores.unflatten(2, (halves, -1)).movedim(2, 1)  # [N, halves, n, O / halves]
    best = largest(apart.reshape(count * halves, -1), share).view(apart.shape)
    return best.movedim(1, 2).reshape(scores.shape)
