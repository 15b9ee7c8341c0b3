"""A decoder layer without one of its branches, for as long as it is asked.

What is silenced adds nothing: its module is replaced by one that answers zeros in the form the layer expects,
its norms by nothing, exactly as in a model whose config skips the branch. So a cut can be tried before it is
made, and one branch be run by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from moespresso.core.blueprint import Branch
from moespresso.runtime import Anatomy, NoNorm, Silent


@contextmanager
def without(layer: nn.Module, anatomy: Anatomy, branches: Collection[Branch]) -> Iterator[None]:
    """While inside, `branches` of the layer add nothing to the residual stream. Needs a forward without a
    cache."""
    real: dict[str, nn.Module] = {}
    for name in branches:
        branch = anatomy.attention if name == "attention" else anatomy.mlp
        if branch is None:
            continue
        stubs: dict[str, nn.Module] = {branch.body: Silent(branch.answers)}
        stubs |= {body: Silent(answers) for body, answers in branch.beside}
        stubs |= {norm: NoNorm() for norm in (branch.pre, branch.post) if norm is not None}
        for child, stub in stubs.items():
            real[child] = layer.get_submodule(child)
            setattr(layer, child, stub)
    try:
        yield
    finally:
        for child, module in real.items():
            setattr(layer, child, module)
