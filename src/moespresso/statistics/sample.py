"""A sample of the tokens that reach a layer's experts, and what every expert answers to it.

Some questions need experts on tokens that the router did not send them: what would the others say? All
answers to all tokens would not fit, so evenly spaced tokens are taken, as many as a bound allows.

Nothing keeps these answers within what float16 holds, as training does with those that the router asks for:
they are computed in float32, one expert at a time.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from moespresso.core.layer import Call, Layer, valid_tokens
from moespresso.model import expert_forward

# At most this many tokens, and no more answers (float32) than fit in this many bytes.
MOST_TOKENS, ANSWER_BYTES = 1024, 256 << 20


class Sample:
    """Takes its share of every batch; then `hidden` [n, H] is what experts see, `asked` and `extra` what
    routers see."""

    def __init__(self, experts: int, hidden: int, total: int) -> None:
        self._wanted = max(16, min(MOST_TOKENS, ANSWER_BYTES // (4 * experts * hidden)))
        self._total = total
        self._calls: list[tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]] = []

    @classmethod
    def of(cls, layer: Layer, num_tokens: int) -> Sample:
        """A sample of the layer's tokens, still empty, where so many will pass it."""
        assert layer.router is not None
        width = next(iter(layer.router.parameters())).shape[-1]
        return cls(layer.spec.experts, width, num_tokens)

    def add(self, call: Call) -> None:
        """Take the batch's share, evenly spaced over its tokens."""
        assert call.routed is not None
        tokens = valid_tokens(call)
        share = min(tokens.numel(), math.ceil(self._wanted * tokens.numel() / self._total))
        tokens = tokens[torch.linspace(0, tokens.numel() - 1, share).round().long()]
        seen, *extra = call.routed.router_args
        # As many dimensions as the router is used to; what it sees need not be what the experts see.
        asked = seen.reshape(-1, seen.shape[-1])[tokens].view(*[1] * (seen.ndim - 2), len(tokens), -1)
        self._calls.append((call.routed.hidden[tokens], call.routed.logits[tokens], asked, tuple(extra)))

    @cached_property
    def hidden(self) -> Tensor:
        """What the experts see [n, H]."""
        return torch.cat([hidden for hidden, _, _, _ in self._calls])

    @cached_property
    def logits(self) -> Tensor:
        """What the router said of them [n, E]."""
        return torch.cat([logits for _, logits, _, _ in self._calls])

    @cached_property
    def asked(self) -> Tensor:
        """What the router sees, in as many dimensions as it is used to."""
        return torch.cat([asked for _, _, asked, _ in self._calls], -2)

    @property
    def extra(self) -> tuple[Tensor, ...]:
        """What else the router is called with."""
        return self._calls[0][3]

    def answers(self, layer: Layer) -> Tensor:
        """What every expert answers to every token of the sample [n, E, H], in float32."""
        experts = layer.experts
        assert experts is not None
        return torch.stack(
            [expert_forward(experts, e, self.hidden.float()) for e in range(layer.spec.experts)], 1
        )
