"""The command line: one verb per arrow of the design, and `press`, which does them all.

A verb reads its options into a `Request` (what is asked for) and a `Runtime` (how it is carried out), calls the
function of the same name in `api`, and shows the result: a page for people, or with `--json` one JSON object on
standard output and nothing else. Progress and people's words go to standard error. Exit codes: 0 done, 1 our fault
(traceback), 2 the user's mistake (one sentence), 3 a check failed, 130 interrupted.

Torch and transformers take seconds to import, so nothing here imports them before a verb needs them: `--help` and
a misspelt option answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import json as jsonlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from moespresso._versions import VERSION as __version__
from moespresso.core.errors import MoespressoError, UserError, did_you_mean
from moespresso.core.place import place

if TYPE_CHECKING:
    from moespresso.core.progress import Progress
    from moespresso.core.runtime import Runtime
    from moespresso.data import Source
    from moespresso.run import Request

T = TypeVar("T")

# Verbs and options of the design that this version does not have yet: refused as such, not as misspelt.
LATER_VERBS = ("slice", "heal", "bench", "report", "study")
LATER_OPTIONS = ("--export", "--tasks", "--memory", "--context", "--batch", "--quality")
# Faults of the machine that the user can mend; any other OSError is ours.
MENDABLE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "use a file system that takes large files",
    errno.EACCES: "choose another place or change its permissions",
    errno.EPERM: "choose another place or change its permissions",
    errno.EROFS: "choose another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "give a path that is no circle of links",
}
REQUEST = ("model", "samples", "length", "mode", "seed", "target", "size")

Model = Annotated[str, typer.Argument(help="A checkpoint folder or a hub id.", metavar="MODEL")]
ModelOrRecipe = Annotated[str | None, typer.Argument(
    help="A checkpoint folder or a hub id (may stand in the recipe).", metavar="MODEL")]  # fmt: skip

_WHAT, _TEXT, _HOW = "What to do", "Text", "How to do it"
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", parser=place, metavar="FILE", help="YAML recipe; options override it.",
                 rich_help_panel=_WHAT),
]  # fmt: skip
Step = Annotated[list[str] | None, typer.Option(
    "--step", metavar="KIND[:key=value,...]", help="A step; repeat for several.", rich_help_panel=_WHAT)]  # fmt: skip
Size = Annotated[str | None, typer.Option(
    "--size", metavar="SIZE", help="What may remain: 20GiB or 25%.", rich_help_panel=_WHAT)]  # fmt: skip
Target = Annotated[str | None, typer.Option(
    "--target", help="Where it must load: transformers, vllm, llama.cpp, plugin.", rich_help_panel=_WHAT)]  # fmt: skip
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of every draw (0).", rich_help_panel=_WHAT)]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="FILE[:key=value,...]", help="Text, JSON lines, Parquet or a folder; repeat for several "
                 "(keys: weight, field, split, join).", rich_help_panel=_TEXT),
]  # fmt: skip
Dataset = Annotated[
    list[str] | None,
    typer.Option("--dataset", metavar="NAME", help="A hub dataset: c4, wikitext2, alpaca, ... or owner/name.",
                 rich_help_panel=_TEXT),
]  # fmt: skip
Samples = Annotated[int | None, typer.Option(
    "--samples", help="Rows of text to measure on (128).", rich_help_panel=_TEXT)]  # fmt: skip
Length = Annotated[int | None, typer.Option(
    "--length", help="Tokens in a row (2048).", rich_help_panel=_TEXT)]  # fmt: skip
Mode = Annotated[str | None, typer.Option("--mode", help="auto, pack or chat (auto).", rich_help_panel=_TEXT)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=_HOW)]
Dtype = Annotated[str, typer.Option(
    "--dtype", help="Precision to measure in: auto, float32, bfloat16, float16.", rich_help_panel=_HOW)]  # fmt: skip
MaxMemory = Annotated[str | None, typer.Option(
    "--max-memory", metavar="SIZE", help="Memory to stay under: 8GiB or 50%.", rich_help_panel=_HOW)]  # fmt: skip
NoResume = Annotated[bool, typer.Option(
    "--no-resume", help="Start over in this folder.", rich_help_panel=_HOW)]  # fmt: skip
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Count NaN in the weights as trouble.", rich_help_panel=_HOW)
]
Json = Annotated[bool, typer.Option(
    "--json", help="One JSON object on standard output.", rich_help_panel=_HOW)]  # fmt: skip
Against = Annotated[
    str | None, typer.Option("--against", metavar="MODEL", help="The original to compare with.")
]
Pressed = Annotated[Path, typer.Argument(parser=place, help="A folder that press wrote.", metavar="DIR")]
OutFolder = Annotated[Path, typer.Option("--out", parser=place, metavar="DIR", help="The folder to write.")]

app = typer.Typer(
    name="moespresso",
    help="moespresso compresses Mixture-of-Experts models, one layer at a time. Into a smaller cup.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`argv`: without the program's name) and return its exit code."""
    # A report must not be lost to a terminal that cannot show a box-drawing character.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        code = typer.main.get_command(app).main(
            args=None if argv is None else list(argv), prog_name="moespresso", standalone_mode=False
        )
    except Exception as error:
        return _failed(error)
    return code if isinstance(code, int) else 0


