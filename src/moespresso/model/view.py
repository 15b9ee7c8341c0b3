"""A checkpoint as a plan leaves it, before anything is written.

A `View` answers with the edited config, the tensors to write (`pieces`) and a `Skeleton` that loads them: so a later
step is measured on the model as the earlier ones leave it, pricing and writing agree by construction, and `verify`
compares files with what they ought to be. With an empty plan it is the checkpoint itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from moespresso.checkpoint.index import Checkpoint
from moespresso.checkpoint.reader import Lazy, Reader
from moespresso.core.blueprint import Blueprint
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan
from moespresso.core.rewrite import Piece, pieces, pressed_blueprint
from moespresso.model.blueprint import check_tensors
from moespresso.model.counts import with_count
from moespresso.model.skeleton import Skeleton


@dataclass(frozen=True)
class View:
    """A source checkpoint with its blueprint, seen through a plan."""

    checkpoint: Checkpoint
    source: Blueprint
    plan: Plan = field(default=Plan(""))

    @cached_property
    def blueprint(self) -> Blueprint:
        """What the plan makes of the source."""
        return pressed_blueprint(self.source, self.plan)

    @cached_property
    def pieces(self) -> list[Piece]:
        """Every tensor of the result, in the source's order."""
        return pieces(self.source, self.plan)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config.json of the result. Unequal layers need a target that can say so (`export.check_target`)."""
        config = copy.deepcopy(self.checkpoint.config)
        config.pop("auto_map", None)  # custom code is not copied; the family is transformers' own
        counts = {layer.experts for layer in self.blueprint.moe_layers}
        if counts == {layer.experts for layer in self.source.moe_layers}:
            return config
        assert len(counts) == 1, f"config.json has one count of experts, the plan {sorted(counts)}"
        return with_count(config, self.source.family, counts.pop())

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
