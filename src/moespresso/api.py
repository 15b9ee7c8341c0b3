"""One function per verb; the command line and Python walk through the same doors.

Each takes a checkpoint (folder or hub id), a `Request` (what is wanted) and a `Runtime` (how it is carried out), and
raises `UserError` with one sentence before anything is written when the request cannot be met.
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
from typing import Any, TypedDict, Unpack, cast

import torch
from transformers import PreTrainedModel

import moespresso.methods  # noqa: F401  (registers them)
from moespresso._versions import VERSION
from moespresso.build import (
    View,
    config_view,
    load_model,
    make_skeleton,
    num_positions,
    one_format,
    open_view,
)
from moespresso.bundled import MODELS, TEXT
from moespresso.checkpoint import Reader, claim, locate, read_json, write_text
from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.format import LAYOUT_BITS, Form, check_layout
from moespresso.core.place import place, real, sayable, typed
from moespresso.core.plan import Plan
from moespresso.core.registry import parse_step
from moespresso.core.runtime import Runtime
from moespresso.core.stats import Stats, stats_key
from moespresso.data import Batches, Source, calibration, load_tokenizer, sequences
from moespresso.effect import needs_fit, rounds_on_text, slims, step_of, validated
from moespresso.export import check_even, formed
from moespresso.fit import found, unrepaired
from moespresso.model import is_rehoused, is_unequal, quiet_transformers
from moespresso.quality import evaluate as evaluate_models
from moespresso.report import Report, describe_methods
from moespresso.run import (
    Clock,
    Decided,
    NotOnThisModel,
    Recipe,
    Request,
    decide,
    format_notes,
    housed,
    in_some_form,
    produce,
    rehearse,
    row_length,
    say_shorter,
    see_text,
    source_notes,
)
from moespresso.run import measure as measure_view
from moespresso.stream import must_spill
from moespresso.verify import verify as verify_folder

quiet_transformers()

# Tokens in a row of evaluation, where nothing else is asked for.
EVALUATED = 512


class Options(TypedDict, total=False):
    """What a request can be made of, where no `Request` is given (see `Request.from_options`)."""

    recipe: Recipe
    steps: Sequence[Any]
    texts: Sequence[str | Path | Source]
    datasets: Sequence[str]
    samples: int
    length: int
    mode: str
    seed: int
    target: str
    size: int | str


def _asked(model: str | Path, request: Request | None, options: Options) -> Request:
    return request or Request.from_options(model=model, **options)


def inspect(model: str | Path) -> dict[str, Any]:
    """What a checkpoint is and weighs, from its config and headers, or from a config.json alone."""
    alone = _config_alone(typed(model, "MODEL"))
    view = config_view(place(model)) if alone else open_view(locate(model))
    blueprint, cost = view.blueprint, view.blueprint.cost()
    notes = [*source_notes(view), *format_notes(view)]
    if alone:
        notes.append("priced from its config alone: no tensor was seen")
    if is_unequal(view.checkpoint.config):
        notes.append("its layers differ: transformers loads it where moespresso is imported")
    if is_rehoused(view.checkpoint):
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


def _config_alone(said: str) -> bool:
    """Whether this names a config, and not a folder, a page of the hub or another file of a checkpoint."""
    file = Path(said)
    if not said.endswith(".json") or said.endswith(".index.json") or "://" in said or file.is_dir():
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
    request: Request | None = None,
    runtime: Runtime | None = None,
    **options: Unpack[Options],
) -> Stats:
    """Measure what the request's steps need and save it to `out`; an interrupted measurement is continued."""
    runtime, request, out = runtime or Runtime(), _asked(model, request, options), place(out, "--out")
    view = open_view(locate(model))
    _check_file(out, view.checkpoint.folder)
    try:
        view, request = rehearse(view, request)
    except NotOnThisModel:
        raise
    except UserError:  # the target cannot load what comes of it, which is no matter of measuring
        view, request = rehearse(view, replace(request, target="plugin"))
    request, batches = _calibration(view, request)
    must_spill(view, batches, runtime)
    work_folder = out.parent / f".{out.name}.moespresso"
    with claim(work_folder, view.checkpoint.folder, resume=runtime.resume) as work:
        stats = measure_view(view, batches, request.steps, work, runtime)
        write_text(out, stats.to_json())
        shutil.rmtree(work_folder)
    return stats


