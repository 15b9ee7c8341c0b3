"""A result folder: claimed, written, described and finished, the manifest last.

The report is made from the manifest, so it is the same for a folder that was finished before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moespresso._versions import VERSION
from moespresso.build import View, engine_of, needs_engine, one_format, write_folder
from moespresso.checkpoint import (
    MANIFEST,
    FileFacts,
    Journal,
    Manifest,
    Origin,
    Written,
    claim,
    finish,
    sweep_up,
    write_text,
)
from moespresso.core.blueprint import LayerSpec
from moespresso.core.errors import UserError
from moespresso.core.format import Format
from moespresso.core.runtime import Runtime
from moespresso.core.unit import Unit
from moespresso.effect import dropped_units, is_part, merged_into, mixtures_ahead, remains, size_of
from moespresso.export import formed
from moespresso.fit import Clock
from moespresso.formats import codec_in, codec_named, codec_of
from moespresso.model import auto_class, is_apart, is_unequal, skeleton
from moespresso.report import LayerScores, Report, machine, model_card, shareable, source_licence, versions
from moespresso.run.pipeline import Decided
from moespresso.run.recipe import TargetName, parse_size
from moespresso.stream import PeakMemory, peak_rss_bytes


@dataclass(frozen=True)
class Order:
    """Which result is wanted: the folder `out`, the digest of all that it depends on (`identity`), who must
    load it, and what its manifest says was asked for (`recipe`); `size` is what may remain, where somebody
    said so."""

    out: Path
    identity: str
    target: TargetName
    recipe: Mapping[str, Any]
    seed: int = 0
    size: str | None = None


def produce(
    view: View, order: Order, make: Callable[[Path], Decided], runtime: Runtime, clock: Clock
) -> Report:
    """Claim the folder, make the plan, write everything, the manifest last."""
    out = order.out
    done = _already_done(out, order.identity) if runtime.resume else None
    if done is not None:
        report = _report(view, done, clock)
        return replace(report, out=str(out), notes=(*report.notes, "already finished: nothing was done"))
    with claim(out, view.checkpoint.folder, resume=runtime.resume) as work, PeakMemory() as memory:
        journal = Journal(out, order.identity)
        decided = make(work)
        pressed = formed(order.target, replace(view, plan=decided.plan, fits=decided.fits))
        with clock.phase("build"):
            files, left = write_folder(pressed, out, journal, runtime)
        notes = [*left, *source_notes(view), *form_notes(pressed), *_size_notes(pressed, order),
                *_coverage_notes(decided.coverage)]  # fmt: skip
        manifest = _manifest(pressed, order, files, decided, notes)
        report = _report(view, manifest, clock)
        card = model_card(report, _hub_id(view), source_licence(view.checkpoint.folder))
        readme = Written("README.md", *write_text(out / "README.md", card))
        finish(out, replace(manifest, files={**manifest.files, readme.name: _facts(readme)}))
    return replace(report, out=str(out), peak_rss_bytes=peak_rss_bytes(), peak_anonymous_bytes=memory.peak)


def _already_done(out: Path, identity: str) -> Manifest | None:
    if not (out / MANIFEST).is_file():
        return None
    manifest = Manifest.load(out)
    if manifest.identity != identity:
        raise UserError(
            f"{out} holds another finished result: choose another --out, or add --no-resume to replace it"
        )
    sweep_up(out)  # a run killed between its manifest and its last breath leaves its work folder
    return manifest


def _hub_id(view: View) -> str | None:
    """`owner/name` of a model in the hub's cache (`models--owner--name/snapshots/REVISION`), else None."""
    cached = [part for part in view.checkpoint.folder.parts if part.startswith("models--")]
    return cached[-1].removeprefix("models--").replace("--", "/") if cached else None


def _facts(file: Written) -> FileFacts:
    return FileFacts(file.nbytes, file.sha256)


