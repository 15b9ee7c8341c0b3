"""The loop once more, last layer to first: what the loss asks of the experts' answers.

Forward, what each batch brings to a layer is written to a file, and what else the layer was called with is
kept by reference. From the head comes the gradient of the loss with respect to the last layer's output; then,
layer by layer, every batch runs through the layer again, this time remembered by autograd, and the gradient
goes from its output to its input:

    dL/dx_l  =  (d layer_l(x_l) / dx_l)^T  dL/dx_(l+1)

It passes the routed experts on its way, where the visitor sees it. Held are one layer, the graph of one batch
and, on the way forth, what the embedding answered; on the disk, hidden states once for every layer. No weight
gets a gradient. L is the sum over all predicted tokens, not their mean, so that gradients do not shrink with
the length of the text (see `statistics.gradient_moments`).

Gradients have the precision of the layers. float16 knows nothing below 6e-8 and little below 6e-5, so there
each batch's is multiplied with a power of two before every layer, which brings its largest value to about 1;
what is shown is freed of it again.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moespresso.core.errors import UserError
from moespresso.core.layer import Layer
from moespresso.model import MetaModel, PausedBatch, expert_forward, observing, quirks
from moespresso.statistics import FedGradient, GradientMoments
from moespresso.stream.sweep import UNWATCHED, Watch, begin, reserve, rows_at_once, within

BackVisitor = Callable[[Layer, Iterator[FedGradient]], None]
# Logits computed at once: 64 MiB in float32 (their gradient and a few copies beside them).
_LOGITS = 16 << 20


@torch.no_grad()
def sweep_back(
    meta: MetaModel,
    ids: Tensor,
    mask: Tensor,
    visit: BackVisitor,
    *,
    work: Path,
    watch: Watch = UNWATCHED,
) -> float:
    """Mean cross-entropy of the next tokens of `ids` [N, L] (int64; `mask` False on padding), with its
    gradients on the way.

    `visit(layer, batches)` sees each loaded layer that has experts, last to first; each of its `batches` is
    run as it is asked for. Their `grad` is that of the summed, not of the mean cross-entropy. Hidden states
    wait in files in the folder `work`. Raises `UserError` for families whose layers hand on more than hidden
    states, and when the disk is full.
    """
    if meta.config.model_type in quirks.HANDS_ON:
        raise _no_way_back(meta)
    count = len(meta.layers)
    rows = rows_at_once(ids.shape[1], meta.specs, meta.config.get_text_config().hidden_size)
    masks = mask.split(rows)
    paused = begin(meta, ids.split(rows), masks)
    watch.begin(2 * count)
    with _shelf(work, [batch.hidden for batch in paused], count + 1) as shelf:
        stops, last = _forth(meta, paused, masks, shelf, watch)
        loss, powers = _head(meta, paused, last, ids.split(rows), masks)
        for index in reversed(range(count)):
            with meta.layer(index) as layer:
                batches = _back(layer, stops.pop(), masks, last, powers, meta.device)
                if layer.experts is not None:
                    visit(layer, batches)
                for _ in batches:  # what nobody asked for has to be gone through all the same
                    pass
            shelf.drop(index)
            watch.advance()
    return loss


def gradient_moments(
    meta: MetaModel, ids: Tensor, mask: Tensor, work: Path, watch: Watch = UNWATCHED
) -> dict[int, Tensor]:
    """Second moments of the loss's gradient along every column of the experts' down projections: [E, I]
    for each layer that has experts (see `statistics.gradient_moments`)."""
    moments = GradientMoments()
    sweep_back(meta, ids, mask, moments, work=work, watch=watch)
    return moments.values


# Forward


def _forth(
    meta: MetaModel, paused: list[PausedBatch], masks: Sequence[Tensor], shelf: _Shelf, watch: Watch
) -> tuple[list[list[PausedBatch]], list[Tensor]]:
    """Take all batches through the layers: how each paused before each layer, and what the last layer
    answers."""
    hidden = [shelf.put(0, number, batch.hidden) for number, batch in enumerate(paused)]
    stops: list[list[PausedBatch]] = []
    for index in range(len(meta.layers)):
        if index:
            for batch, output in zip(paused, hidden, strict=True):
                _go_on(meta, batch, output)
        stops.append([batch.snapshot(states) for batch, states in zip(paused, hidden, strict=True)])
        with meta.layer(index) as layer:
            hidden = [
                shelf.put(index + 1, number, within(_answer(meta, layer.module, stop), valid, index))
                for number, (stop, valid) in enumerate(zip(stops[-1], masks, strict=True))
            ]
        watch.advance()
    return stops, hidden


def _go_on(meta: MetaModel, batch: PausedBatch, output: Tensor) -> None:
    batch.go_on(output)
    if batch.hidden is not output:  # what is computed between layers, autograd would not see
        raise _no_way_back(meta)


def _answer(meta: MetaModel, layer: nn.Module, stop: PausedBatch) -> Tensor:
    """The layer's output, unless the layer also leaves something for later ones where they look for it
    (keys and values)."""
    boxes = [value for value in stop.kwargs.values() if isinstance(value, MutableMapping)]
    before = [len(box) for box in boxes]
    output = stop.run(layer, stop.hidden.to(meta.device))
    if before != [len(box) for box in boxes]:
        raise _no_way_back(meta)
    return output


def _no_way_back(meta: MetaModel) -> UserError:
    return UserError(
        f"no gradients can be taken on {meta.place}: its layers hand on more than hidden states; "
        "choose a score that needs no gradients"
    )


# Back


def _head(
    meta: MetaModel,
    paused: list[PausedBatch],
    last: list[Tensor],
    ids: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> tuple[float, list[int]]:
    """The mean loss from what the last layer answers; puts the summed loss's gradient in its place, and
    says by which power of two each batch's is multiplied."""
    total, predicted, powers = 0.0, 0, list[int]()
    with meta.outer():
        meta.model.requires_grad_(False)
        for batch, hidden, tokens, valid in zip(paused, last, ids, masks, strict=True):
            at = torch.nonzero(valid[:, :-1] & valid[:, 1:])
            leaf = hidden.to(meta.device).detach().requires_grad_()
            with torch.enable_grad():
                batch.go_on(leaf)  # through whatever the family has behind its layers
            loss, gradient = _loss(meta, batch.hidden.detach(), tokens.to(meta.device), at)
            gradient, power = _centred(gradient)
            gradient, more = _centred(torch.autograd.grad(batch.hidden, leaf, gradient)[0])
            hidden.copy_(gradient)
            batch.hidden = hidden
            powers.append(power + more)
            total, predicted = total + loss, predicted + len(at)
    return total / predicted, powers


