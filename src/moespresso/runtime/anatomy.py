"""What a decoder layer adds to the residual stream, found by asking the layer.

Every direct child of the layer is replaced by a stand-in that answers with a direction of its own, whatever
it is given, and the layer's own forward is run on a hidden state that is one more direction. All that goes in
and comes out is then a sum of known directions, and the factors say which norm feeds which body, what is
applied to its answer, how it is scaled, and whether the second branch sees what the first one added. No
source is read, no family is known by name, no weight is touched: the layer may live on `meta`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moespresso.runtime.parts import Silent, hidden_of

# Names of submodules that mix tokens; anything else beside norms is the feed-forward part.
MIXERS: dict[str, str] = {"self_attn": "attention", "mamba": "mamba", "linear_attn": "linear_attention",
                          "conv": "convolution", "short_conv": "convolution"}  # fmt: skip

# A sum of directions: the factor of each child's answer by the child's name, and of the incoming hidden states.
Sum = dict[str, float]
_STREAM = "(hidden states)"
# Tuples come first: who takes `answer[0]` would take the first row of a bare tensor just as well.
_FORMS = (2, None, 3)


class NotResidual(Exception):
    """The layer is not `x + m1 post1(body1(pre1(x)))` and then the same once more; the message says why."""


@dataclass(frozen=True, slots=True)
class BranchParts:
    """One branch: the layer adds `multiplier * post(body(pre(x)))` to x. Names are those of its children.

    `answers` is the form of the body's answer: None for a bare tensor, else the length of a tuple that starts
    with it. `beside` are modules that are given what the body is given and whose answers are added to its
    answer (a shared MLP), each with the form of its own.
    """

    body: str
    pre: str | None
    post: str | None
    multiplier: float
    answers: int | None
    beside: tuple[tuple[str, int | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The branch that mixes tokens and the feed-forward branch; None where the layer has no such branch."""

    attention: BranchParts | None
    mlp: BranchParts | None


def find_anatomy(layer: nn.Module) -> Anatomy:
    """The branches of a decoder layer; raises `NotResidual` where its forward is not a plain sum of at most
    two."""
    probe = _probe(layer)
    if probe.out.get(_STREAM) != 1:
        raise NotResidual("it rescales or replaces the residual stream")
    terms = [_trace(probe, name) for name in probe.out if name != _STREAM]
    first = [term for term in terms if term.state == {_STREAM: 1}]
    after = {_STREAM: 1.0} | {term.name: term.multiplier for term in first}
    second = [term for term in terms if term.state == after != {_STREAM: 1}]
    if len(first) + len(second) < len(terms):
        raise NotResidual("a branch sees neither the layer's input nor all that was added to it before")
    branches = [_branch(probe, stage) for stage in (first, second) if stage]
    attention = [branch for branch in branches if probe.mixes(branch.body)]
    mlp = [branch for branch in branches if branch not in attention]
    if len(attention) > 1 or len(mlp) > 1:
        raise NotResidual("it has two branches of one kind")
    return Anatomy(next(iter(attention), None), next(iter(mlp), None))


# Reading the probe


@dataclass(frozen=True, slots=True)
class _Term:
    """One summand of the layer's output, traced back to the state of the residual stream it was computed
    from."""

    name: str
    bodies: tuple[str, ...]
    pre: str | None
    post: str | None
    multiplier: float
    state: Sum


def _trace(probe: _Probe, name: str) -> _Term:
    post, bodies = (name, tuple(probe.input_of(name))) if name in probe.norms else (None, (name,))
    if post is not None and set(probe.input_of(post).values()) != {1.0}:
        raise NotResidual(f"the answer that {post} is given has been rescaled")
    if not set(bodies) <= probe.bodies:
        raise NotResidual(f"{name} is given more than the answer of a body")
    pre, state = _source(probe, bodies)
    return _Term(name, bodies, pre, post, probe.out[name], state)


def _source(probe: _Probe, bodies: tuple[str, ...]) -> tuple[str | None, Sum]:
    """The norm that feeds bodies, if one does, and the state of the residual stream before it."""
    state = probe.input_of(bodies[0])
    if any(probe.input_of(body) != state for body in bodies):
        raise NotResidual(f"{' and '.join(bodies)} are given different things")
    only = next(iter(state)) if len(state) == 1 else None
    if only not in probe.norms:
        return None, state
    if state[only] != 1:
        raise NotResidual(f"what {bodies[0]} is given has been rescaled")
    return only, probe.input_of(only)


def _branch(probe: _Probe, terms: list[_Term]) -> BranchParts:
    """One branch from all summands that were computed from the same state of the residual stream."""
    bodies = [body for term in terms for body in term.bodies]
    names = " and ".join(bodies)
    if len({probe.mixes(body) for body in bodies}) > 1:
        raise NotResidual(f"{names} stand side by side")
    if len({(term.pre, term.multiplier) for term in terms}) > 1:
        raise NotResidual(f"{names} are not fed and added alike")
    if len(terms) > 1 and any(term.post for term in terms):
        raise NotResidual(f"{names} are normed apart")
    (body, answers), *beside = [(body, probe.children[body].answers) for body in bodies]
    return BranchParts(body, terms[0].pre, terms[0].post, terms[0].multiplier, answers, tuple(beside))


