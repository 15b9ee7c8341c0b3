"""The engines a result can be meant for, and what a plan may do for each (checked; see
docs/architecture.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from moespresso.build import View, half_packed, in_order, one_format, tied_head, zeros_of
from moespresso.core.blueprint import LayerSpec
from moespresso.core.errors import UserError, did_you_mean
from moespresso.effect import biased_stubs
from moespresso.export.nearest import repaired_otherwise, stored_plainly, to_leave_out
from moespresso.formats import codec_in, codec_named, codecs
from moespresso.model import is_unequal, skipping


@dataclass(frozen=True, slots=True)
class Target:
    """One engine. `plugin`: it loads with moespresso imported, so that layers may differ in any way.
    `stubs`: families in which it was seen to load layers whose mixture is a dense part of zeros (None: all
    that can say so). `packed`: it reads packed integers."""

    name: str
    plugin: bool = False
    packed: bool = True
    stubs: frozenset[str] | None = frozenset()


TARGETS = {
    target.name: target
    for target in (
        Target("transformers", stubs=None),
        Target("vllm", stubs=frozenset({"qwen2_moe", "qwen3_moe"})),
        Target("llama.cpp", packed=False),
        Target("plugin", plugin=True),
    )
}


# Widths of experts are multiples of this.
_WIDE = 8


def find_target(name: str) -> Target:
    """The target called `name`; raises `UserError` when there is none."""
    if name not in TARGETS:
        raise UserError(f"target {name!r} is unknown{did_you_mean(name, TARGETS)}")
    return TARGETS[name]


def formed(name: str, view: View) -> View:
    """The view in the form that the target loads; raises `UserError` when it cannot load what the plan
    makes, naming the nearest plan that it can."""
    target = find_target(name)
    made = replace(view, stock=False) if target.plugin else _stock(target, view)
    if not target.plugin:
        _check_formats(target, made)
    _ = made.config  # raises where no config can say which blocks are left
    return made


def _stock(target: Target, view: View) -> View:
    _check_experts(target, view)
    cut = [f"L{layer}" for layer, branch in sorted(view.remains.cut) if branch == "attention"]
    if cut:
        raise _beyond(target, f"leaves {_some(cut)} without attention", _blocks(view, len(cut)))
    biased = [f"L{layer}" for layer, _ in sorted(biased_stubs(view.source, view.plan))]
    if biased:
        instead = repaired_otherwise(view, partial(formed, target.name)) or _blocks(view, len(biased))
        raise _beyond(target, f"leaves a constant where {_some(biased)} lost a part", instead)
    made = _stubbed(target, replace(view, stock=True))
    _check_widths(target, made)
    odd = [f"L{view.remains.layers[position]}" for position in skipping(made.config)]
    if odd:
        raise _beyond(
            target, f"keeps layers that lack a part already ({_some(odd)})", _blocks(view, len(odd))
        )
    return made


def _check_formats(target: Target, view: View) -> None:
    """Stock loaders take one symmetric format for all experts, and compute wrong numbers without a word
    from others."""
    if not view.formats:
        return
    there = {codec_in(piece.ref) for piece in view.pieces if piece.ref.packed is not None}
    own = [held for held in codecs() if held.own and held in there]
    if own:
        what = own[0].title
        instead = stored_plainly(view, partial(formed, target.name))
        raise UserError(
            f"this plan stores {what}, which {target.name} does not read; the nearest plan that it can is {instead}, or say "
            "--target plugin (moespresso.load reads it)"
        )
    if not target.packed:
        raise UserError(
            f"this plan packs integers, which {target.name} does not read (it has a file format of its own, not available in "
            "this version): drop the rounding step, or choose --target transformers"
        )
    if view.packed_alone:
        raise UserError(
            f"this plan keeps packed routers ({_some(view.packed_alone)}), which {target.name} does not look for, so that it would take "
            "random ones; write the model plainly first (moespresso export DIR --to plain) and press that, or say --target plugin "
            "(moespresso.load reads it)"
        )
    if target.name == "transformers" and half_packed(view) and one_format(view):
        raise UserError(
            "this plan packs other parts and leaves experts plain, at which transformers stops; the nearest plan that it can is to "
            "round the experts too (parts=experts+...), or say --target plugin (moespresso.load reads it)"
        )
    if in_order(view):
        raise UserError(
            "this plan keeps packed matrices whose inputs are grouped in an order of their own (act-order), which compressed-tensors "
            f"0.20 no longer decodes, so that {target.name} stops at them; the nearest plan that it can is to round them again "
            "(rtn), or say --target plugin (moespresso.load reads it)"
        )
    if one_format(view):
        return
    if view.unreadable:
        raise UserError(
            f"this plan packs matrices beside {_some(view.unreadable)}, which {target.name} converts as it reads, but cannot beside "
            "packed ones: drop the rounding step, or say --target plugin (moespresso.load reads it)"
        )
    if tied_head(view):
        raise UserError(
            f"this plan packs the head, which config.json ties to the embedding, so that {target.name} stops; the nearest plan that it "
            "can is to leave the head out of parts, or say --target plugin (moespresso.load reads it)"
        )
    zeros = zeros_of(view)
    if zeros and zeros != "experts":
        raise UserError(
            f"this plan leaves {zeros} with zeros of its own (symmetric=false), at which {target.name} stops; the nearest plan that it "
            "can is symmetric=true, or say --target plugin (moespresso.load reads it)"
        )
    experts = {piece.ref.packed and piece.ref.packed.format for piece in view.pieces
               if piece.unit.part == "experts" and len(piece.shape) == 2}  # fmt: skip
    known = [format for format in experts if format]
    bits = max(format.bits for format in known)
    what = "some experts plain and others packed" if len(known) < len(experts) else (
        "experts in different formats" if len(known) > 1 else "experts with a zero of their own (symmetric=false)"
    )  # fmt: skip
    raise UserError(
        f"this plan leaves {what}, which {target.name} loads without an error and computes wrong; the nearest plan that it "
        f"can is bits={bits},symmetric=true for all experts{to_leave_out(view.plan.stages)}, or say --target plugin (moespresso.load reads it)"
    )


def _check_experts(target: Target, view: View) -> None:
    layers = _moe_layers(view)
    gone = [f"L{layer}" for layer in view.remains.gone]
    if gone:
        raise _beyond(
            target,
            f"leaves routers whole that select experts that are gone ({_some(gone)})",
            "router=rows,replace=none",
        )
    counts = [layer.experts for layer in layers]
    if len(set(counts)) > 1:
        steps = max(layer.groups for layer in layers)
        fewest = -(-max(layer.floor for layer in layers) // steps) * steps
        most = min(layer.experts for layer in view.source.moe_layers) // steps * steps
        nearest = min(max(round(sum(counts) / len(counts) / steps) * steps, fewest), most)
        raise _beyond(
            target,
            f"leaves unequal layers ({min(counts)} to {max(counts)} experts)",
            f"scope=layer,keep={nearest}",
        )


def _check_widths(target: Target, view: View) -> None:
    """One number of the config is the width of all experts."""
    widths = [layer.width for layer in view.blueprint.moe_layers]
    if len(set(widths)) > 1:
        most = min(min(layer.widths, default=layer.width) for layer in view.source.moe_layers)
        mean = min(max(1, round(sum(widths) / len(widths) / _WIDE)) * _WIDE, most)
        raise _beyond(
            target,
            f"leaves experts of unequal width ({min(widths)} to {max(widths)} channels)",
            f"channel_prune:scope=layer,width={mean}",
        )
    if view.remains.widths and is_unequal(view.config):
        raise _beyond(
            target,
            f"narrows experts to {widths[0]} channels, which the config of a {view.source.family} model cannot say without "
            "changing its dense layers too",
            "expert_drop",
        )


def check_even(view: View, layout: str) -> None:
    """Raise `UserError` where experts of a layer differ in width, or a router is packed, which no engine
    of another layout than ours can load."""
    if codec_named(layout).one_format and view.packed_alone:
        raise UserError(
            f"routers are packed here ({_some(view.packed_alone)}), for which engines that read {layout} have no place: export it as "
            "plain, and press that"
        )
    for layer in view.blueprint.layers if codec_named(layout).one_format else ():
        if layer.widths:
            raise UserError(
                f"the experts of L{layer.index} have {min(layer.widths)} to {max(layer.widths)} channels, which no engine that reads "
                f"{layout} can load: use moespresso.load as it is, or press with per_expert=false"
            )


def _moe_layers(view: View) -> list[LayerSpec]:
    kept: Mapping[int, tuple[int, ...]] = view.remains.experts
    return [
        replace(layer, experts=len(kept[layer.index]))
        for layer in view.source.moe_layers
        if layer.index in kept
    ]


def _stubbed(target: Target, view: View) -> View:
    """The stock form: what lost its feed-forward part has a dense one of zeros, where the family can say
    so."""
    if not view.stubs:
        return view
    names = [f"L{view.remains.layers[position]}" for position in view.stubs]
    what = f"leaves {_some(names)} without a feed-forward part"
    instead = _blocks(view, len(names))
    if not view.source.moe_layers:
        raise _beyond(target, f"{what}, and a dense model has one width for all layers", instead)
    if target.stubs is not None and view.source.family not in target.stubs:
        raise _beyond(target, what, instead)
    try:
        _ = view.config
    except UserError as error:
        raise _beyond(target, f"{what} ({error})", instead) from error
    return view


def _beyond(target: Target, what: str, instead: str) -> UserError:
    return UserError(
        f"this plan {what}, which {target.name} cannot load; the nearest plan that it can is {instead}, or say "
        "--target plugin (loads where moespresso is imported)"
    )


def _blocks(view: View, count: int) -> str:
    """The step that drops about as many whole blocks as `count` of which single parts cannot go: whole
    patterns, where the config can only repeat one."""
    there, every = len(view.source.layers), view.source.period
    whole = min(range(every, there, every), key=lambda drop: abs(drop - count), default=0)
    if not whole:
        return "expert_drop"
    return f"block_drop:drop={whole}" + (",contiguous=true" if every > 1 else "")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