def _check_file(out: Path, source: Path) -> None:
    """A file to write must be one that can be, and must not lie in the source: found out before any work is done for it."""
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
    request: Request | None = None,
    runtime: Runtime | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Decide from saved stats (or measure now, where text is given), and save the plan to `out`."""
    runtime, request = runtime or Runtime(), _asked(model, request, options)
    view = open_view(locate(model))
    file = None if out is None else place(out, "--out")
    if file is not None:
        _check_file(file, view.checkpoint.folder)
    view, request = rehearse(view, request)
    given = _given_stats(place(stats, "--stats"), view) if stats is not None else None
    # A later step that is re-scored needs the text even where the first one's stats are given.
    if given is None:
        request, batches = _calibration(view, request)
    else:
        batches = _same_text(view, given.calibration, request, "these stats were measured on")
    with tempfile.TemporaryDirectory() as work:
        decided = decide(view, request.steps, batches, given, Path(work), runtime, Clock())
    made = _signed(decided, request, batches).plan
    formed(request.target, replace(view, plan=made))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, made.to_json() + "\n")
    return made


def _given_stats(path: Path, view: View) -> Stats:
    stats = Stats.load(path)
    if stats.blueprint != view.source.digest:
        raise UserError(
            f"{path} was measured on another checkpoint than {view.source.source}: measure this one"
        )
    return stats


def _signed(decided: Decided, request: Request, batches: Batches | None) -> Decided:
    measured = next((stats.calibration for stats in decided.stats if stats.calibration), None)
    # A step that searches takes text and has no stats.
    calibrated = dict(measured or (batches.describe() if batches is not None else {}))
    # A plan is made to be shared: it names texts, not where they lie on somebody's disk.
    if "sources" in calibrated:
        calibrated["sources"] = [{**source, "name": Path(source["name"]).name if Path(source["name"]).is_absolute()
                                  else source["name"]} for source in calibrated["sources"]]  # fmt: skip
    plan = replace(decided.plan, calibration=calibrated, made_by=f"moespresso {VERSION}", seed=request.seed)
    return replace(decided, plan=plan)


def press(
    model: str | Path,
    *,
    out: str | Path,
    request: Request | None = None,
    runtime: Runtime | None = None,
    **options: Unpack[Options],
) -> Report:
    """Measure, decide and build in one go; killed anywhere and run again it ends with the same bytes."""
    runtime, clock, request = runtime or Runtime(), Clock(), _asked(model, request, options)
    with clock.phase("open"):
        view, request = rehearse(open_view(locate(model)), request)
        request, batches = _calibration(view, request)
        must_spill(view, batches, runtime)
    tokens = batches.digest if batches is not None else ""
    settings = json.dumps([step.describe() for step in request.steps], sort_keys=True)
    identity = stats_key("press", VERSION, view.source.digest, settings, tokens, request.target, str(request.seed),
                         runtime.dtype)  # fmt: skip

    def make(work: Path) -> Decided:
        return _signed(decide(view, request.steps, batches, None, work, runtime, clock), request, batches)

    return produce(view, place(out, "--out"), identity, make, request, runtime, clock)


def build(
    model: str | Path,
    *,
    plan: str | Path,
    out: str | Path,
    request: Request | None = None,
    runtime: Runtime | None = None,
) -> Report:
    """Do exactly what a saved plan says."""
    runtime, clock, request = runtime or Runtime(), Clock(), request or Request()
    target = request.target
    with clock.phase("open"):
        made = Plan.load(place(plan, "--plan"))

        def tried(form: View) -> View:
            validated(made, form.source)
            return housed(form, lambda at_home: formed(target, replace(at_home, plan=made)).check_fits())

        steps = [step_of(stage) for stage in made.stages if slims(stage)]
        view = in_some_form(open_view(locate(model)), steps, tried)
    batches = _text_of_plan(view, made, request)
    # What is built is what the plan says, whatever else the request holds.
    recipe = {"calibration": dict(made.calibration), "steps": [dict(stage.method) for stage in made.stages],
              "target": request.target, "seed": made.seed}  # fmt: skip
    request = replace(request, recipe=recipe, seed=made.seed)
    identity = stats_key("build", VERSION, view.source.digest, made.digest, request.target, runtime.dtype,
                         batches.digest if batches is not None else "")  # fmt: skip

    def make(work: Path) -> Decided:
        with clock.phase("fit"):
            return _fitted(view, made, batches, work, runtime)

    return produce(view, place(out, "--out"), identity, make, request, runtime, clock)


def _fitted(view: View, made: Plan, batches: Batches | None, work: Path, runtime: Runtime) -> Decided:
    """The plan with what each of its stages needs, found again on the text it was made on."""
    done = Decided(made)
    for stage in range(len(made.stages)):
        before = replace(view, plan=replace(made, stages=made.stages[:stage]), fits=dict(done.fits))
        this_far = replace(made, stages=made.stages[: stage + 1])
        done.add(found(before, this_far, batches, work, runtime))
        done.notes += unrepaired(this_far, before)
    return done


def _text_of_plan(view: View, made: Plan, request: Request) -> Batches | None:
    """The text given to `build`, which must be the text the plan was made on; a plan that is fitted needs it."""
    wanted = made.calibration
    fitted = any(
        "text" in needs_fit(made, number) or rounds_on_text(stage) for number, stage in enumerate(made.stages)
    )
    if not request.texts and fitted:
        raise UserError(
            "this plan is fitted on real text: give --text FILE or --dataset NAME, as it was made with"
        )
    if not (fitted or "digest" in wanted):
        return None
    return _same_text(view, wanted, request, "the plan was calibrated on")


def _same_text(view: View, wanted: Mapping[str, Any], request: Request, where: str) -> Batches | None:
    """The request's texts drawn as `wanted` describes, None where there are none; raises `UserError` for other ones."""
    if not request.texts:
        return None
    found = calibration(request.texts, load_tokenizer(view.checkpoint.folder), int(wanted.get("samples", request.samples)),
                        int(wanted.get("length", request.length)), int(wanted.get("seed", request.seed)), wanted.get("mode", request.mode), view.source.vocab)  # fmt: skip
    if found.digest != wanted.get("digest", found.digest):
        raise UserError(f"the text given is not the one {where}: give the same files in the same order")
    return found


