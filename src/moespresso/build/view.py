"""A checkpoint as a plan leaves it, before anything is written.

A `View` answers with the edited config, the tensors to write (`pieces`) and a `Skeleton` that loads them: so a later
step is measured on the model as the earlier ones leave it, pricing and writing agree by construction, and `verify`
compares files with what they ought to be. With an empty plan it is the checkpoint itself.

Layers that differ are said in the words of moespresso's runtime. In its `stock` form a view says what it can in words
that engines know on their own: a feed-forward part that is gone is a dense one of zeros there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from moespresso.checkpoint import OWN_KIND, SECTION, Checkpoint, Lazy, Reader, packing_config
from moespresso.core.blueprint import Blueprint, Entry, LayerSpec, TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import OWN_LAYOUTS, Form, Format, Layout
from moespresso.core.plan import Plan
from moespresso.core.unit import Unit
from moespresso.effect import Fits, Piece, Remains, laid_out, pieces, pressed_blueprint, remains, stored
from moespresso.model import (
    Names,
    Skeleton,
    build_meta,
    check_tensors,
    joined,
    packed_alone,
    pressed_config,
    read_config,
    unreadable,
    with_dense,
)


@dataclass(frozen=True)
class View:
    """A source checkpoint with its blueprint, seen through a plan and what was fitted for it."""

    checkpoint: Checkpoint
    source: Blueprint
    plan: Plan = field(default=Plan(""))
    fits: Fits = field(default_factory=dict[str, torch.Tensor], repr=False)
    stock: bool = False
    # How packed matrices are laid out, if they stay packed; None: as the source has them.
    layout: Form | None = None
    # The blueprint under its own family's name, where the checkpoint is presented as one of another.
    origin: Blueprint | None = None

    @cached_property
    def left(self) -> Remains:
        """What of the source is left."""
        return remains(self.plan, self.source)

    @cached_property
    def stubs(self) -> tuple[int, ...]:
        """New numbers of the layers whose feed-forward part is a dense one of zeros."""
        if not self.stock:
            return ()
        return tuple(self.left.position(layer) for layer, branch in sorted(self.left.cut) if branch == "mlp")

    @cached_property
    def blueprint(self) -> Blueprint:
        """What the plan makes of the source."""
        pressed = pressed_blueprint(self.source, self.plan, self.pieces)
        bodies = {position: self._body(position) for position in self.stubs}
        layers = tuple(_as_stub(layer, bodies, self._config[1]) for layer in pressed.layers)
        return replace(pressed, layers=layers)

    @cached_property
    def pieces(self) -> list[Piece]:
        """Every tensor of the result, in the source's order."""
        found = pieces(self.source, self.plan, self.fits, stock=self.stock)
        laid = [laid_out(piece, self.layout) for piece in self._grown(found)]
        return [*joined(laid, self.checkpoint.config, self.source.source), *self._stub_pieces()]

    @cached_property
    def unreadable(self) -> list[str]:
        """Names of plain tensors that stock transformers cannot read beside the packed ones."""
        return unreadable(self.pieces, self.checkpoint.config, self.source.source)

    @cached_property
    def packed_alone(self) -> list[str]:
        """Names of packed matrices that stock transformers would leave random: it has no linear layer there."""
        return packed_alone(self.pieces, self.checkpoint.config, self.source.source)

    @cached_property
    def stored(self) -> list[Piece]:
        """Every tensor as it is written: a packed matrix as its parts."""
        return [part for piece in self.pieces for part in stored(piece)]

    @cached_property
    def formats(self) -> dict[str, Format]:
        """The format of every matrix that is packed, by the name of its module."""
        found = {piece.name.removesuffix(".weight"): piece.ref.packed for piece in self.pieces}
        return {name: packed.format for name, packed in found.items() if packed is not None}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config.json of the result; raises `UserError` where none can say what is left."""
        config = {key: value for key, value in self._config[0].items() if key != SECTION}
        if not self.formats:
            return config
        layout: Layout = next(
            piece.ref.packed.layout for piece in self.pieces if piece.ref.packed is not None
        )
        packed, plain = self._modules(config)
        section = packing_config(packed, plain, layout=layout, stock=one_format(self))
        if layout in ("gptq", "awq"):  # their engines compute in the dtype of the scales
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = "float16"
        return config | {SECTION: section}

    def _modules(self, config: dict[str, Any]) -> tuple[dict[str, Format], set[str]]:
        """The formats of packed modules, and the other modules with a matrix; by their names on disk and in memory, since loaders look
        them up by either."""
        place = self.source.source
        model = build_meta(read_config(config, place), torch.bfloat16, place)
        names, formats = Names(model), dict(self.formats)
        for piece in self.pieces:
            if piece.ref.packed is not None and piece.unit.expert is None:
                formats[names.in_memory(piece.name)[0].removesuffix(".weight")] = piece.ref.packed.format
        linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        pieces = {piece.name.removesuffix(".weight") for piece in self.pieces
                  if len(piece.shape) == 2 and piece.name.endswith(".weight") and piece.unit.part != "embedding"}  # fmt: skip
        return formats, (linears | pieces) - formats.keys()

    @cached_property
    def _config(self) -> tuple[dict[str, Any], int]:
        """The config, and the width of dense stubs."""
        if not self.stubs:
            return pressed_config(
                self.checkpoint.config, self.source, self.plan, self.left, stock=self.stock
            ), 0
        whole = frozenset(at for at in self.left.cut if at[1] != "mlp")
        kept = {
            **{layer.index: tuple(range(layer.experts)) for layer in self.source.moe_layers},
            **self.left.experts,
        }
        experts = {layer: kept[layer] for layer in self.left.layers if layer in kept}
        # Their number of experts does not matter: they will have none.
        most = max(map(len, self.left.experts.values()), default=0)
        experts |= {
            layer: kept[layer][:most] or kept[layer] for layer in experts if layer not in self.left.experts
        }
        # What will be dense has no width of its own to be asked for.
        widths = self.left.widths
        if len(sizes := {width for each in widths.values() for width in each.values()}) == 1:
            widths = {layer: dict.fromkeys(there, *sizes) for layer, there in experts.items()}
        config = pressed_config(
            self.checkpoint.config,
            self.source,
            self.plan,
            replace(self.left, cut=whole, experts=experts, widths=widths),
            stock=self.stock,
        )
        return with_dense(config, self.stubs, self.source.source)

    def _body(self, position: int) -> str:
        layer = self.left.layers[position]
        return next(spec for spec in self.source.layers if spec.index == layer).bodies["mlp"]

    def _grown(self, found: list[Piece]) -> list[Piece]:
        """Shared experts as wide as the config says: where its one width of experts counts them."""
        if not self.stock or not self.left.widths:
            return found
        config, place = self._config[0], self.source.source
        model = build_meta(read_config(config, place), torch.bfloat16, place)
        names, state = Names(model), model.state_dict()
        grown: list[Piece] = []
        for piece in found:
            wanted = state.get(names.in_memory(piece.name)[0]) if piece.unit.part == "shared" else None
            wide = wanted is not None and tuple(wanted.shape) != piece.shape
            grown.append(
                replace(piece, shape=tuple(wanted.shape), filled=True)
                if wide and wanted is not None
                else piece
            )
        return grown

    def _stub_pieces(self) -> list[Piece]:
        """The zeros that stand where feed-forward parts were, as the model of the config has them."""
        if not self.stubs:
            return []
        place = self.source.source
        state = build_meta(read_config(self._config[0], place), torch.bfloat16, place).state_dict()
        dtypes = self.source.dtypes
        made: list[Piece] = []
        for position in self.stubs:
            prefix = f"{self.source.layers_name}.{position}.{self._body(position)}."
            dtype = dtypes[self.left.layers[position]]
            refs = [
                TensorRef(name, tuple(t.shape), dtype, "")
                for name, t in state.items()
                if name.startswith(prefix)
            ]
            made += [
                Piece(ref.name, ref.shape, Entry(ref, Unit(position, "dense"), branch="mlp")) for ref in refs
            ]
        return made

    def check_fits(self) -> None:
        """Raise `UserError` when the tensors to write are not the ones that the model of the edited config asks for."""
        try:
            check_tensors(self.config, [piece.ref for piece in self.pieces], self.source.source)
        except UserError as error:
            raise UserError(f"the plan's tensors do not fit the model its config makes: {error}") from error

    def skeleton(self, reader: Reader, dtype: torch.dtype, device: torch.device) -> Skeleton:
        """The model on `meta`, ready to load the pieces layer by layer."""
        tensors = {piece.name: Lazy(reader, piece) for piece in self.pieces}
        return Skeleton(
            self.config, tensors, self.blueprint.layers, place=self.source.source, dtype=dtype, device=device
        )


def _as_stub(layer: LayerSpec, bodies: dict[int, str], width: int) -> LayerSpec:
    if layer.index not in bodies:
        return layer
    return replace(layer, width=width, bodies={**layer.bodies, "mlp": bodies[layer.index]})


def own_packing(view: View) -> bool:
    """Whether a checkpoint has packed matrices that transformers stops at, or (in folders of others) reads wrongly."""
    said = (view.checkpoint.config.get(SECTION) or {}).get("format")
    return said == OWN_KIND or half_packed(view) or not (one_format(view) or other_layout(view))


def half_packed(view: View) -> bool:
    """Whether experts are plain matrices beside others that are packed: then transformers 5.23 looks for packed experts, finds none
    and stops."""
    experts = [
        piece.ref.packed
        for piece in view.pieces
        if piece.unit.part == "experts" and piece.unit.expert is not None
    ]
    return bool(experts) and not any(experts) and bool(view.formats)


def other_layout(view: View) -> bool:
    """Whether a checkpoint is packed in a layout that transformers needs another engine for."""
    return (view.checkpoint.config.get(SECTION) or {}).get("quant_method") in ("gptq", "awq")


def in_order(view: View) -> bool:
    """Whether compressed-tensors stores the groups of inputs, which its library took out in 0.20 (it stops at such a config)."""
    packed = [piece.ref.packed for piece in view.pieces if piece.ref.packed is not None]
    return any(each.format.ordered and each.layout == "compressed-tensors" for each in packed)


def one_format(view: View) -> bool:
    """Whether stock loaders read a packed view rightly: all experts in one format, which in compressed-tensors must be symmetric
    and count groups off, and beside them nothing that they cannot read there, packed or not."""
    experts = {
        piece.ref.packed and piece.ref.packed.format for piece in view.pieces if piece.unit.part == "experts"
    }
    packed = [piece.ref.packed for piece in view.pieces if piece.ref.packed is not None]
    ragged = any(layer.widths for layer in view.blueprint.layers) and any(experts)
    if ragged or view.unreadable or view.packed_alone or in_order(view) or tied_head(view) or zeros_of(view):
        return False
    return len(experts) <= 1 and not any(each.layout in OWN_LAYOUTS for each in packed)


def zeros_of(view: View) -> str:
    """A part of a view whose packed matrices have zeros of their own, which transformers 5.23 does not read; nothing where there is none."""
    packed = ((piece.unit.part, piece.ref.packed) for piece in view.pieces)
    return next((part for part, each in packed
                 if each is not None and not each.format.symmetric and each.layout == "compressed-tensors"), "")  # fmt: skip


def tied_head(view: View) -> bool:
    """Whether the head or the embedding is packed though the config ties the two: transformers then ties matrices that it has
    packed, and stops."""
    tied = view.source.tied or view.source.both_stored
    return tied and any(
        piece.unit.part in ("embedding", "head") and piece.ref.packed is not None for piece in view.pieces
    )
