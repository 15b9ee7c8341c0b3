"""The one loop: layer in, visit, layer out.

`sweep` runs token batches through a model that is on disk. Every batch waits at the same layer (`model.lockstep`); the
layer is loaded once, the visitor looks at it and at what flows through it, the batches go on, the layer goes. A visitor
never sees the loop and the loop never sees a method. With a `Memento` the hidden states are kept after each layer, so
that a killed sweep goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moespresso.checkpoint import TORCH_DTYPES, as_bytes, disk_full_is_told, header, write_file
from moespresso.core.blueprint import BRANCHES, Branch, LayerSpec, TensorRef
from moespresso.core.errors import UserError
from moespresso.core.layer import Call, Fed, Layer, LayerWeights, Taps
from moespresso.core.progress import Progress, Silent
from moespresso.model import Skeleton, Waiting, start, without
from moespresso.stream.listen import Held, listening, overhearing

Visitor = Callable[[Layer, Taps], LayerWeights | None]
# Tokens that pass a layer at once: enough to keep matrix products busy, few enough that what all selected experts answer
# (tokens x top_k x hidden) stays within a bound.
BATCH_TOKENS, ANSWER_BYTES = 4096, 256 << 20


@dataclass(frozen=True, slots=True)
class Memento:
    """Where a sweep keeps what it needs to go on after a kill: the next layer, hidden states, the visitor's notes."""

    path: Path
    notes: Callable[[], Any]
    recall: Callable[[Any], None]

    def save(self, layer: int, hidden: list[Tensor]) -> None:
        """Remember that `layer` comes next, with what it is to be fed (atomically, and synced)."""
        parts = [tensor.reshape(-1).cpu() for tensor in hidden]
        names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
        refs = [
            TensorRef(str(i), tuple(tensor.shape), names[tensor.dtype], "") for i, tensor in enumerate(hidden)
        ]
        metadata = {"layer": str(layer), "notes": json.dumps(self.notes())}
        write_file(self.path, [memoryview(header(refs, metadata)), *map(as_bytes, parts)])

    def load(self) -> tuple[int, list[Tensor]]:
        """The next layer and its inputs, or layer 0 and none; gives the visitor its notes back."""
        if not self.path.is_file():
            return 0, []
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
            hidden = [file.get_tensor(f"{i}") for i in range(len(file.keys()))]
        self.recall(json.loads(metadata["notes"]))
        return int(metadata["layer"]), hidden


@torch.inference_mode()
def sweep(
    skeleton: Skeleton,
    ids: Tensor,
    mask: Tensor,
    visit: Visitor | None = None,
    *,
    carry: str = "original",
    memento: Memento | None = None,
    spill: Path | None = None,
    progress: Progress | None = None,
    label: str = "layers",
) -> Tensor:
    """Run `ids` [N, L] (int64; `mask` False on padding) through the model; return last hidden states [N, L, H].

    `visit(layer, taps)` sees each loaded layer; with `carry="rebuilt"` the weights it returns are put in place before
    the batches go on. `spill` is a folder for hidden states that would not fit in memory.
    """
    watch = progress or Silent()
    next_layer, remembered = memento.load() if memento else (0, [])
    with ExitStack() as stack:
        parked = stack.enter_context(parking(spill))
        rows = rows_at_once(ids.shape[1], skeleton.specs, skeleton.config.get_text_config().hidden_size)
        waiting = begin(skeleton, ids.split(rows), mask.split(rows))
        masks = mask.split(rows)
        watch.stage(label, len(skeleton.layers))
        for index in range(len(skeleton.layers)):
            if index < next_layer:
                _skip(waiting, remembered if index == next_layer - 1 else None, skeleton.device)
            else:
                _pass(skeleton, index, waiting, masks, visit, carry, parked, hold=spill is None)
                if memento:
                    memento.save(index + 1, [batch.hidden for batch in waiting])
            watch.advance()
        return torch.cat([batch.hidden.cpu() for batch in waiting])


