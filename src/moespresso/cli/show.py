"""How a verb is carried out on the command line, what it shows, and how a fault leaves.

Standard output holds the result and nothing else, a page for people or with `--json` one JSON object;
progress, people's words and what libraries print go to standard error. Exit codes: 0 done, 1 our fault
(traceback), 2 the user's mistake (one sentence), 3 a check failed, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from moespresso.cli.options import recipe_of, runtime_of
from moespresso.core.errors import MoespressoError, did_you_mean
from moespresso.core.later import not_yet

if TYPE_CHECKING:
    from moespresso.core.runtime import Runtime
    from moespresso.run import Recipe

T = TypeVar("T")

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


def call(ctx: typer.Context, work: Callable[[ModuleType], T]) -> T:
    """Do the work, with standard output kept clean of what libraries print."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from moespresso import api

            return work(api)
    except KeyboardInterrupt:
        # Verbs that can start over (--no-resume) are those that otherwise go on.
        kept = "what is finished is kept, and the same command goes on from there"
        words = kept if "no_resume" in ctx.params else "nothing was written"
        raise typer.Exit(refuse(f"{ctx.info_name} was interrupted: {words}", 130)) from None


def run(ctx: typer.Context, work: Callable[[ModuleType, Recipe, Runtime], T]) -> T:
    """Read the options into recipe and runtime, and do the work while the screen shows how far it is."""

    def watched(api: ModuleType) -> T:
        from moespresso.report import screen

        with screen() as bars:
            return work(api, recipe_of(ctx.params), runtime_of(ctx.params, bars))

    return call(ctx, watched)


def show(ctx: typer.Context, result: Any, page: Callable[[], str]) -> None:
    """Print a result: one JSON object, or a page for people."""
    from moespresso.report import to_json

    typer.echo(to_json(result) if ctx.params["json"] else page().rstrip("\n"))


def failed(error: Exception) -> int:
    """Say what went wrong on standard error; returns the exit code."""
    if isinstance(error, MoespressoError):
        return refuse(str(error), error.exit_code)
    if isinstance(error, OSError) and error.errno in MENDABLE:
        where = f" ({error.filename})" if error.filename else ""
        return refuse(f"{error.strerror}{where}: {MENDABLE[error.errno]}, then run the same command again", 2)
    if hasattr(error, "format_message"):
        return refuse(_usage(error), 2)
    if _out_of_memory(error):
        return refuse("not enough memory: try --dtype bfloat16 or --max-memory, or free some", 2)
    traceback.print_exc()
    return refuse("this is a fault of moespresso, not yours: please report it with the lines above", 1)


def _out_of_memory(error: Exception) -> bool:
    """Python, the kernel and torch each have their own way to say it."""
    words = str(error)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and ("allocate memory" in words or "out of memory" in words))
    )


def refuse(sentence: str, code: int) -> int:
    """Say it on standard error; returns the exit code."""
    typer.echo(f"moespresso: {sentence}", err=True)
    return code


def _usage(error: Any) -> str:
    """One sentence for an error that typer found in the command line."""
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context else "moespresso"
    option = getattr(error, "option_name", None)
    if later := not_yet("option", option or ""):
        return f"{later}: leave it out"
    if option and "no such option" in str(error).lower():
        known = [
            name for parameter in context.command.params for name in parameter.opts if name.startswith("--")
        ]
        return f"{path} has no option {option}{did_you_mean(option, known)}"
    said = " ".join(error.format_message().split()).rstrip(".")
    return f"{said} (see `{path} --help`)" if said else f"say what to do (see `{path} --help`)"
