"""GPTQ: weights are rounded one column after another, and what is still to come makes up for the errors so far.

For a row w that becomes q, with e = w - q and H = R R^T (R upper triangular), the output error is

    e H e^T  =  sum_j R_jj^2 (e_j + sum_{i<j} e_i R_ij / R_jj)^2

so column j is best rounded from w_j + sum_{i<j} e_i R_ij / R_jj. This is the published algorithm (arXiv 2210.17323)
written without inverses, as in QuIP (arXiv 2307.13304). Columns with the largest H_jj go first (act order).

Sweeps of coordinate descent follow, each step of which lowers the error: with all else known, a group's scale becomes the
one of least squares, and its columns are rounded once more, from w_j + sum_{i!=j} e_i H_ij / H_jj. Last, each row is freed
of its shrinkage (`unbias`). All N matrices of a layer advance together. Tensors here lie column by column: [N, in, out].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moespresso.core.format import Format
from moespresso.formats import QuantizedWeights, levels, searched, unbias
from moespresso.kernels.hessians import factored, ridged, usable


@dataclass(frozen=True, slots=True)
class Trouble:
    """What had to be mended: relative damping that matrices took beyond what was asked, matrices with a Hessian that was
    not finite (the identity stood in), inputs that never fired, and scales that were cut to the range of their dtype."""

    damped: Mapping[int, float]
    nonfinite: tuple[int, ...]
    dead: int
    clipped: int


def solve(
    weights: Tensor,
    hessians: Tensor,
    format: Format,
    dtype: torch.dtype,
    *,
    damping: float = 0.03,
    act_order: bool = True,
    block: int = 128,
    sweeps: int = 2,
    unbiased: bool = True,
    weighted: bool = True,
    signed: bool = True,
) -> tuple[QuantizedWeights, Trouble]:
    """Codes of `weights` [N, out, in] under `hessians` [N, in, in] (means or sums), with scales stored as `dtype`.

    damping: share of the mean of each diagonal that is added to it.
    act_order: round columns with the largest second moments first.
    block: columns whose errors reach the columns behind them in one product.
    sweeps: rounds of coordinate descent on scales and codes that follow; 0 for the published algorithm.
    unbiased: free each row of its shrinkage.
    weighted: search scales with errors weighted by the inputs' second moments.
    signed: let scales of symmetric formats be negative.

    Needs about the memory of three more `hessians` and four more `weights` in float32: give it fewer matrices at once where
    that is too much.
    """
    dead = int((hessians.diagonal(dim1=1, dim2=2) == 0).sum())
    hessians, nonfinite = usable(hessians)
    moments = hessians.diagonal(dim1=1, dim2=2)
    importance = moments + damping * moments.mean(1, keepdim=True) if weighted else None
    scale, zero = searched(weights, format, dtype, importance=importance, signed=signed)
    columns = _Columns.of(weights, scale, zero, format)
    order = _order(hessians, act_order)
    factors, ridge, raised = factored(_permuted(hessians, order), damping)
    _pass(columns, factors, order, block)
    hessians = ridged(hessians, ridge)
    _descend(columns, hessians, block, sweeps)
    codes = columns.codes()
    if unbiased:
        codes = unbias(weights, codes, hessians)
    clipped = int((codes.scale.abs() == torch.finfo(dtype).max).sum())
    return codes, Trouble(raised, tuple(nonfinite), dead, clipped)


@dataclass(slots=True, eq=False)
class _Columns:
    """Weights, errors and values [N, in, out], grids [N, G, out], and the group [N, in] of each column."""

    format: Format
    weights: Tensor
    error: Tensor
    values: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor

    @classmethod
    def of(cls, weights: Tensor, scale: Tensor, zero: Tensor, format: Format) -> _Columns:
        """`weights` [N, out, in] on grids [N, out, G], nothing rounded yet."""
        count, _, width = weights.shape
        columns = weights.float().mT.contiguous()
        values = torch.empty_like(columns, dtype=torch.uint8)
        group = torch.arange(width, device=weights.device) // (format.group_size or width)
        scale, zero, group = scale.mT.contiguous(), zero.mT.contiguous(), group.expand(count, width)
        return cls(format, columns, torch.zeros_like(columns), values, scale, zero, group)

    def reordered(self, order: Tensor) -> _Columns:
        """A copy whose columns stand in `order` [N, in]; the grids are shared."""
        index = _wide(order, self.weights)
        weights, error, values = (each.gather(1, index) for each in (self.weights, self.error, self.values))
        group = self.group.gather(1, order)
        return _Columns(self.format, weights, error, values, self.scale, self.zero, group)

    def round(self, column: int, wanted: Tensor) -> None:
        """Give a column the values nearest to `wanted` [N, out]."""
        place = torch.arange(len(wanted), device=wanted.device), self.group[:, column]
        scale, zero = self.scale[place], self.zero[place].float()
        values = (wanted / scale.float()).add_(zero).round_().clamp_(0, levels(self.format) - 1)
        self.values[:, column] = values
        self.error[:, column] = self.weights[:, column] - ((values - zero).to(scale.dtype) * scale).float()

    def codes(self) -> QuantizedWeights:
        """The result in the usual layout."""
        values, scale, zero = (each.mT.contiguous() for each in (self.values, self.scale, self.zero))
        return QuantizedWeights(self.format, values, scale, zero)


def _order(hessians: Tensor, act_order: bool) -> Tensor:
    """The order [N, in] in which columns are rounded."""
    moments = hessians.diagonal(dim1=1, dim2=2)
    return (moments if act_order else torch.zeros_like(moments)).argsort(dim=1, descending=True, stable=True)


def _wide(order: Tensor, like: Tensor) -> Tensor:
    """`order` [N, in] as an index for `like` [N, in, out]."""
    return order.unsqueeze(-1).expand(like.shape)


def _permuted(hessians: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of `hessians` [N, in, in] in `order`."""
    rows = hessians.gather(1, _wide(order, hessians))
    return rows.gather(2, order.unsqueeze(1).expand(hessians.shape))


