"""Low rank: every matrix becomes the product of two thin ones, which is closest to it on what it is given.

    minimise  sum over tokens of |(W - L R) x|^2     L [out, r], R [r, in]

Experts are nearly of full rank, so this is a mark for others more than a way to go. With `shared_basis` gate
and up become L_e (sum over m of alpha_em R_m), the second factors mixed of a few that all experts of a layer
share (MoBE, arXiv 2508.05257; `kernels/shared_bases.py`), which lets them be of far higher rank for the same
bytes. The factors are what is stored; loading multiplies them (moespresso.load). Down is solved on what the
products of gate and up really hand on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from moespresso.core.blueprint import Blueprint, Entry
from moespresso.core.errors import UserError
from moespresso.core.format import DTYPE_BYTES, Format
from moespresso.core.method import Sight
from moespresso.core.registry import method
from moespresso.effect import is_matrix
from moespresso.formats import based, product
from moespresso.kernels import RoutedExperts, joint_refit, low_rank, shared_bases
from moespresso.methods._counts import refuse_widths
from moespresso.methods._matrices import EXPERTS, OnMatrices
from moespresso.methods._on_text import LayerContext, LayerResult, OnText

Factors = tuple[Tensor, Tensor]
_MODEGPT = "channel_prune:score=leverage,refit=expert and attention_rank"
# MoDeGPT's modules (arXiv 2408.09632) as the steps that make them: experts by Nystrom, then queries and keys, values and outputs.
_MODULES = (
    {"kind": "channel_prune", "score": "leverage", "refit": "expert"},
    {"kind": "attention_rank", "modules": "qk+vo"},
)
# Damping by default. Bases are fitted to the mean of the weights' own error and that of what is seen, which carries farther.
_DAMPING = {"svd": 0.01, "shared_basis": 1.0}
# Damping and rounds of the refit of down behind bases, as `channel_prune` has them.
_REFIT, _SWEEPS = 0.003, 2


@method
@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank(OnMatrices, OnText):
    """Settings of one decomposition.

    ratio: share of the bytes that goes: of every matrix, or with `shared_basis` of the experts of every
        layer, out of gate and up. (Of what they take as plain matrices, should they be stored as less.)
    method: `svd` (each matrix by itself), `shared_basis` (gate and up of a layer's experts together; down is
        refitted), or `modegpt` (short for two steps: channel_prune:score=leverage,refit=expert and
        attention_rank, each with this ratio).
    bases: how many the experts of a layer share; a quarter as many as there are experts, but 3 or more, when
        it is not said.
    damping: share of the mean diagonal added to every second moment (0.01, or 1 with `shared_basis`, when it
        is not said).
    sequential: later layers see what the products before let through.
    """

    kind: ClassVar[str] = "low_rank"
    verb: ClassVar[tuple[str, str]] = ("decompose", "decomposed")
    able: ClassVar[tuple[str, ...]] = ("experts", "shared", "attention", "dense")
    ratio: float = 0.25
    method: Literal["svd", "modegpt", "shared_basis"] = "svd"
    bases: int | None = None
    damping: float | None = None
    sequential: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        OnMatrices.__post_init__(self)
        if not 0 < self.ratio < 1:
            raise UserError(f"low_rank: ratio={self.ratio} must lie between 0 and 1")
        if self.damping is not None and not 0 <= self.damping < float("inf"):
            raise UserError(f"low_rank: damping={self.damping} must not be negative")
        if self.bases is not None and (not self._shares_bases or self.bases < 1):
            why = "must be 1 or more" if self._shares_bases else "is a setting of method=shared_basis"
            raise UserError(f"low_rank: bases={self.bases} {why}")
        if self.stands_for() and (self.parts != EXPERTS or self.exclude):
            raise UserError(
                f"low_rank: method=modegpt takes experts and attention alike: to choose, give its two steps, {_MODEGPT}"
            )
        if self._shares_bases and self.parts.each() != ["experts"]:
            raise UserError(
                f"low_rank: parts={self.parts} has no layer-mates to share bases with: use method=svd for all but experts"
            )

    def stands_for(self) -> tuple[Mapping[str, Any], ...]:
        """The steps that this one is short for; none where it is one itself."""
        if self.method != "modegpt":
            return ()
        same = {"ratio": self.ratio, "sequential": self.sequential}
        same |= {} if self.damping is None else {"damping": self.damping}
        return tuple({**module, **same} for module in _MODULES)

    @property
    def shows(self) -> frozenset[Sight]:
        """What the original layer answers: down is refitted to that where bases are shared."""
        return frozenset({"original"} if self._shares_bases else ())

    @property
    def without_text(self) -> str:
        """A step that sees weights alone."""
        return "magnitude"

    @property
    def plainly(self) -> tuple[str, ...]:
        """Narrower experts or heads, or fewer weights."""
        parts = self.parts.each()
        narrower = (f"channel_prune:ratio={self.ratio}",) if "experts" in parts else ()
        fewer = (f"attention_rank:ratio={self.ratio},pack=false",) if parts == ["attention"] else ()
        return (*narrower, *fewer, f"wanda:parts={self.parts},sparsity={self.ratio}")

    @property
    def _shares_bases(self) -> bool:
        return self.method == "shared_basis"

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        if self.stands_for():  # Python callers alone get here: requests open it
            raise UserError(f"low_rank: method=modegpt is short for {_MODEGPT}: give these two")
        if "experts" in self.parts.each() and not self._shares_bases:
            refuse_widths(self.kind, blueprint, "use method=shared_basis")
        for (layer, _), group in self._shared(blueprint).items():
            if group.bases > len(group.entries):
                raise UserError(
                    f"low_rank: bases={group.bases} is more than the {len(group.entries)} experts of L{layer}"
                )
            if self.ratio > group.most:
                one = replace(group, wanted=1)  # fewer bases help only where one would do
                cure = f", or fewer than {group.bases} bases" if self.ratio <= one.most else ""
                raise UserError(
                    f"low_rank: ratio={self.ratio} leaves nothing of gate and up of L{layer}: use {math.floor(100 * group.most) / 100} or "
                    f"less{cure}"
                )
            if len({entry.ref.dtype for entry in group.entries}) > 1:
                raise UserError(f"low_rank: the experts of L{layer} are of different dtypes: use method=svd")
        OnMatrices.check(self, blueprint)

    def amounts(self, blueprint: Blueprint) -> list[Any]:
        """This step with every ratio, least first (for a byte budget)."""
        most = min((group.most for group in self._shared(blueprint).values()), default=1.0)
        return [replace(self, ratio=share / 100) for share in range(1, 100) if share / 100 <= most]

    def solve(self, context: LayerContext) -> LayerResult:
        """Factors of everything that is to be decomposed in one layer, and their products."""
        result = LayerResult()
        if context.experts is not None:
            fit = self._together if self._shares_bases else self._apart
            fit(context, context.experts, result)
        for name, (weight, hessian) in context.linears.items():
            factors = self._factors(weight[None].float(), hessian[None], context, name)
            result.numbers[name], result.weights[name] = factors, product(*factors)[0]
        return result

    # Each matrix by itself

    def _apart(self, context: LayerContext, experts: RoutedExperts, result: LayerResult) -> None:
        halves = _halves(experts)
        found: dict[str, list[Factors]] = {name: [] for name in (*halves, "down")}
        for some in experts.groups():
            part, hessians = slice(some.start, some.stop), experts.hessians_in(some)
            for name, weights in zip(halves, experts.up[part].chunk(len(halves), dim=1), strict=True):
                found[name].append(self._factors(weights.float(), hessians, context, "up"))
            up = torch.cat([product(*found[name][-1]) for name in halves], dim=1).to(experts.up.dtype)
            hessians = experts.hessians_inner(some, up, by_gate=False)
            found["down"].append(self._factors(experts.down[part].float(), hessians, context, "down"))
            empty = [expert for expert in some if not len(experts.rows(expert)[0])]
            result.remedies |= dict.fromkeys(empty, "their weights alone")
        for name, parts in found.items():
            result.numbers[name] = (
                torch.cat([left for left, _ in parts]),
                torch.cat([right for _, right in parts]),
            )
        result.weights["up"] = torch.cat([product(*result.numbers[name]) for name in halves], dim=1)
        result.weights["down"] = product(*result.numbers["down"])

    def _factors(self, weights: Tensor, hessians: Tensor, context: LayerContext, name: str) -> Factors:
        """Factors [N, out, r] and [N, r, in] as they are stored."""
        left, right = low_rank.truncate(weights, hessians, context.formats[name].rank, self._damping)
        return left.to(context.dtypes[name]), right.to(context.dtypes[name])

    # All experts of a layer together

    def _together(self, context: LayerContext, experts: RoutedExperts, result: LayerResult) -> None:
        halves, format, dtype = _halves(experts), context.formats["up"], context.dtypes["up"]
        if not format.bases:
            raise UserError(f"low_rank: the plan gives gate and up of L{context.layer} no bases to share")
        hessian, made = experts.pooled_hessian(), list[Tensor]()
        importance = self._importance(experts).chunk(len(halves), dim=1)
        for name, weights, rows in zip(halves, experts.up.chunk(len(halves), dim=1), importance, strict=True):
            settings = shared_bases.Settings(damping=self._damping)
            own, bases, shares = shared_bases.fit(weights, hessian, format.rank, format.bases, rows, settings)
            mixture = own.to(dtype), shares, bases.to(dtype)
            result.numbers[name] = mixture
            made.append(based(mixture[0], mixture[1], mixture[2].unsqueeze(0)))
            if float((made[-1].float() - weights).square().sum()) > float(weights.float().square().sum()):
                raise UserError(
                    f"low_rank: no bases come near {name} of L{context.layer}'s experts: leave them out with exclude=L{context.layer}.experts"
                )
        up = torch.cat(made, dim=1)
        widths = context.channels or (experts.down.shape[2],) * experts.count
        every = joint_refit.all_neurons(experts, widths)
        narrowed = joint_refit.Narrowed(up.to(experts.up.dtype), experts.down, every)
        dampings = joint_refit.damping_by_expert(experts, widths, _REFIT)
        down, raised = joint_refit.refit_layer(
            experts, narrowed, damping=dampings, sweeps=_SWEEPS, missing=context.missing
        )
        result.weights = {"up": up, "down": down}
        silent = (experts.tokens == 0).nonzero().flatten().tolist()
        result.remedies |= dict.fromkeys(silent, "what the others were given, and no refit")
        result.warnings += joint_refit.damping_warnings(context.layer, raised)

    def _importance(self, experts: RoutedExperts) -> Tensor:
        """What an error in each row counts [E, R]: the root of how much the answer moves with it, between
        all alike and what this text makes of them. Experts without a token count as others do on average."""
        squares = experts.squared_slopes(range(experts.count), experts.up)
        halves = squares.shape[1] // experts.down.shape[2]
        found = (squares * experts.column_squares.repeat(1, halves)).sqrt().sqrt()
        seen = experts.tokens > 0
        found[~seen] = found[seen].mean() if bool(seen.any()) else 1.0
        return found

    # Sizes

    @property
    def _damping(self) -> float:
        return _DAMPING[self.method] if self.damping is None else self.damping

    def form(self, chosen: list[Entry]) -> Callable[[Entry, int | None], Format]:
        """Factors of the rank that leaves the bytes asked for, or bases that experts share."""
        if not self._shares_bases:
            return lambda entry, layer: Format("factors", rank=self._rank(*entry.ref.shape))
        groups = self._groups(chosen)

        def form(entry: Entry, layer: int | None) -> Format:
            group = groups.get((entry.unit.layer, entry.unit.matrix))
            return (
                Format() if group is None else Format("bases", rank=group.rank(self.ratio), bases=group.bases)
            )

        return form

    def _rank(self, out: int, width: int) -> int:
        """The rank at which two factors take what is left of the bytes of one matrix."""
        return max(1, int((1 - self.ratio) * out * width / (out + width)))

    def _shared(self, blueprint: Blueprint) -> dict[tuple[int | None, str | None], _Group]:
        """What shares bases in a model."""
        chosen = [entry for entry in blueprint.entries if is_matrix(entry) and self._is_meant(entry)]
        return self._groups(chosen) if self._shares_bases else {}

    def _groups(self, chosen: Iterable[Entry]) -> dict[tuple[int | None, str | None], _Group]:
        """The matrices that share bases, by layer and matrix: all but down."""
        found: dict[tuple[int | None, str | None], list[Entry]] = {}
        of_layer = Counter[int | None]()
        for entry in chosen:
            of_layer[entry.unit.layer] += int(entry.ref.numel * DTYPE_BYTES[entry.ref.dtype])
            if not (entry.unit.matrix or "").startswith("down"):
                found.setdefault((entry.unit.layer, entry.unit.matrix), []).append(entry)
        halves = Counter(layer for layer, _ in found)
        return {
            (layer, matrix): _Group(tuple(entries), halves[layer], self.bases, of_layer[layer])
            for (layer, matrix), entries in found.items()
        }

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of formats that it makes."""
        made = {"svd": {"factors"}, "shared_basis": {"bases", "source"}, "modegpt": set[str]()}
        return frozenset(made[self.method])

    def _told(self, blueprint: Blueprint) -> tuple[str, ...]:
        shared = "with bases that a layer's experts share" if self._shares_bases else "as two factors"
        notes = (f"low_rank: stored {shared}; in memory it is dense again, and no engine gets faster",)
        if self._shares_bases:
            return notes
        shapes = [entry.ref.shape for entry, _ in self._formats(blueprint)]
        left = sum(self._rank(out, width) * (out + width) for out, width in shapes)
        gone = 1 - left / sum(map(math.prod, shapes))
        off = f"low_rank: {gone:.1%} of the bytes of these matrices go, {self.ratio:.1%} were asked for (ranks are whole)"
        return (*notes, off) if abs(gone - self.ratio) >= 0.0005 else notes


