"""What a plan does to each stored tensor: the one function that pricing, building and verifying share.

`pieces` turns the entries of the source into `Piece`s of the result, from names and shapes alone: which bytes
are taken, under which name and shape they are written, and what is done to them on the way: rows taken, a
scale, experts averaged, an output mapped, all of it encoded. Fitted values (`cuts`) are put in where they are
known; pricing needs none. `pressed_blueprint` is the source's blueprint after that, so a plan's cost is the
sum of what will be written.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moespresso.core.blueprint import Blueprint, Branch, Entry, TensorRef
from moespresso.core.cost import Cost
from moespresso.core.format import Format
from moespresso.core.plan import Plan, Treatment
from moespresso.core.unit import Unit
from moespresso.effect.ahead import Predictions
from moespresso.effect.cuts import Fits, Repair, cuts, fitted_key, key
from moespresso.effect.matrices import format_of, narrowed, replaces, scale_dtypes
from moespresso.effect.piece import Encoding, Fold, Member, Piece, Pruned, as_expert, led
from moespresso.effect.remains import pressed_layers, remains
from moespresso.formats import codec_in, codec_of


def kept_by_layer(plan: Plan, blueprint: Blueprint) -> dict[int, tuple[int, ...]]:
    """Kept experts of every MoE layer that is left, in source numbers."""
    return dict(remains(plan, blueprint).experts)


def pieces(blueprint: Blueprint, plan: Plan, fits: Fits | None = None, *, stock: bool = False) -> list[Piece]:
    """Everything that `plan` writes, in the source's order, with what is new at the end. In a `stock` form
    the norm of a feed-forward part that goes stays: the engine's class has one there."""
    rewriter = _Rewriter(blueprint, plan, fits or {}, stock)
    rewritten = (rewriter(entry) for entry in blueprint.entries)
    written = _of_one_packing([piece for piece in rewritten if piece is not None])
    return [*_with_leaders(written), *rewriter.added()]


def _of_one_packing(written: list[Piece]) -> list[Piece]:
    """Where a plan packs in another layout than one that a config says of all matrices, what the source has
    in that is stored as what it decodes to."""
    new = {piece.encoding.layout for piece in written if piece.encoding is not None and piece.encoding.by}
    return [replace(piece, plain=True, encoding=None) if new and _stands_alone(piece, new) else piece
            for piece in written]  # fmt: skip


def _stands_alone(piece: Piece, new: Collection[str]) -> bool:
    """Whether a piece stays in a layout of the source that goes with no other, such as `new` ones."""
    packed = piece.ref.packed
    kept = packed is not None and (piece.encoding is None or piece.encoding.by is None)
    return kept and codec_in(piece.ref).one_format and codec_in(piece.ref).layout not in new


def _with_leaders(written: Iterable[Piece]) -> Iterator[Piece]:
    """With what experts share stored by the first of those that are left."""
    met: set[Unit] = set()
    for piece in written:
        packed = piece.ref.packed
        if packed is None or not packed.shared:
            yield piece
            continue
        unit = replace(piece.unit, expert=None)
        yield led(piece, leads=unit not in met)
        met.add(unit)


def pressed_blueprint(blueprint: Blueprint, plan: Plan, written: list[Piece] | None = None) -> Blueprint:
    """The blueprint of what `plan` makes of `blueprint` (of the pieces `written`), before anything is
    written."""
    layers = pressed_layers(blueprint, remains(plan, blueprint))
    written = pieces(blueprint, plan) if written is None else written
    entries = tuple(replace(piece.source, ref=piece.ref, unit=piece.unit) for piece in written)
    return replace(blueprint, layers=layers, entries=entries)


def price(plan: Plan, blueprint: Blueprint) -> Cost:
    """What the model that `plan` makes of `blueprint` weighs and takes, from headers alone."""
    return pressed_blueprint(blueprint, plan).cost()


