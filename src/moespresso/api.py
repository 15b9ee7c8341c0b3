"""One function per verb; the command line and Python walk through the same doors.

Each takes a checkpoint (folder or hub id), a `Recipe` and options that are followed in the place of its
fields (what is wanted), and a `Runtime` (how it is carried out), and raises `UserError` with one sentence
before anything is written when that cannot be done.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel

import moespresso.methods  # noqa: F401  (registers them)
from moespresso._place import place, real, sayable, typed
from moespresso._versions import VERSION
from moespresso.build import (
    Tensors,
    View,
    config_view,
    load_model,
    make_meta_model,
    num_positions,
    one_format,
    open_view,
)
from moespresso.bundled import MODELS, TEXT
from moespresso.checkpoint import claim, locate, read_json, write_text
from moespresso.core.errors import UserError, did_you_mean, text_missing
from moespresso.core.later import not_yet
from moespresso.core.method import Step
from moespresso.core.plan import Plan
from moespresso.core.runtime import Runtime
from moespresso.core.stats import Stats, stats_key
from moespresso.data import Batches, Source, calibration, load_tokenizer, sequences
from moespresso.effect import fits_on_text, needs_fit, step_of, treats_matrices, validated
from moespresso.export import check_even, formed
from moespresso.fit import Clock, Job, see_text
from moespresso.fit import measure as measure_view
from moespresso.formats import codec_in, codecs
from moespresso.model import is_converted, is_unequal, quiet_transformers
from moespresso.quality import evaluate as evaluate_models
from moespresso.report import Report, describe_methods
from moespresso.run import (
    Decided,
    NotOnThisModel,
    Options,
    Order,
    Recipe,
    ahead_notes,
    decide,
    fit_again,
    format_notes,
    in_equivalent,
    in_some_form,
    produce,
    rehearse,
    row_length,
    say_shorter,
    source_notes,
)
from moespresso.stream import must_spill
from moespresso.verify import verify as verify_folder

quiet_transformers()

# Tokens in a row of evaluation, where nothing else is asked for.
EVALUATED = 512


def _with_options(model: str | Path, recipe: Recipe | None, options: Options) -> Recipe:
    return (recipe or Recipe()).with_options(model=model, **options)


def inspect(model: str | Path) -> dict[str, Any]:
    """What a checkpoint is and weighs, from its config and headers, or from a config.json alone."""
    alone = _config_alone(typed(model, "MODEL"))
    view = config_view(place(model)) if alone else open_view(locate(model))
    blueprint, cost = view.blueprint, view.blueprint.cost()
    notes = [*source_notes(view), *format_notes(view), *ahead_notes(view)]
    if alone:
        notes.append("priced from its config alone: no tensor was seen")
    if is_unequal(view.checkpoint.config):
        notes.append("its layers differ: transformers loads it where moespresso is imported")
    if blueprint.opaque:
        notes.append(
            f"its experts are left whole ({blueprint.opaque}): blocks, and attention, can be treated"
        )
    if is_converted(view.checkpoint):
        notes.append(
            f"read as {blueprint.family}, whose code computes the same: transformers does not have its own family"
        )
    if "auto_map" in view.checkpoint.config:
        notes.append(
            "config.json names custom code (auto_map), which is never run: the family is transformers' own"
        )
    return {
        "family": blueprint.family,
        "digest": blueprint.digest,
        "num_layers": len(blueprint.layers),
        "layers": [
            {"index": layer.index, "mixer": layer.mixer, "experts": layer.experts, "shared_experts": layer.shared_experts,
             "top_k": layer.top_k, "groups": layer.groups, "width": layer.width, "skipped": layer.skipped,
             "parts": sorted(layer.bodies), **({"widths": list(layer.widths)} if layer.widths else {})}
            for layer in blueprint.layers
        ],
        "hidden": blueprint.hidden,
        "vocab": blueprint.vocab,
        "tied": blueprint.tied,
        "params": {"total": cost.params, "active": cost.active_params},
        "bytes": {"total": cost.bytes} | blueprint.bytes_by_part(),
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "flops_2048": cost.flops,
        "peak_load_bytes": cost.peak_load_bytes,
        "notes": notes,
    }  # fmt: skip


def _config_alone(name: str) -> bool:
    """Whether this names a config, and not a folder, a page of the hub or another file of a checkpoint."""
    file = Path(name)
    if not name.endswith(".json") or name.endswith(".index.json") or "://" in name or file.is_dir():
        return False
    if file.name == "config.json" or not (file.is_file() and (file.parent / "config.json").is_file()):
        return True
    with suppress(UserError):
        return "model_type" in read_json(file)
    return False


def measure(
    model: str | Path,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    runtime: Runtime | None = None,
    **options: Unpack[Options],
) -> Stats:
    """Measure what the recipe's steps need and save it to `out`; an interrupted measurement is continued."""
    runtime, recipe, out = runtime or Runtime(), _with_options(model, recipe, options), place(out, "--out")
    view = open_view(locate(model))
    _check_file(out, view.checkpoint.folder)
    try:
        view, steps = rehearse(view, recipe)
    except NotOnThisModel:
        raise
    except UserError:  # the target cannot load what comes of it, which is no matter of measuring
        view, steps = rehearse(view, recipe.model_copy(update={"target": "plugin"}))
    _, batches = _calibration(view, recipe, steps)
    must_spill(view, batches, runtime)
    work_folder = out.parent / f".{out.name}.moespresso"
    with claim(work_folder, view.checkpoint.folder, resume=runtime.resume) as work:
        stats = measure_view(Job(view, work, batches, runtime), steps, view)
        write_text(out, stats.to_json())
        shutil.rmtree(work_folder)
    return stats


