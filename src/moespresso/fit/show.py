"""What a step on text is shown of a layer: weights as they are stored, tokens, second moments, and what else
it asks for.

Batches run in the precision of the run, but the weights that a step is shown are the stored ones, to the last
bit: what it leaves alone, or rounds, must not have been rounded before. Where that precision does not hold
them (experts in float32, a run in bfloat16) the experts of the layer are loaded once more, as they are
stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial, reduce

import torch
from torch import Tensor

from moespresso.build import Tensors
from moespresso.checkpoint import TORCH_DTYPES
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.layer import Layer, Taps
from moespresso.core.method import Sight
from moespresso.effect import Piece
from moespresso.fit.treated import Treated
from moespresso.kernels import RoutedExperts
from moespresso.methods import LayerContext
from moespresso.model import MetaModel


@dataclass(frozen=True)
class Showing:
    """Shows the layers of a model: of `treated`, read by `tensors`; `original` and `curvature` by layer
    where a step asks for them."""

    treated: Treated
    tensors: Tensors
    sights: frozenset[Sight]
    curvature: Mapping[int, Tensor] = field(default_factory=dict[int, Tensor])
    original: MetaModel | None = None

    @contextmanager
    def stored(self, layer: Layer, pieces: list[Piece]) -> Iterator[Layer]:
        """The layer with its experts in a precision that holds them as they are stored: itself, if it
        does."""
        meta = self.treated.meta_model
        kinds = {TORCH_DTYPES[piece.ref.dtype] for piece in pieces if piece.unit.part == "experts"}
        if reduce(torch.promote_types, kinds, meta.dtype) == meta.dtype:
            yield layer
            return
        widest = reduce(torch.promote_types, kinds)
        exact = self.treated.view.meta_model(self.tensors, widest, meta.device)
        with exact.layer(layer.spec.index) as loaded:
            yield loaded

    def context(self, layer: Layer, taps: Taps, pieces: list[Piece], stored: Layer) -> LayerContext:
        """The layer as the step sees it, with the second moments of what reaches its linear modules."""
        treated, view, index = self.treated, self.treated.view, layer.spec.index
        modules = [treated.module(piece, layer) for piece in pieces if piece.unit.part != "experts"]
        sums = {name: _Moment() for name in modules}
        fed = taps.fed({name: total.add for name, total in sums.items()})
        formats, dtypes = self._formats(layer, pieces)
        everyone = "all_tokens" in self.sights
        widths = treated.after.widths.get(view.remains.layers[index], {})
        return LayerContext(
            index,
            stored.module,
            formats,
            dtypes,
            RoutedExperts.of(stored.experts, fed, everyone=everyone) if "up" in formats else None,
            self._linears(layer, sums),
            tuple(widths.values()) or None,
            self.curvature.get(index),
            self._missing(layer, taps),
            {name: total.center for name, total in sums.items()},
            layer.spec.heads,
            partial(self._parameter, layer),
        )

    def _formats(self, layer: Layer, pieces: list[Piece]) -> tuple[dict[str, Format], dict[str, torch.dtype]]:
        """Formats and dtypes by what the step knows matrices by."""
        formats: dict[str, Format] = {}
        dtypes: dict[str, torch.dtype] = {}
        for piece in pieces:
            name, format = self.treated.projection(piece, layer), self.treated.format(piece)
            if formats.setdefault(name, format) != format:
                raise UserError(
                    f"the plan gives gate and up of L{layer.spec.index} different formats: give both the same"
                )
            dtypes[name] = self.treated.dtype(piece)
        return formats, dtypes

    def _linears(self, layer: Layer, sums: Mapping[str, _Moment]) -> dict[str, tuple[Tensor, Tensor]]:
        """Weights and second moments of single matrices."""
        linears: dict[str, tuple[Tensor, Tensor]] = {}
        for name, total in sums.items():
            if total.mean is None:
                raise UserError(
                    f"L{layer.spec.index}.{name} is never run as a module of its own, so what it is given cannot be seen: round "
                    "it by rtn, or leave it out with exclude"
                )
            linears[name] = self._parameter(layer, f"{name}.weight").float(), total.mean
        return linears

    def _parameter(self, layer: Layer, name: str) -> Tensor:
        """A parameter by its name in the layer, as it is stored where it is stored by itself."""
        loaded = layer.module.get_parameter(name)
        piece = self.treated.named.get((layer.spec.index, name))
        if piece is None or piece.shape != tuple(loaded.shape):
            return loaded
        return self.tensors.whole(piece).to(loaded.device)

    @cached_property
    def _changed(self) -> set[int | None]:
        """Layers that an earlier stage has changed."""
        return {unit.layer for stage in self.treated.view.plan.stages for unit in stage.treatments}

    def _missing(self, layer: Layer, taps: Taps) -> Tensor | None:
        """What the layer's answer to every token that is no padding lacks of the original layer's on the
        same input."""
        source = self.treated.view.remains.layers[layer.spec.index]
        mlp = layer.anatomy and layer.anatomy.mlp
        if self.original is None or source not in self._changed or mlp is None or mlp.post is not None:
            return None
        with self.original.layer(source) as first:
            pairs = zip(taps.through(first.module), taps.through(layer.module), taps.valid, strict=True)
            return torch.cat(
                [(was[valid] - now[valid]).float() / mlp.multiplier for was, now, valid in pairs]
            )


class _Moment:
    """The means of x x^T and of x over the tokens a module was given."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._first: Tensor | None = None
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add the inputs [T, in] of one batch."""
        inputs = inputs.float()
        self._sum = inputs.T @ inputs if self._sum is None else self._sum.addmm_(inputs.T, inputs)
        self._first = inputs.sum(0) if self._first is None else self._first + inputs.sum(0)
        self._tokens += len(inputs)

    @property
    def mean(self) -> Tensor | None:
        """The mean of x x^T [in, in]; None where it was never given any."""
        return self._sum / self._tokens if self._sum is not None else None

    @property
    def center(self) -> Tensor:
        """The mean [in] of what it was given."""
        assert self._first is not None
        return self._first / self._tokens