class _Rewriter:
    """Says what becomes of one entry after another."""

    def __init__(self, blueprint: Blueprint, plan: Plan, fits: Fits, stock: bool) -> None:
        self._blueprint, self._plan, self._fits, self._stock = blueprint, plan, fits, stock
        self._left = remains(plan, blueprint)
        self._predictions = Predictions(plan, blueprint)
        self._fitted_stages = {
            int(name.partition("/")[0]) for name in self._fits
        }  # stages that have found what they need
        self._folds: dict[tuple[int, str], list[tuple[int, Fold]]] = {}  # with the stages they come from
        self._biases: dict[tuple[int, Branch], Tensor | None] = {}
        self._scale_dtypes = scale_dtypes(blueprint)
        self._gather_folds()
        self._groups = {layer: _groups(plan, layer) for layer in self._left.experts}
        self._rows = {layer: _groups(plan, layer, of_rows=True) for layer in self._left.experts}
        self._by_role = {_role(entry): entry for entry in blueprint.entries if entry.unit.expert is not None}

    def _gather_folds(self) -> None:
        for stage in range(len(self._plan.stages)):
            for cut in cuts(self._plan, stage, self._blueprint):
                at = cut.before if folds_into(self._blueprint, cut.before, cut.repair) else None
                if at is not None:
                    values = self._fits.get(key(stage, _unit(self._blueprint, at), cut.repair))
                    self._folds.setdefault(at, []).append((stage, Fold(cut.repair, -1, values)))
                elif cut.repair == "bias" and cut.stub is not None:
                    self._biases[cut.stub] = self._fits.get(
                        key(stage, _unit(self._blueprint, cut.stub), "bias")
                    )

    def __call__(self, entry: Entry) -> Piece | None:
        """The piece that `entry` becomes, or None when it is removed."""
        layer = entry.unit.layer
        if entry.ahead is not None:
            return self._behind(self._predictions(entry), layer)
        if layer is None:
            return self._encode(
                self._with_pruning(Piece(entry.ref.name, entry.ref.shape, entry), entry), entry
            )
        if layer not in self._left.layers or self._is_cut(entry, layer):
            return None
        piece = self._of_experts(entry, layer) if layer in self._left.experts and entry.in_graph else None
        if entry.in_graph and entry.unit.expert is not None and layer in self._left.experts and piece is None:
            return None
        piece = piece or Piece(entry.ref.name, entry.ref.shape, entry)
        if folds := self._folds_on(entry, layer):
            piece = replace(piece, folds=folds)
        piece = replace(piece, shape=self._narrow_shape(piece, entry))
        piece = self._encode(self._with_refits(self._with_pruning(piece, entry), entry), entry)
        return self._renumber(piece, layer, self._left.position(layer))

    def _behind(self, piece: Piece | None, layer: int | None) -> Piece | None:
        """A piece of a prediction layer; one that is numbered like a decoder layer follows the last of
        these."""
        if piece is None or layer is None:
            return piece
        return self._renumber(piece, layer, len(self._left.layers) + layer - len(self._blueprint.layers))

    def _narrow_shape(self, piece: Piece, entry: Entry) -> tuple[int, ...]:
        """The shape with the channels that are left."""
        axis, cut = entry.channel_axis, narrowed(entry, self._left)
        if axis is None or cut == entry.ref.shape:
            return piece.shape
        shape = list(piece.shape)
        shape[axis] = cut[axis]
        return tuple(shape)

    def _with_pruning(self, piece: Piece, entry: Entry) -> Piece:
        """With the stages that leave fewer weights of it, and those as they are."""
        formats = ((number, stage, format_of(entry, stage)) for number, stage in enumerate(self._plan.stages))
        pruning = [Pruned(number, stage, format) for number, stage, format in formats
                 if format is not None and not (codec_of(format).rounds or codec_of(format).fitted)]  # fmt: skip
        return replace(piece, pruned=tuple(pruning)) if pruning else piece

    def _with_refits(self, piece: Piece, entry: Entry) -> Piece:
        """With what a stage found to stand in the place of the whole tensor. Before it has found anything
        every tensor of such a part may be replaced; afterwards those are that it found."""
        for number, stage in reversed([*enumerate(self._plan.stages)]):
            values = self._fits.get(fitted_key(number, entry.ref.name, "dense"))
            if values is not None or (replaces(entry, stage) and number not in self._fitted_stages):
                return self._with_refit(piece, entry, number, values)
            if number in self._fitted_stages:  # on text, and it found nothing for this one
                piece = replace(piece, pruned=tuple(pruned for pruned in piece.pruned if pruned.at != number))
        return piece

    def _with_refit(self, piece: Piece, entry: Entry, number: int, values: Tensor | None) -> Piece:
        """With what stage `number` found, and what later stages do to that."""
        before = Plan("", self._plan.stages[:number])
        scale = piece.scale / (before.routed_scale(entry.unit.layer or 0) if piece.scale != 1 else 1.0)
        later = tuple(pruned for pruned in piece.pruned if pruned.at > number)
        return replace(
            piece,
            refit=True,
            values=self._left_of(values, piece, number),
            scale=scale,
            blend=(),
            pruned=later,
        )

    def _left_of(self, values: Tensor | None, piece: Piece, number: int) -> Tensor | None:
        """What later stages take of a tensor that stage `number` found: `values` has the rows that were left
        by then."""
        if values is None or piece.take is None or tuple(values.shape) == piece.shape:
            return values
        before = remains(Plan("", self._plan.stages[:number]), self._blueprint)
        layer = piece.source.unit.layer or 0
        rows_before = before.rows(layer) if piece.source.unit.part == "router" else before.experts[layer]
        return values.index_select(
            piece.axis or 0, torch.tensor([rows_before.index(row) for row in piece.take])
        )

    def _encode(self, piece: Piece, entry: Entry) -> Piece:
        """With the last format that a stage gives it; what was packed already stays so, as long as it keeps
        its rows: words and zeros may hold several of them."""
        for number, stage in reversed([*enumerate(self._plan.stages)]):
            format = format_of(entry, stage)
            packs = format is not None and codec_of(format).packs
            if replaces(entry, stage) or (format is not None and not packs):
                break  # what was stored in a format before is a plain matrix now
            if format is not None:
                return self._pack(piece, entry, number, format)
        packed, touched = entry.ref.packed, piece.changed or entry.ref.factor != 1
        if packed is None or not (touched or piece.take is not None):
            return piece
        if piece.take is not None or not codec_in(entry.ref).renews:
            return replace(piece, plain=True)
        how = Encoding(packed.format, packed.layout)
        if piece.blend or piece.folds or piece.refit or piece.pruned:
            codec_in(entry.ref).check_anew(packed.format, piece.shape, entry.ref.name)
            return replace(piece, encoding=replace(how, again=True))
        return replace(piece, scale=1.0, encoding=replace(how, factor=piece.scale))

    def _pack(self, piece: Piece, entry: Entry, number: int, format: Format) -> Piece:
        """Packed by stage `number`; later scales are put on what is scaled of its parts."""
        before, codec = Plan("", self._plan.stages[:number]), codec_of(format)
        scale = before.routed_scale(entry.unit.layer or 0) if piece.scale != 1 else 1.0
        alike = entry.unit.part == "experts" and not codec.own  # loaders stack the scales of experts
        how = Encoding(
            format,
            codec.layout,
            dtype=self._scale_dtypes.get(entry.unit.layer, "") if alike else "",
            by=self._plan.stages[number],
            parts=self._parts(entry, number, format),
            factor=piece.scale / scale,
        )
        return replace(piece, scale=scale, encoding=how)

    def _parts(self, entry: Entry, number: int, format: Format) -> Fits:
        """The parts of a matrix that stage `number` has found, by suffix."""
        codec, layer = codec_of(format), replace(entry.unit, expert=None)
        names = {
            suffix: key(number, layer, suffix)
            if suffix in codec.shared
            else fitted_key(number, entry.ref.name, suffix)
            for suffix in codec.parts
        }
        return {suffix: self._fits[name] for suffix, name in names.items() if name in self._fits}

    def _is_cut(self, entry: Entry, layer: int) -> bool:
        keeps_norm = self._stock and entry.branch == "mlp" and entry.unit.part == "norm"
        return entry.branch is not None and (layer, entry.branch) in self._left.cut and not keeps_norm

    def _renumber(self, piece: Piece, layer: int, position: int) -> Piece:
        if position == layer:
            return piece
        place = replace(piece.unit, layer=position)
        name = re.sub(rf"(?<=\.){layer}(?=\.)", str(position), piece.name, count=1)
        return replace(piece, name=name, place=place)

    def _of_experts(self, entry: Entry, layer: int) -> Piece | None:
        """A tensor of one expert, or one that all experts of the layer share."""
        kept_experts = self._left.experts[layer]
        routed = entry.unit.part == "experts" and (entry.unit.matrix or "").startswith("down")
        scale = self._plan.routed_scale(layer) if routed else 1.0
        if entry.unit.expert is not None:
            if entry.unit.expert not in kept_experts:
                return None
            position = kept_experts.index(entry.unit.expert)
            name = as_expert(entry.ref.name, position)
            blend = self._average(entry, layer, entry.unit.expert)
            return Piece(name, entry.ref.shape, entry, scale=scale, blend=(blend,) if blend else (),
                         place=replace(entry.unit, expert=position))  # fmt: skip
        axis = entry.expert_axis
        stay = self._left.rows(layer) if entry.unit.part == "router" else kept_experts
        if axis is None or len(stay) == entry.ref.shape[axis]:
            return Piece(entry.ref.name, entry.ref.shape, entry, scale=scale)
        shape = (*entry.ref.shape[:axis], len(stay), *entry.ref.shape[axis + 1 :])
        return Piece(entry.ref.name, shape, entry, axis, stay, scale, self._averages(entry, layer, stay))

    def _average(self, entry: Entry, layer: int, expert: int) -> tuple[Member, ...]:
        """The members whose average expert `expert` becomes, for tensors that each expert has of its own."""
        members = self._groups[layer].get(expert, {})
        return tuple(
            self._member(self._by_role[_role(entry, number)], number, part)
            for number, part in sorted(members.items())
        )

    def _averages(self, entry: Entry, layer: int, stay: tuple[int, ...]) -> tuple[tuple[Member, ...], ...]:
        """The same for a tensor that holds all experts; a router's rows are averaged only where the plan says
        so."""
        groups = self._rows[layer] if entry.unit.part == "router" else self._groups[layer]
        if not groups.keys() & set(stay):
            return ()
        return tuple(
            tuple(
                self._member(entry, number, part)
                for number, part in sorted(groups.get(expert, {expert: _Part()}).items())
            )
            for expert in stay
        )

    def _member(self, entry: Entry, expert: int, part: _Part) -> Member:
        """A member of an average, with its channels in the order that all merges it has been through give
        them."""
        if not part.lines or entry.channel_axis is None:
            return Member(entry, expert, part.share)
        order: Tensor | None = None
        for line in part.lines:
            fitted = self._fits.get(line)
            if fitted is None:
                return Member(entry, expert, part.share, aligned=True)
            order = fitted if order is None else order[fitted]
        return Member(entry, expert, part.share, order, aligned=True)

    def _folds_on(self, entry: Entry, layer: int) -> tuple[Fold, ...]:
        if entry.out_axis is None or entry.branch is None:
            return ()
        folds = [fold for _, fold in self._folds.get((layer, entry.branch), ())]
        is_bias = len(entry.ref.shape) == 1
        return tuple(_on(entry, fold) for fold in folds if fold.kind != "bias" or is_bias)

    def added(self) -> Iterator[Piece]:
        """Tensors that the source does not have: constants where branches or experts were."""
        dtypes = self._blueprint.dtypes
        specs = {layer.index: layer for layer in self._blueprint.layers}
        for (layer, branch), bias in sorted(self._biases.items(), key=lambda item: item[0]):
            if (layer, branch) in self._left.cut:
                name = f"{specs[layer].bodies[branch]}.bias"
                yield self._constant(layer, name, (self._blueprint.hidden,), bias, dtypes[layer])
        for layer, gone in self._left.gone.items():
            stage = _novice_stage(self._plan, layer)
            if stage is not None:
                values = self._fits.get(key(stage, Unit(layer, "experts"), "novices"))
                shape = (len(gone), self._blueprint.hidden)
                name = f"{specs[layer].bodies['mlp']}.experts.novices"
                novices = self._constant(layer, name, shape, values, self._dtype_of_answers(layer))
                # They were measured with earlier maps in place; what later ones do to experts they do to novices.
                later = tuple(fold for number, fold in self._folds.get((layer, "mlp"), ()) if number > stage)
                yield replace(novices, folds=novices.folds + later)

    def _dtype_of_answers(self, layer: int) -> str:
        """The dtype of what the experts of a layer end with."""
        return next(entry.ref.dtype for entry in self._blueprint.by_layer[layer]
                    if entry.unit.part == "experts" and (entry.unit.matrix or "").startswith("down"))  # fmt: skip

    def _constant(
        self, layer: int, name: str, shape: tuple[int, ...], values: Tensor | None, dtype: str
    ) -> Piece:
        position = self._left.position(layer)
        ref = TensorRef(f"{self._blueprint.layers_name}.{position}.{name}", shape, dtype, "")
        return Piece(ref.name, shape, Entry(ref, Unit(position)), folds=(Fold("bias", 0, values),))


