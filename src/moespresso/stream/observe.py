"""What passes inside a layer while it runs: its router, its experts, and the residual stream between its
branches.

Nothing is computed twice: hooks on the modules that the layer's anatomy names, and observers of its experts
(`model.observing`), hand out what passes by.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from moespresso.core.layer import Fed, Layer, Routed
from moespresso.model import observing
from moespresso.runtime import hidden_of


@dataclass(slots=True)
class Observed:
    """What passed inside a layer in one run (see `core.layer.Call`)."""

    routed: Routed | None = None
    middle: Tensor | None = None
    fed: Tensor | None = None
    answer: Tensor | None = None


@contextmanager
def observe_layer(layer: Layer) -> Generator[Observed]:
    """While the layer runs once, take down what passes between its parts."""
    observed = Observed()
    with ExitStack() as stack:
        if layer.experts is not None and layer.router is not None:
            stack.enter_context(_experts_observed(layer.experts, layer.router, observed))
        if layer.anatomy is not None and layer.anatomy.mlp is not None:
            stack.enter_context(_stream_observed(layer, observed))
        yield observed


class HeldRun:
    """One run of a layer that waits where its experts are called, or is through where they never are.

    It goes on with the experts' weights as they are by then.
    """

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = greenlet(run)
        self._output: Tensor | None = self._run.switch()

    def finish(self) -> Tensor:
        """What the layer answers."""
        return self._run.switch(None) if self._output is None else self._output


@contextmanager
def observe_inputs(
    layer: Layer,
    valid: Tensor,
    watched: Mapping[str, Callable[[Tensor], None]],
    fed: list[Fed],
    *,
    hold: bool = False,
) -> Generator[None]:
    """While the layer runs once on a batch with the mask `valid` [B, L]: its experts answer nothing (with
    `hold`, a `HeldRun` waits) and their inputs are added to `fed`; modules that are `watched` hand on
    theirs."""
    tokens = torch.nonzero(valid.reshape(-1)).squeeze(-1)

    def on_experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
        fed.append(Fed(hidden[tokens], index[tokens], weights[tokens].float()))
        if not hold:
            return torch.zeros_like(hidden)
        driver = getcurrent().parent
        assert driver is not None
        return driver.switch(None)

    def handing_to(take: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: take(args[0].reshape(-1, args[0].shape[-1])[tokens])

    with ExitStack() as stack:
        for name, take in watched.items():
            handle = layer.module.get_submodule(name).register_forward_pre_hook(handing_to(take))
            stack.callback(handle.remove)
        if layer.experts is not None:
            stack.enter_context(observing(layer.experts, before=on_experts))
        yield


@contextmanager
def _experts_observed(experts: nn.Module, router: nn.Module, observed: Observed) -> Generator[None]:
    of_router: dict[str, Any] = {}

    def on_router(_: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        of_router["args"], of_router["logits"] = args, output[0]

    def on_experts(hidden: Tensor, index: Tensor, weights: Tensor, outputs: Tensor) -> None:
        logits = of_router["logits"].reshape(hidden.shape[0], -1)
        observed.routed = Routed(hidden, logits, index, weights, outputs, of_router["args"])

    handle = router.register_forward_hook(on_router)
    try:
        with observing(experts, after=on_experts):
            yield
    finally:
        handle.remove()


@contextmanager
def _stream_observed(layer: Layer, observed: Observed) -> Generator[None]:
    branch = layer.anatomy.mlp
    body = layer.module.get_submodule(branch.body)

    def on_entry(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observed.middle = hidden_of(args, kwargs)

    def on_body(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        observed.fed = hidden_of(args, kwargs)
        observed.answer = output[0] if isinstance(output, tuple) else output

    entry = body if branch.pre is None else layer.module.get_submodule(branch.pre)
    handles = [
        entry.register_forward_pre_hook(on_entry, with_kwargs=True),
        body.register_forward_hook(on_body, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
