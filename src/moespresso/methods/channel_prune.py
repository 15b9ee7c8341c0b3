"""Channel pruning: intermediate channels of experts go, and what stays is refitted to answer as before.

    minimise  sum over an expert's tokens of g^2 |W a - W' a_K|^2       g = the gate, a = its channels, K =
              those that stay

Rows of gate and up and columns of down go together, so the result is an ordinary, narrower model. `score=obs`
(Optimal Brain Surgeon, the default) picks and refits at once, by what is lost after the others have made up
for it. Other scores rank once: HEAPr's E[a_k^2] w_k G w_k, with G the mean square of the loss's gradient
(arXiv 2509.22299, one backward pass), MoDeGPT's leverage (arXiv 2408.09632), CAMERA's energy (arXiv
2508.02322), Wanda's, and that of the weights alone. `refit=expert` solves the formula for each expert, in
closed form; `refit=layer` for all experts of the layer together, so that they also make up for one another
(`kernels/neurons.py`, `kernels/joint_refit.py`). Layers are pruned one after the other, each on what the
pruned ones before let through. `scope=global` takes channels from those layers that lose the least by it,
`per_expert=true` from those experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from moespresso.core.blueprint import Blueprint, LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.method import Sight
from moespresso.core.plan import Decision, Plan, Stage, Treatment
from moespresso.core.registry import method
from moespresso.core.stats import Stats
from moespresso.core.unit import Unit
from moespresso.effect import remains
from moespresso.kernels import allocation, conditioning, joint_refit, low_rank, neurons, obs
from moespresso.methods._counts import need_experts
from moespresso.methods._on_text import LayerContext, LayerResult, OnText
from moespresso.statistics import grid

# Channels that engines can multiply with: the grouped products of PyTorch want rows of whole 16 bytes.
_LEAST = 8


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelPrune(OnText):
    """Settings of one Channel Pruning.

    ratio: share of every expert's channels that goes.
    width: channels that stay, instead of a ratio.
    score: `obs` (Optimal Brain Surgeon: least loss after refitting), `heapr` (by gradients of the model's
        loss), `leverage` (what others cannot tell), `camera`, `wanda`, `magnitude`, or `random`.
    scope: `layer` takes as much from every layer, `global` where it costs least (layers then differ: --target
        plugin).
    per_expert: every expert has a width of its own, so that channels go where they cost least (--target
        plugin).
    least: the fewest channels that any expert keeps where they differ, however little the text uses it.
    refit: `expert` (each by itself), `layer` (all experts of a layer together), or `none`.
    multiple: a ratio's width is rounded up to a multiple of this; engines run multiples of 8, some faster
        those of 128.
    damping: share of the mean second moment that is added to every one in a refit.
    alpha: weight of a channel's highest value in camera's score.
    sweeps: rounds over all experts in refit=layer.
    sequential: later layers see what the pruned ones before let through.
    """

    kind: ClassVar[str] = "channel_prune"
    able: ClassVar[tuple[str, ...]] = ("experts",)

    ratio: float | None = None
    width: int | None = None
    score: Literal["obs", "heapr", "leverage", "camera", "wanda", "magnitude", "random"] = "obs"
    scope: Literal["layer", "global"] = "layer"
    per_expert: bool = False
    least: int = _LEAST
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
        for name in ("width", "multiple", "least"):
            number = getattr(self, name)
            if number is not None and (number < _LEAST or number % _LEAST):
                raise UserError(
                    f"channel_prune: {name}={number} must be a multiple of {_LEAST}, since engines run no other widths "
                    f"(rows of 16 bytes): use {max(1, round(number / _LEAST)) * _LEAST}"
                )
        if self.ratio is not None and self.width is not None:
            raise UserError(
                f"channel_prune: ratio={self.ratio} and width={self.width} both say how much: leave one out"
            )
        if self.width is not None and self.width % self.multiple:
            raise UserError(
                f"channel_prune: width={self.width} is no multiple of multiple={self.multiple}: use "
                f"{-(-self.width // self.multiple) * self.multiple}, or leave multiple out"
            )
        if self.alpha and (self.score != "camera" or self.alpha > 1):
            why = "must be at most 1" if self.score == "camera" else "is a setting of score=camera"
            raise UserError(f"channel_prune: alpha={self.alpha} {why}")
        for name, least in (("damping", 0), ("alpha", 0), ("sweeps", 1)):
            if not least <= getattr(self, name) < float("inf"):
                raise UserError(
                    f"channel_prune: {name}={getattr(self, name)} must be a number of at least {least}"
                )

    @property
    def shows(self) -> frozenset[Sight]:
        """How the model's loss bends, what the original layer answers."""
        wanted: dict[Sight, bool] = {"gradient": self.score == "heapr", "original": self.refit == "layer"}
        return frozenset(sight for sight, is_wanted in wanted.items() if is_wanted)

    @property
    def without_text(self) -> str:
        """Steps that see weights alone."""
        return "another step, magnitude or rtn"

    @property
    def uneven(self) -> bool:
        """Whether layers or experts may come to differ."""
        return self.scope == "global" or self.per_expert

    @property
    def why_uneven(self) -> str:
        """The setting that lets them differ, and what comes of it."""
        if self.scope == "global":
            return "scope=global leaves unequal layers"
        return "per_expert=true leaves experts of unequal width"

    def even(self, blueprint: Blueprint) -> str:
        """The settings of the nearest plan with equal layers."""
        widths = [self._width(layer.width) for layer in blueprint.moe_layers]
        width = max(1, round(sum(widths) / len(widths) / self.multiple)) * self.multiple
        amount = f"width={width}" if self.ratio is None else f"ratio={self.ratio}"
        return f"per_expert=false,{amount}" if self.per_expert else amount

    def needs(self) -> frozenset[str]:
        """What must be measured for this step: for widths that differ, what each expert would lose."""
        return frozenset({self._loss} if self.uneven else ())

    @property
    def _loss(self) -> str:
        """The measure of what narrower experts lose: with what the others make up for, where these are
        asked to."""
        return (
            "channels"
            if self.refit == "none" or self.score in ("camera", "wanda", "magnitude", "random")
            else "removal"
        )

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        need_experts(self.kind, blueprint, alone=self.per_expert)
        for layer in blueprint.moe_layers:
            if layer.widths and not self.per_expert:
                raise UserError(
                    f"channel_prune: the experts of L{layer.index} have {min(layer.widths)} to {max(layer.widths)} channels, so "
                    "that one number does not fit them: add per_expert=true"
                )
            if self.width is not None and self.width > layer.width:
                raise UserError(
                    f"channel_prune: width={self.width}, but experts have {layer.width} channels: say fewer"
                )
            self._check_packed(layer, blueprint)

    def _check_packed(self, layer: LayerSpec, blueprint: Blueprint) -> None:
        width = self._width(layer.width)
        for entry in blueprint.by_layer[layer.index]:
            packed = entry.ref.packed
            groups = packed.format.group_size if packed is not None and entry.unit.part == "experts" else 0
            odd = groups and (width % groups or (self.uneven and self.multiple % groups))
            if odd and (entry.unit.matrix or "").startswith("down"):
                what = f"width={-(-width // groups) * groups}," if self.width is not None else ""
                raise UserError(
                    f"channel_prune: {entry.ref.name} is packed in groups of {groups}, which do not divide {width} channels: "
                    f"use {what}multiple={groups}, and put this step before any that rounds"
                )

    def _width(self, before: int) -> int:
        """Channels that stay of `before`."""
        if self.ratio is None and self.width is None:
            raise UserError(
                "channel_prune: say how much: ratio=0.25 (of the channels goes), or width=96 (stay)"
            )
        wanted = self._wanted(before)
        return min(before, -(-max(round(wanted), 1) // self.multiple) * self.multiple)

    def _wanted(self, before: int) -> float:
        """The same, not rounded."""
        return self.width if self.width is not None else before * (1 - (self.ratio or 0))

    def amounts(self, blueprint: Blueprint) -> list[Any]:
        """This step with every width, widest first (for a byte budget); with every ratio where layers
        differ already."""
        widths = {layer.width for layer in blueprint.moe_layers} or {1}
        most, least = max(widths), self.least if self.uneven else 1
        step = -(-most // (256 * self.multiple)) * self.multiple
        kept = range((most - 1) // step * step, least - 1, -step)
        found = [replace(self, ratio=0.0, width=None)]
        if len(widths) == 1:
            return found + [replace(self, ratio=None, width=width) for width in kept]
        return found + [replace(self, ratio=1 - width / most, width=None) for width in kept]

    def outline(self, source: Blueprint, before: Plan) -> Stage:
        """A stage of the right size, before anything is measured."""
        left = remains(before, source)
        specs = {layer.index: layer for layer in source.moe_layers}
        made: dict[Unit, Treatment] = {}
        for at, kept in left.experts.items():
            widths = left.widths.get(at) or dict.fromkeys(kept, specs[at].width)
            if len(set(widths.values())) > 1:
                made |= {Unit(at, "experts", each): self._narrowed(width) for each, width in widths.items()}
            else:
                made |= self._treatments({at: max(widths.values())})
        return Stage(self.describe(), made)

    def uneven_outline(self, source: Blueprint, before: Plan) -> Stage:
        """A stage of widths that an uneven one may come to, for steps after it to be tried on: experts, or
        layers, with one multiple of channels less beside whole ones."""
        left = remains(before, source)
        specs = {layer.index: layer for layer in source.moe_layers}
        made: dict[Unit, Treatment] = {}
        for number, (at, kept) in enumerate(left.experts.items()):
            for place, expert in enumerate(kept):
                width = left.widths.get(at, {}).get(expert, specs[at].width)
                less = (place if self.per_expert else number) % 2 == 0 and width - self.multiple >= self.least
                made[Unit(at, "experts", expert)] = Treatment(channels=width - self.multiple * less)
        return replace(self.outline(source, before), treatments=made)

    def _narrowed(self, width: int) -> Treatment:
        return Treatment(channels=self._width(width))

    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Give every layer its width."""
        if self.uneven:
            return self._allocated(stats, blueprint)
        made = self._treatments({layer.index: layer.width for layer in blueprint.moe_layers})
        return Decision(made, tuple(self._told(blueprint)))

    def _allocated(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Widths of all layers or experts: again and again channels go where the next ones cost least."""
        layers = {layer.index: layer for layer in blueprint.moe_layers}
        curves: dict[allocation.Key, allocation.Points] = {
            (at, expert): self._curve(stats, layer, expert)
            for at, layer in layers.items()
            for expert in range(layer.experts)
        }
        counts: dict[allocation.Key, int] = dict.fromkeys(curves, 1)
        if not self.per_expert:
            curves = {
                (at,): _summed([curves[at, expert] for expert in range(layer.experts)])
                for at, layer in layers.items()
            }
            counts = {(at,): layer.experts for at, layer in layers.items()}
        before = {key: _widths(layers[key[0]])[key[1] if self.per_expert else 0] for key in curves}
        gone: dict[allocation.Key, int] = {}
        asked = 0
        for part in [list(layers)] if self.scope == "global" else [[at] for at in layers]:
            widths = [width for at in part for width in _widths(layers[at])]
            goal = round(sum(max(0, width - self._wanted(width)) for width in widths))
            asked += goal
            some = {key: curve for key, curve in curves.items() if key[0] in part}
            gone |= allocation.allocate(some, before, counts, goal, self.multiple)
        left = {key: before[key] - count for key, count in gone.items()}
        narrowed = {key[0] for key, count in gone.items() if count}
        notes = (
            [f"channel_prune: experts keep {min(left.values())} to {max(left.values())} channels"]
            if narrowed
            else []
        )
        went, there = (
            sum(count * counts[key] for key, count in gone.items()),
            sum(map(sum, map(_widths, layers.values()))),
        )
        if went < asked or went / there - asked / there >= 0.0005:
            least = f" and none is under least={self.least}" if went < asked else ""
            notes.append(
                f"channel_prune: {went / there:.1%} of the channels go instead of {asked / there:.1%}, since widths are multiples of "
                f"{self.multiple}{least}"
            )
        made = {_unit(key): Treatment(channels=width) for key, width in left.items() if key[0] in narrowed}
        return Decision(made, tuple(notes))

    def _curve(self, stats: Stats, layer: LayerSpec, expert: int) -> allocation.Points:
        """How many channels of an expert may go, and what is lost without them."""
        losses, width = stats.series(Unit(layer.index, "experts", expert), self._loss), _widths(layer)[expert]
        measured = [kept for kept in grid(layer.width) if self.least <= kept < width]
        if not losses.keys() >= set(measured):
            raise UserError(
                f"these stats do not say what narrower experts of L{layer.index} would lose by score={self.score}: measure them again"
            )
        return [(0, 0.0), *((width - kept, losses[kept]) for kept in reversed(measured))]

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

    def solve(self, context: LayerContext) -> LayerResult:
        """The narrower experts of one layer."""
        experts, keep = context.experts, context.channels
        assert experts is not None
        assert keep is not None
        result = LayerResult()
        self._check_curvature(context)
        result.warnings += self._few(context)
        kept: list[Tensor] = []
        up = experts.up.new_zeros(
            experts.count, experts.up.shape[1] // experts.down.shape[2] * max(keep), experts.up.shape[2]
        )
        down = experts.down.new_zeros(*experts.down.shape[:2], max(keep), dtype=torch.float32)
        for some in experts.groups():
            for expert, (own, new) in zip(some, self._group(context, some, result), strict=True):
                kept.append(own)
                rows = neurons.select_rows(experts.up[expert], own, experts.down.shape[2])
                up[expert].unflatten(0, (len(rows), -1))[:, : len(own)] = rows
                down[expert, :, : len(own)] = new
        if self.refit == "layer":
            shares = self._shares(context, range(experts.count)).tolist()
            narrowed = joint_refit.Narrowed(up, down, kept)
            down, raised = joint_refit.refit_layer(
                experts, narrowed, damping=shares, sweeps=self.sweeps, missing=context.missing
            )
            result.warnings += joint_refit.damping_warnings(context.layer, raised)
        result.weights = {"up": up, "down": down}
        return result

    def _group(self, context: LayerContext, some: range, result: LayerResult) -> list[tuple[Tensor, Tensor]]:
        """Kept channels [K] and down projection [H, K] of `some` experts."""
        experts, keep = context.experts, context.channels
        assert experts is not None
        assert keep is not None
        up, down = experts.up[some.start : some.stop], experts.down[some.start : some.stop]
        counts, widths = experts.tokens[some.start : some.stop], keep[some.start : some.stop]
        hessians, _ = conditioning.finite_or_identity(experts.hessians_inner(some, up, by_gate=True))
        ridge = (self._shares(context, some) - self.damping) * hessians.diagonal(dim1=1, dim2=2).mean(1)
        hessians = conditioning.add_ridge(hessians, ridge)
        if self.score == "obs":
            order, raised = obs.removal_order(down, hessians, min(widths), self.damping)
        else:
            order, raised = neurons.rank_ascending(self._scores(context, some, hessians)), {}
        empty = (counts == 0).nonzero().flatten().tolist()
        result.remedies |= {some[at]: "magnitude" for at in empty}
        if empty:
            # Without a token the Hessian is zero: the weights alone speak.
            order[empty] = neurons.rank_ascending(neurons.weight_norms(up[empty], down[empty]))
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for width in set(widths):
            same = [at for at, each in enumerate(widths) if each == width]
            kept = neurons.keep_last(order[same], width)
            new, more = neurons.select(down[same].float(), kept, 2), {}
            if self.refit == "expert" or (self.refit == "layer" and self.score == "obs"):
                new, more = neurons.refit(down[same], hessians[same], kept, self.damping)
            raised |= {same[at]: share for at, share in more.items()}
            for at, own, each in zip(same, kept, new, strict=True):
                found[at] = own, down[at].float()[:, own] if at in empty else each
        few = {some[at]: share for at, share in raised.items() if at not in empty}
        result.warnings += joint_refit.damping_warnings(context.layer, few)
        return [found[at] for at in range(len(some))]

    def _shares(self, context: LayerContext, some: range) -> Tensor:
        """Damping of `some` experts [N]: as many times what was asked for as an expert keeps channels for
        each of its tokens, where those are more."""
        assert context.experts is not None
        assert context.channels is not None
        tokens = context.experts.tokens[some.start : some.stop].clamp(min=1).float()
        if context.experts.everyone:
            tokens = torch.full_like(tokens, len(context.experts.hidden))
        kept = tokens.new_tensor(context.channels[some.start : some.stop])
        return self.damping * (kept / tokens).clamp(min=1)

    def _few(self, context: LayerContext) -> list[str]:
        """Experts whose refit stands on less than one token a channel."""
        assert context.experts is not None
        assert context.channels is not None
        shares = self._shares(context, range(context.experts.count)).tolist()
        tokens = context.experts.tokens.tolist()
        few = [at for at, kept in enumerate(context.channels) if 0 < tokens[at] < kept]
        if not few or self.refit == "none" or not self.damping:
            return []
        names = ", ".join(f"E{at}" for at in few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        most = max(context.channels)
        return [
            f"L{context.layer}: {names} saw fewer tokens than they keep channels ({most}): their refit is damped by up to "
            f"{max(shares[at] for at in few):.2g} instead of {self.damping:g}; more text helps"
        ]

    def _check_curvature(self, context: LayerContext) -> None:
        assert context.experts is not None
        if self.score == "heapr" and getattr(context.experts.module, "has_post_expert_norm", False):
            raise UserError(
                f"channel_prune: the experts of L{context.layer} end with a norm, for which heapr's formula does not hold: use "
                "score=obs"
            )

    def _scores(self, context: LayerContext, some: range, hessians: Tensor) -> Tensor:
        """Importance of every channel [N, I]."""
        experts = context.experts
        assert experts is not None
        up, down = experts.up[some.start : some.stop], experts.down[some.start : some.stop]
        squares = hessians.diagonal(dim1=1, dim2=2)
        if self.score == "magnitude":
            return neurons.weight_norms(up, down)
        if self.score == "heapr":
            assert context.curvature is not None
            return experts.squares_inner(some, up, by_gate=False) * context.curvature[some.start : some.stop]
        if self.score == "leverage":
            return low_rank.leverage(hessians, self.damping)
        if self.score == "wanda":
            plain = experts.squares_inner(some, up, by_gate=False)
            return neurons.wanda(down, plain)
        if self.score == "random":
            generator = torch.Generator().manual_seed(some.start)
            return torch.rand(squares.shape, generator=generator).to(squares.device)
        if not self.alpha:
            return neurons.energy(down, squares)
        return neurons.camera_energy(down, *experts.sums_and_maxima(some, up), self.alpha)


def _widths(layer: LayerSpec) -> tuple[int, ...]:
    """Channels of every expert of a layer."""
    return layer.widths or (layer.width,) * layer.experts


def _unit(key: allocation.Key) -> Unit:
    return Unit(key[0], "experts", key[1] if len(key) > 1 else None)


def _summed(curves: list[allocation.Points]) -> allocation.Points:
    """The curve of a layer whose experts all become equally narrow, each having been as wide."""
    return [(points[0][0], sum(loss for _, loss in points)) for points in zip(*curves, strict=True)]