def _check_file(out: Path, source: Path) -> None:
    """A file to write must be one that can be, and must not lie in the source: found out before any work is
    done for it."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give a file name")
    if lost := next((part for part in (out, *out.parents) if part.is_symlink() and not part.exists()), None):
        raise UserError(
            f"--out {out}: {lost} is a link that leads nowhere: take it away, or choose another place"
        )
    if out.exists() and not out.is_file():
        raise UserError(
            f"--out {out} is a device or a pipe, and a result is put in the place of a file: give a file name"
        )
    if under := next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None):
        raise UserError(f"--out {out} lies under {under}, which is a file: choose another place")
    if real(source) in real(out).parents:
        raise UserError(
            f"--out {out} lies in the source folder {source}, which is never written to: choose another"
        )
    try:
        with tempfile.TemporaryFile(dir=next(parent for parent in out.absolute().parents if parent.exists())):
            pass
    except PermissionError:
        raise
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}): choose another place") from error


def plan(
    model: str | Path,
    *,
    stats: str | Path | None = None,
    out: str | Path | None = None,
    recipe: Recipe | None = None,
    runtime: Runtime | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Decide from saved stats (or measure now, where text is given), and save the plan to `out`."""
    runtime, recipe = runtime or Runtime(), _with_options(model, recipe, options)
    view = open_view(locate(model))
    file = None if out is None else place(out, "--out")
    if file is not None:
        _check_file(file, view.checkpoint.folder)
    view, steps = rehearse(view, recipe)
    measured = _load_stats(place(stats, "--stats"), view) if stats is not None else None
    # A later step that is re-scored needs the text even where the first one's stats are given.
    if measured is None:
        _, batches = _calibration(view, recipe, steps)
    else:
        batches = _same_text(view, measured.calibration, recipe, "these stats were measured on")
    with tempfile.TemporaryDirectory() as work:
        decided = decide(Job(view, Path(work), batches, runtime), steps, measured)
    decided_plan = _with_provenance(decided, recipe.seed, batches).plan
    formed(recipe.target, replace(view, plan=decided_plan))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, decided_plan.to_json() + "\n")
    return decided_plan


def _load_stats(path: Path, view: View) -> Stats:
    stats = Stats.load(path)
    if stats.blueprint != view.source.digest:
        raise UserError(
            f"{path} was measured on another checkpoint than {view.source.place}: measure this one"
        )
    return stats


def _with_provenance(decided: Decided, seed: int, batches: Batches | None) -> Decided:
    measured = next((stats.calibration for stats in decided.stats if stats.calibration), None)
    # A step that searches takes text and has no stats.
    calibrated = dict(measured or (batches.describe() if batches is not None else {}))
    # A plan is made to be shared: it names texts, not where they lie on somebody's disk.
    if "sources" in calibrated:
        calibrated["sources"] = [{**source, "name": Path(source["name"]).name if Path(source["name"]).is_absolute()
                                  else source["name"]} for source in calibrated["sources"]]  # fmt: skip
    plan = replace(decided.plan, calibration=calibrated, made_by=f"moespresso {VERSION}", seed=seed)
    return replace(decided, plan=plan)


