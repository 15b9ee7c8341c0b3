"""A checkpoint as a plan leaves it, before anything is written.

A `View` answers with the edited config, the tensors to write (`pieces`) and a `MetaModel` that loads them: so
a later step is measured on the model as the earlier ones leave it, pricing and writing agree by construction,
and `verify` compares files with what they ought to be. With an empty plan it is the checkpoint itself.

Layers that differ are said in the words of moespresso's runtime. In its `stock` form a view says what it can
in words that engines know on their own: a feed-forward part that is gone is a dense one of zeros there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from moespresso.build.packing import one_format
from moespresso.build.tensors import Lazy, Tensors
from moespresso.checkpoint import SECTION, Checkpoint, packing_config
from moespresso.core.blueprint import Blueprint, Entry, LayerSpec, TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.plan import Plan
from moespresso.core.unit import Unit
from moespresso.effect import (
    Fits,
    Piece,
    Remains,
    changes_experts,
    laid_out,
    mixtures_ahead,
    pieces,
    pressed_blueprint,
    remains,
    size_of,
    stored,
)
from moespresso.formats import codec_named
from moespresso.model import (
    MetaModel,
    check_tensors,
    joined,
    packed_alone,
    pressed_config,
    size_in_config,
    skeleton,
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
    layout: str | None = None
    # The blueprint under its own family's name, where the checkpoint is presented as one of another.
    origin: Blueprint | None = None

    @cached_property
    def remains(self) -> Remains:
        """What of the source is left."""
        return remains(self.plan, self.source)

    @cached_property
    def stubs(self) -> tuple[int, ...]:
        """New numbers of the layers whose feed-forward part is a dense one of zeros."""
        if not self.stock:
            return ()
        return tuple(
            self.remains.position(layer) for layer, branch in sorted(self.remains.cut) if branch == "mlp"
        )

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
        planned = pieces(self.source, self.plan, self.fits, stock=self.stock)
        grown = self._widen_shared(planned)
        laid = grown if self.layout is None else [laid_out(piece, self.layout) for piece in grown]
        return [*joined(laid, self.checkpoint.config, self.source.place), *self._stub_pieces()]

    @cached_property
    def unreadable(self) -> list[str]:
        """Names of plain tensors that stock transformers cannot read beside the packed ones."""
        return unreadable(self.pieces, self.checkpoint.config, self.source.place)

    @cached_property
    def packed_alone(self) -> list[str]:
        """Names of packed matrices that stock transformers would leave random: it has no linear layer
        there."""
        return packed_alone(self.pieces, self.checkpoint.config, self.source.place)

    @cached_property
    def stored(self) -> list[Piece]:
        """Every tensor as it is written: a packed matrix as its parts."""
        return [part for piece in self.pieces for part in stored(piece)]

    @cached_property
    def formats(self) -> dict[str, Format]:
        """The format of every matrix that is packed, by the name of its module."""
        packed_by_module = {piece.name.removesuffix(".weight"): piece.ref.packed for piece in self.pieces}
        return {name: packed.format for name, packed in packed_by_module.items() if packed is not None}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config.json of the result; raises `UserError` where none can say what is left."""
        config = {key: value for key, value in self._config[0].items() if key != SECTION}
        if not self.formats:
            return config
        layout = next(piece.ref.packed.layout for piece in self.pieces if piece.ref.packed is not None)
        packed, plain = self._modules(config)
        codec = codec_named(layout)
        section = packing_config(packed, plain, layout=layout, stock=one_format(self))
        before = self.checkpoint.config.get(SECTION) or {}
        if codec.engine and before.get("quant_method") == codec.engine:
            section = codec.carried(section, before)
        if computes_in := codec.computes_in:  # its engines compute in the dtype of the scales
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = computes_in
        return config | {SECTION: section}

    def _modules(self, config: dict[str, Any]) -> tuple[dict[str, Format], set[str]]:
        """The formats of packed modules, and the other modules with a matrix; by their names on disk and in
        memory, since loaders look them up by either."""
        place = self.source.place
        made, formats = skeleton(config, place), dict(self.formats)
        for piece in self.pieces:
            if piece.ref.packed is not None and piece.unit.expert is None:
                formats[made.names.in_memory(piece.name)[0].removesuffix(".weight")] = piece.ref.packed.format
        linears = {name for name, module in made.model.named_modules() if isinstance(module, torch.nn.Linear)}
        pieces = {piece.name.removesuffix(".weight") for piece in self.pieces
                  if len(piece.shape) == 2 and piece.name.endswith(".weight") and piece.unit.part != "embedding"}  # fmt: skip
        return formats, (linears | pieces) - formats.keys()

    @cached_property
    def _config(self) -> tuple[dict[str, Any], int]:
        """The config, and the width of dense stubs."""
        if not self.stubs:
            return pressed_config(
                self.checkpoint.config, self.source, self.plan, self.remains, stock=self.stock
            ), 0
        cut = frozenset(at for at in self.remains.cut if at[1] != "mlp")
        kept = {
            **{layer.index: tuple(range(layer.experts)) for layer in self.source.moe_layers},
            **self.remains.experts,
        }
        experts = {layer: kept[layer] for layer in self.remains.layers if layer in kept}
        # Their number of experts does not matter: they will have none.
        most = max(map(len, self.remains.experts.values()), default=0)
        experts |= {
            layer: kept[layer][:most] or kept[layer] for layer in experts if layer not in self.remains.experts
        }
        # What will be dense has no width of its own to be asked for.
        widths = self.remains.widths
        if len(sizes := {width for each in widths.values() for width in each.values()}) == 1:
            widths = {layer: dict.fromkeys(numbers, *sizes) for layer, numbers in experts.items()}
        config = pressed_config(
            self.checkpoint.config,
            self.source,
            self.plan,
            replace(self.remains, cut=cut, experts=experts, widths=widths),
            stock=self.stock,
        )
        return with_dense(config, self.stubs, self.source.place)

    def _body(self, position: int) -> str:
        layer = self.remains.layers[position]
        return next(spec for spec in self.source.layers if spec.index == layer).bodies["mlp"]

    def _widen_shared(self, planned: list[Piece]) -> list[Piece]:
        """Shared experts as wide as the config says: where its one width of experts counts them."""
        if not self.stock or not self.remains.widths:
            return planned
        names = skeleton(self._config[0], self.source.place).names
        grown: list[Piece] = []
        for piece in planned:
            wanted = names.state.get(names.in_memory(piece.name)[0]) if piece.unit.part == "shared" else None
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
        state = skeleton(self._config[0], self.source.place).names.state
        dtypes = self.source.dtypes
        zeros: list[Piece] = []
        for position in self.stubs:
            prefix = f"{self.source.layers_name}.{position}.{self._body(position)}."
            dtype = dtypes[self.remains.layers[position]]
            refs = [
                TensorRef(name, tuple(t.shape), dtype, "")
                for name, t in state.items()
                if name.startswith(prefix)
            ]
            zeros += [
                Piece(ref.name, ref.shape, Entry(ref, Unit(position, "dense"), branch="mlp")) for ref in refs
            ]
        return zeros

    def check_fits(self) -> None:
        """Raise `UserError` when the tensors to write are not the ones that the model of the edited config
        asks for."""
        try:
            check_tensors(self.config, [piece.ref for piece in self.pieces], self.source.place)
        except UserError as error:
            raise UserError(f"the plan's tensors do not fit the model its config makes: {error}") from error
        if changes_experts(self.plan, self.source) and (reason := misfit_ahead(self)):
            raise UserError(f"{self.source.place}: {reason}: say --mtp drop")

    def meta_model(self, tensors: Tensors, dtype: torch.dtype, device: torch.device) -> MetaModel:
        """The model on `meta`, ready to load the pieces layer by layer."""
        lazy = {piece.name: Lazy(tensors, piece) for piece in self.pieces}
        return MetaModel(
            self.config, lazy, self.blueprint.layers, place=self.source.place, dtype=dtype, device=device
        )


def misfit_ahead(view: View) -> str | None:
    """Why an engine cannot load the prediction layers of a view with its config; None where it can."""
    size = size_in_config(view.config, view.blueprint)
    for layer, entries in mixtures_ahead(view.blueprint).items():
        if size is not None and (held := size_of(entries)) != size:
            has = held or "experts whose numbers and router do not agree"
            return f"prediction layer {layer} has {has}, where the config says {size} for all layers"
    return None


def _as_stub(layer: LayerSpec, bodies: dict[int, str], width: int) -> LayerSpec:
    if layer.index not in bodies:
        return layer
    return replace(layer, width=width, bodies={**layer.bodies, "mlp": bodies[layer.index]})
