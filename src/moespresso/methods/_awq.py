"""Where factors can be moved without any effect: from a norm into all that reads it, and from up into down.

    readers (x n)  =  (readers diag(n / n')) (x n')          down (act(g) * u)  =  (down diag(t)) (act(g) * u
                   / t)

Nothing is known of families by name. The feed-forward part is run on a few random tokens with its experts
silent; whatever is given the very tensor that the part was given, and has a matrix as wide, is taken for a
reader. Then all of them are scaled by random powers of two, which floating point does exactly (in float32,
that is: float16 rounds what is below 6e-5): where the scaled part does not say exactly the same, it reads its
input in some other way, and `UnknownEntrance` says so. The same trial tells a norm that multiplies by its
weight from one that multiplies by 1 + w, and a plain product of gate and up from one that is cut off.

`narrowed` is the search for ranges that goes with it: the one of least output error, group by group.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moespresso.core.format import Format
from moespresso.formats import Grid, chosen, decode, encode, in_groups, spanned
from moespresso.model import observing
from moespresso.runtime import BranchParts, NotResidual, find_anatomy

_TOKENS = 16
# Larger than any bound at which a family cuts off what goes through its experts.
_FAR = 1e3
# Ranges that are tried for each group, down to the narrowest; and what every input counts at least, in mean squares.
_RANGES, _NARROWEST = 16, 0.4
_RIDGE = 1e-4


class UnknownEntrance(Exception):
    """The inputs of a layer's experts cannot be scaled; the message says why."""


@dataclass(frozen=True, slots=True)
class Entrance:
    """What stands before the experts of a layer: the parameter of the `norm`, [H], and those of all other
    `readers` of its output, [*, H], by their names in the layer."""

    norm: str
    readers: tuple[str, ...]


def find_entrance(layer: nn.Module, experts: Any) -> Entrance:
    """The norm before `experts` and all that reads its output beside them; raises `UnknownEntrance` where
    that cannot be told."""
    try:
        branch = find_anatomy(layer).mlp
    except NotResidual as error:
        raise UnknownEntrance(f"the branches of the layer cannot be told apart: {error}") from error
    if branch is None or branch.pre is None:
        raise UnknownEntrance("no norm stands before them")
    norm = layer.get_submodule(branch.pre)
    names = [name for name, _ in norm.named_parameters()]
    if len(names) != 1 or not _multiplies(norm, names[0]):
        raise UnknownEntrance(f"{branch.pre} does more than multiply by its weight")
    readers = _readers(layer, branch, experts, norm.get_parameter(names[0]))
    return Entrance(f"{branch.pre}.{names[0]}", readers)


def is_product(experts: Any, width: int) -> bool:
    """Whether what reaches down, `width` wide, is the answer to the gate times up, each in its half, and
    nothing else."""
    if not experts.has_gate or experts.has_bias:
        return False
    like = experts.down_proj[:0].float()
    gate, up = (_random(_TOKENS, width, like=like, seed=seed) for seed in (0, 1))
    factors = _powers(width, like)
    plain = experts._apply_gate(torch.cat([gate, _FAR * up], 1))
    return torch.equal(experts._apply_gate(torch.cat([gate, _FAR * up * factors], 1)), plain * factors)


def _multiplies(norm: nn.Module, name: str) -> bool:
    weight = norm.get_parameter(name).float()
    if weight.ndim != 1:
        return False
    hidden, factors = _random(1, _TOKENS, len(weight), like=weight), _powers(len(weight), weight)
    plain, scaled = (functional_call(norm, {name: each}, (hidden,)) for each in (weight, weight * factors))
    return torch.equal(scaled, plain * factors)


def _readers(layer: nn.Module, branch: BranchParts, experts: Any, norm: Tensor) -> tuple[str, ...]:
    bodies = [branch.body, *(name for name, _ in branch.beside)]
    norm = norm.float()
    hidden, factors = _random(1, _TOKENS, len(norm), like=norm), _powers(len(norm), norm)
    values = _in_float32(layer, bodies, experts)
    try:
        with _silent(experts) as inputs, _watched(layer, bodies, experts, hidden) as found:
            plain = [_with(layer, name, values)(hidden) for name in bodies]
        scaled = values | {name: values[name] * factors for name in found}
        with _silent(experts) as again:
            answers = [_with(layer, name, scaled)(hidden / factors) for name in bodies]
    except Exception as error:  # whatever a module raises that is given less than it is used to
        raise UnknownEntrance(f"{' and '.join(bodies)} cannot be run alone ({error})") from error
    alone = len(inputs) == 3 and torch.equal(inputs[0], hidden[0])
    if not alone or not _equal([inputs[0] / factors, *inputs[1:], *plain], [*again, *answers]):
        raise UnknownEntrance(f"something in {' and '.join(bodies)} reads its input in a way of its own")
    return tuple(dict.fromkeys(found))


