"""The one loop: layer in, visit, layer out.

`sweep` runs token batches through a model that is on disk. Every batch is paused at the same layer
(`model.lockstep`); the layer is loaded once, the visitor looks at it and at what flows through it, the
batches go on, the layer goes. A visitor never sees the loop and the loop never sees a method. With a
`SweepState` the hidden states are kept after each layer, so that a killed sweep goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moespresso.checkpoint import TORCH_DTYPES, as_bytes, disk_full_is_told, header, write_file
from moespresso.core.blueprint import BRANCHES, Branch, LayerSpec, TensorRef
from moespresso.core.errors import UserError
from moespresso.core.layer import Call, Fed, Layer, LayerWeights, Taps
from moespresso.core.progress import Progress, Silent
from moespresso.model import MetaModel, PausedBatch, start, without
from moespresso.stream.observe import HeldRun, observe_inputs, observe_layer

Visitor = Callable[[Layer, Taps], LayerWeights | None]
# Tokens that pass a layer at once: enough to keep matrix products busy, few enough that what all selected experts answer
# (tokens x top_k x hidden) stays within a bound.
BATCH_TOKENS, ANSWER_BYTES = 4096, 256 << 20


@dataclass(frozen=True, slots=True)
class SweepState:
    """Where a sweep keeps what it needs to go on after a kill: the next layer, hidden states, the
    visitor's notes."""

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


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """What a sweep does beside showing layers.

    carry: `rebuilt` puts the weights that a visitor returns in place before the batches go on; `original`
        leaves them out.
    state: keeps what a killed sweep needs to go on.
    spill: a folder for hidden states that would not fit in memory.
    """

    carry: Literal["original", "rebuilt"] = "original"
    state: SweepState | None = None
    spill: Path | None = None


@dataclass(frozen=True, slots=True)
class Watch:
    """Who sees how far a sweep is, and what it is called there."""

    progress: Progress = field(default_factory=Silent)
    label: str = "layers"

    def begin(self, total: int) -> None:
        """Open a row of so many layers."""
        self.progress.stage(self.label, total)

    def advance(self) -> None:
        """One layer is done."""
        self.progress.advance()


PLAIN, UNWATCHED = SweepOptions(), Watch()


@torch.inference_mode()
def sweep(
    meta: MetaModel,
    ids: Tensor,
    mask: Tensor,
    visit: Visitor | None = None,
    options: SweepOptions = PLAIN,
    watch: Watch = UNWATCHED,
) -> Tensor:
    """Run `ids` [N, L] (int64; `mask` False on padding) through the model; return last hidden states [N, L,
    H].

    `visit(layer, taps)` sees each loaded layer, and may return new weights for it.
    """
    state = options.state
    next_layer, remembered = state.load() if state else (0, [])
    with ExitStack() as stack:
        parked = stack.enter_context(parking(options.spill))
        rows = rows_at_once(ids.shape[1], meta.specs, meta.config.get_text_config().hidden_size)
        masks = mask.split(rows)
        batches = begin(meta, ids.split(rows), masks)
        watch.begin(len(meta.layers))
        for index in range(len(meta.layers)):
            if index < next_layer:
                _skip(batches, remembered if index == next_layer - 1 else None, meta.device)
            else:
                _pass(meta, index, _Batches(batches, masks), visit, options, parked)
                if state:
                    state.save(index + 1, [batch.hidden for batch in batches])
            watch.advance()
        return torch.cat([batch.hidden.cpu() for batch in batches])