def _failed(error: Exception) -> int:
    """Say what went wrong on standard error; returns the exit code."""
    if isinstance(error, MoespressoError):
        return _refuse(str(error), error.exit_code)
    if isinstance(error, OSError) and error.errno in MENDABLE:
        where = f" ({error.filename})" if error.filename else ""
        return _refuse(
            f"{error.strerror}{where}: {MENDABLE[error.errno]}, then run the same command again", 2
        )
    if hasattr(error, "format_message"):
        return _refuse(_usage(error), 2)
    if _out_of_memory(error):
        return _refuse("not enough memory: try --dtype bfloat16 or --max-memory, or free some", 2)
    traceback.print_exc()
    return _refuse("this is a fault of moespresso, not yours: please report it with the lines above", 1)


def _out_of_memory(error: Exception) -> bool:
    """Python, the kernel and torch each have their own way to say it."""
    words = str(error)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and ("allocate memory" in words or "out of memory" in words))
    )


def _refuse(sentence: str, code: int) -> int:
    typer.echo(f"moespresso: {sentence}", err=True)
    return code


def _usage(error: Any) -> str:
    """One sentence for an error that typer found in the command line."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context else "moespresso"
    option = getattr(error, "option_name", None)
    if option in LATER_OPTIONS:
        return f"{option} is not available in this version: leave it out"
    if option and "no such option" in str(error).lower():
        known = [
            name for parameter in context.command.params for name in parameter.opts if name.startswith("--")
        ]
        return f"{path} has no option {option}{did_you_mean(option, known)}"
    said = " ".join(error.format_message().split()).rstrip(".")
    return f"{said} (see `{path} --help`)" if said else f"say what to do (see `{path} --help`)"


def _call(ctx: typer.Context, work: Callable[[ModuleType], T]) -> T:
    """Do the work, with standard output kept clean of what libraries print."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from moespresso import api

            return work(api)
    except KeyboardInterrupt:
        # Verbs that can start over (--no-resume) are those that otherwise go on.
        kept = "what is finished is kept, and the same command goes on from there"
        words = kept if "no_resume" in ctx.params else "nothing was written"
        raise typer.Exit(_refuse(f"{ctx.info_name} was interrupted: {words}", 130)) from None


def _run(ctx: typer.Context, work: Callable[[ModuleType, Request, Runtime], T]) -> T:
    """Read the options into request and runtime, and do the work while the screen shows how far it is."""

    def watched(api: ModuleType) -> T:
        from moespresso.report import screen

        with screen() as bars:
            return work(api, _request(ctx.params), _runtime(ctx.params, bars))

    return _call(ctx, watched)


def _request(options: Mapping[str, Any]) -> Request:
    from moespresso.run import Recipe, Request

    given = {name: options[name] for name in REQUEST if name in options}
    recipe = Recipe.load(Path(options["recipe"])) if options.get("recipe") else None
    request = Request.from_options(
        recipe=recipe,
        steps=options.get("step") or (),
        texts=options.get("text") or (),
        datasets=options.get("dataset") or (),
        **given,
    )
    if "model" in options and request.model is None:
        raise UserError(
            "no MODEL was given: name a checkpoint folder or a hub id, or write `model:` in the recipe"
        )
    return request


