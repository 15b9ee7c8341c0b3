"""What a model is, before a single tensor is read.

A `Blueprint` lists every tensor of a checkpoint with the unit it belongs to, and one `LayerSpec` per decoder
layer, so that unequal layers are ordinary. Counting is exact: `cost()` sums what the headers say.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from moespresso.core.cost import Cost
from moespresso.core.format import DTYPE_BYTES, Format
from moespresso.core.unit import Part, Unit

FLOPS_TOKENS = 2048
# What a decoder layer adds to the residual stream, in order.
Branch = Literal["attention", "mlp"]
BRANCHES: tuple[Branch, ...] = ("attention", "mlp")


@dataclass(frozen=True, slots=True)
class Packed:
    """How a matrix is stored as several tensors: the `parts` by suffix, as a codec lays them out
    (`formats.pack`) or as they lie in files. Of matrices that have `shared` parts in common only one `leads`,
    and stores those.
    """

    format: Format
    layout: str
    parts: Mapping[str, TensorRef] = field(default_factory=dict[str, "TensorRef"])
    shared: frozenset[str] = frozenset()
    leads: bool = True


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor before it is read: where its bytes lie (`offset` counts from the start of `file`).

    Without a `file` it is stored nowhere and reads as zeros; what is read is multiplied by `factor`. A
    `packed` matrix keeps the name, shape and dtype of what it decodes to, so that whoever does not write it
    need not know.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    offset: int = 0
    factor: float = 1.0
    packed: Packed | None = None

    @property
    def numel(self) -> int:
        """Number of elements (of a packed matrix: of its weights)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Stored bytes, scales, zeros and shapes included."""
        if self.packed is not None:
            return sum(part.nbytes for part in self.stored().values())
        return int(self.numel * DTYPE_BYTES[self.dtype])

    def stored(self) -> Mapping[str, TensorRef]:
        """The tensors that a packed matrix is stored as, by suffix: all that it is decoded from, but what
        another stores."""
        assert self.packed is not None
        lent = frozenset[str]() if self.packed.leads else self.packed.shared
        return {suffix: part for suffix, part in self.packed.parts.items() if suffix not in lent}


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor and what it is.

    `expert_axis` is the axis that counts experts in a tensor shared by all of them (router rows, stacked
    experts); None for a tensor that belongs to one expert (`unit.expert`) or to none. `in_graph` is False for
    tensors the model's class does not know (multi-token prediction layers, for example). `branch` is the
    residual branch of the layer that goes with the tensor, norms included; `out_axis` the axis of its output,
    for what a branch ends with, and `multiplier` what the layer multiplies that with. `channel_axis` runs
    along the intermediate channels of an expert, counted from the last axis; gate and up may be `joined`
    there, one behind the other or interleaved. `ahead` is the address of a tensor in the layers that predict
    tokens further ahead, numbered from 0 as if these were a model of their own.
    """

    ref: TensorRef
    unit: Unit
    expert_axis: int | None = None
    in_graph: bool = True
    branch: Branch | None = None
    out_axis: int | None = None
    multiplier: float = 1.0
    channel_axis: int | None = None
    joined: Literal["", "halves", "interleaved"] = ""
    ahead: Unit | None = None


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention with a matrix each for queries, keys, values and outputs.

    `count` query heads read `kv_count` key and value heads; `qk_dim` and `v_dim` are the dims of one query
    and one value. `units` are the dims of a query that a rotary embedding turns together. `no_qk` and `no_vo`
    say why dims of queries and keys, or of values and outputs, cannot go, where that is so.
    """

    count: int = 0
    kv_count: int = 0
    qk_dim: int = 0
    v_dim: int = 0
    units: tuple[tuple[int, ...], ...] = ()
    no_qk: str = ""
    no_vo: str = ""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer.

    `mixer` is `attention` or the name of what mixes tokens instead; `experts` the routed experts (0: dense);
    `groups` the router's groups (1: none); `floor` the fewest experts its router can work with; `width` the
    intermediate width of one expert (or of the dense MLP); `qk_width` and `v_width` the summed widths of all
    query and value heads; `kv_width` the cached elements a token. `bodies` names the module of each residual
    branch that the layer has; `skipped` counts experts that the router may select but that are gone; `widths`
    are those of the single experts where they differ (`width` is that of the widest); `heads` are those of
    its attention (None: it has none).
    """

    index: int
    mixer: str
    experts: int = 0
    shared_experts: int = 0
    top_k: int = 0
    groups: int = 1
    floor: int = 0
    width: int = 0
    qk_width: int = 0
    v_width: int = 0
    kv_width: int = 0
    bodies: Mapping[Branch, str] = field(default_factory=dict[Branch, str])
    skipped: int = 0
    widths: tuple[int, ...] = ()
    heads: Heads | None = None

    def facts(self) -> dict[str, Any]:
        """What tells two layers apart, as plain data."""
        found = {"index": self.index, "mixer": self.mixer, "experts": self.experts, "skipped": self.skipped,
                 "width": self.width, "parts": sorted(self.bodies)}  # fmt: skip
        return found | {"widths": list(self.widths)} if self.widths else found

    def unit(self, branch: Branch) -> Unit:
        """The address of one of the layer's residual branches."""
        feed_forward: Part = "experts" if self.experts else "dense"
        return Unit(self.index, "attention" if branch == "attention" else feed_forward)