def rows_at_once(length: int, specs: Sequence[LayerSpec], hidden: int) -> int:
    """Rows of `length` tokens in one batch."""
    answers = 4 * hidden * max((spec.top_k for spec in specs), default=0)
    return max(1, min(BATCH_TOKENS, ANSWER_BYTES // answers if answers else BATCH_TOKENS) // length)


def begin(meta: MetaModel, ids: Sequence[Tensor], mask: Sequence[Tensor]) -> list[PausedBatch]:
    """Start the batches `ids` [B, L]; all of them pause at the first layer."""
    device = meta.device
    # Without padding no mask is built at all, and the attention kernels take their causal path.
    masks = [None if bool(part.all()) else part.long().to(device) for part in mask]
    with meta.outer():
        return start(meta.base, meta.layers_name, [part.to(device) for part in ids], masks)


def _skip(batches: list[PausedBatch], remembered: list[Tensor] | None, device: torch.device) -> None:
    for number, batch in enumerate(batches):
        batch.go_on(batch.hidden if remembered is None else remembered[number].to(device))


@dataclass(frozen=True, slots=True)
class _Batches:
    """All batches of a sweep with their masks."""

    paused: list[PausedBatch]
    masks: Sequence[Tensor]


def _pass(
    meta: MetaModel,
    index: int,
    batches: _Batches,
    visit: Visitor | None,
    options: SweepOptions,
    parked: Callable[[int, Tensor], Tensor],
) -> None:
    """Take all batches through one layer."""
    with meta.layer(index) as layer:
        taps = _LayerTaps(layer, batches, hold=options.spill is None)
        _show(layer, taps, visit, options.carry)
        outputs = taps.outputs(parked)
    for batch, output, valid in zip(batches.paused, outputs, batches.masks, strict=True):
        batch.go_on(within(output, valid, index))


def _show(layer: Layer, taps: _LayerTaps, visit: Visitor | None, carry: str) -> None:
    """Let the visitor see a layer, and put what it returns in place."""
    new = visit(layer, taps) if visit else None
    if new is None or carry != "rebuilt":
        return
    changed = [layer.module.get_parameter(name) for name in new]
    for parameter, tensor in zip(changed, new.values(), strict=True):
        parameter.data = tensor
    experts = set() if layer.experts is None else set(layer.experts.parameters())
    taps.forget(whole=not experts.issuperset(changed))


def within(output: Tensor, valid: Tensor, layer: int) -> Tensor:
    """What a layer answers to a batch with the mask `valid` [B, L]; raises `UserError` where float16 cannot
    hold it.

    It would go on as infinities, which soon are no numbers, and every score after it would be made of these.
    """
    if output.dtype is torch.float16:
        rows = output.reshape(valid.numel(), -1)[valid.reshape(-1).to(output.device)]
        if not bool(rows.isfinite().all()):
            raise UserError(f"L{layer} answers with more than float16 holds: use --dtype bfloat16 or float32")
    return output


class _LayerTaps:
    """Runs each batch through the layer once; what the visitor did not ask for is run when the loop needs it.

    With `hold`, batches that were run as far as the experts stay there, so that nothing before these runs
    twice; each then holds a few more hidden states.
    """

    def __init__(self, layer: Layer, batches: _Batches, *, hold: bool = False) -> None:
        self._layer, self._batches, self._masks, self._hold = layer, batches.paused, batches.masks, hold
        self._outputs: dict[int, Tensor] = {}
        self._held: dict[int, HeldRun] = {}

    def __iter__(self) -> Iterator[Call]:
        for number, (batch, valid) in enumerate(zip(self._batches, self._masks, strict=True)):
            with observe_layer(self._layer) as observed:
                output = batch.run(self._layer.module)
            self._outputs[number] = output
            yield Call(
                batch.hidden,
                output,
                valid.to(output.device),
                observed.routed,
                observed.middle,
                observed.fed,
                observed.answer,
            )

    def fed(self, watched: Mapping[str, Callable[[Tensor], None]]) -> list[Fed]:
        """What reaches the experts, batch by batch; their own answers are not computed."""
        fed: list[Fed] = []
        hold = self._hold and not watched  # watched modules may come behind the experts
        for number, (batch, valid) in enumerate(zip(self._batches, self.valid, strict=True)):
            with observe_inputs(self._layer, valid, watched, fed, hold=hold):
                run = partial(batch.run, self._layer.module)
                if hold:
                    self._held[number] = HeldRun(run)
                else:
                    run()
        return fed

    @property
    def inputs(self) -> list[Tensor]:
        """Hidden states of every batch before the layer."""
        return [batch.hidden for batch in self._batches]

    @property
    def valid(self) -> list[Tensor]:
        """Masks of every batch."""
        return [mask.to(batch.hidden.device) for mask, batch in zip(self._masks, self._batches, strict=True)]

    def branch(self, number: int, hidden: Tensor, branch: Branch) -> Tensor:
        """`hidden` and what one branch of the layer adds to it."""
        others: list[Branch] = [other for other in BRANCHES if other != branch]
        with without(self._layer.module, self._layer.anatomy, others):
            return self._batches[number].run(self._layer.module, hidden)

    def through(self, module: nn.Module) -> Iterator[Tensor]:
        """What every batch becomes in another layer's module."""
        return (batch.run(module) for batch in self._batches)

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
        return [parked(number, self._output(number)) for number in range(len(self._batches))]

    def _output(self, number: int) -> Tensor:
        if number in self._outputs:
            return self._outputs.pop(number)
        held = self._held.pop(number, None)
        return self._batches[number].run(self._layer.module) if held is None else held.finish()


@contextmanager
def parking(folder: Path | None) -> Iterator[Callable[[int, Tensor], Tensor]]:
    """Where hidden states wait between layers: in memory, or in mapped files that the kernel may write out.

    What is parked under a number is overwritten when the second next is parked there. Raises `UserError` when
    the disk is full.
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
    """Take the disk space now: writing through a map into a full disk would kill the process without a
    word."""
    with disk_full_is_told(path.parent), path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
