"""The routed experts of one layer as matrices, with the tokens that reach each of them.

Hessians are means over what an expert is really given: H = sum c^2 x x^T / sum c^2, with c = 1, or the gate
for what reaches the down projection, since its output is multiplied with that. All are computed from the
tokens on demand, for as many experts at once as the caller's memory allows; nothing is kept.

An expert is computed in the precision of the tokens it is given, whatever that of its weights: the products
of a run in 16 bits stay in 16 bits, and who asks in float32 is answered in float32. Squares, products and
sums of what comes out are float32: float16 ends at 65504, and a few hundred squared are beyond it.

Shapes: E experts, N of them in a group; T tokens, k experts for each, n tokens of one expert; H hidden
    values, I neurons, R rows of gate and up (2 I with the gate in the first half, or I without one); W values
    of what an expert is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.core.layer import Fed

# Hessians that are held at once.
HESSIAN_BYTES = 1 << 30


@dataclass(frozen=True)
class RoutedExperts:
    """The experts' matrices `up` (gate and up) and `down`; the tokens `hidden`, in the compute precision, of
    which each goes to the experts `index` by `weights` (float32).

    `module` is the experts' own, for its activation. With `everyone` every expert counts as given every
    token.
    """

    up: Float[Tensor, "E R H"]
    down: Float[Tensor, "E H I"]
    module: Any
    hidden: Float[Tensor, "T H"]
    index: Int[Tensor, "T k"]
    weights: Float[Tensor, "T k"]
    everyone: bool = False

    @classmethod
    def of(cls, module: Any, fed: Sequence[Fed], *, everyone: bool = False) -> RoutedExperts:
        """The experts of a loaded layer and what reached them."""
        up, down = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
        if module.is_transposed:
            up, down = up.mT, down.mT
        parts = [
            torch.cat([getattr(batch, name) for batch in fed]) for name in ("hidden", "index", "weights")
        ]
        return cls(up, down, module, *parts, everyone=everyone)

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.down)

    def groups(self, budget: int = HESSIAN_BYTES) -> Iterator[range]:
        """The experts, in runs whose Hessians fit in `budget` bytes."""
        width = max(self.up.shape[-1], self.down.shape[-1])
        size = max(1, budget // (8 * 4 * width * width))
        for first in range(0, self.count, size):
            yield range(first, min(first + size, self.count))

    @cached_property
    def column_squares(self) -> Float[Tensor, "E I"]:
        """The squared lengths of the columns of all down projections: expert by expert, since a layer in
        16 bits is not to be held in float32."""
        return torch.cat([each.float().square().sum(1) for each in self.down.split(1)])

    @cached_property
    def tokens(self) -> Int[Tensor, " E"]:
        """How many tokens reach each expert, by the router's own choice."""
        return torch.bincount(self.index.flatten(), minlength=self.count)[: self.count]

    @cached_property
    def _order(self) -> tuple[Int[Tensor, " Tk"], list[int]]:
        slots = self.index.flatten()
        ends = torch.bincount(slots, minlength=self.count)[: self.count].cumsum(0)
        return slots.argsort(stable=True), [0, *ends.tolist()]

    def rows(self, expert: int) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """Numbers of the tokens that reach `expert`, and their gates."""
        if self.everyone:
            gates = (self.weights * (self.index == expert)).sum(1)
            return torch.arange(len(self.hidden), device=self.hidden.device), gates
        order, ends = self._order
        slots = order[ends[expert] : ends[expert + 1]]
        return slots // self.index.shape[1], self.weights.flatten()[slots]

    def inner(
        self, expert: int, hidden: Float[Tensor, "n H"], up: Float[Tensor, "R H"]
    ) -> Float[Tensor, "n I"]:
        """What the down projection of an expert is given for tokens, with `up` as its weights; in the
        precision of the tokens."""
        return self._within(self._act(self._mixed(hidden, up)))

    def _mixed(self, hidden: Float[Tensor, "n H"], up: Float[Tensor, "R H"]) -> Float[Tensor, "n R"]:
        # Here alone tokens meet weights, which may be codes that were decoded, or fitted in float32.
        return hidden @ up.to(hidden.dtype).T

    def _within(self, inner: Float[Tensor, "n I"]) -> Float[Tensor, "n I"]:
        if inner.dtype is torch.float16 and not bool(inner.isfinite().all()):
            raise UserError(
                "what the experts of a layer hold is more than float16 does: use --dtype bfloat16 or float32"
            )
        return inner

    def _act(self, mixed: Float[Tensor, "n R"]) -> Float[Tensor, "n I"]:
        return self.module._apply_gate(mixed) if self.module.has_gate else self.module.act_fn(mixed)

    def hessians_in(self, experts: range) -> Float[Tensor, "N H H"]:
        """Mean x x^T of what each of `experts` is given (zeros where it is given nothing)."""
        inputs = [self.hidden[self.rows(expert)[0]] for expert in experts]
        return torch.stack([_hessian(rows, None) for rows in inputs])

    def hessians_inner(
        self, experts: range, up: Float[Tensor, "N R H"], *, by_gate: bool
    ) -> Float[Tensor, "N I I"]:
        """Mean a a^T of what the down projections of `experts` are given with `up` as their weights,
        weighted by the square of the gate with `by_gate`."""
        return torch.stack(
            [_hessian(inner, gates if by_gate else None) for inner, gates in self._inner(experts, up)]
        )

    def squares_in(self, experts: range, *, by_gate: bool) -> Float[Tensor, "N H"]:
        """Means of the squares of what each of `experts` is given: the diagonals of `hessians_in`; or
        weighted by the gate."""
        rows = [self.rows(expert) for expert in experts]
        return torch.stack(
            [_squares(self.hidden[tokens], gates if by_gate else None) for tokens, gates in rows]
        )

    def squares_inner(
        self, experts: range, up: Float[Tensor, "N R H"], *, by_gate: bool
    ) -> Float[Tensor, "N I"]:
        """Means of the squares of what the down projections of `experts` are given: the diagonals of
        `hessians_inner`."""
        return torch.stack(
            [_squares(inner, gates if by_gate else None) for inner, gates in self._inner(experts, up)]
        )

    def sums_and_maxima(
        self, experts: range, up: Float[Tensor, "N R H"]
    ) -> tuple[Float[Tensor, "N I"], Float[Tensor, "N I"]]:
        """Sums over tokens and highest values of the squares of the same times the gate."""
        sums, maxima = [], []
        for inner, gates in self._inner(experts, up):
            rows = inner.float() * gates.float().unsqueeze(1)
            squares = torch.cat([rows.square(), rows.new_zeros(1, rows.shape[1])])  # there may be no token
            sums.append(squares.sum(0))
            maxima.append(squares.amax(0))
        return torch.stack(sums), torch.stack(maxima)

    def _inner(
        self, experts: range, up: Float[Tensor, "N R H"]
    ) -> Iterator[tuple[Float[Tensor, "n I"], Float[Tensor, " n"]]]:
        """What the down projection of each of `experts` is given, and the gates of the tokens."""
        for weights, expert in zip(up, experts, strict=True):
            tokens, gates = self.rows(expert)
            yield self.inner(expert, self.hidden[tokens], weights), gates

    def squared_slopes(self, experts: range, up: Float[Tensor, "N R H"]) -> Float[Tensor, "N R"]:
        """How sharply the outputs move with each row of `up`: means over all tokens of the square of the
        gate times the derivative of the neuron that the row leads into."""
        means: list[Tensor] = []
        for weights, expert in zip(up, experts, strict=True):
            tokens, gates = self.rows(expert)
            with torch.inference_mode(False), torch.enable_grad():
                # Slopes are float32: they are products of what a token holds, summed up as squares.
                mixed = self._mixed(self.hidden[tokens], weights).float().clone().requires_grad_()
                (slopes,) = torch.autograd.grad(self._act(mixed).sum(), mixed)
            means.append((slopes * gates.float().unsqueeze(1)).square().sum(0) / max(len(self.hidden), 1))
        return torch.stack(means)

    def pooled_hessian(self) -> Float[Tensor, "H H"]:
        """Mean x x^T of all tokens."""
        return _hessian(self.hidden, None)


def _squares(rows: Float[Tensor, "n W"], gates: Float[Tensor, " n"] | None) -> Float[Tensor, " W"]:
    """The diagonal of `_hessian`."""
    squares = rows.float().square()
    if gates is None:
        return squares.sum(0) / max(len(rows), 1)
    weights = gates.float().square()
    return weights @ squares / max(float(weights.sum()), 1e-12)


def _hessian(rows: Float[Tensor, "n W"], gates: Float[Tensor, " n"] | None) -> Float[Tensor, "W W"]:
    """Mean of r r^T over `rows`, weighted by the squares of `gates`; zeros where there are none."""
    rows = rows.float()
    if gates is not None:
        rows = rows * gates.float().unsqueeze(1)
    total = len(rows) if gates is None else float(gates.float().square().sum())
    return (rows.T @ rows) / max(total, 1e-12)
