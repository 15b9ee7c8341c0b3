"""What a step that rounds on text finds: one layer after the other, each on what the rounded ones before let through.

A layer is loaded as the stages before leave it; its batches run as far as the experts; the step answers with codes; these
are put in place and the batches go on. Every layer's codes go to a file of their own in the work folder, in the form that
they are written in at last, so a killed run goes on with the next layer and nothing is held for longer than a layer.

Batches run in the precision of the run, but the weights that a step is shown are the stored ones, to the last bit: what it leaves
alone, or rounds, must not have been rounded before. Where that precision does not hold them (experts in float32, a run in
bfloat16) the experts of the layer are loaded once more, as they are stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from moespresso.build import View, make_skeleton, precision
from moespresso.checkpoint import TORCH_DTYPES, Reader, as_bytes, header, write_file
from moespresso.core.blueprint import TensorRef
from moespresso.core.errors import UserError
from moespresso.core.format import Format, layout_of
from moespresso.core.layer import Layer, LayerWeights, Taps
from moespresso.core.plan import Plan
from moespresso.core.runtime import Runtime
from moespresso.core.stats import stats_key
from moespresso.data import Batches
from moespresso.effect import (
    Piece,
    channels_of,
    format_of,
    found_key,
    key,
    narrowed,
    remains,
    rounds_on_text,
    scale_dtypes,
    step_of,
)
from moespresso.fit.repairs import fit
from moespresso.formats import Codes, decode, encode_parts, encode_plain
from moespresso.kernels import RoutedExperts
from moespresso.methods import LayerContext, LayerResult
from moespresso.model import Skeleton
from moespresso.stream import SweepOptions, SweepState, Watch, gradient_moments, must_spill, sweep

# Raise when the same plan and text would give other codes.
_VERSION = "1"
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass
class Slimmed:
    """Fitted tensors by name, what went wrong, and by layer how many tokens reached each expert and which were helped."""

    fits: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    trouble: list[str] = field(default_factory=list[str])
    coverage: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])


def found(view: View, plan: Plan, batches: Batches | None, work: Path, runtime: Runtime) -> Slimmed:
    """Whatever the last stage of `plan` needs beside the decision, `view` being the model before it."""
    if not rounds_on_text(plan.stages[-1]):
        return Slimmed(fit(view, plan, batches, work, runtime))
    if batches is None:
        raise UserError(
            "this plan is fitted on real text: give --text FILE or --dataset NAME, as it was made with"
        )
    return slim(view, plan, batches, work, runtime)


def slim(view: View, plan: Plan, batches: Batches, work: Path, runtime: Runtime) -> Slimmed:
    """Everything that the last stage of `plan`, which rounds on text, needs; `view` is the model before it."""
    stage = len(plan.stages) - 1
    step: Any = step_of(plan.stages[stage])
    name = stats_key(
        "slim", view.source.digest, plan.digest_of_stages, batches.digest, precision(view, runtime), _VERSION
    )[:16]
    files = [work / f"slim-{name}-{index:05d}.safetensors" for index in range(len(view.blueprint.layers))]
    state = SweepState(work / f"sweep-{name}.safetensors", dict, lambda _: None)
    if not all(file.is_file() for file in files):
        with Reader(view.checkpoint.folder, allow_nonfinite=runtime.allow_nonfinite) as reader:
            skeleton = make_skeleton(view, reader, runtime)
            visitor = _Visitor(view, plan, step, skeleton, files, reader)
            if "original" in step.shows and view.plan.stages:
                original = replace(view, plan=replace(view.plan, stages=()), fits={})
                visitor.original = make_skeleton(original, reader, runtime)
            if "gradient" in step.shows:
                visitor.curvature = _curvature(
                    skeleton, batches, work / f"curvature-{name}.safetensors", runtime
                )
            carry = "rebuilt" if step.sequential else "original"
            spill = work if must_spill(view, batches, runtime) else None
            options = SweepOptions(carry, state, spill)
            watch = Watch(runtime.progress, f"{step.kind}, layers")
            sweep(skeleton, batches.ids, batches.mask, visitor, options, watch)
    state.path.unlink(missing_ok=True)
    (work / f"curvature-{name}.safetensors").unlink(missing_ok=True)
    return _gathered(files)


def _curvature(skeleton: Skeleton, batches: Batches, file: Path, runtime: Runtime) -> dict[int, Tensor]:
    """By layer, how sharply the model's loss bends along every channel's output [E, I]; kept in `file` for a run that is killed
    later."""
    if not file.is_file():
        watch = Watch(runtime.progress)
        moments = gradient_moments(skeleton, batches.ids, batches.mask, file.parent, watch)
        _write(file, {str(layer): tensor for layer, tensor in moments.items()}, {})
    return {int(layer): tensor.to(skeleton.device) for layer, tensor in load_file(file).items()}


def _gathered(files: list[Path]) -> Slimmed:
    """What all layers found; tensors stay in their files until they are looked at."""
    found = Slimmed()
    for file in files:
        found.fits |= load_file(file)
        with safe_open(file, "pt") as opened:
            notes = json.loads(opened.metadata()["notes"])
        found.trouble += notes["trouble"]
        found.coverage |= notes["coverage"]
    return found


@dataclass
class _Visitor:
    """Shows each layer to the step, and keeps what it answers."""

    view: View
    plan: Plan
    step: Any
    skeleton: Skeleton
    files: list[Path]
    reader: Reader
    curvature: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    original: Skeleton | None = None

    def __post_init__(self) -> None:
        self.stage = len(self.plan.stages) - 1
        self.after = remains(self.plan, self.view.source)
        self.changed = {unit.layer for stage in self.view.plan.stages for unit in stage.treatments}
        self.dtypes = scale_dtypes(self.view.source)
        self.pieces: dict[int, list[Piece]] = {}
        for piece in self.view.pieces:
            stage, entry = self.plan.stages[self.stage], piece.source
            treated = format_of(entry, stage) is not None or channels_of(entry, stage) is not None
            if piece.unit.layer is not None and treated:
                self.pieces.setdefault(piece.unit.layer, []).append(piece)

    def __call__(self, layer: Layer, taps: Taps) -> LayerWeights | None:
        at = layer.spec.index
        pieces = self.pieces.get(at, [])
        target = self.files[at]
        if not pieces:
            self._save(target, {}, LayerResult(), {})
            return None
        with self._stored(layer, pieces) as stored:
            context = self._shown(layer, taps, pieces, stored)
            result: LayerResult = self.step.solve(context)
        self._check_finite(result, at)
        self._save(target, self._tensors(pieces, result, layer), result, _coverage(context, result))
        return self._weights(layer, result, context)

    @cached_property
    def named(self) -> dict[tuple[int | None, str], Piece]:
        """What is stored of every layer, by its number and the name in it."""
        found: dict[tuple[int | None, str], Piece] = {}
        for piece in self.view.pieces:
            prefix = f"{self.skeleton.layers_name}.{piece.unit.layer}."
            found[piece.unit.layer, self.skeleton.in_memory(piece.name).removeprefix(prefix)] = piece
        return found

    @contextmanager
    def _stored(self, layer: Layer, pieces: list[Piece]) -> Iterator[Layer]:
        """The layer with its experts in a precision that holds them as they are stored: itself, if it does."""
        own, device = self.skeleton.dtype, self.skeleton.device
        kinds = {TORCH_DTYPES[piece.ref.dtype] for piece in pieces if piece.unit.part == "experts"}
        holds = reduce(torch.promote_types, kinds, own)
        if holds == own:
            yield layer
            return
        exact = self.view.skeleton(self.reader, reduce(torch.promote_types, kinds), device)
        with exact.layer(layer.spec.index) as found:
            yield found

    def _parameter(self, layer: Layer, name: str) -> Tensor:
        """A parameter by its name in the layer, as it is stored where it is stored by itself."""
        loaded, piece = layer.module.get_parameter(name), self.named.get((layer.spec.index, name))
        if piece is None or piece.shape != tuple(loaded.shape):
            return loaded
        return self.reader.piece(piece).to(loaded.device)

    def _shown(self, layer: Layer, taps: Taps, pieces: list[Piece], stored: Layer) -> LayerContext:
        """The layer as the step sees it, with the second moments of what reaches its linear modules."""
        singles = {self._module(piece, layer): piece for piece in pieces if piece.unit.part != "experts"}
        sums = {name: _Moment() for name in singles}
        fed = taps.fed({name: total.add for name, total in sums.items()})
        formats: dict[str, Format] = {}
        dtypes: dict[str, torch.dtype] = {}
        for piece in pieces:
            format = format_of(piece.source, self.plan.stages[self.stage]) or Format()
            name = _projection(piece) if piece.unit.part == "experts" else self._module(piece, layer)
            if formats.setdefault(name, format) != format:
                raise UserError(
                    f"the plan gives gate and up of L{layer.spec.index} different formats: give both the same"
                )
            experts = self.dtypes.get(piece.source.unit.layer, "") if piece.unit.part == "experts" else ""
            dtypes[name] = TORCH_DTYPES[experts or piece.ref.dtype]
        everyone = "all_tokens" in self.step.shows
        experts = RoutedExperts.of(stored.experts, fed, everyone=everyone) if "up" in formats else None
        linears: dict[str, tuple[Tensor, Tensor]] = {}
        for name, total in sums.items():
            if total.mean is None:
                raise UserError(
                    f"L{layer.spec.index}.{name} is never run as a module of its own, so what it is given cannot be seen: round "
                    "it by rtn, or leave it out with exclude"
                )
            linears[name] = self._parameter(layer, f"{name}.weight").float(), total.mean
        widths = self.after.widths.get(self.view.left.layers[layer.spec.index], {})
        curvature = self.curvature.get(layer.spec.index)
        means = {name: total.center for name, total in sums.items()}
        return LayerContext(layer.spec.index, stored.module, formats, dtypes, experts, linears, tuple(widths.values()) or None,
                     curvature, self._missing(layer, taps), means, layer.spec.heads,
                     partial(self._parameter, layer))  # fmt: skip

    def _missing(self, layer: Layer, taps: Taps) -> Tensor | None:
        """What the layer's answer to every token that is no padding lacks of the original layer's on the same input."""
        source = self.view.left.layers[layer.spec.index]
        mlp = layer.anatomy and layer.anatomy.mlp
        if self.original is None or source not in self.changed or mlp is None or mlp.post is not None:
            return None
        with self.original.layer(source) as first:
            pairs = zip(taps.through(first.module), taps.through(layer.module), taps.valid, strict=True)
            return torch.cat(
                [(was[valid] - now[valid]).float() / mlp.multiplier for was, now, valid in pairs]
            )

    def _module(self, piece: Piece, layer: Layer) -> str:
        """The name, in its layer, of the module that holds a matrix."""
        prefix = f"{self.skeleton.layers_name}.{layer.spec.index}."
        name = self.skeleton.in_memory(piece.name).removeprefix(prefix).removesuffix(".weight")
        module = dict(layer.module.named_modules()).get(name)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or tuple(weight.shape) != piece.shape:
            raise UserError(
                f"{piece.name} is not a matrix by itself in memory, so this version cannot round it on text: use rtn"
            )
        return name

    def _tensors(self, pieces: list[Piece], result: LayerResult, layer: Layer) -> dict[str, Tensor]:
        """What is kept, by the names of fits."""
        found: dict[str, Tensor] = {}
        stacks = _Stacks(_by_projection(result, layer))
        plain = _plain(result, layer)
        for piece in pieces:
            name = piece.unit.matrix or "" if piece.unit.part == "experts" else self._module(piece, layer)
            if name in plain:
                whole = plain[name] if piece.unit.expert is None else plain[name][piece.unit.expert]
                if piece.unit.expert is not None:  # not all are as wide as the widest
                    rows, columns = narrowed(piece.source, self.after)
                    whole = whole[:rows, :columns]
                parts = self._small(piece, whole.to(TORCH_DTYPES[piece.ref.dtype]), result, name)
            elif piece.unit.part == "experts":
                assert piece.unit.expert is not None
                parts = stacks.parts(name, piece.unit.expert, piece.shape)
            else:
                stored = encode_parts("compressed-tensors", result.linears[name])
                parts = {suffix: tensor[0] for suffix, tensor in stored.items()}
            found |= {
                found_key(self.stage, piece.source.ref.name, suffix): tensor
                for suffix, tensor in parts.items()
            }
        leaders = {replace(piece.source.unit, expert=None): piece for piece in reversed(pieces)}
        found |= {
            key(self.stage, unit, "weight_bases"): result.based[unit.matrix or ""][2].to(
                TORCH_DTYPES[piece.ref.dtype]
            )
            for unit, piece in leaders.items()
            if unit.matrix in result.based
        }
        for name, tensor in result.replaced.items():
            ref = self.named[layer.spec.index, name].source.ref
            found[found_key(self.stage, ref.name, "dense")] = tensor
        return found

    def _small(self, piece: Piece, whole: Tensor, result: LayerResult, name: str) -> dict[str, Tensor]:
        """A plain matrix in the form that the plan stores it in."""
        format = format_of(piece.source, self.plan.stages[self.stage]) or Format()
        if layout_of(format) in ("bitmask", "slices"):
            return {
                suffix: tensor.squeeze(0)
                for suffix, tensor in encode_plain(whole.unsqueeze(0), format).items()
            }
        if format.kind == "factors":
            left, right = result.factors[name]
            at = 0 if piece.unit.expert is None else piece.unit.expert
            return {"weight_left": left[at].to(whole.dtype), "weight_right": right[at].to(whole.dtype)}
        if format.kind == "bases":
            assert piece.unit.expert is not None
            own, shares, _ = result.based[name]
            rows = own[piece.unit.expert, : len(whole)]
            return {"weight_own": rows.to(whole.dtype), "weight_shares": shares[piece.unit.expert]}
        return {"dense": whole}

    def _save(
        self, path: Path, tensors: Mapping[str, Tensor], result: LayerResult, coverage: dict[str, Any]
    ) -> None:
        _write(path, tensors, {"notes": json.dumps({"trouble": result.trouble, "coverage": coverage})})

    def _check_finite(self, result: LayerResult, layer: int) -> None:
        broken = [name for name, tensor in result.weights.items() if not bool(tensor.isfinite().all())]
        if broken:
            raise UserError(
                f"L{layer}.{broken[0]}: fitting it gave values that are not finite: give more text, or a larger damping"
            )

    def _weights(self, layer: Layer, result: LayerResult, context: LayerContext) -> dict[str, Tensor]:
        """The layer's parameters as they will be loaded."""
        found = dict(result.replaced)
        plain = {name: tensor.to(context.dtypes[name]) for name, tensor in result.weights.items()}
        up, down = plain.pop("up", None), plain.pop("down", None)
        if result.up is not None and result.down is not None:
            up, down = decode(result.up), decode(result.down)
        if up is not None and down is not None:
            prefix = next(name for name, module in layer.module.named_modules() if module is layer.experts)
            name = "gate_up_proj" if getattr(layer.experts, "has_gate", True) else "up_proj"
            found |= {f"{prefix}.{name}": up, f"{prefix}.down_proj": down}
        found |= {f"{name}.weight": decode(codes)[0] for name, codes in result.linears.items()}
        found |= {f"{name}.weight": tensor for name, tensor in plain.items()}
        return {name: tensor.to(layer.module.get_parameter(name)) for name, tensor in found.items()}


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Keep tensors in a file that is there as a whole or not at all."""
    refs = [TensorRef(name, tuple(t.shape), _NAMES[t.dtype], "") for name, t in sorted(tensors.items())]
    bodies = (as_bytes(tensors[ref.name].cpu().reshape(-1)) for ref in refs)
    write_file(path, [memoryview(header(refs, metadata)), *bodies])


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


class _Stacks:
    """Codes of all experts of a layer by projection, and what they are stored as."""

    def __init__(self, codes: Mapping[str, Codes]) -> None:
        self._codes = codes
        self._whole: dict[str, dict[str, Tensor]] = {}

    def parts(self, name: str, expert: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The tensors that one expert's matrix of some shape is stored as; it may be narrower than the widest."""
        codes = self._codes[name]
        if tuple(codes.values.shape[1:]) == shape:
            whole = self._whole.setdefault(name, {}) or encode_parts("compressed-tensors", codes)
            self._whole[name] = whole
            return {suffix: tensor[expert] for suffix, tensor in whole.items()}
        own = codes.corner(expert, shape)
        return {suffix: tensor[0] for suffix, tensor in encode_parts("compressed-tensors", own).items()}


