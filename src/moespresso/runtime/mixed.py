"""Classes of experts that are made while a model is: a family's own with one of ours mixed in.

They bear the family's name, so that whatever recognises its experts recognises these, and are made once for
each family. No module holds them, so copies and pickles (`copy.deepcopy`, `torch.save` of a whole model,
workers that are spawned) are told how to make them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


class Mixed(nn.Module):
    """Base of what is mixed in: knows of what a class was made."""

    made_of: tuple[type[Mixed], type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """As ever, but for the class, which is made again."""
        _, _, *state = super().__reduce_ex__(protocol)  # pyright: ignore[reportAssignmentType]
        return (_again, _parts(type(self)), *state)


@cache
def mixed(ours: type[Mixed], family: type[nn.Module]) -> type[nn.Module]:
    """The class of a family's experts with ours mixed in."""
    return type(family.__name__, (ours, family), {"__module__": ours.__module__, "made_of": (ours, family)})


def _parts(kind: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """All that a class was made of, the family's own last."""
    made_of = kind.__dict__.get("made_of")
    return (kind,) if made_of is None else (made_of[0], *_parts(made_of[1]))


def _again(*parts: Any) -> nn.Module:
    """An empty module of the class that parts make."""
    *ours, kind = parts
    for mixin in reversed(ours):
        kind = mixed(mixin, kind)
    return kind.__new__(kind)