@dataclass(frozen=True, slots=True)
class _Group:
    """The matrices that share bases, one of each expert of a layer, which has so many `halves` of that
    kind (gate and up); how many bases are `wanted` (None: as many as usual); and the bytes of all experts
    `of_layer`, down included, as plain matrices."""

    entries: tuple[Entry, ...]
    halves: int
    wanted: int | None
    of_layer: int

    @property
    def bases(self) -> int:
        """How many they share."""
        return self.wanted or min(len(self.entries), max(3, len(self.entries) // 4))

    @property
    def most(self) -> float:
        """The ratio at which nothing is left of them but one row of every basis."""
        return self.halves * (self._whole - self._each - self._shares) / self.of_layer

    def rank(self, ratio: float) -> int:
        """The rank at which the experts, down included, lose a share of their bytes."""
        return int((self._whole - ratio * self.of_layer / self.halves - self._shares) / self._each)

    @property
    def _size(self) -> float:
        return DTYPE_BYTES[self.entries[0].ref.dtype]

    @property
    def _whole(self) -> float:
        return sum(entry.ref.numel for entry in self.entries) * self._size

    @property
    def _each(self) -> float:
        """Bytes of a rank."""
        width = self.entries[0].ref.shape[1]
        return (sum(entry.ref.shape[0] for entry in self.entries) + self.bases * width) * self._size

    @property
    def _shares(self) -> float:
        return 4 * self.bases * len(self.entries)


def _halves(experts: RoutedExperts) -> tuple[str, ...]:
    """What leads into the channels, as `experts.up` stacks it."""
    return ("gate", "up") if experts.up.shape[1] > experts.down.shape[2] else ("up",)