def _on(entry: Entry, fold: Fold) -> Fold:
    """A fold for one tensor. What is added there, the layer will multiply; a map commutes with that."""
    values = fold.values
    if fold.kind == "bias" and values is not None and entry.multiplier != 1:
        values = values / entry.multiplier
    return replace(fold, axis=entry.out_axis, values=values)


def folds_into(blueprint: Blueprint, at: tuple[int, str] | None, repair: Repair) -> bool:
    """Whether a repair can be put into the weights of branch `at`; a bias needs a plain one there."""
    outputs = [
        entry
        for entry in blueprint.entries
        if entry.out_axis is not None and at == (entry.unit.layer, entry.branch)
    ]
    if repair != "bias":
        return bool(outputs)
    routed = any(entry.unit.part == "experts" for entry in outputs)
    return not routed and any(len(entry.ref.shape) == 1 for entry in outputs)


def biased_stubs(blueprint: Blueprint, plan: Plan) -> frozenset[tuple[int, Branch]]:
    """Branches that are removed but leave a constant in their place, since no weight before them can hold
    it."""
    with_bias = (
        cut
        for stage in range(len(plan.stages))
        for cut in cuts(plan, stage, blueprint)
        if cut.repair == "bias"
    )
    left = remains(plan, blueprint)
    return frozenset(
        cut.stub for cut in with_bias
        if cut.stub is not None and not folds_into(blueprint, cut.before, "bias") and cut.stub[0] in left.layers
    )  # fmt: skip