def _runtime(options: Mapping[str, Any], progress: Progress) -> Runtime:
    from moespresso.core.runtime import DTYPES, Runtime
    from moespresso.report import total_memory
    from moespresso.run import parse_size

    dtype, memory = options.get("dtype", "auto"), options.get("max_memory")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r} is unknown{did_you_mean(dtype, DTYPES)}")
    return Runtime(
        device=options.get("device", "auto"),
        dtype=dtype,
        max_memory=None if memory is None else parse_size(memory, total_memory()),
        resume=not options.get("no_resume", False),
        allow_nonfinite=options.get("allow_nonfinite", False),
        progress=progress,
    )


def _show(result: Any, page: Callable[[], str], *, json: bool) -> None:
    """Print a result: one JSON object, or a page for people."""
    from moespresso.report import to_json

    typer.echo(to_json(result) if json else page().rstrip("\n"))


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"moespresso {__version__}")
        raise typer.Exit


@app.callback()
def _moespresso(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(ctx: typer.Context, model: Model, json: Json = False) -> None:
    """Say what a model is: layers, experts, bytes, what it takes to run. Reads headers only."""
    from moespresso.report import render_inspection

    found = _call(ctx, lambda api: api.inspect(model))
    _show(found, lambda: render_inspection(found), json=json)


@app.command()
def press(
    ctx: typer.Context,
    out: OutFolder,
    model: ModelOrRecipe = None,
    recipe: RecipeFile = None,
    step: Step = None,
    size: Size = None,
    target: Target = None,
    seed: Seed = None,
    text: Texts = None,
    dataset: Dataset = None,
    samples: Samples = None,
    length: Length = None,
    mode: Mode = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_memory: MaxMemory = None,
    no_resume: NoResume = False,
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
) -> None:
    """Measure, plan and build in one go: MODEL becomes a smaller checkpoint in DIR."""
    from moespresso.report import render_report

    if recipe is None and not step:
        raise UserError(
            "nothing was asked for: say --step KIND:key=value (see `moespresso methods`) or --recipe FILE"
        )
    report = _run(ctx, lambda api, asked, how: api.press(asked.model, out=out, request=asked, runtime=how))
    _show(report, lambda: render_report(report), json=json)


@app.command()
def measure(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("--out", parser=place, metavar="STATS", help="The file to write.")],
    model: ModelOrRecipe = None,
    recipe: RecipeFile = None,
    step: Step = None,
    seed: Seed = None,
    text: Texts = None,
    dataset: Dataset = None,
    samples: Samples = None,
    length: Length = None,
    mode: Mode = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_memory: MaxMemory = None,
    no_resume: NoResume = False,
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
) -> None:
    """Run text through MODEL, layer by layer, and write what its experts did to STATS."""
    from moespresso.report import render_stats

    stats = _run(ctx, lambda api, asked, how: api.measure(asked.model, out=out, request=asked, runtime=how))
    found = {"out": str(out), "key": stats.key, "tokens": stats.tokens, "needs": stats.needs, "trouble": stats.trouble,
             "calibration": stats.calibration}  # fmt: skip
    _show(found, lambda: render_stats(stats, str(out)), json=json)


@app.command()
def plan(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("--out", parser=place, metavar="PLAN", help="The plan file to write.")],
    model: ModelOrRecipe = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            "--stats", parser=place, metavar="STATS", help="What `measure` wrote (not without data)."
        ),
    ] = None,
    recipe: RecipeFile = None,
    step: Step = None,
    size: Size = None,
    target: Target = None,
    seed: Seed = None,
    text: Texts = None,
    dataset: Dataset = None,
    samples: Samples = None,
    length: Length = None,
    mode: Mode = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_memory: MaxMemory = None,
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
) -> None:
    """Decide what happens to each expert, and write it to PLAN: JSON to read, edit and share."""
    from moespresso.report import render_plan

    if recipe is None and not step:
        raise UserError(
            "nothing was asked for: say --step KIND:key=value (see `moespresso methods`) or --recipe FILE"
        )
    made = _run(
        ctx, lambda api, asked, how: api.plan(asked.model, stats=stats, out=out, request=asked, runtime=how)
    )
    found = {"out": str(out), "digest": made.digest, "plan": jsonlib.loads(made.to_json())}
    _show(found, lambda: render_plan(made, str(out)), json=json)


