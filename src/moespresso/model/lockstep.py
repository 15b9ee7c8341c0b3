"""Lock-step forward: every batch runs the model's own forward, all of them paused at the same layer.

Each decoder layer is replaced by a stand-in that switches to the driver (`greenlet`) with its arguments and
returns what the driver hands back. So masks, rotary tables, sliding windows and whatever else a family does
between layers come from the family's own code; the driver loads a layer once, runs all paused batches through
it, and lets them go on to the next. Nothing is captured by raising, nothing is re-implemented.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any, cast

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from transformers import PreTrainedModel

from moespresso.core.errors import UserError
from moespresso.model import quirks

_MASKS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask")


class _StandIn(nn.Module):
    """Sits where a decoder layer was; attributes a forward reads from its layers are the real layer's."""

    def __init__(self, real: nn.Module) -> None:
        super().__init__()
        self.__dict__["real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["real"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        driver = getcurrent().parent
        assert driver is not None
        return driver.switch(hidden_states, args, kwargs)


class PausedBatch:
    """One batch on its way: its `hidden` states before the layer that it is paused at, or the last ones when
    it is through; `args` and `kwargs` are what that layer is called with beside them."""

    def __init__(self, forward: Callable[[], Tensor], *, hands_on: bool = False) -> None:
        self._greenlet = greenlet(forward)
        self._hands_on = hands_on
        self._beside: tuple[Any, ...] | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.hidden = self._take(self._greenlet.switch())

    def run(self, layer: nn.Module, hidden: Tensor | None = None) -> Tensor:
        """The layer's output for this batch, or for other hidden states in its place (the batch stays paused:
        this may be called again)."""
        output = layer(self.hidden if hidden is None else hidden, *self.args, **self.kwargs)
        if self._hands_on and isinstance(output, tuple):
            output, *beside = cast("tuple[Any, ...]", output)
            self._beside = tuple(beside)
        if not isinstance(output, Tensor):
            raise UserError(
                f"{type(layer).__name__} answers with more than hidden states, which this version does not understand"
            )
        return output

    def snapshot(self, hidden: Tensor) -> PausedBatch:
        """This pause, which stays when the batch goes on, with its hidden states where they are kept
        meanwhile."""
        pause = copy(self)
        pause.hidden = hidden
        return pause

    def go_on(self, output: Tensor) -> None:
        """Hand `output` back as the layer's result and run on to the next layer."""
        answer: Any = output
        if self._hands_on:
            if self._beside is None:
                raise UserError(
                    "the layers of this model hand on more than hidden states, so a measurement that was interrupted "
                    "cannot be continued: start it afresh (--no-resume)"
                )
            answer, self._beside = (output, *self._beside), None
        self.hidden = self._take(self._greenlet.switch(answer))

    def _take(self, yielded: Any) -> Tensor:
        if self._greenlet.dead:
            return cast("Tensor", yielded)
        hidden, self.args, self.kwargs = yielded
        return hidden


def start(
    base: PreTrainedModel, layers_name: str, ids: list[Tensor], masks: list[Tensor | None]
) -> list[PausedBatch]:
    """Start one forward per batch of `ids` [B, L]; all pause at the first layer. Gradient mode is the
    caller's.

    Batches of equal ids hold what came before the first layer once: treat `hidden` as read-only.
    """
    hands_on = base.config.model_type in quirks.HANDS_ON
    batches: list[PausedBatch] = []
    firsts: dict[Any, list[Tensor]] = {}
    path = layers_name.rpartition(".")[2]
    real = getattr(base, path)
    stand_ins = nn.ModuleList([_StandIn(layer) for layer in real])
    setattr(base, path, stand_ins)
    try:
        with _shared_tables(base), _observe(base.get_input_embeddings()) as embedded:
            for batch, mask in zip(ids, masks, strict=True):
                embedded.clear()
                batches.append(PausedBatch(partial(_forward, base, batch, mask), hands_on=hands_on))
                held = [*embedded, batches[-1].hidden]
                for tensor, first in zip(held, firsts.setdefault(_fingerprint(batch), held), strict=False):
                    _share(tensor, first)
        return batches
    finally:
        setattr(base, path, real)


def _forward(base: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    return base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


@contextmanager
def _observe(embedding: nn.Module) -> Iterator[list[Tensor]]:
    """What the embedding answers, while in here."""
    answers: list[Tensor] = []

    def on_answer(_: nn.Module, __: Any, answer: Any) -> None:
        answers.append(answer)

    hook = embedding.register_forward_hook(on_answer)
    try:
        yield answers
    finally:
        hook.remove()


def _share(tensor: Tensor, first: Tensor) -> None:
    """Let `tensor` stand on the memory of `first`, if they are equal."""
    # The paused forward holds this very tensor (some to the end, some scaled first), so nothing but its memory can be
    # exchanged. Sharing the embedding's answer before it is used would be wrong where a family scales it in place.
    alike = tensor.stride() == first.stride() and tensor.dtype == first.dtype and not tensor.requires_grad
    if tensor.data_ptr() != first.data_ptr() and alike and torch.equal(tensor, first):
        tensor.set_(first)  # pyright: ignore[reportArgumentType]


@contextmanager
def _shared_tables(base: PreTrainedModel) -> Iterator[None]:
    """One mask and one rotary table for all batches of equal shape, instead of one each."""
    module = sys.modules[type(base).__module__]
    originals = {name: getattr(module, name) for name in _MASKS if hasattr(module, name)}
    rotary = [child for name, child in base.named_children() if "rotary" in name]
    for name, function in originals.items():
        setattr(module, name, _remember(function))
    for child in rotary:
        # Replacing the method, not the module, keeps what else a forward reads from it.
        child.forward = _remember(child.forward)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(module, name, function)
        for child in rotary:
            del child.forward


def _remember(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call `function` once per distinct arguments: embeddings count by shape, masks and positions by
    content."""
    answers: dict[Any, Any] = {}

    def remembered(*args: Any, **kwargs: Any) -> Any:
        key = tuple(_fingerprint(value) for value in (*args, *(kwargs[name] for name in sorted(kwargs))))
        if key not in answers:
            answers[key] = function(*args, **kwargs)
        return answers[key]

    return remembered


def _fingerprint(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value if isinstance(value, str | int | float | bool | type(None)) else id(value)
    if value.is_floating_point():  # hidden states: only their shape, dtype and device shape a table
        return tuple(value.shape), value.dtype, str(value.device)
    content = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return tuple(value.shape), hashlib.sha256(content).hexdigest()
