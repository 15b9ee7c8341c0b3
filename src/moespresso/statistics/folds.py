"""What stands in for branches that go: fitted on the model as it is being rebuilt, layer by layer.

The stream h runs through the layers as the plan leaves them. Behind the last branch before a cut it is h + M,
and the branches that go, run once more on it, say what it ought to become: Y. With a column for each token
the smallest squared error has

    linear  T = I + (Y - h - M) M^T (M M^T + a I)^-1  h + T M     ReplaceMe, arXiv 2505.02819
    scale   t_c = <(Y - h)_c, M_c> / <M_c, M_c>       h + t M     its diagonal
    bias    b = mean(Y - h - M)                       h + M + b

where a, which falls with the length of the text, pulls T towards the identity, which is what stands there
without a repair: a direction that the text hardly shows stays as it is. (Published is a pull towards nothing,
which takes it away.) `scale` and `bias` have a number for each channel, which some hundred tokens settle, and
are not pulled. The stream goes on repaired, so that what comes later is fitted to what it will really see. T
goes into the branch's output weights, no tensor is added. Held meanwhile: h, M and Y, three times the hidden
states of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moespresso.core.blueprint import BRANCHES, Branch
from moespresso.core.layer import Layer, Taps
from moespresso.effect import Cut

At = tuple[int, Branch]
# What pulls the linear map towards the identity: so many tokens for each channel, as loud as the text's and evenly in all
# directions, that ask for no change. The more text, the less it weighs. Chosen by measurement (LOG.md).
RIDGE = 32.0
_TINY = torch.finfo(torch.float64).tiny


@dataclass(slots=True)
class _Open:
    """A cut that is being passed: per batch the stream before the last branch, what that added, what ought
    to come."""

    cut: Cut
    before: list[Tensor]
    added: list[Tensor]
    wanted: list[Tensor]
    valid: list[Tensor]


class Folds:
    """Visits the layers of a sweep; `values` holds what was fitted, by the first branch of each cut."""

    def __init__(self, cuts: Sequence[Cut], plain: Sequence[At] = ()) -> None:
        """`cuts` are those to fit, numbered as the sweep's layers; `plain` branches go without anything in
        return."""
        self._starts: Mapping[At, Cut] = {cut.before: cut for cut in cuts if cut.before is not None}
        self._first: Mapping[At, Cut] = {cut.branches[0]: cut for cut in cuts if cut.before is None}
        self._gone = {at for cut in cuts for at in cut.branches} | set(plain)
        self._open: _Open | None = None
        self.values: dict[At, Tensor] = {}

    def __call__(self, layer: Layer, taps: Taps) -> None:
        """Take the stream through one layer, without what goes."""
        at: list[At] = [(layer.spec.index, branch) for branch in BRANCHES if branch in layer.spec.bodies]
        if self._open is None and not any(each in self._gone or each in self._starts for each in at):
            return
        stream = taps.inputs
        for branch in BRANCHES:
            each = layer.spec.index, branch
            if branch not in layer.spec.bodies:
                stream = self._left(layer, each, stream, taps)
            elif each in self._gone:
                self._pass(each, stream, taps)
            else:
                stream = self._stay(each, self.close(stream), taps)
        for number, hidden in enumerate(stream):
            taps.put(number, hidden)

    def _left(self, layer: Layer, at: At, stream: list[Tensor], taps: Taps) -> list[Tensor]:
        """Where a branch was, an earlier step may have left a constant: it is added whatever is fitted."""
        part = None if layer.anatomy is None else getattr(layer.anatomy, at[1])
        if part is None or getattr(layer.module.get_submodule(part.body), "bias", None) is None:
            return stream
        after = [taps.branch(number, hidden, at[1]) for number, hidden in enumerate(stream)]
        if self._open is not None:
            constants = [new - old for new, old in zip(after, stream, strict=True)]
            self._open.before = [old + new for old, new in zip(self._open.before, constants, strict=True)]
            self._open.wanted = [old + new for old, new in zip(self._open.wanted, constants, strict=True)]
        return after

    def _pass(self, at: At, stream: list[Tensor], taps: Taps) -> None:
        """A branch that goes: only what it would have made of the stream is looked at."""
        if self._open is None and at in self._first:
            nothing = [torch.zeros_like(hidden) for hidden in stream]
            self._open = _Open(self._first[at], stream, nothing, stream, taps.valid)
        if self._open is not None:
            self._open.wanted = [taps.branch(n, hidden, at[1]) for n, hidden in enumerate(self._open.wanted)]

    def _stay(self, at: At, stream: list[Tensor], taps: Taps) -> list[Tensor]:
        after = [taps.branch(number, hidden, at[1]) for number, hidden in enumerate(stream)]
        if at in self._starts:
            added = [new - old for new, old in zip(after, stream, strict=True)]
            self._open = _Open(self._starts[at], stream, added, after, taps.valid)
        return after

    def close(self, stream: list[Tensor]) -> list[Tensor]:
        """Solve the cut that has been passed, if there is one, and repair the stream."""
        if self._open is None:
            return stream
        passed, self._open = self._open, None
        value = _solve(passed)
        self.values[passed.cut.branches[0]] = value
        return [_repaired(passed.cut.repair, old, added, value)
                for old, added in zip(passed.before, passed.added, strict=True)]  # fmt: skip


def _solve(passed: _Open) -> Tensor:
    """The fitted values in float32, from sums in float64 over all tokens that are not padding."""
    repair = passed.cut.repair
    square: Tensor | float = 0.0
    product: Tensor | float = 0.0
    tokens = 0
    for added, wanted in _pairs(passed):
        tokens += len(added)
        if repair == "linear":
            square, product = square + added.T @ added, product + wanted.T @ added
        elif repair == "scale":
            square, product = square + added.square().sum(0), product + (added * wanted).sum(0)
        else:
            product = product + (wanted - added).sum(0)
    square, product = torch.as_tensor(square), torch.as_tensor(product)
    if repair == "bias":
        return (product / tokens).float()
    if repair == "scale":
        # A channel that the branch never touches stays as it is.
        return torch.where(square > 0, product / square.clamp_min(_TINY), 1.0).float()
    # RIDGE * H times the mean of the diagonal, per token.
    pull = (RIDGE * square.trace() / tokens).clamp_min(_TINY)
    square.diagonal().add_(pull)
    # (product + a I) (square + a I)^-1 is I + D for the D that the formula above adds.
    product.diagonal().add_(pull)
    return torch.linalg.solve(square, product.T).T.float()


def _pairs(passed: _Open) -> Iterator[tuple[Tensor, Tensor]]:
    """Per batch, tokens [n, H]: what the last branch added, and what it ought to have added."""
    for old, added, wanted, mask in zip(
        passed.before, passed.added, passed.wanted, passed.valid, strict=True
    ):
        # Streams in 16 bits are told apart in float32.
        yield added[mask].double(), (wanted[mask].float() - old[mask].float()).double()


def _repaired(repair: str, before: Tensor, added: Tensor, value: Tensor) -> Tensor:
    factor = value.to(added.dtype)
    if repair == "bias":
        return before + added + factor
    return before + (added @ factor.T if repair == "linear" else added * factor)
