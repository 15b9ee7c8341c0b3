"""Which matrices of each layer a stage on text treats, in which format, and what a step knows them by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moespresso.build import View
from moespresso.checkpoint import TORCH_DTYPES
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.layer import Layer
from moespresso.core.plan import Plan, Stage
from moespresso.effect import Piece, Remains, channels_of, format_of, remains, scale_dtypes
from moespresso.model import MetaModel


@dataclass(frozen=True)
class Treated:
    """What the last stage of `plan` treats of `view`, the model before it, which `meta` loads."""

    view: View
    plan: Plan
    meta_model: MetaModel

    @property
    def number(self) -> int:
        """The stage's number."""
        return len(self.plan.stages) - 1

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.plan.stages[-1]

    @cached_property
    def after(self) -> Remains:
        """What is left behind the stage."""
        return remains(self.plan, self.view.source)

    @cached_property
    def pieces(self) -> dict[int, list[Piece]]:
        """The matrices that are treated, by layer."""
        by_layer: dict[int, list[Piece]] = {}
        for piece in self.view.pieces:
            entry = piece.source
            treated = format_of(entry, self.stage) is not None or channels_of(entry, self.stage) is not None
            if piece.unit.layer is not None and treated:
                by_layer.setdefault(piece.unit.layer, []).append(piece)
        return by_layer

    @cached_property
    def named(self) -> dict[tuple[int | None, str], Piece]:
        """What is stored of every layer, by its number and the name in it."""
        pieces: dict[tuple[int | None, str], Piece] = {}
        for piece in self.view.pieces:
            prefix = f"{self.meta_model.layers_name}.{piece.unit.layer}."
            pieces[piece.unit.layer, self.meta_model.in_memory(piece.name).removeprefix(prefix)] = piece
        return pieces

    @cached_property
    def _scale_dtypes(self) -> dict[int | None, str]:
        return scale_dtypes(self.view.source)

    def format(self, piece: Piece) -> Format:
        """The format that a matrix gets; the plain one where it only loses channels."""
        return format_of(piece.source, self.stage) or Format()

    def dtype(self, piece: Piece) -> torch.dtype:
        """What its scales, or what is left of it, are stored in."""
        experts = self._scale_dtypes.get(piece.source.unit.layer, "") if piece.unit.part == "experts" else ""
        return TORCH_DTYPES[experts or piece.ref.dtype]

    def projection(self, piece: Piece, layer: Layer) -> str:
        """What a step knows a matrix by: `up` (gate and up of all experts) or `down`, or the name of its
        module in the layer."""
        if piece.unit.part == "experts":
            return "down" if (piece.unit.matrix or "").startswith("down") else "up"
        return self.module(piece, layer)

    def module(self, piece: Piece, layer: Layer) -> str:
        """The name, in its layer, of the module that holds a matrix."""
        prefix = f"{self.meta_model.layers_name}.{layer.spec.index}."
        name = self.meta_model.in_memory(piece.name).removeprefix(prefix).removesuffix(".weight")
        module = dict(layer.module.named_modules()).get(name)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or tuple(weight.shape) != piece.shape:
            raise UserError(
                f"{piece.name} is not a matrix by itself in memory, so this version cannot round it on text: use rtn"
            )
        return name
