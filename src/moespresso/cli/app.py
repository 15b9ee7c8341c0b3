"""The command line: one verb per arrow of the design, and `press`, which does them all.

A verb has its options from `options`, calls the function of the same name in `api` with a `Recipe` (what is
asked for) and a `Runtime` (how it is carried out), and shows the result as `show` says, which knows the exit
codes too.

Torch and transformers take seconds to import, so nothing here imports them before a verb needs them: `--help`
and a misspelt option answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from moespresso._place import place
from moespresso._versions import VERSION as __version__
from moespresso.cli.options import (
    ALLOW_NONFINITE,
    DATASET,
    DEVICE,
    DTYPE,
    FILES,
    HOW,
    JSON,
    LIMIT,
    MAX_MEMORY,
    NO_RESUME,
    RECIPE,
    SEED,
    STEP,
    TARGET,
    TEXT,
    WHAT,
    WINDOW,
    Against,
    Model,
    ModelOrRecipe,
    OutFolder,
    Pressed,
    check_wish,
    takes,
)
from moespresso.cli.show import call, failed, run, show
from moespresso.core.errors import CheckFailed, UserError
from moespresso.core.later import LATER, not_yet

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
        return failed(error)
    return code if isinstance(code, int) else 0


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
@takes(JSON)
def inspect(ctx: typer.Context, model: Model) -> None:
    """Say what a model is: layers, experts, bytes, what it takes to run. Reads headers only."""
    from moespresso.report import render_inspection

    found = call(ctx, lambda api: api.inspect(model))
    show(ctx, found, lambda: render_inspection(found))


@app.command()
@takes(*WHAT, *TEXT, *HOW)
def press(ctx: typer.Context, out: OutFolder, model: ModelOrRecipe = None) -> None:
    """Measure, plan and build in one go: MODEL becomes a smaller checkpoint in DIR."""
    from moespresso.report import render_report

    check_wish(ctx.params)
    report = run(ctx, lambda api, asked, how: api.press(asked.model, out=out, recipe=asked, runtime=how))
    show(ctx, report, lambda: render_report(report))


@app.command()
@takes(RECIPE, STEP, SEED, *TEXT, *HOW)
def measure(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option("--out", parser=place, metavar="STATS", help="The file to write.")],
    model: ModelOrRecipe = None,
) -> None:
    """Run text through MODEL, layer by layer, and write what its experts did to STATS."""
    from moespresso.report import render_stats

    stats = run(ctx, lambda api, asked, how: api.measure(asked.model, out=out, recipe=asked, runtime=how))
    found = {"out": str(out), "key": stats.key, "tokens": stats.tokens, "needs": stats.needs, "warnings": stats.warnings,
             "calibration": stats.calibration}  # fmt: skip
    show(ctx, found, lambda: render_stats(stats, str(out)))


@app.command()
@takes(*WHAT, *TEXT, DEVICE, DTYPE, MAX_MEMORY, ALLOW_NONFINITE, JSON)
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
) -> None:
    """Decide what happens to each expert, and write it to PLAN: JSON to read, edit and share."""
    from moespresso.report import render_plan

    check_wish(ctx.params)
    made = run(
        ctx, lambda api, asked, how: api.plan(asked.model, stats=stats, out=out, recipe=asked, runtime=how)
    )
    found = {"out": str(out), "digest": made.digest, "plan": made.as_dict()}
    show(ctx, found, lambda: render_plan(made, str(out)))


@app.command()
@takes(FILES, DATASET, TARGET, DEVICE, MAX_MEMORY, NO_RESUME, ALLOW_NONFINITE, JSON)
def build(
    ctx: typer.Context,
    model: Model,
    out: OutFolder,
    plan: Annotated[Path, typer.Option("--plan", parser=place, metavar="PLAN", help="The plan to follow.")],
) -> None:
    """Do to MODEL exactly what PLAN says, and write DIR."""
    from moespresso.report import render_report

    report = run(ctx, lambda api, asked, how: api.build(model, plan=plan, out=out, recipe=asked, runtime=how))
    show(ctx, report, lambda: render_report(report))


@app.command()
@takes(DEVICE, DTYPE, MAX_MEMORY, JSON)
def verify(ctx: typer.Context, folder: Pressed, against: Against = None) -> None:
    """Prove that DIR holds what its plan says and loads; exit code 3 when a check fails."""
    from moespresso.report import render_verdict

    verdict = run(ctx, lambda api, _, how: api.verify(folder, against=against, runtime=how))
    show(ctx, verdict, lambda: render_verdict(verdict))
    if wrong := [check["name"] for check in verdict["checks"] if not check["ok"]]:
        raise CheckFailed(f"{folder} does not pass: {', '.join(wrong)}")


@app.command()
@takes(NO_RESUME, JSON)
def export(
    ctx: typer.Context,
    folder: Pressed,
    out: OutFolder,
    to: Annotated[str, typer.Option("--to", metavar="FORM", help="gptq, awq, compressed-tensors or plain.")],
) -> None:
    """Write the packed weights of DIR in the layout of another engine, or decoded (plain)."""
    from moespresso.report import render_report

    report = run(ctx, lambda api, _, how: api.export(folder, to=to, out=out, runtime=how))
    show(ctx, report, lambda: render_report(report))


@app.command()
@takes(FILES, DATASET, WINDOW, LIMIT, DEVICE, DTYPE, MAX_MEMORY, JSON)
def evaluate(ctx: typer.Context, model: Model, against: Against = None) -> None:
    """Perplexity of MODEL on text and, against the original, KL and top-1 agreement; layer by layer."""
    from moespresso.report import render_evaluation

    windows = {"length": ctx.params["length"], "limit": ctx.params["limit"]}
    scores = run(ctx, lambda api, asked, how: api.evaluate(
        model, against=against, texts=asked.calibration.texts, runtime=how, **windows))  # fmt: skip
    show(ctx, scores, lambda: render_evaluation(scores))


@app.command()
@takes(JSON)
def methods(
    ctx: typer.Context,
    kind: Annotated[str | None, typer.Argument(help="One step kind.", metavar="[KIND]")] = None,
) -> None:
    """List the step kinds and their settings."""
    from moespresso.report import render_methods

    found = call(ctx, lambda api: api.methods(kind))
    show(ctx, {"methods": found}, lambda: render_methods(found))


@app.command()
@takes(JSON)
def demo(
    ctx: typer.Context,
    out: Annotated[
        Path | None, typer.Option("--out", parser=place, metavar="DIR", help="Keep the pressed models here.")
    ] = None,
) -> None:
    """Press, verify and evaluate the bundled models: no network, under three minutes on two cores."""
    from moespresso.report import render_demo

    result = run(ctx, lambda api, _, how: api.demo(out=out, runtime=how))
    show(ctx, result, lambda: render_demo(result))


def _refuse_later(ctx: typer.Context) -> None:
    name = ctx.info_name or ""
    raise UserError(not_yet("verb", name, f"`moespresso {name}`"))


for _verb in LATER["verb"]:
    app.command(
        _verb, hidden=True, add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(_refuse_later)  # fmt: skip