@app.command()
def build(
    ctx: typer.Context,
    model: Model,
    out: OutFolder,
    plan: Annotated[Path, typer.Option("--plan", parser=place, metavar="PLAN", help="The plan to follow.")],
    text: Texts = None,
    dataset: Dataset = None,
    target: Target = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    no_resume: NoResume = False,
    allow_nonfinite: AllowNonfinite = False,
    json: Json = False,
) -> None:
    """Do to MODEL exactly what PLAN says, and write DIR."""
    from moespresso.report import render_report

    report = _run(
        ctx, lambda api, asked, how: api.build(model, plan=plan, out=out, request=asked, runtime=how)
    )
    _show(report, lambda: render_report(report), json=json)


@app.command()
def verify(
    ctx: typer.Context,
    folder: Pressed,
    against: Against = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """Prove that DIR holds what its plan says and loads; exit code 3 when a check fails."""
    from moespresso.report import render_verdict

    verdict = _run(ctx, lambda api, _, how: api.verify(folder, against=against, runtime=how))
    _show(verdict, lambda: render_verdict(verdict), json=json)
    if not verdict["ok"]:
        failed = [check["name"] for check in verdict["checks"] if not check["ok"]]
        raise typer.Exit(_refuse(f"{folder} does not pass: {', '.join(failed)}", 3))


@app.command()
def export(
    ctx: typer.Context,
    folder: Pressed,
    out: OutFolder,
    to: Annotated[str, typer.Option("--to", metavar="FORM", help="gptq, awq, compressed-tensors or plain.")],
    no_resume: NoResume = False,
    json: Json = False,
) -> None:
    """Write the packed weights of DIR in the layout of another engine, or decoded (plain)."""
    from moespresso.report import render_report

    report = _run(ctx, lambda api, _, how: api.export(folder, to=to, out=out, runtime=how))
    _show(report, lambda: render_report(report), json=json)


@app.command()
def evaluate(
    ctx: typer.Context,
    model: Model,
    against: Against = None,
    text: Texts = None,
    dataset: Dataset = None,
    length: Annotated[
        int | None, typer.Option("--length", help="Tokens in a window (512).", rich_help_panel=_TEXT)
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Windows at most.", rich_help_panel=_TEXT)
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """Perplexity of MODEL on text and, against the original, KL and top-1 agreement; layer by layer."""
    from moespresso.report import render_evaluation

    def work(api: ModuleType, asked: Request, how: Runtime) -> dict[str, Any]:
        texts: Sequence[Source] = asked.texts
        return api.evaluate(model, against=against, texts=texts, length=length, limit=limit, runtime=how)

    scores = _run(ctx, work)
    _show(scores, lambda: render_evaluation(scores), json=json)


@app.command()
def methods(
    ctx: typer.Context,
    kind: Annotated[str | None, typer.Argument(help="One step kind.", metavar="[KIND]")] = None,
    json: Json = False,
) -> None:
    """List the step kinds and their settings."""
    from moespresso.report import render_methods

    found = _call(ctx, lambda api: api.methods(kind))
    _show({"methods": found}, lambda: render_methods(found), json=json)


@app.command()
def demo(
    ctx: typer.Context,
    out: Annotated[
        Path | None, typer.Option("--out", parser=place, metavar="DIR", help="Keep the pressed models here.")
    ] = None,
    json: Json = False,
) -> None:
    """Press, verify and evaluate the bundled models: no network, under three minutes on two cores."""
    from moespresso.report import render_demo

    result = _run(ctx, lambda api, _, how: api.demo(out=out, runtime=how))
    _show(result, lambda: render_demo(result), json=json)


def _refuse_later(ctx: typer.Context) -> None:
    raise UserError(f"`moespresso {ctx.info_name}` is not available in this version")


for _verb in LATER_VERBS:
    app.command(
        _verb, hidden=True, add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(_refuse_later)  # fmt: skip