# Running the probe


class _StandIn(nn.Module):
    """Answers with its own direction and remembers what it was given; all else a forward reads is the real
    child's."""

    def __init__(self, real: nn.Module, direction: Tensor, answers: int | None) -> None:
        super().__init__()
        self.__dict__.update(real=real, direction=direction, answers=answers, calls=[], keywords=set())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """The direction, in the form it was told; raises `TypeError` when it is given another's tuple."""
        hidden = hidden_of(args, kwargs)
        if not isinstance(hidden, Tensor):
            raise TypeError(f"{type(hidden).__name__} given instead of hidden states")
        self.calls.append(hidden)
        self.keywords.update(kwargs)
        answers = self.answers
        return self.direction if answers is None else (self.direction, *[None] * (answers - 1))


@dataclass(frozen=True, slots=True)
class _Probe:
    """What one run of a layer's forward showed: its output, and the inputs of its children."""

    out: Sum
    children: dict[str, _StandIn]
    inputs: dict[str, list[Sum]]
    norms: set[str]
    bodies: set[str]

    def input_of(self, name: str) -> Sum:
        """The input of a child, which must be called once."""
        if len(self.inputs[name]) != 1:
            raise NotResidual(f"{name} is called {len(self.inputs[name])} times")
        return self.inputs[name][0]

    def mixes(self, body: str) -> bool:
        """Whether a body mixes tokens: by its name or, where one name serves all (`mixer`), by being given a
        mask."""
        return body in MIXERS or "attention_mask" in self.children[body].keywords


def _probe(layer: nn.Module) -> _Probe:
    """Run the layer with the first forms of answers that it takes; twice, as only sums follow their summands'
    size."""
    parts = {name: child for name, child in layer.named_children() if not _is_dropout(child)}
    bodies = [name for name, child in parts.items() if not _is_norm(child)]
    error: Exception | None = None
    for forms in product(_FORMS, repeat=len(bodies)):
        answers = dict.fromkeys(parts) | dict(zip(bodies, forms, strict=True))
        try:
            probe, again = (_run(layer, answers, set(bodies), size) for size in (1.0, -2.0))
        except Exception as raised:  # whatever a forward raises that is given what it does not expect
            error = error or raised
            continue
        if (probe.out, probe.inputs) != (again.out, again.inputs):
            raise NotResidual("it does more than add its branches up")
        return probe
    raise NotResidual(f"its forward cannot be followed ({error})")


def _run(layer: nn.Module, answers: Mapping[str, int | None], bodies: set[str], size: float) -> _Probe:
    """One forward of a copy of the layer that shares everything with it but its children."""
    labels = [_STREAM, *answers]
    # A model under construction may make everything else on `meta`. In double precision multipliers stay what they are.
    with torch.device("cpu"):
        stream, *directions = size * torch.eye(len(labels), dtype=torch.float64).view(-1, 1, 1, len(labels))
        children = {
            name: _StandIn(layer.get_submodule(name), direction, answers[name])
            for name, direction in zip(answers, directions, strict=True)
        }
        bare = copy.copy(layer)
        # What stands for a removed norm may be asked for its dtype.
        idle = {
            name: child if isinstance(child, nn.Identity) else nn.Identity()
            for name, child in layer.named_children()
        }
        bare.__dict__["_modules"] = idle | children
        out = bare.forward(stream, **_nothing(layer))
    total = _sum(out[0] if isinstance(out, tuple) else out, labels, size)
    inputs = {name: [_sum(call, labels, size) for call in child.calls] for name, child in children.items()}
    return _Probe(total, children, inputs, set(answers) - bodies, bodies)


def _nothing(layer: nn.Module) -> dict[str, None]:
    """None for everything that the layer's forward asks for beside hidden states."""
    _, *others = inspect.signature(layer.forward).parameters.values()
    return {one.name: None for one in others if one.default is one.empty and one.kind is not one.VAR_KEYWORD}


def _sum(vector: Tensor, labels: list[str], size: float) -> Sum:
    """The factors of a vector [1, 1, D] that is a sum of D directions of length `size`."""
    factors = (vector.reshape(-1) / size).tolist()
    return {label: factor for label, factor in zip(labels, factors, strict=True) if factor}


def _is_norm(module: nn.Module) -> bool:
    """Norms and scales have no parts and at most vectors for weights; bodies have matrices, or had."""
    if isinstance(module, Silent):
        return False
    return not any(True for _ in module.children()) and all(p.dim() < 2 for p in module.parameters())


def _is_dropout(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout | nn.Identity)