def _in_float32(layer: nn.Module, bodies: list[str], experts: nn.Module) -> dict[str, Tensor]:
    """What belongs to the bodies and not to the experts, which are silent, by its name in the layer."""
    silent = {id(tensor) for tensor in (*experts.parameters(), *experts.buffers())}
    return {name: tensor.float() for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
            if tensor.is_floating_point() and id(tensor) not in silent
            and any(name.startswith(f"{body}.") for body in bodies)}  # fmt: skip


def _with(layer: nn.Module, name: str, values: dict[str, Tensor]) -> Callable[[Tensor], Any]:
    """A child of the layer with other values for some of its parameters (named as in the layer)."""
    own = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
    return lambda hidden: functional_call(layer.get_submodule(name), own, (hidden,))


def _equal(one: Any, other: Any) -> bool:
    """Whether two answers, tensors or nested tuples of them, are the same to the last bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


@contextmanager
def _silent(experts: nn.Module) -> Generator[list[Tensor]]:
    """Experts answer zeros; their inputs (tokens, selection, gates) are put into the list."""
    inputs: list[Tensor] = []

    def on_experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        inputs.extend((hidden, index, weights))
        return torch.zeros_like(hidden)

    with observing(experts, before=on_experts):
        yield inputs


@contextmanager
def _watched(layer: nn.Module, bodies: list[str], experts: nn.Module, hidden: Tensor) -> Generator[list[str]]:
    """While the bodies run on `hidden`: names of the matrices of all modules that are given just that."""
    found: list[str] = []

    def look(prefix: str) -> Callable[..., None]:
        def on_entry(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _is_that(next(iter((*args, *kwargs.values())), None), hidden):
                found.extend(f"{prefix}.{name}" for name, own in module.named_parameters(recurse=False)
                             if own.ndim == 2 and own.shape[1] == hidden.shape[-1])  # fmt: skip

        return on_entry

    beneath = set(experts.modules())
    handles = [module.register_forward_pre_hook(look(name), with_kwargs=True)
               for name, module in layer.named_modules()
               if any(f"{name}.".startswith(f"{body}.") for body in bodies) and module not in beneath]  # fmt: skip
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _is_that(given: Any, hidden: Tensor) -> bool:
    """Whether a module is given just these tokens, in whatever shape."""
    if not isinstance(given, Tensor) or given.numel() != hidden.numel():
        return False
    return given.shape[-1] == hidden.shape[-1] and torch.equal(given.reshape(hidden.shape).to(hidden), hidden)


def narrowed(weights: Tensor, hessians: Tensor, format: Format, dtype: torch.dtype) -> Grid:
    """Grids of `weights` [N, out, in] on ranges that are narrowed until e H e^T of each group by itself is
    least: H is the group's block of `hessians` [N, in, in], e its error."""
    found = [_narrowed(*one, format, dtype) for one in zip(weights.split(1), hessians, strict=True)]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


def _narrowed(weights: Tensor, hessian: Tensor, format: Format, dtype: torch.dtype) -> Grid:
    """`narrowed` for one matrix [1, out, in]."""
    grouped = in_groups(weights, format)
    size = grouped.shape[-1]
    blocks = torch.stack([hessian[at : at + size, at : at + size] for at in range(0, len(hessian), size)])
    blocks = blocks + _RIDGE * hessian.diagonal().mean() * torch.eye(size, device=hessian.device)
    low, high = grouped.aminmax(dim=-1)
    best, lowest = spanned(low, high, format, dtype), torch.full_like(low, torch.inf)
    for step in range(_RANGES):
        share = 1 - (1 - _NARROWEST) * step / _RANGES
        grid = spanned(low * share, high * share, format, dtype)
        errors = in_groups(decode(encode(weights, *grid, format)).float(), format) - grouped
        by_group = errors[0].transpose(0, 1)
        loss = ((by_group @ blocks) * by_group).sum(-1).mT[None]
        best, lowest = chosen(loss < lowest, grid, best), torch.minimum(loss, lowest)
    return best


def _random(*shape: int, like: Tensor, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(like)


def _powers(width: int, like: Tensor) -> Tensor:
    """Factors 1/2, 1 and 2 in random order [width]."""
    made = torch.randint(-1, 2, (width,), generator=torch.Generator().manual_seed(2))
    return made.to(like).exp2()
