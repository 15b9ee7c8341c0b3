"""Channel pruning: intermediate channels of experts go, and what stays is refitted to answer as before.

    minimise  sum over an expert's tokens of g^2 |W a - W' a_K|^2       g = the gate, a = its channels, K = those that stay

Rows of gate and up and columns of down go together, so the result is an ordinary, narrower model, in which all experts of a
layer keep equally many channels. `score=surgeon` (default) picks and refits at once, by what is lost after the others have made
up for it. Other scores rank once: HEAPr's E[a_k^2] w_k G w_k, with G the mean square of the loss's gradient (arXiv 2509.22299,
one backward pass), MoDeGPT's leverage (arXiv 2408.09632), CAMERA's energy (arXiv 2508.02322), Wanda's, and that of the weights
alone. `refit=expert` solves the formula for each expert, in closed form; `refit=layer` for all experts of the layer together,
so that they also make up for one another (`_channels.py`, `_joint.py`). Layers are pruned one after the other, each on what the
pruned ones before let through; `scope=global` takes channels from those layers that lose the least by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from heapq import heapify, heappop, heappush
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from moespresso.core.blueprint import Blueprint, LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.plan import Decision, Plan, Stage, Treatment
from moespresso.core.registry import method
from moespresso.core.remains import remains
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.measure import RoutedExperts
from moespresso.methods._channels import (
    activity,
    best,
    energy,
    peaked,
    refitted,
    rows_of,
    size,
    surgeon,
    taken,
)
from moespresso.methods._hessians import ridged, usable
from moespresso.methods._joint import joint_refit
from moespresso.methods._low_rank import leverage
from moespresso.methods._on_text import Answer, Shown

# Channels that engines can multiply with: the grouped products of PyTorch want rows of whole 16 bytes.
_LEAST = 8


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPrune:
    """Settings of one Channel Pruning.

    ratio: share of every expert's channels that goes.
    width: channels that stay, instead of a ratio.
    score: `surgeon` (least loss after refitting), `heapr` (by gradients of the model's loss), `leverage` (what others cannot tell),
        `camera`, `wanda`, `magnitude`, or `random`.
    scope: `layer` takes as much from every layer, `global` where it costs least (layers then differ: --target plugin).
    refit: `expert` (each by itself), `layer` (all experts of a layer together), or `none`.
    multiple: a ratio's width is rounded up to a multiple of this; engines run multiples of 8, some faster those of 128.
    damping: share of the mean second moment that is added to every one in a refit.
    alpha: weight of a channel's highest value in camera's score.
    sweeps: rounds over all experts in refit=layer.
    sequential: later layers see what the pruned ones before let through.
    """

    kind: ClassVar[str] = "channel_prune"
    on_text: ClassVar[bool] = True
    without_text: ClassVar[str] = "magnitude or rtn"
    searches: ClassVar[bool] = False
    # What is pruned is always what the steps before leave.
    rescore: ClassVar[bool] = True

    ratio: float | None = None
    width: int | None = None
    score: Literal["surgeon", "heapr", "leverage", "camera", "wanda", "magnitude", "random"] = "surgeon"
    scope: Literal["layer", "global"] = "layer"
    refit: Literal["expert", "layer", "none"] = "layer"
    multiple: int = 8
    damping: float = 0.003
    alpha: float = 0.0
    sweeps: int = 2
    sequential: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.ratio is not None and not 0 <= self.ratio < 1:
            raise UserError(f"channel_prune: ratio={self.ratio} must be at least 0 and below 1")
        for name in ("width", "multiple"):
            number = getattr(self, name)
            if number is not None and (number < _LEAST or number % _LEAST):
                raise UserError(
                    f"channel_prune: {name}={number} must be a multiple of {_LEAST}, since engines run no other widths "
                    f"(rows of 16 bytes): use {max(1, round(number / _LEAST)) * _LEAST}"
                )
        for name, least in (("damping", 0), ("alpha", 0), ("sweeps", 1)):
            if not least <= getattr(self, name) < float("inf"):
                raise UserError(
                    f"channel_prune: {name}={getattr(self, name)} must be a number of at least {least}"
                )

    @property
    def by_gradient(self) -> bool:
        """Whether the step wants to know how the model's loss bends."""
        return self.score == "heapr"

    @property
    def uneven(self) -> bool:
        """Whether layers may come to differ."""
        return self.scope == "global"

    def even(self, blueprint: Blueprint) -> str:
        """The settings of the nearest plan with equal layers."""
        widths = [self._width(layer.width) for layer in blueprint.moe_layers]
        return f"width={round(sum(widths) / len(widths) / _LEAST) * _LEAST}"

    def needs(self) -> frozenset[str]:
        """What must be measured for this step: nothing but text to see, and for a global choice what each layer would lose."""
        return frozenset({"text", "channels"} if self.uneven else {"text"})

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        if not blueprint.moe_layers:
            raise UserError(
                f"channel_prune: {blueprint.source} has no routed experts whose channels could go: it is a dense model"
            )
        for entry in blueprint.entries:
            if entry.unit.part == "experts" and (entry.unit.expert is None or len(entry.ref.shape) != 2):
                raise UserError(
                    f"channel_prune: {blueprint.source} ({blueprint.family}) stores its experts as {entry.ref.name}, not as "
                    "matrices of their own, which this version cannot narrow: drop experts instead"
                )
        for layer in blueprint.moe_layers:
            self._check_packed(layer, blueprint)

    def _check_packed(self, layer: LayerSpec, blueprint: Blueprint) -> None:
        width = self._width(layer.width)
        for entry in blueprint.by_layer[layer.index]:
            packed = entry.ref.packed
            groups = packed.format.group_size if packed is not None and entry.unit.part == "experts" else 0
            if groups and width % groups and (entry.unit.matrix or "").startswith("down"):
                raise UserError(
                    f"channel_prune: {entry.ref.name} is packed in groups of {groups}, which do not divide {width} channels: "
                    f"use multiple={groups}"
                )

    def _width(self, before: int) -> int:
        """Channels that stay of `before`."""
        if (self.ratio is None) == (self.width is None):
            raise UserError(
                "channel_prune: say how much: ratio=0.25 (of the channels goes), or width=96 (stay)"
            )
        if self.width is not None and self.width > before:
            raise UserError(
                f"channel_prune: width={self.width}, but experts have {before} channels: say fewer"
            )
        wanted = self.width if self.width is not None else round(before * (1 - (self.ratio or 0)))
        return min(before, -(-max(wanted, 1) // self.multiple) * self.multiple)

    def amounts(self, blueprint: Blueprint) -> list[Any]:
        """This step with every width, widest first (for a byte budget)."""
        most = max((layer.width for layer in blueprint.moe_layers), default=1)
        step = max(self.multiple, -(-most // 256))
        return [replace(self, ratio=None, width=width) for width in range(most, 0, -step)]

    def outline(self, source: Blueprint, before: Plan) -> Stage:
        """A stage of the right size, before anything is measured."""
        left = remains(before, source)
        specs = {layer.index: layer for layer in source.moe_layers}
        widths = {layer: left.widths.get(layer, specs[layer].width) for layer in left.experts}
        return Stage(
            {"kind": self.kind} | {each.name: getattr(self, each.name) for each in fields(self)},
            self._treatments(widths),
        )

    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Give every layer its width."""
        if self.uneven:
            return Decision(_treated(self._allocated(stats, blueprint), blueprint))
        made = self._treatments({layer.index: layer.width for layer in blueprint.moe_layers})
        return Decision(made, tuple(self._told(blueprint)))

    def _allocated(self, stats: Stats, blueprint: Blueprint) -> dict[int, int]:
        """Widths of all layers: again and again those experts become narrower that lose the least by it, for their weight."""
        widths = {layer.index: layer.width for layer in blueprint.moe_layers}
        experts = {layer.index: layer.experts for layer in blueprint.moe_layers}
        over = sum((width - self._width(width)) * experts[layer] for layer, width in widths.items())
        costs = {layer: _costs(stats, layer, width, self.multiple) for layer, width in widths.items()}
        queue = [
            entry for layer in widths for entry in _next(layer, widths[layer], costs[layer], experts[layer])
        ]
        heapify(queue)
        while queue and over > 0:
            _, layer, narrower = heappop(queue)
            if (widths[layer] - narrower) * experts[layer] > over + self.multiple * experts[layer] // 2:
                continue
            over -= (widths[layer] - narrower) * experts[layer]
            widths[layer] = narrower
            for entry in _next(layer, narrower, costs[layer], experts[layer]):
                heappush(queue, entry)
        return widths

    def _told(self, blueprint: Blueprint) -> list[str]:
        """Where a ratio could not be met to the channel."""
        widths = sorted({layer.width for layer in blueprint.moe_layers})
        kept = [(width, self._width(width)) for width in widths]
        return [
            f"channel_prune: experts keep {left} of {width} channels, {(width - left) / width:.1%} less instead of "
            f"{self.ratio:.1%} (widths are multiples of {self.multiple})"
            for width, left in kept
            if self.ratio is not None and abs((width - left) / width - self.ratio) >= 0.0005
        ]

    def _treatments(self, widths: Mapping[int, int]) -> dict[Unit, Treatment]:
        kept = {layer: self._width(width) for layer, width in widths.items()}
        return {
            Unit(layer, "experts"): Treatment(channels=width)
            for layer, width in kept.items()
            if width < widths[layer]
        }

    def slim(self, shown: Shown) -> Answer:
        """The narrower experts of one layer."""
        experts, keep = shown.experts, shown.channels
        assert experts is not None
        assert keep is not None
        answer = Answer()
        self._check_curvature(shown)
        answer.trouble += self._few(shown)
        kept: list[Tensor] = []
        downs: list[Tensor] = []
        for some in shown.groups():
            here, down = self._group(shown, experts, some, keep, answer)
            kept.append(here)
            downs.append(down)
        chosen, down = torch.cat(kept), torch.cat(downs)
        up = rows_of(experts.up, chosen, experts.down.shape[2])
        if self.refit == "layer":
            shares = self._shares(shown, range(experts.count)).tolist()
            down, thin = joint_refit(experts, up, down, chosen, damping=shares, sweeps=self.sweeps)
            answer.trouble += [_thin(shown.layer, expert, ridge) for expert, ridge in thin.items()]
        answer.weights = {"up": up, "down": down}
        return answer

    def _group(
        self, shown: Shown, experts: RoutedExperts, some: range, keep: int, answer: Answer
    ) -> tuple[Tensor, Tensor]:
        """Kept channels and down projections of `some` experts."""
        up, down = experts.up[some.start : some.stop], experts.down[some.start : some.stop]
        counts = experts.tokens[some.start : some.stop]
        empty = (counts == 0).nonzero().flatten().tolist()
        answer.remedies |= {some[at]: "magnitude" for at in empty}
        moments, _ = usable(experts.moments_inner(some, up, by_gate=True))
        shares = self._shares(shown, some)
        moments = ridged(moments, (shares - self.damping) * moments.diagonal(dim1=1, dim2=2).mean(1))
        if self.score == "surgeon":
            kept, new, raised = surgeon(down, moments, keep, self.damping)
        else:
            kept, new, raised = best(self._scores(shown, some, moments), keep), None, {}
        if empty:
            # Without a token all moments are zero: the weights alone speak.
            kept[empty] = best(size(up[empty], down[empty]), keep)
        if self.refit == "none" or (self.refit == "layer" and new is None):
            new = taken(down.float(), kept, 2)
        elif new is None:
            new, raised = refitted(down, moments, kept, self.damping)
        new[empty] = taken(down[empty].float(), kept[empty], 2)
        answer.trouble += [
            _thin(shown.layer, some[at], ridge) for at, ridge in raised.items() if at not in empty
        ]
        return kept, new

    def _shares(self, shown: Shown, some: range) -> Tensor:
        """Damping of `some` experts [N]: as many times what was asked for as an expert keeps channels for each of its tokens,
        where those are more."""
        assert shown.experts is not None
        assert shown.channels is not None
        tokens = shown.experts.tokens[some.start : some.stop].clamp(min=1).float()
        if shown.experts.everyone:
            tokens = torch.full_like(tokens, len(shown.experts.hidden))
        return self.damping * (shown.channels / tokens).clamp(min=1)

    def _few(self, shown: Shown) -> list[str]:
        """Experts whose refit stands on less than one token a channel."""
        assert shown.experts is not None
        assert shown.channels is not None
        shares = self._shares(shown, range(shown.experts.count)).tolist()
        few = [at for at, count in enumerate(shown.experts.tokens.tolist()) if 0 < count < shown.channels]
        if not few or self.refit == "none":
            return []
        names = ", ".join(f"E{at}" for at in few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        return [
            f"L{shown.layer}: {names} saw fewer tokens than they keep channels ({shown.channels}): their refit is damped by up to "
            f"{max(shares[at] for at in few):.2g} instead of {self.damping:g}; more text helps"
        ]

    def _check_curvature(self, shown: Shown) -> None:
        assert shown.experts is not None
        if self.score == "heapr" and getattr(shown.experts.module, "has_post_expert_norm", False):
            raise UserError(
                f"channel_prune: the experts of L{shown.layer} end with a norm, for which heapr's formula does not hold: use "
                "score=surgeon"
            )

    def _scores(self, shown: Shown, some: range, moments: Tensor) -> Tensor:
        """Importance of every channel [N, I]."""
        experts = shown.experts
        assert experts is not None
        up, down = experts.up[some.start : some.stop], experts.down[some.start : some.stop]
        squares = moments.diagonal(dim1=1, dim2=2)
        if self.score == "magnitude":
            return size(up, down)
        if self.score == "heapr":
            assert shown.curvature is not None
            return experts.squares_inner(some, up, by_gate=False) * shown.curvature[some.start : some.stop]
        if self.score == "leverage":
            return leverage(moments, self.damping)
        if self.score == "wanda":
            plain = experts.squares_inner(some, up, by_gate=False)
            return activity(down, plain)
        if self.score == "random":
            generator = torch.Generator().manual_seed(some.start)
            return torch.rand(squares.shape, generator=generator).to(squares.device)
        if not self.alpha:
            return energy(down, squares)
        return peaked(down, *experts.sums_and_peaks(some, up), self.alpha)


def _costs(stats: Stats, layer: int, width: int, multiple: int) -> dict[int, float]:
    """What experts of each width would lose; those of their own nothing."""
    row = stats.values.get(Unit(layer, "experts"), {})
    found = {
        kept: row[f"channels@{kept}"]
        for kept in range(multiple, width, multiple)
        if f"channels@{kept}" in row
    }
    if not found and width > multiple:
        raise UserError(
            f"these stats do not say what narrower experts of L{layer} would lose: measure them again"
        )
    return found | {width: 0.0}


def _next(layer: int, width: int, costs: Mapping[int, float], experts: int) -> list[tuple[float, int, int]]:
    """The next narrower width of a layer, with what a channel less then costs; none where there is no narrower one."""
    narrower = max((kept for kept in costs if kept < width), default=None)
    if narrower is None:
        return []
    return [((costs[narrower] - costs[width]) / ((width - narrower) * experts), layer, narrower)]


def _treated(widths: Mapping[int, int], blueprint: Blueprint) -> dict[Unit, Treatment]:
    """Treatments of the layers that become narrower."""
    return {
        Unit(layer.index, "experts"): Treatment(channels=widths[layer.index])
        for layer in blueprint.moe_layers
        if widths[layer.index] < layer.width
    }


def _thin(layer: int, expert: int, ridge: float) -> str:
    return f"L{layer}.E{expert}: too few tokens for a refit at the damping asked for: damping raised to {ridge:g}"