def _feedback(matrix: Tensor) -> Tensor:
    """[N, to, from]: what each column takes from the others' errors; rows over their diagonal, which becomes 0."""
    feedback = matrix / matrix.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    feedback.diagonal(dim1=1, dim2=2).zero_()
    return feedback


def _pass(columns: _Columns, factors: Tensor, order: Tensor, block: int) -> None:
    """GPTQ itself: round every column once, in `order`."""
    ordered, feedback = columns.reordered(order), _feedback(factors.mT)
    for start in range(0, order.shape[1], block):
        here = slice(start, start + block)
        target = torch.baddbmm(ordered.weights[:, here], feedback[:, here, :start], ordered.error[:, :start])
        _round(ordered, target, feedback[:, here, here], start)
    columns.values.scatter_(1, _wide(order, columns.values), ordered.values)
    columns.error.scatter_(1, _wide(order, columns.error), ordered.error)


def _descend(columns: _Columns, hessians: Tensor, block: int, sweeps: int) -> None:
    """Fit each group's scale, then round its columns again; `sweeps` times over all groups.

    The pull H e of all errors on a group's columns is one product, which serves both.
    """
    width, groups = hessians.shape[-1], columns.scale.shape[1]
    size = width // groups
    for _ in range(sweeps):
        for number, first in enumerate(range(0, width, size)):
            part = slice(first, first + size)
            pull = hessians[:, part] @ columns.error
            pull += _fit_scale(columns, hessians[:, part, part], pull, number, part)
            for start in range(first, first + size, block):
                _round_again(columns, hessians, pull, slice(start, min(start + block, first + size)), part)


def _round_again(columns: _Columns, hessians: Tensor, pull: Tensor, here: slice, part: slice) -> None:
    """Round the columns `here` of the group `part` once more, and tell the `pull` on those of the group behind them."""
    error = columns.error[:, here]
    local, before = hessians[:, here, here], error.clone()
    mine = pull[:, here.start - part.start : here.stop - part.start]
    diagonal = local.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    target = torch.baddbmm(mine, local, error, alpha=-1).div_(diagonal).add_(columns.weights[:, here])
    _round(columns, target, _feedback(local), here.start)
    if here.stop < part.stop:
        behind = pull[:, here.stop - part.start :]
        behind.baddbmm_(hessians[:, here.stop : part.stop, here], error - before)


def _round(columns: _Columns, target: Tensor, near: Tensor, start: int) -> None:
    """Round columns from `start` on one by one, to their `target` [N, n, out] plus `near` [N, n, n] of their errors so far."""
    local = columns.error[:, start : start + target.shape[1]]
    for j in range(target.shape[1]):
        wanted = torch.baddbmm(target[:, j : j + 1], near[:, j : j + 1], local)
        columns.round(start + j, wanted.squeeze(1))


def _fit_scale(columns: _Columns, local: Tensor, pull: Tensor, number: int, part: slice) -> Tensor:
    """Move a group's scales to the least error that its values v allow, s + (v H e) / (v H v), v counted from zero; return
    what that adds to the `pull` H e on its columns.

    A scale that would change its sign, vanish or overflow stays.
    """
    zero, old = columns.zero[:, number, None], columns.scale[:, number]
    steps = columns.values[:, part].float() - zero.float()
    response = local @ steps
    fitted = (old.float() + (steps * pull).sum(1) / (steps * response).sum(1)).to(old.dtype)
    new = torch.where((fitted / old > 0) & fitted.isfinite(), fitted, old)
    columns.scale[:, number] = new
    before = columns.error[:, part].clone()
    columns.error[:, part] = columns.weights[:, part] - (steps.to(new.dtype) * new.unsqueeze(1)).float()
    return local @ (columns.error[:, part] - before)
