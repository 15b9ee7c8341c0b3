"""Experts of one layer that differ in width.

Each is stored with the channels it has. A model that is used has them so in memory, end to end:
`gate_up_proj` [S, 2 H] and `down_proj` [H, S], S the sum of the widths, each expert with its run of channels
(`Ragged`). What moespresso does to a model it does to stacks: there (`stacked`) experts are as wide as the
widest of their layer, the others ending in channels of zeros, which add nothing.

transformers makes stacks of what it reads with `MergeModulelist`, which `install` teaches both, and takes
them apart for saving with `revert_weight_conversion`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import modeling_utils
from transformers.core_model_loading import MergeModulelist
from transformers.modeling_utils import PreTrainedModel

from moespresso.core.errors import UserError
from moespresso.runtime.mixed import Mixed, mixed

# Marks our functions.
_DONE = "_moespresso"
_STACKED: ContextVar[bool] = ContextVar("stacked", default=False)


@contextmanager
def stacked() -> Iterator[None]:
    """Build and load models with experts as stacks, whatever their widths."""
    token = _STACKED.set(True)
    try:
        yield
    finally:
        _STACKED.reset(token)


def widened(narrow: Tensor, shape: Sequence[int]) -> Tensor:
    """`narrow` with zeros behind, up to `shape`; raises `ValueError` where it is larger than that
    anywhere."""
    more = [wide - size for wide, size in zip(shape, narrow.shape, strict=True)]
    if min(more) < 0:
        raise ValueError(f"a tensor of {list(narrow.shape)} does not fit in {list(shape)}")
    return pad(narrow, [side for missing in reversed(more) for side in (0, missing)])


def differ(experts: Any, widths: tuple[int, ...], gone: int) -> None:
    """Give experts under construction, of which some will be `gone`, widths of their own; raises `UserError`
    where their weights are laid out in a way that this cannot be done to."""
    if experts.is_transposed or experts.has_bias:
        raise UserError(
            "its experts have biases or are stored transposed, so that widths of their own are not known"
        )
    wide = experts.down_proj.shape[2]
    if len(widths) != experts.num_experts - gone or max(widths) != wide or min(widths) < 1:
        raise UserError(
            f"expert_widths {list(widths)} are not the widths of {experts.num_experts - gone} experts of which the widest has {wide}"
        )
    experts.widths = widths
    if not _STACKED.get():
        halves = 2 if experts.has_gate else 1
        hidden, total = experts.down_proj.shape[1], sum(widths)
        _become(
            experts,
            experts.down_proj.new_empty(total, halves * hidden),
            experts.down_proj.new_empty(hidden, total),
        )


def _become(experts: Any, up: Tensor, down: Tensor) -> None:
    experts.__class__ = mixed(Ragged, type(experts))
    for name, tensor in zip(_names(experts), (up, down), strict=True):
        setattr(experts, name, nn.Parameter(tensor, requires_grad=experts.down_proj.requires_grad))


def _names(experts: Any) -> tuple[str, str]:
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


class Ragged(Mixed):
    """Mixed into a family's class of experts: each is a run of channels of matrices that hold all of them."""

    num_experts: int
    has_gate: bool
    widths: tuple[int, ...]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum [T, H] of what the selected experts answer; a number past the last adds nothing."""
        total, slots = torch.zeros_like(hidden_states), top_k_index.reshape(-1)
        order, gates = slots.argsort(stable=True), top_k_weights.reshape(-1)
        counts = torch.bincount(slots, minlength=self.num_experts).tolist()
        ends = [0, *accumulate(counts)]
        for expert in (number for number in range(self.num_experts) if counts[number]):
            rows = order[ends[expert] : ends[expert + 1]]
            tokens = rows // top_k_index.shape[-1]
            answer = self.answer(expert, hidden_states[tokens]) * gates[rows].unsqueeze(1)
            total.index_add_(0, tokens, answer.to(total.dtype))
        return total

    def answer(self, expert: int, hidden: Tensor) -> Tensor:
        """What one expert makes of tokens [n, H]."""
        us: Any = self
        first = sum(self.widths[:expert])
        run = slice(first, first + self.widths[expert])
        up = getattr(us, _names(us)[0])[run].unflatten(1, (-1, hidden.shape[1]))
        inner = torch.cat([hidden @ half.T for half in up.unbind(1)], -1)
        inner = us._apply_gate(inner) if self.has_gate else us.act_fn(inner)
        output = inner @ us.down_proj[:, run].T
        return us.post_expert_norm(output) if us.has_post_expert_norm else output


def install() -> None:
    """Teach transformers to read experts of different widths, and to save them; called again, it does
    nothing."""
    if not hasattr(MergeModulelist.convert, _DONE):
        MergeModulelist.convert = _merging(MergeModulelist.convert)
        saving: Any = modeling_utils  # which calls by this name what it imports
        saving.revert_weight_conversion = _reverting(saving.revert_weight_conversion)


def _merging(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    @wraps(original)
    def convert(
        self: MergeModulelist, input_dict: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        ragged = {name: tensors for name, tensors in input_dict.items() if _differ_in(tensors) is not None}
        together = _even if _STACKED.get() else _run_together
        return original(
            self, input_dict | {name: together(parts) for name, parts in ragged.items()}, *args, **kwargs
        )

    convert.__dict__[_DONE] = True
    return convert


def _differ_in(tensors: Any) -> int | None:
    """The one axis in which tensors of a list have different sizes."""
    shapes = (
        {tuple(tensor.shape) for tensor in tensors} if isinstance(tensors, list) else set[tuple[int, ...]]()
    )
    if len(shapes) < 2 or len({len(shape) for shape in shapes}) > 1:
        return None
    axes = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    return axes[0] if len(axes) == 1 else None


def _run_together(tensors: list[Tensor]) -> Tensor:
    """One tensor, which the library takes for a stack that is there already."""
    return torch.cat(tensors, _differ_in(tensors) or 0)


def _even(tensors: list[Tensor]) -> list[Tensor]:
    largest = [max(sizes) for sizes in zip(*(one.shape for one in tensors), strict=True)]
    return [widened(tensor, largest) for tensor in tensors]


def _reverting(original: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    @wraps(original)
    def revert_weight_conversion(model: PreTrainedModel, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        rest, apart = dict(state_dict), dict[str, Tensor]()
        for name, experts in model.named_modules():
            if not isinstance(experts, Ragged):
                continue
            for key in [f"{name}.{matrix}" for matrix in _names(experts)]:
                if key in rest:  # and not in another shard
                    apart |= _one_by_one(lambda state: original(model, state), experts, key, rest.pop(key))
        return original(model, rest) | apart

    return revert_weight_conversion


def _one_by_one(
    reverted: Callable[[dict[str, Tensor]], dict[str, Tensor]], experts: Ragged, key: str, together: Tensor
) -> dict[str, Tensor]:
    """Experts as they are stored, each in the form that its family gives to the one of a stack of one."""
    by_name: dict[str, Tensor] = {}
    for number, stack in enumerate(_stacks_of_one(experts, key.rpartition(".")[2], together)):
        for name, tensor in reverted({key: stack}).items():
            if "experts.0." not in name:  # read as one matrix, which it stays
                return {name: together}
            by_name[name.replace("experts.0.", f"experts.{number}.")] = tensor.clone()
    return by_name


def _stacks_of_one(experts: Ragged, matrix: str, together: Tensor) -> Iterator[Tensor]:
    """Every expert's own run of a matrix, as transformers has it in memory where there is no other expert."""
    if matrix == "down_proj":
        yield from (run.unsqueeze(0) for run in together.split(experts.widths, 1))
        return
    halves = 2 if experts.has_gate else 1
    for run in together.split(experts.widths):
        yield run.unflatten(1, (halves, -1)).transpose(0, 1).flatten(0, 1).unsqueeze(0)