def rows_at_once(length: int, specs: Sequence[LayerSpec], hidden: int) -> int:
    """Rows of `length` tokens in one batch."""
    answers = 4 * hidden * max((spec.top_k for spec in specs), default=0)
    return max(1, min(BATCH_TOKENS, ANSWER_BYTES // answers if answers else BATCH_TOKENS) // length)


def begin(skeleton: Skeleton, ids: Sequence[Tensor], mask: Sequence[Tensor]) -> list[Waiting]:
    """Start the batches `ids` [B, L]; all of them wait at the first layer."""
    device = skeleton.device
    # Without padding no mask is built at all, and the attention kernels take their causal path.
    masks = [None if bool(part.all()) else part.long().to(device) for part in mask]
    with skeleton.outer():
        return start(skeleton.base, skeleton.layers_name, [part.to(device) for part in ids], masks)


def _skip(waiting: list[Waiting], remembered: list[Tensor] | None, device: torch.device) -> None:
    for number, batch in enumerate(waiting):
        batch.go_on(batch.hidden if remembered is None else remembered[number].to(device))


def _pass(
    skeleton: Skeleton,
    index: int,
    waiting: list[Waiting],
    masks: Sequence[Tensor],
    visit: Visitor | None,
    carry: str,
    parked: Callable[[int, Tensor], Tensor],
    *,
    hold: bool,
) -> None:
    """Take all batches through one layer."""
    with skeleton.layer(index) as layer:
        taps = _LayerTaps(layer, waiting, masks, hold=hold)
        new = visit(layer, taps) if visit else None
        if new is not None and carry == "rebuilt":
            changed = [layer.module.get_parameter(name) for name in new]
            for parameter, tensor in zip(changed, new.values(), strict=True):
                parameter.data = tensor
            experts = set() if layer.experts is None else set(layer.experts.parameters())
            taps.forget(whole=not experts.issuperset(changed))
        outputs = taps.outputs(parked)
    for batch, output, valid in zip(waiting, outputs, masks, strict=True):
        batch.go_on(within(output, valid, index))


def within(output: Tensor, valid: Tensor, layer: int) -> Tensor:
    """What a layer answers to a batch with the mask `valid` [B, L]; raises `UserError` where float16 cannot hold it.

    It would go on as infinities, which soon are no numbers, and every score after it would be made of these.
    """
    if output.dtype is torch.float16:
        rows = output.reshape(valid.numel(), -1)[valid.reshape(-1).to(output.device)]
        if not bool(rows.isfinite().all()):
            raise UserError(f"L{layer} answers with more than float16 holds: use --dtype bfloat16 or float32")
    return output


class _LayerTaps:
    """Runs each batch through the layer once; what the visitor did not ask for is run when the loop needs it.

    With `hold`, batches that were run as far as the experts wait there, so that nothing before these runs twice; each then
    holds a few more hidden states.
    """

    def __init__(
        self, layer: Layer, waiting: list[Waiting], masks: Sequence[Tensor], *, hold: bool = False
    ) -> None:
        self._layer, self._waiting, self._masks, self._hold = layer, waiting, masks, hold
        self._outputs: dict[int, Tensor] = {}
        self._held: dict[int, Held] = {}

    def __iter__(self) -> Iterator[Call]:
        for number, (batch, valid) in enumerate(zip(self._waiting, self._masks, strict=True)):
            with listening(self._layer) as heard:
                output = batch.run(self._layer.module)
            self._outputs[number] = output
            yield Call(
                batch.hidden,
                output,
                valid.to(output.device),
                heard.routed,
                heard.middle,
                heard.fed,
                heard.answer,
            )

    def fed(self, watched: Mapping[str, Callable[[Tensor], None]]) -> list[Fed]:
        """What reaches the experts, batch by batch; their own answers are not computed."""
        found: list[Fed] = []
        hold = self._hold and not watched  # watched modules may come behind the experts
        for number, (batch, valid) in enumerate(zip(self._waiting, self.valid, strict=True)):
            with overhearing(self._layer, valid, watched, found, hold=hold):
                run = partial(batch.run, self._layer.module)
                if hold:
                    self._held[number] = Held(run)
                else:
                    run()
        return found

    @property
    def inputs(self) -> list[Tensor]:
        """Hidden states of every batch before the layer."""
        return [batch.hidden for batch in self._waiting]

    @property
    def valid(self) -> list[Tensor]:
        """Masks of every batch."""
        return [mask.to(batch.hidden.device) for mask, batch in zip(self._masks, self._waiting, strict=True)]

    def branch(self, number: int, hidden: Tensor, branch: Branch) -> Tensor:
        """`hidden` and what one branch of the layer adds to it."""
        others: list[Branch] = [other for other in BRANCHES if other != branch]
        with without(self._layer.module, self._layer.anatomy, others):
            return self._waiting[number].run(self._layer.module, hidden)

    def through(self, module: nn.Module) -> Iterator[Tensor]:
        """What every batch becomes in another layer's module."""
        return (batch.run(module) for batch in self._waiting)

    def put(self, number: int, output: Tensor) -> None:
        """Let a batch go on with `output`."""
        self._outputs[number] = output

    def forget(self, *, whole: bool) -> None:
        """The experts have new weights, or the `whole` layer: nothing behind these is as it was."""
        self._outputs.clear()
        if whole:
            self._held.clear()

    def outputs(self, parked: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """Outputs of all batches, put where they may wait for the next layer."""
        return [parked(number, self._output(number)) for number in range(len(self._waiting))]

    def _output(self, number: int) -> Tensor:
        if number in self._outputs:
            return self._outputs.pop(number)
        held = self._held.pop(number, None)
        return self._waiting[number].run(self._layer.module) if held is None else held.finish()


@contextmanager
def parking(folder: Path | None) -> Iterator[Callable[[int, Tensor], Tensor]]:
    """Where hidden states wait between layers: in memory, or in mapped files that the kernel may write out.

    What is parked under a number is overwritten when the second next is parked there. Raises `UserError` when the disk
    is full.
    """
    if folder is None:
        yield lambda _, tensor: tensor
        return
    for left_by_a_killed_run in folder.glob("hidden-*"):
        shutil.rmtree(left_by_a_killed_run)
    with tempfile.TemporaryDirectory(dir=folder, prefix="hidden-") as name:
        turn: dict[int, int] = {}

        def park(number: int, tensor: Tensor) -> Tensor:
            # The layer reads one file while the other is written.
            turn[number] = 1 - turn.get(number, 0)
            path = Path(name) / f"{number}-{turn[number]}"
            reserve(path, tensor.nbytes)
            mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
            return mapped.view(tensor.shape).copy_(tensor)

        yield park


def reserve(path: Path, size: int) -> None:
    """Take the disk space now: writing through a map into a full disk would kill the process without a word."""
    with disk_full_is_told(path.parent), path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