def _unit(blueprint: Blueprint, at: tuple[int, str]) -> Unit:
    spec = next(layer for layer in blueprint.layers if layer.index == at[0])
    return spec.unit("attention" if at[1] == "attention" else "mlp")


def _role(entry: Entry, expert: int | None = None) -> tuple[int | None, int | None, str | None]:
    """What names one expert's tensor: two experts' tensors of the same layer and matrix belong together."""
    return entry.unit.layer, entry.unit.expert if expert is None else expert, entry.unit.matrix


def _novice_stage(plan: Plan, layer: int) -> int | None:
    unit = Unit(layer, "experts")
    return next((number for number, stage in enumerate(plan.stages)
                 if stage.treatments.get(unit, Treatment()).repair == "novice"), None)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Part:
    """What a member has of an average: its share, and the fitted orders that put its channels in line, first
    to last."""

    share: float = 1.0
    lines: tuple[str, ...] = ()


def _groups(plan: Plan, layer: int, *, of_rows: bool = False) -> dict[int, dict[int, _Part]]:
    """Members of every expert that is an average, or has a router row that is (`of_rows`). Merges of several
    stages are averages of averages, put in line as a whole."""
    groups: dict[int, dict[int, _Part]] = {}
    for number, stage in enumerate(plan.stages):
        if of_rows and stage.treatments.get(Unit(layer, "router"), Treatment()).repair != "mean":
            continue
        merged: dict[int, dict[int, _Part]] = {}
        for unit, treatment in stage.treatments.items():
            if unit.layer == layer and unit.expert is not None and treatment.into is not None:
                line = (key(number, unit, "order"),) if treatment.repair == "align" else ()
                for member, part in groups.get(unit.expert, {unit.expert: _Part()}).items():
                    merged.setdefault(treatment.into, {})[member] = _Part(
                        treatment.share * part.share, part.lines + line
                    )
        groups |= merged
    return groups