def press(
    model: str | Path,
    *,
    out: str | Path,
    recipe: Recipe | None = None,
    runtime: Runtime | None = None,
    **options: Unpack[Options],
) -> Report:
    """Measure, decide and build in one go; killed anywhere and run again it ends with the same bytes."""
    runtime, clock, recipe = runtime or Runtime(), Clock(), _with_options(model, recipe, options)
    with clock.phase("open"):
        view, steps = rehearse(open_view(locate(model)), recipe)
        recipe, batches = _calibration(view, recipe, steps)
        must_spill(view, batches, runtime)
    tokens = batches.digest if batches is not None else ""
    settings = json.dumps([step.describe() for step in steps], sort_keys=True)
    identity = stats_key("press", VERSION, view.source.digest, settings, tokens, recipe.target, str(recipe.seed),
                         recipe.mtp, runtime.dtype)  # fmt: skip
    order = Order(
        place(out, "--out"), identity, recipe.target, recipe.resolved(), recipe.seed, recipe.budget.size
    )

    def make(work: Path) -> Decided:
        return _with_provenance(decide(Job(view, work, batches, runtime, clock), steps), recipe.seed, batches)

    return produce(view, order, make, runtime, clock)


def build(
    model: str | Path,
    *,
    plan: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    runtime: Runtime | None = None,
    **options: Unpack[Options],
) -> Report:
    """Do exactly what a saved plan says, for the recipe's target and with its text; nothing else of it is
    asked."""
    runtime, clock, recipe = runtime or Runtime(), Clock(), _with_options(model, recipe, options)
    target = recipe.target
    with clock.phase("open"):
        saved = Plan.load(place(plan, "--plan"))

        def tried(form: View) -> View:
            validated(saved, form.source, steps=True)
            return in_equivalent(form, lambda form: formed(target, replace(form, plan=saved)).check_fits())

        steps = [step_of(stage) for stage in saved.stages if treats_matrices(stage)]
        view = in_some_form(open_view(locate(model)), steps, tried)
    batches = _text_of_plan(view, saved, recipe)
    request = {"calibration": dict(saved.calibration), "steps": [dict(stage.method) for stage in saved.stages],
            "target": target, "mtp": saved.mtp.wish, "seed": saved.seed}  # fmt: skip
    identity = stats_key("build", VERSION, view.source.digest, saved.digest, target, runtime.dtype,
                         batches.digest if batches is not None else "")  # fmt: skip
    order = Order(place(out, "--out"), identity, target, request, saved.seed)

    def make(work: Path) -> Decided:
        return fit_again(Job(view, work, batches, runtime, clock), saved)

    return produce(view, order, make, runtime, clock)


def _text_of_plan(view: View, plan: Plan, recipe: Recipe) -> Batches | None:
    """The text given to `build`, which must be the text the plan was made on; a plan that is fitted needs
    it."""
    wanted = plan.calibration
    fitted = any(
        "text" in needs_fit(plan, number) or fits_on_text(stage) for number, stage in enumerate(plan.stages)
    )
    if not recipe.calibration.texts and fitted:
        raise text_missing("this plan is fitted on", ", as it was made with")
    if not (fitted or "digest" in wanted):
        return None
    return _same_text(view, wanted, recipe, "the plan was calibrated on")


def _same_text(view: View, wanted: Mapping[str, Any], recipe: Recipe, where: str) -> Batches | None:
    """The recipe's texts drawn as `wanted` describes, None where there are none; raises `UserError` for other
    ones."""
    asked = recipe.calibration
    if not asked.texts:
        return None
    known = {name: wanted[name] for name in ("samples", "length", "seed", "mode") if name in wanted}
    tokenizer = load_tokenizer(view.checkpoint.folder)
    batches = calibration(asked.texts, tokenizer, replace(recipe.sampling, **known), view.source.vocab)
    if batches.digest != wanted.get("digest", batches.digest):
        raise UserError(f"the text given is not the one {where}: give the same files in the same order")
    return batches


def _calibration(view: View, recipe: Recipe, steps: Sequence[Step]) -> tuple[Recipe, Batches | None]:
    """The text that the steps see, and the recipe with rows that are no longer than the model's positions."""
    if not see_text(steps):
        return recipe, None
    if not recipe.calibration.texts:
        raise text_missing("these steps see", _without_text(steps))
    shorter = recipe.within(num_positions(view))
    tokenizer = load_tokenizer(view.checkpoint.folder)
    batches = calibration(shorter.calibration.texts, tokenizer, shorter.sampling, view.source.vocab)
    say_shorter(shorter.calibration.length, recipe.calibration.length)
    return shorter, batches


def _without_text(steps: Sequence[Step]) -> str:
    """Which settings would need no text, for the steps that have such."""
    hints = {step.without_text for step in steps if see_text([step]) and step.without_text}
    return f" (or use {' and '.join(sorted(hints))}, which needs none)" if hints else ""


