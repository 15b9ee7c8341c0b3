"""GPTQ: weights are rounded one column after another, and what is still to come makes up for the errors so
    far.

For a row w that becomes q, with e = w - q and H = R R^T (R upper triangular), the output error is

    e H e^T  =  sum_j R_jj^2 (e_j + sum_{i<j} e_i R_ij / R_jj)^2

so column j is best rounded from w_j + sum_{i<j} e_i R_ij / R_jj. This is the published algorithm (arXiv
2210.17323) written without inverses, as in QuIP (arXiv 2307.13304). Columns with the largest H_jj go first
(act order).

Sweeps of coordinate descent follow, each step of which lowers the error: with all else known, a group's scale
becomes the one of least squares, and its columns are rounded once more, from w_j + sum_{i!=j} e_i H_ij /
H_jj. Last, each row is freed of its shrinkage (`unbias`). All N matrices of a layer advance together.

Shapes: N matrices, O outputs, I inputs, G groups of inputs. Inside, matrices lie column by column: N x I x O.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from moespresso.core.format import Format
from moespresso.formats import QuantizedWeights, Search, levels, searched, unbias
from moespresso.kernels.conditioning import Warnings, add_ridge, damped_factors, finite_or_identity


@dataclass(frozen=True, slots=True)
class Settings:
    """How a GPTQ is solved.

    damping: share of the mean of each diagonal that is added to it.
    act_order: round columns with the largest second moments first.
    block: columns whose errors reach the columns behind them in one product.
    sweeps: rounds of coordinate descent on scales and codes that follow; 0 for the published algorithm.
    unbiased: free each row of its shrinkage.
    weighted: search scales with errors weighted by the inputs' second moments.
    signed: let scales of symmetric formats be negative.
    """

    damping: float = 0.03
    act_order: bool = True
    block: int = 128
    sweeps: int = 2
    unbiased: bool = True
    weighted: bool = True
    signed: bool = True


DEFAULT = Settings()


def solve(
    weights: Float[Tensor, "N O I"],
    hessians: Float[Tensor, "N I I"],
    format: Format,
    dtype: torch.dtype,
    settings: Settings = DEFAULT,
) -> tuple[QuantizedWeights, Warnings]:
    """Codes of `weights` under `hessians` (means or sums), with scales stored as `dtype`.

    Needs about the memory of three more `hessians` and four more `weights` in float32: give it fewer matrices
    at once where that is too much.
    """
    dead = int((hessians.diagonal(dim1=1, dim2=2) == 0).sum())
    hessians, nonfinite = finite_or_identity(hessians)
    diagonal_NI = hessians.diagonal(dim1=1, dim2=2)
    damped_NI = (
        diagonal_NI + settings.damping * diagonal_NI.mean(1, keepdim=True) if settings.weighted else None
    )
    scale, zero = searched(weights, format, dtype, damped_NI, Search(signed=settings.signed))
    columns = _Columns.of(weights, scale, zero, format)
    order = _order(hessians, settings.act_order)
    factors, ridge, raised = damped_factors(_permuted(hessians, order), settings.damping)
    _pass(columns, factors, order, settings.block)
    hessians = add_ridge(hessians, ridge)
    _descend(columns, hessians, settings.block, settings.sweeps)
    codes = columns.codes()
    if settings.unbiased:
        codes = unbias(weights, codes, hessians)
    clipped = int((codes.scale.abs() == torch.finfo(dtype).max).sum())
    return codes, Warnings(raised, tuple(nonfinite), dead, clipped)


@dataclass(slots=True, eq=False)
class _Columns:
    """Weights, errors and values, their grids, and the group of each column."""

    format: Format
    weights: Float[Tensor, "N I O"]
    error: Float[Tensor, "N I O"]
    values: UInt8[Tensor, "N I O"]
    scale: Float[Tensor, "N G O"]
    zero: UInt8[Tensor, "N G O"]
    group: Int[Tensor, "N I"]

    @classmethod
    def of(
        cls,
        weights: Float[Tensor, "N O I"],
        scale: Float[Tensor, "N O G"],
        zero: UInt8[Tensor, "N O G"],
        format: Format,
    ) -> _Columns:
        """`weights` on grids, nothing rounded yet."""
        count, _, width = weights.shape
        weights_NIO = weights.float().mT.contiguous()
        values_NIO = torch.empty_like(weights_NIO, dtype=torch.uint8)
        group = torch.arange(width, device=weights.device) // (format.group_size or width)
        scale_NGO, zero_NGO, group_NI = (
            scale.mT.contiguous(),
            zero.mT.contiguous(),
            group.expand(count, width),
        )
        return cls(
            format, weights_NIO, torch.zeros_like(weights_NIO), values_NIO, scale_NGO, zero_NGO, group_NI
        )

    def reordered(self, order: Int[Tensor, "N I"]) -> _Columns:
        """A copy whose columns stand in `order`; the grids are shared."""
        index = _wide(order, self.weights)
        weights, error, values = (each.gather(1, index) for each in (self.weights, self.error, self.values))
        group = self.group.gather(1, order)
        return _Columns(self.format, weights, error, values, self.scale, self.zero, group)

    def round(self, column: int, target: Float[Tensor, "N O"]) -> None:
        """Give a column the values nearest to `target`."""
        place = torch.arange(len(target), device=target.device), self.group[:, column]
        scale, zero = self.scale[place], self.zero[place].float()
        values = (target / scale.float()).add_(zero).round_().clamp_(0, levels(self.format) - 1)
        self.values[:, column] = values
        self.error[:, column] = self.weights[:, column] - ((values - zero).to(scale.dtype) * scale).float()

    def codes(self) -> QuantizedWeights:
        """The result in the usual layout."""
        values, scale, zero = (each.mT.contiguous() for each in (self.values, self.scale, self.zero))
        return QuantizedWeights(self.format, values, scale, zero)


def _order(hessians: Float[Tensor, "N I I"], act_order: bool) -> Int[Tensor, "N I"]:
    """The order in which columns are rounded."""
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    return (diagonal if act_order else torch.zeros_like(diagonal)).argsort(
        dim=1, descending=True, stable=True
    )


def _wide(order: Int[Tensor, "N I"], like: Shaped[Tensor, "N I X"]) -> Int[Tensor, "N I X"]:
    """`order` as an index for columns `like` these."""
    return order.unsqueeze(-1).expand(like.shape)


def _permuted(hessians: Float[Tensor, "N I I"], order: Int[Tensor, "N I"]) -> Float[Tensor, "N I I"]:
    """Rows and columns of `hessians` in `order`."""
    rows = hessians.gather(1, _wide(order, hessians))
    return rows.gather(2, order.unsqueeze(1).expand(hessians.shape))


def _feedback(matrix: Float[Tensor, "N to source"]) -> Float[Tensor, "N to source"]:
    """What each column takes from the others' errors: rows over their diagonal, which becomes 0."""
    feedback = matrix / matrix.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    feedback.diagonal(dim1=1, dim2=2).zero_()
    return feedback