def _manifest(
    view: View, order: Order, files: Sequence[Written], decided: Decided, notes: Sequence[str]
) -> Manifest:
    nonfinite = {name: count for file in files for name, count in file.nonfinite.items()}
    kept_warnings = [
        f"{name}: {count} NaN or infinite values, kept as they are" for name, count in nonfinite.items()
    ]
    name = _hub_id(view) or view.checkpoint.folder.resolve().name
    return Manifest(
        moespresso=VERSION,
        identity=order.identity,
        source=Origin(name, view.source.family, view.source.digest),
        recipe=shareable({key: value for key, value in order.recipe.items() if key != "model"}),
        plan=view.plan,
        cost=view.blueprint.cost(),
        experts={layer.index: layer.experts for layer in view.blueprint.moe_layers},
        family=view.blueprint.family,
        target=order.target,
        stock=view.stock,
        layout=view.layout,
        packing=_packing(view),
        plugin=is_unequal(view.config),
        layers=tuple(layer.facts() for layer in view.blueprint.layers),
        fitted=tuple(sorted(name for name in decided.fits if not is_part(name))),
        coverage=decided.coverage,
        scores=decided.scores,
        protected=frozenset(decided.protected),
        files={file.name: _facts(file) for file in files},
        nonfinite=nonfinite,
        warnings=(*decided.warnings, *kept_warnings),
        notes=(*decided.notes, *notes),
        seed=order.seed,
        versions=versions(),
        apart=is_apart(view.checkpoint),
    )


def _packing(view: View) -> str:
    """Who reads the packed matrices: `stock` transformers, moespresso's `own` loader, or the engine of
    another layout."""
    if not view.formats:
        return ""
    engine = engine_of(view.config)
    return engine if needs_engine(engine) else "stock" if one_format(view) else "own"


def _report(view: View, manifest: Manifest, clock: Clock) -> Report:
    """What came of it, from what the folder says of itself and the model that it was made from."""
    plan = manifest.plan
    left = remains(plan, view.source)
    return Report(
        recipe={"model": manifest.source.name, **manifest.recipe},
        plan=plan,
        before=(view.origin or view.source).cost(),
        after=manifest.cost,
        scores={layer.index: _layer_scores(layer, manifest) for layer in view.source.moe_layers
                if plan.stages and layer.index in left.experts},
        gone={unit: manifest.scores.get(unit) for unit in sorted(dropped_units(plan))},
        seconds=clock.seconds,
        machine=machine(),
        versions=manifest.versions,
        plugin=manifest.plugin,
        packing=manifest.packing,
        auto_class=auto_class(view.checkpoint.config),
        warnings=manifest.warnings,
        notes=manifest.notes,
        peak_rss_bytes=peak_rss_bytes(),
    )  # fmt: skip


def _layer_scores(layer: LayerSpec, manifest: Manifest) -> LayerScores:
    plan = manifest.plan
    kept = plan.kept_experts(layer.index, layer.experts)
    units = [Unit(layer.index, "experts", expert) for expert in range(layer.experts)]
    values = [manifest.scores[unit] for unit in units if unit in manifest.scores]
    return LayerScores(
        kept=kept,
        dropped=tuple(expert for expert in range(layer.experts) if expert not in kept),
        values=tuple(values) if len(values) == len(units) else (),
        name=str(plan.stages[-1].method.get("score", "")),
        merged=merged_into(plan, layer.index),
        protected=tuple(expert for expert, unit in enumerate(units) if unit in manifest.protected),
    )


def _size_notes(view: View, order: Order) -> list[str]:
    """Say when what remains is more than was asked for: amounts are chosen before it is known which layers
    go."""
    total, got = (view.origin or view.source).cost().bytes, view.blueprint.cost().bytes
    asked = parse_size(order.size, total) if order.size is not None else got
    if got <= asked:
        return []
    return [
        f"--size {order.size} is {asked} bytes, but {got} remain, since lighter layers went than was reckoned with: ask for less"
    ]