def verify(
    folder: str | Path, *, against: str | Path | None = None, runtime: Runtime | None = None
) -> dict[str, Any]:
    """Check a folder we wrote (and, with `against`, compare it with its original)."""
    runtime = runtime or Runtime()
    source = open_view(locate(against)) if against is not None else None
    checks = verify_folder(sayable(place(folder, "DIR"), "DIR"), source, runtime.progress)
    return {
        "ok": all(check.ok for check in checks),
        "checks": [dataclasses.asdict(check) for check in checks],
    }


def export(folder: str | Path, *, to: str, out: str | Path, runtime: Runtime | None = None) -> Report:
    """Write a packed folder again in the layout of another engine, `gptq`, `awq` or `compressed-tensors`, or
    as what its matrices decode to: `plain`."""
    runtime, clock = runtime or Runtime(), Clock()
    layouts = [held.layout for held in codecs() if not held.own]
    if to not in layouts:
        later = not_yet("layout", to)
        raise UserError(
            f"export knows no layout {to!r}{f' ({later})' if later else did_you_mean(to, layouts)}"
        )
    with clock.phase("open"):
        view = open_view(locate(folder))
        if not view.formats:
            cure = "it is plain already, so use it as it is" if to == "plain" else (
                "there is nothing to lay out, so press it with gptq or another step that rounds weights first"
            )  # fmt: skip
            raise UserError(f"{folder} holds no packed matrices: {cure}")
        check_even(view, to)
        view = replace(view, layout=to)
        target = "plugin" if is_unequal(view.checkpoint.config) or not one_format(view) else "transformers"
        formed(target, view).check_fits()
        for piece in view.pieces:
            if piece.ref.packed is not None:
                codec_in(piece.ref).check(piece.ref.packed.format, piece.shape, piece.name)
    identity = stats_key("export", VERSION, view.source.digest, to)
    order = Order(place(out, "--out"), identity, target, {"export": to})
    return produce(view, order, lambda _: Decided(view.plan), runtime, clock)


def evaluate(
    model: str | Path,
    *,
    texts: Sequence[Source],
    against: str | Path | None = None,
    length: int | None = None,
    limit: int | None = None,
    runtime: Runtime | None = None,
) -> dict[str, Any]:
    """Perplexity with its 95% interval and, against the original, mean token KL and top-1 agreement.

    `length` is 512, or the model's positions where these are fewer.
    """
    runtime = runtime or Runtime()
    if not texts:
        raise UserError("evaluate needs text that was not used for calibration: give --text FILE")
    view = open_view(locate(model))
    other = open_view(locate(against)) if against is not None else None
    if other is not None and other.source.vocab != view.source.vocab:
        raise UserError(
            f"{model} has {view.source.vocab} token ids, {against} {other.source.vocab}: they cannot be compared"
        )
    reach = [count for count in map(num_positions, filter(None, (view, other))) if count is not None]
    rows = row_length(length, EVALUATED, min(reach, default=None))
    batches = sequences(
        texts, load_tokenizer((other or view).checkpoint.folder), rows, limit, view.source.vocab
    )
    say_shorter(rows, length or EVALUATED)
    with Tensors(view.checkpoint.folder, allow_nonfinite=True) as tensors:
        meta = make_meta_model(view, tensors, runtime)
        if other is None:
            return evaluate_models(meta, None, batches, runtime.progress)
        with Tensors(other.checkpoint.folder, allow_nonfinite=True) as second:
            return evaluate_models(meta, make_meta_model(other, second, runtime), batches, runtime.progress)


def methods(kind: str | None = None) -> list[dict[str, Any]]:
    """What steps there are, and their settings."""
    return describe_methods(kind)


def demo(*, out: str | Path | None = None, runtime: Runtime | None = None) -> dict[str, Any]:
    """Press a bundled model by a quarter of its experts, verify and evaluate it: no network, a minute or
    two."""
    runtime = runtime or Runtime()
    folder = place("moespresso-demo" if out is None else out, "--out") / "mixtral-quarter"
    report = press(MODELS["mixtral"], out=folder, runtime=replace(runtime, resume=False), samples=64, length=512,
                   texts=[TEXT / "calibration"], steps=["expert_drop:ratio=0.25"])  # fmt: skip
    return {
        "press": report,
        "verify": verify(folder, against=MODELS["mixtral"], runtime=runtime),
        "evaluate": evaluate(
            folder, against=MODELS["mixtral"], texts=[Source(str(TEXT / "heldout"))], runtime=runtime
        ),
    }


def load(
    folder: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The model in any folder we write, or any original: one that can be used, trained and saved as every
    other.

    `dtype` is the checkpoint's own unless another is named, `device` a name or `auto` (a GPU where there is
    one). Packed matrices are decoded; what such a model is saved as is a plain checkpoint.
    """
    return load_model(open_view(locate(folder)), dtype, device)