def _pass(columns: _Columns, factors: Float[Tensor, "N I I"], order: Int[Tensor, "N I"], block: int) -> None:
    """GPTQ itself: round every column once, in `order`."""
    ordered, feedback = columns.reordered(order), _feedback(factors.mT)
    for start in range(0, order.shape[1], block):
        part = slice(start, start + block)
        target = torch.baddbmm(ordered.weights[:, part], feedback[:, part, :start], ordered.error[:, :start])
        _round(ordered, target, feedback[:, part, part], start)
    columns.values.scatter_(1, _wide(order, columns.values), ordered.values)
    columns.error.scatter_(1, _wide(order, columns.error), ordered.error)


def _descend(columns: _Columns, hessians: Float[Tensor, "N I I"], block: int, sweeps: int) -> None:
    """Fit each group's scale, then round its columns again; `sweeps` times over all groups.

    The pull H e of all errors on a group's columns is one product, which serves both.
    """
    width, groups = hessians.shape[-1], columns.scale.shape[1]
    size = width // groups
    for _ in range(sweeps):
        for number, first in enumerate(range(0, width, size)):
            group = slice(first, first + size)
            pull = hessians[:, group] @ columns.error
            pull += _fit_scale(columns, hessians[:, group, group], pull, number, group)
            for start in range(first, first + size, block):
                part = slice(start, min(start + block, first + size))
                _round_again(columns, hessians, pull, part, group)


def _round_again(
    columns: _Columns,
    hessians: Float[Tensor, "N I I"],
    pull: Float[Tensor, "N g O"],
    part: slice,
    group: slice,
) -> None:
    """Round the columns `part` of a `group` once more, and tell the `pull` on those of the group behind
    them."""
    error = columns.error[:, part]
    local, before = hessians[:, part, part], error.clone()
    local_pull = pull[:, part.start - group.start : part.stop - group.start]
    diagonal = local.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    target = torch.baddbmm(local_pull, local, error, alpha=-1).div_(diagonal).add_(columns.weights[:, part])
    _round(columns, target, _feedback(local), part.start)
    if part.stop < group.stop:
        behind = pull[:, part.stop - group.start :]
        behind.baddbmm_(hessians[:, part.stop : group.stop, part], error - before)


def _round(
    columns: _Columns, target: Float[Tensor, "N n O"], feedback: Float[Tensor, "N n n"], start: int
) -> None:
    """Round columns from `start` on one by one, to their `target` plus `feedback` of their errors so far."""
    local = columns.error[:, start : start + target.shape[1]]
    for j in range(target.shape[1]):
        corrected = torch.baddbmm(target[:, j : j + 1], feedback[:, j : j + 1], local)
        columns.round(start + j, corrected.squeeze(1))


def _fit_scale(
    columns: _Columns, local: Float[Tensor, "N g g"], pull: Float[Tensor, "N g O"], number: int, group: slice
) -> Float[Tensor, "N g O"]:
    """Move a group's scales to the least error that its values v allow, s + (v H e) / (v H v), v counted from
    zero; return what that adds to the `pull` H e on its columns.

    A scale that would change its sign, vanish or overflow stays.
    """
    zero_N1O, old_NO = columns.zero[:, number, None], columns.scale[:, number]
    steps_NgO = columns.values[:, group].float() - zero_N1O.float()
    response_NgO = local @ steps_NgO
    shift_NO = (steps_NgO * pull).sum(1) / (steps_NgO * response_NgO).sum(1)
    fitted_NO = (old_NO.float() + shift_NO).to(old_NO.dtype)
    new_NO = torch.where((fitted_NO / old_NO > 0) & fitted_NO.isfinite(), fitted_NO, old_NO)
    columns.scale[:, number] = new_NO
    before = columns.error[:, group].clone()
    columns.error[:, group] = (
        columns.weights[:, group] - (steps_NgO.to(new_NO.dtype) * new_NO.unsqueeze(1)).float()
    )
    return local @ (columns.error[:, group] - before)
