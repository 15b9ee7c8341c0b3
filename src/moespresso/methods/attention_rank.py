"""Lower rank within attention heads: fewer dims of queries and keys, fewer of values, after MoDeGPT (arXiv
2408.09632).

    queries, keys     dims stay by |C_Q^(1/2) e_i| |C_K^(1/2) e_i|, with C_Q = W_q C W_q^T, C the moments of
                      the inputs
    values, outputs   W_o W_v of each head becomes the best of a lower rank under C
    entropy           layers lose phi = L * ratio * softmax(-s / eps) of it, s = 1 - cosine of a block's input
                      and output

Heads that share a key or value keep the same dims, and dims that a rotary embedding turns together stay
together. What goes is zero in memory, in a model of its stock shape: scores change only by what went, and no
engine gets faster. On disk only the rows and columns that stay are stored. A norm on queries or keys sees all
dims, so these stay whole there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from moespresso.core.blueprint import Blueprint, Entry, Heads, LayerSpec, TensorRef
from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.format import Format
from moespresso.core.plan import Decision, Plan, Stage, Treatment
from moespresso.core.registry import method
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.effect import is_matrix, remains
from moespresso.formats import codec_of, pack
from moespresso.kernels import attention_rank, low_rank
from moespresso.methods._matrices import Words
from moespresso.methods._on_text import LayerContext, LayerResult, OnText

Slice = Literal["rows", "columns"]
# The matrices of each module, and what of them goes.
SIDES: dict[str, dict[str, Slice]] = {
    "qk": {"q_proj": "rows", "k_proj": "rows"},
    "vo": {"v_proj": "rows", "o_proj": "columns"},
}
_CALLED = {"qk": "queries and keys", "vo": "values and outputs"}
BOTH = Words("qk+vo")


@dataclass(frozen=True, slots=True)
class _Part:
    """The matrices of one module of a layer, and of how many dims a head they are."""

    layer: LayerSpec
    side: str
    entries: tuple[Entry, ...]

    @property
    def heads(self) -> Heads:
        assert self.layer.heads is not None
        return self.layer.heads

    @property
    def dims(self) -> int:
        """Dims of one head."""
        return self.heads.qk_dim if self.side == "qk" else self.heads.v_dim

    @property
    def step(self) -> int:
        """Dims that go at once."""
        return max(map(len, self.heads.units)) if self.side == "qk" else 1

    @property
    def nbytes(self) -> int:
        """Bytes as plain matrices."""
        return sum(replace(entry.ref, packed=None).nbytes for entry in self.entries)

    def formats(self, dims: int, *, pack: bool) -> dict[str, Format]:
        """The format of each matrix when `dims` of each head stay."""
        return {
            matrix: Format(kind if pack else "source", rank=dims * _owners(self.heads, matrix))
            for matrix, kind in SIDES[self.side].items()
        }

    def stored(self, dims: int) -> int:
        """Bytes when `dims` of each head are stored."""
        formats = self.formats(dims, pack=True)
        return sum(_packed(entry, formats[entry.unit.matrix or ""]).nbytes for entry in self.entries)

    def kept(self, share: float) -> int:
        """The most dims that can stay when `share` of the bytes goes; all where none goes."""
        if share == 0:
            return self.dims
        fitting = (
            dims
            for dims in range(self.dims - self.step, 0, -self.step)
            if self.stored(dims) <= (1 - share) * self.nbytes
        )
        return next(fitting, self.step)


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRank(OnText):
    """Settings of one cut.

    ratio: share of the bytes of the attention matrices treated that goes, at least.
    modules: what is treated, joined by +: qk (queries and keys), vo (values and outputs).
    allocation: `even` takes as much from every layer, `entropy` more from layers that turn the stream less.
    damping: share of the mean diagonal added to every second moment.
    sequential: later layers see what the cut ones before let through.
    pack: store only what stays, in fewer bytes that only moespresso reads (moespresso.load; --target plugin).
    """

    kind: ClassVar[str] = "attention_rank"
    able: ClassVar[tuple[str, ...]] = ("attention",)

    ratio: float = 0.25
    modules: Words = BOTH
    allocation: Literal["even", "entropy"] = "even"
    damping: float = 0.01
    sequential: bool = True
    pack: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        object.__setattr__(self, "modules", Words(self.modules))
        for side in self.modules.each():
            if side not in SIDES:
                raise UserError(f"attention_rank: modules={side!r} is unknown{did_you_mean(side, SIDES)}")
        if not self.modules.each():
            raise UserError("attention_rank: modules is empty: say qk, vo, or qk+vo")
        if not 0 <= self.ratio < 1:
            raise UserError(f"attention_rank: ratio={self.ratio} must be at least 0 and below 1")
        if not 0 <= self.damping < float("inf"):
            raise UserError(f"attention_rank: damping={self.damping} must not be negative")

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of formats that it makes."""
        return frozenset({"rows", "columns", "source"})

    def needs(self) -> frozenset[str]:
        """What must be measured for this step: by entropy, how much blocks turn the stream."""
        return frozenset({"similarity"} if self.allocation == "entropy" else ())

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        layers = _layers(blueprint)
        if not layers:
            raise UserError(f"attention_rank: {blueprint.place} has no attention whose heads could be cut")
        for layer in layers:
            assert layer.heads is not None
            reasons = {"qk": layer.heads.no_qk, "vo": layer.heads.no_vo}
            if not any(not reasons[side] for side in self.modules.each()):
                other = next((side for side in SIDES if not reasons[side]), None)
                cure = f"modules={other}" if other else "low_rank:parts=attention with --target plugin"
                raise UserError(
                    f"attention_rank: the attention of L{layer.index} of {blueprint.place} ({blueprint.family}) "
                    f"{' and '.join(dict.fromkeys(reasons[side] for side in self.modules.each()))}: use {cure}"
                )
        for part in self._parts(blueprint, layers):
            _check_stored(part, blueprint)

    def amounts(self, blueprint: Blueprint) -> list[Any]:
        """This step with every ratio, least first (for a byte budget); none without `pack`: zeros weigh
        what weights weigh."""
        if not self.pack:
            raise UserError(
                "attention_rank:pack=false leaves zeros, which take as many bytes: use pack=true for --size"
            )
        return [replace(self, ratio=share / 100) for share in range(1, 100)]

    def outline(self, source: Blueprint, before: Plan) -> Stage:
        """A stage of the right size, before anything is measured (by entropy: of the size that even shares
        have)."""
        left = remains(before, source)
        layers = [
            layer
            for layer in _layers(source)
            if layer.index in left.layers and (layer.index, "attention") not in left.cut
        ]
        return Stage(self.describe(), self._treatments(self._even(self._parts(source, layers))))

    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Say how many dims stay in every layer."""
        parts = self._parts(blueprint, _layers(blueprint))
        kept = self._by_entropy(parts, stats) if self.allocation == "entropy" else self._even(parts)
        return Decision(self._treatments(kept), tuple(self._told(kept, blueprint)))

    def _parts(self, blueprint: Blueprint, layers: Iterable[LayerSpec]) -> list[_Part]:
        """What is treated: all modules asked for that can be."""
        found: list[_Part] = []
        for layer in layers:
            assert layer.heads is not None
            reasons = {"qk": layer.heads.no_qk, "vo": layer.heads.no_vo}
            matrices = {
                entry.unit.matrix: entry
                for entry in blueprint.by_layer[layer.index]
                if entry.unit.part == "attention" and is_matrix(entry)
            }
            found += [
                _Part(layer, side, tuple(matrices[name] for name in SIDES[side] if name in matrices))
                for side in SIDES
                if side in self.modules.each() and not reasons[side]
            ]
        return found

    def _even(self, parts: list[_Part]) -> dict[tuple[int, str], tuple[_Part, int]]:
        return {(part.layer.index, part.side): (part, part.kept(self.ratio)) for part in parts}

    def _by_entropy(self, parts: list[_Part], stats: Stats) -> dict[tuple[int, str], tuple[_Part, int]]:
        layers = sorted({part.layer.index for part in parts})
        turned = [1 - stats.at(Unit(layer), "cosine") for layer in layers]
        shares = dict(zip(layers, low_rank.entropy_allocation(turned, self.ratio), strict=True))
        return {(part.layer.index, part.side): (part, part.kept(shares[part.layer.index])) for part in parts}

    def _treatments(self, kept: Mapping[Any, tuple[_Part, int]]) -> dict[Unit, Treatment]:
        """A format for every matrix that loses something."""
        return {
            Unit(part.layer.index, "attention", None, matrix): Treatment(format=format)
            for part, dims in kept.values()
            if dims < part.dims
            for matrix, format in part.formats(dims, pack=self.pack).items()
        }

    def _told(self, kept: Mapping[Any, tuple[_Part, int]], blueprint: Blueprint) -> Iterable[str]:
        """What a reader wants to know of the choice."""
        for side in self.modules.each():
            whole = {
                layer.index: reason
                for layer in _layers(blueprint)
                if layer.heads and (reason := layer.heads.no_qk if side == "qk" else layer.heads.no_vo)
            }
            if whole:
                yield (
                    f"attention_rank: {_CALLED[side]} of {len(whole)} layers stay whole, since their attention "
                    f"{next(iter(whole.values()))}"
                )
            found = [(dims, part.dims) for part, dims in kept.values() if part.side == side]
            if found:
                least, most = min(found)[0], max(found)[0]
                yield (
                    f"attention_rank: heads keep {least if least == most else f'{least} to {most}'} of {found[0][1]} dims of "
                    f"{_CALLED[side]}"
                )
        before = sum(part.nbytes for part, _ in kept.values())
        after = sum(part.stored(dims) if dims < part.dims else part.nbytes for part, dims in kept.values())
        if self.pack:
            yield (
                f"attention_rank: {1 - after / before:.1%} of the bytes of these matrices go, {self.ratio:.1%} were asked for; "
                "in memory they are whole again, and no engine gets faster"
            )
        else:
            yield "attention_rank: what goes is stored as zeros, so no bytes are saved and no engine gets faster"

    def solve(self, context: LayerContext) -> LayerResult:
        """What is left of one layer's attention."""
        result = LayerResult()
        names = {name.rpartition(".")[2]: name for name in context.linears}
        for side, matrices in SIDES.items():
            some = names.keys() & set(matrices)
            if not some:
                continue
            dims = {_dims(context, names[matrix], matrix) for matrix in some}
            if len(some) < 2 or len(dims) > 1:
                raise UserError(
                    f"the plan does not keep as many dims of {' and '.join(matrices)} in L{context.layer}: give both the same"
                )
            cut = self._queries if side == "qk" else self._values
            first, second = (names[matrix] for matrix in matrices)
            cut(context, first, second, dims.pop(), result)
        return result

    def _queries(self, context: LayerContext, q: str, k: str, keep: int, result: LayerResult) -> None:
        """Zeros where dims of queries and keys go."""
        heads = context.heads
        assert heads is not None
        queries, keys, hessian = _with_biases(context, q, k)
        kept = attention_rank.select_query_key(queries, keys, hessian, keep, heads.count, heads.units)
        for name, rows, owners in ((q, queries, heads.count), (k, keys, heads.kv_count)):
            stay = kept.repeat_interleave(owners // heads.kv_count, 0).flatten()
            _put(context, name, rows.masked_fill(~stay[:, None], 0), result)

    def _values(self, context: LayerContext, v: str, o: str, keep: int, result: LayerResult) -> None:
        """Each head's values and outputs in a basis whose first dims hold the most, zeros where the others
        were."""
        heads, output = context.heads, context.linears[o][0].float()
        assert heads is not None
        rows, hessian = _with_biases(context, v)
        narrow = attention_rank.decompose_value_output(rows, output, hessian, keep, heads.count, self.damping)
        values = torch.zeros_like(rows).unflatten(0, (heads.kv_count, -1))
        values[:, :keep] = narrow[0].unflatten(0, (heads.kv_count, -1))
        _put(context, v, values.flatten(0, 1), result)
        outputs = torch.zeros_like(output).unflatten(1, (heads.count, -1))
        outputs[..., :keep] = narrow[1].unflatten(1, (heads.count, -1))
        result.weights[o] = outputs.flatten(1)


def _packed(entry: Entry, format: Format) -> TensorRef:
    """The reference to a matrix as it will be stored."""
    return pack(replace(entry.ref, packed=None), format, codec_of(format).layout)


def _layers(blueprint: Blueprint) -> list[LayerSpec]:
    """The layers that have attention; other mixers (Mamba, linear attention) are left alone."""
    return [layer for layer in blueprint.layers if layer.mixer == "attention" and layer.heads is not None]


def _owners(heads: Heads, matrix: str) -> int:
    """Number of heads whose dims a matrix has, one after the other."""
    return heads.count if matrix in ("q_proj", "o_proj") else heads.kv_count


def _check_stored(part: _Part, blueprint: Blueprint) -> None:
    """Each matrix must be stored by itself, as it is in memory."""
    heads, found = part.heads, {entry.unit.matrix: entry for entry in part.entries}
    for matrix, kind in SIDES[part.side].items():
        wide = part.dims * _owners(heads, matrix)
        if matrix not in found or found[matrix].ref.shape[0 if kind == "rows" else 1] != wide:
            raise UserError(
                f"attention_rank: {blueprint.place} ({blueprint.family}) does not store {matrix} of L{part.layer.index} as a "
                "matrix of its own: use low_rank:parts=attention with --target plugin"
            )


def _dims(context: LayerContext, name: str, matrix: str) -> int:
    """Dims of each head that the plan keeps of a matrix."""
    assert context.heads is not None
    rank, owners = context.formats[name].rank, _owners(context.heads, matrix)
    if rank < owners or rank % owners:
        raise UserError(
            f"the plan keeps {rank} of L{context.layer}.{name}, which {owners} heads cannot share: say a multiple of {owners}"
        )
    return rank // owners


def _bias(context: LayerContext, name: str) -> Tensor | None:
    there = getattr(context.module.get_submodule(name), "bias", None)
    return None if there is None else context.parameter(f"{name}.bias")


def _with_biases(context: LayerContext, *names: str) -> tuple[Tensor, ...]:
    """Matrices that read the same, and the Hessian of that; with biases as columns of one more input that
    is always 1."""
    weights = [context.linears[name][0].float() for name in names]
    biases = [_bias(context, name) for name in names]
    hessian, mean = context.linears[names[0]][1], context.means[names[0]][:, None]
    if all(bias is None for bias in biases):
        return *weights, hessian
    columns = [
        weight.new_zeros(len(weight)) if bias is None else bias.float()
        for weight, bias in zip(weights, biases, strict=True)
    ]
    wide = [torch.cat([weight, bias[:, None]], 1) for weight, bias in zip(weights, columns, strict=True)]
    rows = torch.cat([hessian, mean], 1), torch.cat([mean.T, mean.new_ones(1, 1)], 1)
    return *wide, torch.cat(rows)


def _put(context: LayerContext, name: str, rows: Tensor, result: LayerResult) -> None:
    """Take a matrix, and its bias if it has one, into the answer."""
    result.weights[name] = rows[:, : context.linears[name][0].shape[1]]
    if _bias(context, name) is not None:
        result.replaced[f"{name}.bias"] = rows[:, -1]
