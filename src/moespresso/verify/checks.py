"""The checks of `verify`, cheapest first."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moespresso.build import (
    Tensors,
    View,
    apart_view,
    engine_of,
    equivalent_views,
    load_model,
    misfit_ahead,
    other_layout,
    own_packing,
)
from moespresso.checkpoint import (
    MANIFEST,
    TORCH_DTYPES,
    Checkpoint,
    Manifest,
    Reader,
    count_nonfinite,
    open_checkpoint,
)
from moespresso.core.blueprint import Blueprint
from moespresso.core.errors import UserError
from moespresso.core.plan import Plan
from moespresso.core.progress import Progress
from moespresso.effect import is_understood, mixtures_ahead, size_of, validated
from moespresso.formats import codec_in
from moespresso.model import MetaModel, is_unequal, own_class, read_blueprint
from moespresso.stream import sweep

_CHUNK = 16 << 20
# Stock loading holds the whole model in float32; larger ones are checked by streaming and by digests.
STOCK_BYTES = 4 << 30
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Check:
    """One check: what it looked at, whether it held, and what it found."""

    name: str
    ok: bool
    detail: str


def verify(folder: Path, source: View | None, progress: Progress) -> list[Check]:
    """Run all checks on a folder we wrote; `source` is the original it was made from."""
    manifest = Manifest.load(folder)
    found = [_run("files are the ones that were written", lambda: _digests(folder, manifest, progress))]
    state: dict[str, View] = {}
    found.append(_run("names, shapes and experts make the whole model", lambda: _complete(folder, state)))
    if "view" in state:
        view = state["view"]
        found.append(_run("every value is finite", lambda: _finite(view, manifest, progress)))
        if view.formats:
            found.append(_run("every packed matrix decodes", lambda: _decodes(view)))
        found.append(_run(_loads(view, manifest), lambda: _stock(folder, view, manifest)))
        if mixtures_ahead(view.blueprint):
            found.append(_run("prediction layers are as the config says", lambda: _ahead(view, manifest)))
        found.append(_run("counts are those of the plan", lambda: _planned_counts(view.blueprint, manifest)))
        if source is not None:
            found.append(_run("every tensor is what the plan makes of the original",
                              lambda: _against(view, source, manifest, progress)))  # fmt: skip
    return found


def _loads(view: View, manifest: Manifest) -> str:
    if own_packing(view) and not _stopped_at(view, manifest):
        return "moespresso.load loads it and agrees"
    plugin = is_unequal(view.checkpoint.config)
    return f"{'transformers with moespresso' if plugin else 'stock transformers'} loads it and agrees"


def _stopped_at(view: View, manifest: Manifest) -> list[str]:
    """What stock transformers cannot read of a folder that was packed for it."""
    return view.unreadable if manifest.packing == "stock" else []


def _run(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except (UserError, AssertionError) as error:
        return Check(name, False, str(error))
    except Exception as error:  # whatever a library raises on a damaged folder is a finding, not a crash
        first = (str(error).splitlines() or [""])[0]
        return Check(name, False, f"{type(error).__name__}: {first}")


def _require(holds: bool, words: str) -> None:
    if not holds:
        raise AssertionError(words)


def _digests(folder: Path, manifest: Manifest, progress: Progress) -> str:
    files = manifest.files
    progress.stage("check files", len(files))
    for name, facts in files.items():
        path = folder / name
        _require(path.is_file(), f"{name} is missing")
        _require(
            path.stat().st_size == facts.bytes, f"{name} has {path.stat().st_size} bytes, not {facts.bytes}"
        )
        _require(_sha256(path) == facts.sha256, f"{name} was changed after it was written")
        progress.advance()
    strangers = sorted({path.name for path in folder.iterdir()} - set(files) - {MANIFEST})
    shards = [name for name in strangers if name.endswith((".safetensors", ".json"))]
    _require(not shards, f"{', '.join(shards)} was not written by moespresso and may be loaded with it")
    return f"{len(files)} files, SHA-256 equal"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _complete(folder: Path, state: dict[str, View]) -> str:
    checkpoint = open_checkpoint(folder)
    blueprint = read_blueprint(checkpoint)
    state["view"] = View(checkpoint, blueprint, Plan(blueprint.digest))
    experts = sum(layer.experts for layer in blueprint.moe_layers)
    outside = f", {len(blueprint.outside)} outside the language model" if blueprint.outside else ""
    return (
        f"{len(blueprint.entries)} tensors, {experts} experts in {len(blueprint.moe_layers)} layers{outside}"
    )


def _finite(view: View, manifest: Manifest, progress: Progress) -> str:
    bad: dict[str, int] = {}
    progress.stage("check values", len(view.stored))
    with Reader(view.checkpoint.folder) as reader:
        for piece in view.stored:
            count = sum(map(count_nonfinite, reader.tensor(piece.source.ref).reshape(-1).split(_CHUNK)))
            if count:
                bad[piece.name] = count
            progress.advance()
    _require(
        bad == manifest.nonfinite,
        f"not finite: {', '.join(f'{name} ({count})' for name, count in bad.items())}",
    )
    return f"{sum(bad.values())} non-finite values, as the manifest says" if bad else "all of them"


def _decodes(view: View) -> str:
    """Stored shapes are the matrices' own, no scale is zero, and the layout's own library, where there is
    one, decodes the same."""
    counts: Counter[str] = Counter()
    with Reader(view.checkpoint.folder) as reader:
        for piece in view.pieces:
            packed = piece.source.ref.packed
            if packed is None:
                continue
            held = codec_in(piece.source.ref)
            shape = tuple(reader.tensor(piece.source.ref).shape)
            _require(shape == piece.shape, f"{piece.name} decodes to {shape}, not {piece.shape}")
            scale = reader.tensor(packed.parts[held.scaled])
            _require(
                not held.rounds or held.zero_scales or bool((scale != 0).all()),
                f"{piece.name} has scales that are zero",
            )
            counts[held.label(packed.format)] += 1
    counted = [f"{count} matrices of {bits}" for bits, count in sorted(counts.items())]
    return ", ".join([*counted, *filter(None, [_by_library(view.checkpoint)])])


def _by_library(checkpoint: Checkpoint) -> str:
    from moespresso.verify.library import decoded_alike  # which takes a while to import

    return decoded_alike(checkpoint)


def _planned_counts(blueprint: Blueprint, manifest: Manifest) -> str:
    """Every layer has the experts, and the parts, that the manifest says."""
    planned = manifest.layers
    layers = [layer.facts() for layer in blueprint.layers]
    _require(len(layers) == len(planned), f"it has {len(layers)} layers, the plan says {len(planned)}")
    for layer, wanted in zip(layers, planned, strict=True):
        _require(layer == wanted, f"L{layer['index']} is {layer}, the plan says {wanted}")
    counts = sorted({layer.experts for layer in blueprint.moe_layers})
    if not counts:
        return f"{len(layers)} layers without experts"
    return f"{len(layers)} layers, {' or '.join(map(str, counts))} experts in each of {len(blueprint.moe_layers)}"


def _ahead(view: View, manifest: Manifest) -> str:
    """Every prediction layer has as many experts, as wide, as the config counts for all layers."""
    layers = mixtures_ahead(view.blueprint)
    if not manifest.plan.mtp.keep and not all(map(is_understood, layers.values())):
        return (
            "not known: the names of their experts are not understood, and they were passed through unchanged"
        )
    reason = misfit_ahead(view)
    _require(reason is None, str(reason))
    return f"{len(layers)} of them, {size_of(next(iter(layers.values())))} each"


def _stock(folder: Path, view: View, manifest: Manifest) -> str:
    """Load with stock transformers and compare logits with the streamed forward of the same files."""
    if view.blueprint.cost().bytes > STOCK_BYTES:
        return (
            f"not run: the model is larger than {STOCK_BYTES >> 30} GiB (names and shapes were checked above)"
        )
    stopped = _some(set(_stopped_at(view, manifest)))
    _require(
        not stopped,
        f"it stops at {stopped}, which it converts as it reads, but cannot beside packed matrices",
    )
    with Tensors(folder, allow_nonfinite=True) as tensors:
        meta = view.meta_model(tensors, torch.float32, torch.device("cpu"))
        if other_layout(view):
            engine = engine_of(view.checkpoint.config)
            return f"not run: the layout of {engine} needs an engine of its own; names, shapes and codes were checked"
        if own_packing(view):
            whole = load_model(view, torch.float32, "cpu")
            _generates(whole, view.blueprint.vocab)
            return f"stock loaders stop at its format; {_same_logits(whole, meta, view.blueprint.vocab)}"
        model, info = _loaded(folder, view, meta)
        outside = {meta.in_memory(entry.ref.name) for entry in view.blueprint.outside}
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            wrong = {str(key) for key in info[kind]} - outside
            _require(not wrong, f"{kind.replace('_', ' ')}: {', '.join(sorted(wrong)[:3])}")
        _generates(model, view.blueprint.vocab)
        if manifest.nonfinite:
            return "no key missing, unexpected or mismatched; logits not compared, since the source was not finite"
        return f"no key missing, unexpected or mismatched; {_same_logits(model.eval(), meta, view.blueprint.vocab)}"


def _loaded(folder: Path, view: View, meta: MetaModel) -> tuple[nn.Module, dict[str, Any]]:
    """What stock transformers loads, in float32, and what it says about the tensors."""
    with redirect_stderr(StringIO()):  # unpacking shows progress bars of its own
        loaded: Any = own_class(view.checkpoint.config).from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        model, info = loaded
        if view.formats:
            _unpack(model, view, meta)
    return model, info


def _unpack(model: Any, view: View, meta: MetaModel) -> None:
    """Unpack the matrices that the loader left packed (it would at the first forward), and compute in
    float32.

    Scales must have the dtype they are stored in again, since weights are rounded to that.
    """
    packed = {meta.in_memory(piece.name).removesuffix("weight") + "weight_scale": piece.ref.dtype for piece in view.pieces
              if piece.ref.packed is not None}  # fmt: skip
    for name, parameter in model.named_parameters():
        if name in packed:
            parameter.data = parameter.data.to(TORCH_DTYPES[packed[name]])
    model.hf_quantizer.compressor.decompress_model(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()


@torch.inference_mode()
def _generates(model: Any, vocab: int) -> None:
    """Have the model go on with a cache, which a hybrid that lost its attention cannot count by; raises what
    it raises."""
    ids = torch.arange(1, 4).remainder(vocab).unsqueeze(0)
    asked = {
        "min_new_tokens": 2,
        "max_new_tokens": 2,
        "do_sample": False,
        "use_cache": True,
        "pad_token_id": 0,
    }
    model.generate(ids, attention_mask=torch.ones_like(ids), **asked)


@torch.inference_mode()
def _same_logits(model: nn.Module, meta: MetaModel, vocab: int) -> str:
    ids = torch.randint(vocab, (2, 32), generator=torch.Generator().manual_seed(0))
    stock = model(input_ids=ids, use_cache=False).logits.float()
    hidden = sweep(meta, ids, torch.ones_like(ids, dtype=torch.bool))
    with meta.outer():
        streamed = meta.logits(hidden.flatten(0, 1)).view_as(stock)
    distance = float((stock - streamed).abs().max() / stock.abs().max())
    _require(
        distance <= _TOLERANCE, f"its logits differ from the streamed ones by {distance:.1e} of the largest"
    )
    return f"logits within {distance:.0e} of the largest"


def _against(view: View, source: View, manifest: Manifest, progress: Progress) -> str:
    _by_library(source.checkpoint)  # what was misread there would be wrong here in the same way
    wanted_view = _as_planned(view, source, manifest)
    config = wanted_view.config
    changed = [
        key
        for key in config.keys() | view.checkpoint.config.keys()
        if config.get(key) != view.checkpoint.config.get(key)
    ]
    _require(not changed, f"config.json differs from the plan's in {_some(set(changed))}")
    wanted = {piece.name: piece for piece in wanted_view.stored}
    have = {piece.name: piece.ref for piece in view.stored}
    files = {piece.name: piece.source.ref for piece in view.stored}
    _require(
        wanted.keys() == have.keys(), f"tensors differ from the plan's: {_some(wanted.keys() ^ have.keys())}"
    )
    progress.stage("compare tensors", len(wanted))
    with (
        Tensors(source.checkpoint.folder, allow_nonfinite=True) as old,
        Reader(view.checkpoint.folder) as new,
    ):
        for name, piece in wanted.items():
            equal = have[name].shape == piece.shape and have[name].dtype == piece.ref.dtype
            _require(
                equal, f"{name} is {have[name].dtype} {have[name].shape}, not {piece.ref.dtype} {piece.shape}"
            )
            _require(
                piece.fitted or _same(old.chunks(piece), new.tensor(files[name])),
                f"{name} is not what the plan makes of the original",
            )
            progress.advance()
    fitted = sum(piece.fitted for piece in wanted.values())
    apart = (
        f"; {fitted} were fitted to text or weights, and are checked by name, shape and digest"
        if fitted
        else ""
    )
    return f"config.json, and {len(wanted) - fitted} tensors byte for byte{apart}"


def _as_planned(view: View, source: View, manifest: Manifest) -> View:
    """What the plan makes of the original, in the family and form that it was written in."""
    if manifest.apart:
        source = apart_view(source) or source
    plan = validated(manifest.plan, source.source)
    equivalents = [
        each for each in (source, *equivalent_views(source)) if each.source.family == view.source.family
    ]
    _require(bool(equivalents), f"it is a {view.source.family} model, the original {source.source.family}")
    return replace(equivalents[0], plan=plan, stock=manifest.stock, layout=manifest.layout)


def _same(chunks: Iterator[torch.Tensor], written: torch.Tensor) -> bool:
    """Compare bytes, so that NaN equals itself and -0.0 differs from 0.0."""
    flat, start = written.reshape(-1).view(torch.uint8), 0
    for chunk in chunks:
        raw = chunk.contiguous().view(torch.uint8)
        if not torch.equal(raw, flat[start : start + raw.numel()]):
            return False
        start += raw.numel()
    return start == flat.numel()


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3])
