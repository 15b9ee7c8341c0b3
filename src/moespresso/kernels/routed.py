"""The routed experts of one layer as matrices, with the tokens that reach each of them.

Second moments are means over what an expert is really given: H = sum c^2 x x^T / sum c^2, with c = 1, or the gate for what
reaches the down projection, since its output is multiplied with that. All are computed from the tokens on demand, for as
many experts at once as the caller's memory allows; nothing is kept.

An expert is computed in the precision of the tokens it is given, whatever that of its weights: the products of a run in 16
bits stay in 16 bits, and who asks in float32 is answered in float32. Squares, products and sums of what comes out are float32:
float16 ends at 65504, and a few hundred squared are beyond it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.layer import Fed

# Second moments that are held at once.
MOMENT_BYTES = 1 << 30


@dataclass(frozen=True)
class RoutedExperts:
    """E experts: `up` [E, R, H] (R = 2 I with the gate in the first half, or I without one) and `down` [E, H, I]; the tokens
    `hidden` [T, H], in the compute precision, of which each goes to the experts `index` [T, k] by `weights` [T, k] (float32).

    `module` is the experts' own, for its activation. With `everyone` every expert counts as given every token.
    """

    up: Tensor
    down: Tensor
    module: Any
    hidden: Tensor
    index: Tensor
    weights: Tensor
    everyone: bool = False

    @classmethod
    def of(cls, module: Any, fed: Sequence[Fed], *, everyone: bool = False) -> RoutedExperts:
        """The experts of a loaded layer and what reached them."""
        up = module.gate_up_proj if module.has_gate else module.up_proj
        parts = [
            torch.cat([getattr(batch, name) for batch in fed]) for name in ("hidden", "index", "weights")
        ]
        return cls(up, module.down_proj, module, *parts, everyone=everyone)

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.down)

    def groups(self, budget: int = MOMENT_BYTES) -> Iterator[range]:
        """The experts, in runs whose second moments fit in `budget` bytes."""
        width = max(self.up.shape[-1], self.down.shape[-1])
        size = max(1, budget // (8 * 4 * width * width))
        for first in range(0, self.count, size):
            yield range(first, min(first + size, self.count))

    @cached_property
    def column_squares(self) -> Tensor:
        """The squared lengths [E, I] of the columns of all down projections: expert by expert, since a layer in 16 bits is not to be
        held in float32."""
        return torch.cat([each.float().square().sum(1) for each in self.down.split(1)])

    @cached_property
    def tokens(self) -> Tensor:
        """How many tokens reach each expert [E], by the router's own choice."""
        return torch.bincount(self.index.flatten(), minlength=self.count)[: self.count]

    @cached_property
    def _order(self) -> tuple[Tensor, list[int]]:
        slots = self.index.flatten()
        ends = torch.bincount(slots, minlength=self.count)[: self.count].cumsum(0)
        return slots.argsort(stable=True), [0, *ends.tolist()]

    def rows(self, expert: int) -> tuple[Tensor, Tensor]:
        """Numbers [n] of the tokens that reach `expert`, and their gates [n]."""
        if self.everyone:
            gates = (self.weights * (self.index == expert)).sum(1)
            return torch.arange(len(self.hidden), device=self.hidden.device), gates
        order, ends = self._order
        slots = order[ends[expert] : ends[expert + 1]]
        return slots // self.index.shape[1], self.weights.flatten()[slots]

    def inner(self, expert: int, hidden: Tensor, up: Tensor) -> Tensor:
        """What the down projection of an expert is given [n, I] for tokens [n, H], with `up` [R, H] as its weights; in the
        precision of the tokens."""
        return self._within(self._act(self._mixed(hidden, up)))

    def _mixed(self, hidden: Tensor, up: Tensor) -> Tensor:
        # Here alone tokens meet weights, which may be codes that were decoded, or fitted in float32.
        return hidden @ up.to(hidden.dtype).T

    def _within(self, inner: Tensor) -> Tensor:
        if inner.dtype is torch.float16 and not bool(inner.isfinite().all()):
            raise UserError(
                "what the experts of a layer hold is more than float16 does: use --dtype bfloat16 or float32"
            )
        return inner

    def _act(self, mixed: Tensor) -> Tensor:
        return self.module._apply_gate(mixed) if self.module.has_gate else self.module.act_fn(mixed)

    def moments_in(self, experts: range) -> Tensor:
        """Mean x x^T [N, H, H] of what each of `experts` is given (zeros where it is given nothing)."""
        found = [self.hidden[self.rows(expert)[0]] for expert in experts]
        return torch.stack([_moment(rows, None) for rows in found])

    def moments_inner(self, experts: range, up: Tensor, *, by_gate: bool) -> Tensor:
        """Mean a a^T [N, I, I] of what the down projections of `experts` are given with `up` [N, R, H] as their weights,
        weighted by the square of the gate with `by_gate`."""
        return torch.stack(list(self._inner_moments(experts, up, by_gate)))

    def _inner_moments(self, experts: range, up: Tensor, by_gate: bool) -> Iterator[Tensor]:
        for weights, expert in zip(up, experts, strict=True):
            tokens, gates = self.rows(expert)
            inner = self.inner(expert, self.hidden[tokens], weights)
            yield _moment(inner, gates if by_gate else None)

    def squares_in(self, experts: range, *, by_gate: bool) -> Tensor:
        """Means of the squares [N, H] of what each of `experts` is given, weighted as in `moments_inner`."""
        found = [self.rows(expert) for expert in experts]
        return torch.stack(
            [_squares(self.hidden[tokens], gates if by_gate else None) for tokens, gates in found]
        )

    def squares_inner(self, experts: range, up: Tensor, *, by_gate: bool) -> Tensor:
        """Means of the squares [N, I] of what the down projections of `experts` are given: the diagonals of
        `moments_inner`."""
        found: list[Tensor] = []
        for weights, expert in zip(up, experts, strict=True):
            tokens, gates = self.rows(expert)
            inner = self.inner(expert, self.hidden[tokens], weights)
            found.append(_squares(inner, gates if by_gate else None))
        return torch.stack(found)

    def sums_and_peaks(self, experts: range, up: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over tokens and highest values, both [N, I], of the squares of the same times the gate."""
        sums, peaks = [], []
        for weights, expert in zip(up, experts, strict=True):
            tokens, gates = self.rows(expert)
            rows = self.inner(expert, self.hidden[tokens], weights).float() * gates.float().unsqueeze(1)
            squares = torch.cat([rows.square(), rows.new_zeros(1, rows.shape[1])])  # there may be no token
            sums.append(squares.sum(0))
            peaks.append(squares.amax(0))
        return torch.stack(sums), torch.stack(peaks)

    def steepness(self, experts: range, up: Tensor) -> Tensor:
        """How sharply the answers move with each row of `up` [N, R, H]: means over all tokens [N, R] of the square of the gate
        times the derivative of the channel that the row leads into."""
        found: list[Tensor] = []
        for weights, expert in zip(up, experts, strict=True):
            tokens, gates = self.rows(expert)
            with torch.inference_mode(False), torch.enable_grad():
                # Slopes are float32: they are products of what a token holds, summed up as squares.
                mixed = self._mixed(self.hidden[tokens], weights).float().clone().requires_grad_()
                (slopes,) = torch.autograd.grad(self._act(mixed).sum(), mixed)
            found.append((slopes * gates.float().unsqueeze(1)).square().sum(0) / max(len(self.hidden), 1))
        return torch.stack(found)

    def pooled(self) -> Tensor:
        """Mean x x^T [H, H] of all tokens."""
        return _moment(self.hidden, None)


def _squares(rows: Tensor, gates: Tensor | None) -> Tensor:
    """The diagonal of `_moment`."""
    squares = rows.float().square()
    if gates is None:
        return squares.sum(0) / max(len(rows), 1)
    weights = gates.float().square()
    return weights @ squares / max(float(weights.sum()), 1e-12)


def _moment(rows: Tensor, gates: Tensor | None) -> Tensor:
    """Mean of r r^T over `rows` [n, W], weighted by the squares of `gates` [n]; zeros where there are none."""
    rows = rows.float()
    if gates is not None:
        rows = rows * gates.float().unsqueeze(1)
    total = len(rows) if gates is None else float(gates.float().square().sum())
    return (rows.T @ rows) / max(total, 1e-12)