@dataclass(frozen=True)
class Blueprint:
    """What the model is. `digest` identifies the checkpoint's content (see `checkpoint.index`).

    `tied`: one matrix is embedding and head; with `both_stored` the config says so too, but the files hold
    each. `layers_name` is where its class keeps the decoder layers; `indivisible` says why single branches of
    them cannot go, where that is so; `period` is the number of blocks after which the pattern of layers
    repeats, where the config can say it in no other way (1: it can say any); `opaque` says why experts are
    left whole, where layers have such that cannot be cut.
    """

    family: str
    place: str
    digest: str
    hidden: int
    vocab: int
    tied: bool
    layers: tuple[LayerSpec, ...]
    entries: tuple[Entry, ...] = field(repr=False)
    layers_name: str = "model.layers"
    indivisible: str = ""
    period: int = 1
    both_stored: bool = False
    opaque: str = ""

    @cached_property
    def branches(self) -> tuple[tuple[int, Branch], ...]:
        """Every residual branch, in the order in which they add to the residual stream."""
        return tuple(
            (layer.index, branch) for layer in self.layers for branch in BRANCHES if branch in layer.bodies
        )

    @cached_property
    def moe_layers(self) -> tuple[LayerSpec, ...]:
        """The layers that hold routed experts."""
        return tuple(layer for layer in self.layers if layer.experts)

    @property
    def no_experts(self) -> str:
        """Why there are no routed experts to work on, and what can be done."""
        if not self.opaque:
            return "is dense"
        return f"has experts that this version leaves whole ({self.opaque}): use block_drop, or a step with parts=attention"

    @cached_property
    def counting(self) -> frozenset[int]:
        """The layers by which a cache counts tokens (those with attention, or with what stands where it was):
        without any, no model that has other mixers generates."""
        return frozenset(layer.index for layer in self.layers if layer.kv_width)

    @cached_property
    def by_layer(self) -> dict[int | None, tuple[Entry, ...]]:
        """Entries of each layer (None: outside the layers), in stored order."""
        grouped: dict[int | None, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            grouped[entry.unit.layer].append(entry)
        return {layer: tuple(entries) for layer, entries in grouped.items()}

    @cached_property
    def dtypes(self) -> dict[int | None, str]:
        """The dtype of each layer's weights: of those that a branch ends with, where there are such."""
        found = {entry.unit.layer: entry.ref.dtype for entry in self.entries if len(entry.ref.shape) > 1}
        return found | {
            entry.unit.layer: entry.ref.dtype for entry in self.entries if entry.out_axis is not None
        }

    @property
    def outside(self) -> tuple[Entry, ...]:
        """Entries the model's class does not know."""
        return tuple(entry for entry in self.entries if not entry.in_graph)

    def bytes_by_part(self) -> dict[str, int]:
        """Tensor bytes of experts, shared experts, attention, embedding (with the head) and everything
        else."""
        names = {"experts": "experts", "shared": "shared", "attention": "attention", "embedding": "embedding",
                 "head": "embedding"}  # fmt: skip
        sums: dict[str, int] = dict.fromkeys(("experts", "shared", "attention", "embedding", "other"), 0)
        for entry in self.entries:
            sums[names.get(entry.unit.part, "other")] += entry.ref.nbytes
        return sums

    def cost(self) -> Cost:
        """Price the checkpoint as stored."""
        params = sum(entry.ref.numel for entry in self.entries)
        idle = sum(self._idle_params(layer) for layer in self.layers)
        idle += sum(entry.ref.numel for entry in self.outside)
        active = params - idle
        embedding = 0 if self.tied else self.vocab * self.hidden
        attention = sum(2 * FLOPS_TOKENS * FLOPS_TOKENS * (la.qk_width + la.v_width) for la in self.layers)
        layer_bytes = [sum(e.ref.nbytes for e in es) for at, es in self.by_layer.items() if at is not None]
        return Cost(
            bytes=sum(entry.ref.nbytes for entry in self.entries),
            params=params,
            active_params=active,
            flops=2 * FLOPS_TOKENS * (active - embedding) + attention,
            kv_bytes_per_token=sum(2 * layer.kv_width for layer in self.layers),
            peak_load_bytes=max(layer_bytes, default=0),
        )

    def _idle_params(self, layer: LayerSpec) -> int:
        """Expert weights that one token does not pass through."""
        stored = sum(e.ref.numel for e in self.by_layer.get(layer.index, ()) if e.unit.part == "experts")
        return stored - stored * layer.top_k // layer.experts if layer.experts else 0