def form_notes(view: View) -> list[str]:
    """Say in what form the result is written, where that is not the source's own."""
    notes: list[str] = []
    if view.origin is not None:
        notes.append(
            f"written as a {view.source.family} model, whose code computes the same and can say that layers lack a part"
        )
    if is_apart(view.checkpoint):
        notes.append(
            "experts are written apart, as the family's own layout has them; the source has those of a layer in one tensor"
        )
    if view.stubs:
        width = view.blueprint.layers[view.stubs[0]].width
        names = ", ".join(f"L{view.remains.layers[position]}" for position in view.stubs)
        notes.append(f"in place of what {names} lost stands a dense part of zeros, {width} wide")
    if len(view.remains.layers) < len(view.source.layers) and _adds_by_number(view.config):
        notes.append(
            "layers were removed, and what its tower sees is added behind the first layers by their number (deepstack): "
            "images are answered by other layers than before, which no text shows"
        )
    notes += [*format_notes(view), *ahead_notes(view)]
    joined = [piece.name for piece in view.pieces if piece.joins]
    if joined:
        notes.append(
            f"{len(joined)} tensors (such as {joined[0]}) are stored in one piece, since transformers 5.23 does not join their parts "
            "beside packed matrices; an engine that wants these apart will not find them"
        )
    again = sum(piece.encoding is not None and piece.encoding.again for piece in view.pieces)
    if again:
        notes.append(
            f"{again} matrices that were packed have new values, and were rounded to nearest in their old format"
        )
    notes += _plain_notes(view)
    layouts = {piece.ref.packed.layout for piece in view.pieces if piece.ref.packed is not None}
    notes += sorted({tried for layout in layouts if (tried := codec_named(layout).tried)})
    if _packing(view) == "own":
        notes.append(
            "stock loaders stop at its packed matrices, which they would read wrongly: moespresso.load reads them"
        )
    elif is_unequal(view.config):
        notes.append(
            "layers differ: transformers loads it where moespresso is imported (`import moespresso`)"
        )
    return notes


def _plain_notes(view: View) -> list[str]:
    """Say what was stored as less than it is, and why it no longer is."""
    before = [piece.source.ref.packed for piece in view.pieces if piece.plain]
    if before and view.layout is not None and not codec_named(view.layout).packs:
        return [f"{len(before)} matrices that were packed are stored as what they decode to"]
    small = sum(packed is not None and codec_named(packed.layout).own for packed in before)
    mixed = sum(piece.plain and piece.take is None and piece.source.ref.packed is not None
                and not codec_in(piece.source.ref).own for piece in view.pieces)  # fmt: skip
    said = {
        "that were stored with a mask, as factors or in part have new values, and are stored plainly": small,
        "that were packed are stored as what they decode to: config.json can name one packing, and a step packs in another": mixed,
        "that were packed lose rows (routers), and what is left is stored plainly": len(before)
        - small
        - mixed,
    }
    return [f"{count} matrices {words}" for words, count in said.items() if count]


