"""Experts of one layer that differ in width.

Each is stored with the channels it has. In memory a layer's experts are one stack, as wide as the widest of them: the
others end in channels of zeros, which add nothing. transformers stacks what it reads with `MergeModulelist`, which
`install` teaches to widen what is narrower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers.core_model_loading import MergeModulelist

# Marks our function.
_DONE = "_moespresso"


def widened(narrow: Tensor, shape: Sequence[int]) -> Tensor:
    """`narrow` with zeros behind, up to `shape`; raises `ValueError` where it is larger than that anywhere."""
    more = [wide - own for wide, own in zip(shape, narrow.shape, strict=True)]
    if min(more) < 0:
        raise ValueError(f"a tensor of {list(narrow.shape)} does not fit in {list(shape)}")
    return pad(narrow, [side for each in reversed(more) for side in (0, each)])


def install() -> None:
    """Teach transformers to stack experts of different widths; called again, it does nothing."""
    if not hasattr(MergeModulelist.convert, _DONE):
        MergeModulelist.convert = _stacking(MergeModulelist.convert)


def _stacking(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    @wraps(original)
    def convert(
        self: MergeModulelist, input_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        for name, tensors in input_dict.items():
            if isinstance(tensors, list):
                input_dict[name] = _even(tensors)
        return original(self, input_dict, *args, **kwargs)

    convert.__dict__[_DONE] = True
    return convert


def _even(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors, all of the largest shape; those that cannot be stacked at all as they are."""
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) < 2 or len({len(shape) for shape in shapes}) > 1:
        return tensors
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    return [widened(tensor, largest) for tensor in tensors]
