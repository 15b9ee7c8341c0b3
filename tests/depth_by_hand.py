"""Layer Drop, Block Drop and their repairs done on a stock model in memory.

Nothing here knows moespresso. A branch is silenced by zeros in its weights, a block by zeros in both; the residual
stream is observed by hooks on the layer, its second norm and its feed-forward part; what stands in for a branch is
solved in numpy and put in place by a hook. Branches are counted through the model: 2 l is the attention (or whatever
mixes tokens) of layer l, 2 l + 1 its feed-forward part.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

BODIES = {"attention": ("self_attn", "mamba"), "mlp": ("mlp", "feed_forward", "block_sparse_moe")}
SECOND_NORMS = ("post_attention_layernorm", "pre_ff_layernorm")
RIDGE = 1e-3  # as published with the repair: times the mean of the diagonal

Cut = tuple[int, str]
Array = np.ndarray[Any, np.dtype[np.float64]]


def body(layer: nn.Module, branch: str) -> nn.Module:
    """The module that a branch of a layer consists of, beside its norm."""
    (found,) = [child for name, child in layer.named_children() if name in BODIES[branch]]
    return found


def parts(cut: Cut) -> list[Cut]:
    """A block is both its branches."""
    layer, what = cut
    return [(layer, branch) for branch in BODIES] if what == "block" else [cut]


@torch.no_grad()
def silenced(model: PreTrainedModel, *cuts: Cut) -> PreTrainedModel:
    """A copy whose branches (layer, attention or mlp) or blocks (layer, block) add nothing."""
    model = copy.deepcopy(model)
    for layer, branch in (part for cut in cuts for part in parts(cut)):
        for parameter in body(model.model.layers[layer], branch).parameters():
            parameter.zero_()
    return model


# The residual stream


@dataclass
class Observed:
    """What one layer did to T tokens, [T, H] each: the stream before, between its branches, and after; what its
    feed-forward part was fed behind the norm, and what that answered."""

    before: Tensor
    middle: Tensor
    after: Tensor
    fed: Tensor
    answer: Tensor


def observe(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> list[Observed]:
    """Every layer on all tokens that are not padding, in float64."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    said: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    handles = [handle for layer, said_here in zip(model.model.layers, said, strict=True)
               for handle in _listen(layer, said_here)]  # fmt: skip
    with torch.no_grad():
        model(ids, attention_mask=mask.long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return [
        Observed(**{name: value.reshape(*mask.shape, -1)[mask].double() for name, value in row.items()})
        for row in said
    ]


def _listen(layer: nn.Module, said: dict[str, Tensor]) -> list[Any]:
    def taken(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: said.update({name: _given(args, kwargs)})

    (norm,) = [child for name, child in layer.named_children() if name in SECOND_NORMS]
    feed = body(layer, "mlp")
    return [
        layer.register_forward_pre_hook(taken("before"), with_kwargs=True),
        norm.register_forward_pre_hook(taken("middle"), with_kwargs=True),
        feed.register_forward_pre_hook(taken("fed"), with_kwargs=True),
        feed.register_forward_hook(lambda _, __, out: said.update({"answer": _bare(out)})),
        layer.register_forward_hook(lambda _, __, out: said.update({"after": _bare(out)})),
    ]


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return (args[0] if args else kwargs["hidden_states"]).clone()


def _bare(out: Any) -> Tensor:
    return (out[0] if isinstance(out, tuple) else out).clone()


def stream(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """The stream before every branch, and behind the last one."""
    observed = observe(model, ids, mask)
    return [state for layer in observed for state in (layer.before, layer.middle)] + [observed[-1].after]


def mean_cosine(before: Tensor, after: Tensor) -> float:
    """Mean over tokens of the cosine between two rows, written out."""
    products = (before * after).sum(1)
    return float((products / (before.square().sum(1).sqrt() * after.square().sum(1).sqrt())).mean())


def token_kl(
    original: PreTrainedModel, other: PreTrainedModel, ids: Tensor, mask: Tensor | None = None
) -> float:
    """Mean over tokens that are not padding of KL(original || other), in float64."""
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    with torch.no_grad():
        p, q = (
            model(ids, attention_mask=mask.long(), use_cache=False).logits[mask].double().log_softmax(-1)
            for model in (original, other)
        )
    return float((p.exp() * (p - q)).sum(1).mean())


# Repairs


def solved(
    model: PreTrainedModel, cuts: Iterable[Cut], repair: str, ids: Tensor, mask: Tensor | None = None
) -> Array:
    """What stands in for neighbouring branches that go: [H, H] for linear, [H] for scale and bias."""
    gone = sorted(2 * layer + (branch == "mlp") for cut in cuts for layer, branch in parts(cut))
    assert gone == list(range(gone[0], gone[-1] + 1))
    states = stream(model, ids, mask)
    return between(states[max(0, gone[0] - 1)], states[gone[0]], states[gone[-1] + 1], repair)


def between(start: Tensor, now: Tensor, then: Tensor, repair: str) -> Array:
    """What a branch that made `now` of `start` must be mapped by, so that it makes the best of `then` instead."""
    added, wanted = (state.numpy() - start.numpy() for state in (now, then))
    if repair == "bias":
        return (wanted - added).mean(0)
    if repair == "scale":
        return (wanted * added).sum(0) / np.square(added).sum(0)
    square = added.T @ added
    square += RIDGE * np.diag(square).mean() * np.eye(len(square))
    return np.linalg.solve(square, added.T @ wanted).T


def mapped(model: PreTrainedModel, branch: int, repair: str, values: Array) -> PreTrainedModel:
    """A copy in which what a branch adds to the stream is mapped by a hook on its body."""
    model = copy.deepcopy(model)
    layer, given = model.model.layers[branch // 2], torch.from_numpy(values)
    multiplier = getattr(layer, "residual_multiplier", 1.0)

    def change(_: nn.Module, __: Any, out: Any) -> Any:
        old = _bare(out).double()
        new = {
            "linear": lambda: old @ given.T,
            "scale": lambda: old * given,
            "bias": lambda: old + given / multiplier,
        }
        answer = new[repair]().to(_bare(out).dtype)
        return (answer, *out[1:]) if isinstance(out, tuple) else answer

    body(layer, "mlp" if branch % 2 else "attention").register_forward_hook(change)
    return model


def repaired(
    model: PreTrainedModel, cuts: list[Cut], repair: str, ids: Tensor, mask: Tensor | None = None
) -> PreTrainedModel:
    """A copy without some neighbouring branches, the last one before them repaired (a bias goes where they were)."""
    values = solved(model, cuts, repair, ids, mask)
    first = min(2 * layer + (branch == "mlp") for cut in cuts for layer, branch in parts(cut))
    # Zeros are put in first: the hook that adds a bias to a silent branch must not be silenced with it.
    return mapped(silenced(model, *cuts), first if repair == "bias" else first - 1, repair, values)