def _coverage_notes(coverage: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How many tokens the experts saw, and which of them were helped otherwise."""
    tokens = sorted(count for row in coverage.values() for count in row["tokens"])
    if not tokens:
        return []
    words = f"experts saw {tokens[0]:,} to {tokens[-1]:,} tokens each (median {tokens[len(tokens) // 2]:,})"
    helped = [f"{layer}.E{expert}" for layer, row in coverage.items() for expert in row["remedies"]]
    ways = sorted({way for row in coverage.values() for way in row["remedies"].values()})
    if not helped:
        return [words]
    examples = ", ".join(helped[:5]) + (f" and {len(helped) - 5} more" if len(helped) > 5 else "")
    return [f"{words}; {len(helped)} without any were treated by {' and '.join(ways)}: {examples}"]


def format_notes(view: View) -> list[str]:
    """How many bits the packed matrices have, scales and zeros included."""
    sums: dict[tuple[str, Format], list[int]] = {}
    ranks: dict[tuple[str, Format], set[int]] = {}
    for piece in view.pieces:
        packed = piece.ref.packed
        if packed is not None:
            kind = piece.unit.part, replace(packed.format, rank=0)  # ranks may be as many as layers
            ranks.setdefault(kind, set()).add(packed.format.rank)
            row = sums.setdefault(kind, [0, 0])
            row[0], row[1] = row[0] + piece.ref.nbytes, row[1] + piece.ref.numel
    return [
        f"{part}: {_format_words(format, ranks[part, format])}: {8 * size / count:.2f} bits a weight in all"
        for (part, format), (size, count) in sums.items()
    ]


def _format_words(format: Format, ranks: set[int]) -> str:
    return codec_of(format).words(format, " to ".join(map(str, sorted({min(ranks), max(ranks)}))))


def _adds_by_number(config: Mapping[str, Any]) -> bool:
    vision = config.get("vision_config")
    return isinstance(vision, dict) and bool(vision.get("deepstack_visual_indexes"))


def source_notes(view: View) -> list[str]:
    """Say what is unusual about a checkpoint: files that are not the model, tensors that its class does not
    know, a head that is tied and stored."""
    notes = [*view.checkpoint.notes, *_outside_notes(view)]
    if view.blueprint.both_stored:
        notes.append(
            "config.json ties the head to the embedding, but the files hold both: where they differ each keeps its own, as in "
            "transformers (engines that go by the config alone tie them: say tie_word_embeddings: false in it)"
        )
    return notes


def _outside_notes(view: View) -> list[str]:
    """What the model's class does not know, prediction layers aside."""
    outside = [entry for entry in view.source.outside if entry.ahead is None]
    if not outside:
        return []
    example = outside[0].ref.name
    return [
        f"{len(outside)} tensors outside the language model (such as {example}) are passed through unchanged"
    ]


def ahead_notes(view: View) -> list[str]:
    """What prediction layers there are, how large, and what they mean beside packed experts."""
    ahead = [entry for entry in view.blueprint.outside if entry.ahead is not None]
    if not ahead:
        gone = [entry for entry in view.source.outside if entry.ahead is not None]
        size = sum(entry.ref.nbytes for entry in gone)
        return [f"prediction layers are left out: {len(gone)} tensors, {size:,} bytes"] if gone else []
    numbers = {entry.ahead.layer for entry in ahead if entry.ahead is not None}
    held = {str(size) for entries in mixtures_ahead(view.blueprint).values() if (size := size_of(entries))}
    what = f", {' or '.join(sorted(held))} each" if held else ""
    notes = [
        f"{len(numbers)} prediction layers (multi-token prediction{what}): {len(ahead)} tensors, "
        f"{sum(entry.ref.nbytes for entry in ahead):,} bytes, beside the language model"
    ]
    if held and any(piece.ref.packed is not None and piece.unit.part == "experts" for piece in view.pieces):
        notes.append(
            "prediction layers stay unrounded; transformers 5.23 loads none beside packed experts (its MtpModel finds their experts "
            "missing, packed or not): press with --mtp drop if they are not wanted there"
        )
    if len(view.remains.layers) < len(view.source.layers) and (lost := _unfound(view)):
        notes.append(
            f"the {view.source.family} class of transformers 5.23 looks for prediction layers under their published numbers only, so it "
            f"does not find {lost}, where engines look that count from the last decoder layer"
        )
    return notes


def _unfound(view: View) -> str | None:
    """The layer number at which the family's class does not look for prediction layers, as a tensor's
    name."""
    known = skeleton(view.config, view.source.place).model._keys_to_ignore_on_load_unexpected or ()  # pyright: ignore[reportPrivateUsage]
    names = (
        entry.ref.name for entry in view.blueprint.outside if entry.ahead is not None and entry.unit.layer
    )
    return next((name for name in names if not any(re.search(each, name) for each in known)), None)
