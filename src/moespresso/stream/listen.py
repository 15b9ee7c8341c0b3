"""What a layer says while it runs: its router, its experts, and the residual stream between its branches.

Nothing is computed twice: hooks on the modules that the layer's anatomy names hand out what passes by.
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
from moespresso.runtime import hidden_of


@dataclass(slots=True)
class Heard:
    """What one run of a layer said (see `core.layer.Call`)."""

    routed: Routed | None = None
    middle: Tensor | None = None
    fed: Tensor | None = None
    answer: Tensor | None = None


@contextmanager
def listening(layer: Layer) -> Generator[Heard]:
    """While the layer runs once, hear what its parts say."""
    heard = Heard()
    with ExitStack() as stack:
        if layer.experts is not None and layer.router is not None:
            stack.enter_context(_experts_heard(layer.experts, layer.router, heard))
        if layer.anatomy is not None and layer.anatomy.mlp is not None:
            stack.enter_context(_stream_heard(layer, heard))
        yield heard


class Held:
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
def overhearing(
    layer: Layer,
    valid: Tensor,
    watched: Mapping[str, Callable[[Tensor], None]],
    found: list[Fed],
    *,
    hold: bool = False,
) -> Generator[None]:
    """While the layer runs once on a batch with the mask `valid` [B, L]: its experts stay silent (with `hold`, a `Held` run
    waits) and what they are given is added to `found`; modules that are `watched` hand on their inputs."""
    tokens = torch.nonzero(valid.reshape(-1)).squeeze(-1)

    def on_experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor | None:
        found.append(Fed(hidden[tokens], index[tokens], weights[tokens].float()))
        if not hold:
            return torch.zeros_like(hidden)
        driver = getcurrent().parent
        assert driver is not None
        return driver.switch(None)

    def told(tell: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: tell(args[0].reshape(-1, args[0].shape[-1])[tokens])

    handles = [
        layer.module.get_submodule(name).register_forward_pre_hook(told(tell))
        for name, tell in watched.items()
    ]
    if layer.experts is not None:
        layer.experts.__dict__["moespresso_ear"] = on_experts
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if layer.experts is not None:
            del layer.experts.__dict__["moespresso_ear"]


@contextmanager
def _experts_heard(experts: nn.Module, router: nn.Module, heard: Heard) -> Generator[None]:
    said: dict[str, Any] = {}

    def on_router(_: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        said["args"], said["logits"] = args, output[0]

    def on_experts(hidden: Tensor, index: Tensor, weights: Tensor, outputs: Tensor) -> None:
        logits = said["logits"].reshape(hidden.shape[0], -1)
        heard.routed = Routed(hidden, logits, index, weights, outputs, said["args"])

    handle = router.register_forward_hook(on_router)
    experts.__dict__["moespresso_tap"] = on_experts
    try:
        yield
    finally:
        handle.remove()
        del experts.__dict__["moespresso_tap"]


@contextmanager
def _stream_heard(layer: Layer, heard: Heard) -> Generator[None]:
    branch = layer.anatomy.mlp
    body = layer.module.get_submodule(branch.body)

    def on_entry(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard.middle = hidden_of(args, kwargs)

    def on_body(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        heard.fed, heard.answer = hidden_of(args, kwargs), output[0] if isinstance(output, tuple) else output

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