def _projection(piece: Piece) -> str:
    return "down" if (piece.unit.matrix or "").startswith("down") else "up"


def _by_projection(result: LayerResult, layer: Layer) -> dict[str, Codes]:
    """Codes of all experts by the name of their stored matrix: gate and up are solved as one."""
    if result.up is None or result.down is None:
        return {}
    if not getattr(layer.experts, "has_gate", True):
        return {"up": result.up, "down": result.down}
    gate, up = (
        Codes(result.up.format, *parts)
        for parts in zip(
            *(getattr(result.up, name).chunk(2, dim=1) for name in ("values", "scale", "zero")), strict=True
        )
    )
    return {"gate": gate, "up": up, "down": result.down}


def _plain(result: LayerResult, layer: Layer) -> dict[str, Tensor]:
    """Matrices that stay plain, by the name of their stored form."""
    found = dict(result.weights)
    if "up" in found:
        found["gate_up"] = found["up"]
    if "up" in found and getattr(layer.experts, "has_gate", True):
        found["gate"], found["up"] = found["up"].chunk(2, dim=1)
    return found


def _coverage(context: LayerContext, result: LayerResult) -> dict[str, Any]:
    if context.experts is None:
        return {}
    remedies = {str(expert): word for expert, word in sorted(result.remedies.items())}
    return {f"L{context.layer}": {"tokens": context.experts.tokens.tolist(), "remedies": remedies}}