def _calibration(view: View, request: Request) -> tuple[Request, Batches | None]:
    """The text that the steps see, and the request with rows that are no longer than the model's positions."""
    if not see_text(request.steps):
        return request, None
    if not request.texts:
        raise UserError(
            f"these steps see real text: give --text FILE or --dataset NAME{_without_text(request)}"
        )
    fitted = request.within(num_positions(view))
    tokenizer = load_tokenizer(view.checkpoint.folder)
    batches = calibration(fitted.texts, tokenizer, fitted.samples, fitted.length, fitted.seed, fitted.mode,
                          view.source.vocab)  # fmt: skip
    say_shorter(fitted.length, request.length)
    return fitted, batches


def _without_text(request: Request) -> str:
    """Which settings would need no text, for the steps that have such."""
    hints = {step.without_text for step in request.steps if see_text([step]) and step.without_text}
    return f" (or use {' and '.join(sorted(hints))}, which needs none)" if hints else ""


def verify(
    folder: str | Path, *, against: str | Path | None = None, runtime: Runtime | None = None
) -> dict[str, Any]:
    """Check a folder we wrote (and, with `against`, compare it with its original)."""
    runtime = runtime or Runtime()
    source = open_view(locate(against)) if against is not None else None
    found = verify_folder(sayable(place(folder, "DIR"), "DIR"), source, runtime.progress)
    return {"ok": all(check.ok for check in found), "checks": [dataclasses.asdict(check) for check in found]}


def export(folder: str | Path, *, to: str, out: str | Path, runtime: Runtime | None = None) -> Report:
    """Write a packed folder again in the layout of another engine, `gptq`, `awq` or `compressed-tensors`, or as what its
    matrices decode to: `plain`."""
    runtime, clock = runtime or Runtime(), Clock()
    layouts = [*LAYOUT_BITS, "plain"]
    if to not in layouts:
        planned = " (gguf is not available in this version)" if to == "gguf" else did_you_mean(to, layouts)
        raise UserError(f"export knows no layout {to!r}{planned}")
    with clock.phase("open"):
        view = open_view(locate(folder))
        if not view.formats:
            cure = "it is plain already, so use it as it is" if to == "plain" else (
                "there is nothing to lay out, so press it with gptq or another step that rounds weights first"
            )  # fmt: skip
            raise UserError(f"{folder} holds no packed matrices: {cure}")
        view = replace(view, layout=cast("Form", to))
        target = "plugin" if is_unequal(view.checkpoint.config) or not one_format(view) else "transformers"
        formed(target, view).check_fits()
        check_even(view, to)
        for piece in view.pieces:
            if piece.ref.packed is not None:
                check_layout(piece.ref.packed.layout, piece.ref.packed.format, *piece.shape)
    request = Request(target=target, recipe={"export": to})
    identity = stats_key("export", VERSION, view.source.digest, to)
    return produce(view, place(out, "--out"), identity, lambda _: Decided(view.plan), request, runtime, clock)


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
    with Reader(view.checkpoint.folder, allow_nonfinite=True) as reader:
        skeleton = make_skeleton(view, reader, runtime)
        if other is None:
            return evaluate_models(skeleton, None, batches, runtime.progress)
        with Reader(other.checkpoint.folder, allow_nonfinite=True) as second:
            return evaluate_models(skeleton, make_skeleton(other, second, runtime), batches, runtime.progress)


def methods(kind: str | None = None) -> list[dict[str, Any]]:
    """What steps there are, and their settings."""
    return describe_methods(kind)


def demo(*, out: str | Path | None = None, runtime: Runtime | None = None) -> dict[str, Any]:
    """Press a bundled model by a quarter of its experts, verify and evaluate it: no network, a minute or two."""
    runtime = runtime or Runtime()
    folder = place("moespresso-demo" if out is None else out, "--out") / "mixtral-quarter"
    request = Request.from_options(
        model=str(MODELS["mixtral"].name), texts=[str(TEXT / "calibration")], samples=64, length=512,
        steps=[parse_step("expert_drop:ratio=0.25")],
    )  # fmt: skip
    report = press(MODELS["mixtral"], out=folder, request=request, runtime=replace(runtime, resume=False))
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
    """The model in any folder we write, or any original: one that can be used, trained and saved as every other.

    `dtype` is the checkpoint's own unless another is named, `device` a name or `auto` (a GPU where there is one). Packed
    matrices are decoded; what such a model is saved as is a plain checkpoint.
    """
    return load_model(open_view(locate(folder)), dtype, device)