def _loss(meta: MetaModel, hidden: Tensor, ids: Tensor, at: Tensor) -> tuple[float, Tensor]:
    """Summed cross-entropy of the tokens behind the positions `at` [n, 2], and its gradient with respect
    to the last hidden states [B, L, H]; never the logits of all of them."""
    total, gradient = 0.0, torch.zeros_like(hidden)
    rows = max(1, _LOGITS // meta.config.get_text_config().vocab_size)
    for chunk in at.to(hidden.device).split(rows):
        row, place = chunk.unbind(1)
        states = hidden[row, place].requires_grad_()
        with torch.enable_grad():
            logits = meta.logits(states).float()
            loss = F.cross_entropy(logits, ids[row, place + 1], reduction="sum")
        (gradient[row, place],) = torch.autograd.grad(loss, states)
        total += loss.item()
    return total, gradient


def _centred(gradient: Tensor) -> tuple[Tensor, int]:
    """A gradient times the power of two that suits its precision, and the power; raises `UserError` where
    it is beyond that."""
    if gradient.dtype is not torch.float16:  # the others reach as far as float32
        return gradient, 0
    largest = float(gradient.abs().max())
    if not math.isfinite(largest):
        raise UserError(
            "the gradients of the loss are beyond what float16 holds: use --dtype bfloat16 or float32"
        )
    power = -math.frexp(largest)[1]
    return (gradient.float() * 2.0**power).to(gradient.dtype), power


def _back(
    layer: Layer,
    stops: list[PausedBatch],
    masks: Sequence[Tensor],
    gradients: list[Tensor],
    powers: list[int],
    device: torch.device,
) -> Iterator[FedGradient]:
    """What reaches the experts of the layer, with its gradient, batch by batch; takes each of `gradients`,
    which are multiplied by `powers` of two, from the layer's output to its input."""
    layer.module.requires_grad_(False)
    for number, (stop, valid, gradient) in enumerate(zip(stops, masks, gradients, strict=True)):
        seen: list[FedGradient] = []
        observer = _observed(layer.experts, valid.to(device), seen, 2.0 ** -powers[number])
        new, more = _centred(_through_layer(layer, stop, gradient.to(device), observer))
        gradient.copy_(new)
        powers[number] += more
        yield from seen


def _through_layer(
    layer: Layer, stop: PausedBatch, gradient: Tensor, observer: AbstractContextManager[None]
) -> Tensor:
    """The gradient with respect to what one batch brought to the layer."""
    leaf = stop.hidden.to(gradient.device).detach().requires_grad_()
    with torch.enable_grad(), observer:
        output = stop.run(layer.module, leaf)
    return torch.autograd.grad(output, leaf, gradient)[0]


@contextmanager
def _observed(
    experts: nn.Module | None, valid: Tensor, seen: list[FedGradient], scale: float
) -> Generator[None]:
    """While the layer runs once on a batch with the mask `valid` [B, L]: as soon as the gradient with
    respect to the experts' answer is known, it is added to `seen` in float32, times `scale`, with their
    inputs."""
    if experts is None:
        yield
        return
    tokens = torch.nonzero(valid.reshape(-1)).squeeze(-1)

    def on_experts(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        answer = _weighted_sum(experts, hidden, index, weights)
        inputs = (hidden.detach()[tokens], index[tokens], weights.detach()[tokens].float())
        # A hook, since the family may go on to change the answer in place.
        answer.register_hook(lambda grad: seen.append(FedGradient(*inputs, grad[tokens].float() * scale)))
        return answer

    with observing(experts, before=on_experts):
        yield


def _weighted_sum(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What `model.experts.experts_forward` answers. That writes each expert's answers in place, and
    autograd would copy those of all experts once for each of them."""
    slots = index.reshape(-1)
    counts = torch.bincount(slots, minlength=experts.num_experts)[: experts.num_experts].tolist()
    order = slots.argsort(stable=True)[: sum(counts)]  # numbers beyond the last expert add nothing
    inputs = hidden.index_select(0, order // index.shape[1]).split(counts)
    answers = [expert_forward(experts, expert, rows) for expert, rows in enumerate(inputs) if len(rows)]
    outputs = hidden.new_zeros(len(slots), hidden.shape[1])
    if answers:
        outputs = outputs.index_copy(0, order, torch.cat(answers))
    outputs = outputs.view(*index.shape, -1)
    if outputs.dtype == weights.dtype:
        return torch.einsum("tkh,tk->th", outputs, weights)
    return (outputs * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


# Where hidden states are kept


class _Shelf:
    """Hidden states of all batches, in one mapped file for each place between layers, that the kernel may
    write out."""

    def __init__(self, folder: Path, hidden: list[Tensor], places: int) -> None:
        self._folder, self._ends = folder, list(accumulate(tensor.numel() for tensor in hidden))
        self._maps: dict[int, Tensor] = {}
        for place in range(places):  # a disk that is too small is told before any work
            reserve(folder / str(place), sum(tensor.nbytes for tensor in hidden))

    def put(self, place: int, number: int, tensor: Tensor) -> Tensor:
        """The states of one batch, as they are there."""
        if place not in self._maps:
            self._maps[place] = self._map(self._folder / str(place), tensor.dtype)
        end = self._ends[number]
        return self._maps[place][end - tensor.numel() : end].view(tensor.shape).copy_(tensor)

    def _map(self, path: Path, dtype: torch.dtype) -> Tensor:
        reserve(
            path, self._ends[-1] * dtype.itemsize
        )  # a family may go on in a wider dtype than it began with
        return torch.from_file(str(path), shared=True, size=self._ends[-1], dtype=dtype)

    def drop(self, place: int) -> None:
        """Let go of what is at a place: the disk space comes back with the last tensor that stands on it."""
        del self._maps[place]
        (self._folder / str(place)).unlink()


@contextmanager
def _shelf(work: Path, hidden: list[Tensor], places: int) -> Generator[_Shelf]:
    for left_by_a_killed_run in work.glob("back-*"):
        shutil.rmtree(left_by_a_killed_run)
    with tempfile.TemporaryDirectory(dir=work, prefix="back-") as name:
        yield _Shelf(Path(name), hidden, places)
