"""The options of the command line, each declared once, and what becomes of them.

Three groups: WHAT to do, on which TEXT, and HOW. `@takes(...)` puts options on a verb, which never sees them
as parameters of its own: they wait in typer's context, from which `recipe_of` makes the `Recipe` (what is
asked for) and `runtime_of` the `Runtime` (how it is carried out). A verb's own parameters, such as its MODEL,
stand in its signature.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moespresso._place import place
from moespresso.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from moespresso.core.progress import Progress
    from moespresso.core.runtime import Runtime
    from moespresso.run import Recipe

Declared = inspect.Parameter

Model = Annotated[str, typer.Argument(help="A checkpoint folder or a hub id.", metavar="MODEL")]
ModelOrRecipe = Annotated[str | None, typer.Argument(
    help="A checkpoint folder or a hub id (may stand in the recipe).", metavar="MODEL")]  # fmt: skip
Pressed = Annotated[Path, typer.Argument(parser=place, help="A folder that press wrote.", metavar="DIR")]
OutFolder = Annotated[Path, typer.Option("--out", parser=place, metavar="DIR", help="The folder to write.")]
Against = Annotated[
    str | None, typer.Option("--against", metavar="MODEL", help="The original to compare with.")
]


def _declared(panel: str, flag: str, kind: Any, help: str, **more: Any) -> Declared:
    """An option in a panel of the help; it says nothing where nobody gives it, but for a `default`."""
    option = typer.Option(more.pop("default", None), flag, help=help, rich_help_panel=panel, **more)
    name = flag.removeprefix("--").replace("-", "_")
    return Declared(name, Declared.KEYWORD_ONLY, default=option, annotation=kind)


_what = functools.partial(_declared, "What to do")
_text = functools.partial(_declared, "Text")
_how = functools.partial(_declared, "How to do it")

RECIPE = _what("--recipe", Path | None, "YAML recipe; options override it.", parser=place, metavar="FILE")
STEP = _what("--step", list[str] | None, "A step; repeat for several.", metavar="KIND[:key=value,...]")
SIZE = _what("--size", str | None, "What may remain: 20GiB or 25%.", metavar="SIZE")
TARGET = _what("--target", str | None, "Where it must load: transformers, vllm, llama.cpp, plugin.")
MTP = _what(
    "--mtp", str | None, "Multi-token prediction layers: keep, drop, or like_trunk: cut like it (like_trunk)."
)
SEED = _what("--seed", int | None, "Seed of every draw (0).")

FILES = _text("--text", list[str] | None, "Text, JSON lines, Parquet or a folder; repeat for several "
              "(keys: weight, field, split, join).", metavar="FILE[:key=value,...]")  # fmt: skip
DATASET = _text("--dataset", list[str] | None, "A hub dataset: c4, wikitext2, alpaca, ... or owner/name.", metavar="NAME")  # fmt: skip
SAMPLES = _text("--samples", int | None, "Rows of text to measure on (128).")
LENGTH = _text("--length", int | None, "Tokens in a row (2048).")
MODE = _text("--mode", str | None, "auto, pack or chat (auto).")
WINDOW = _text("--length", int | None, "Tokens in a window (512).")
LIMIT = _text("--limit", int | None, "Windows at most.")

DEVICE = _how("--device", str, "auto, cpu, cuda, cuda:1, ...", default="auto")
DTYPE = _how("--dtype", str, "Precision to measure in: auto, float32, bfloat16, float16.", default="auto")
MAX_MEMORY = _how("--max-memory", str | None, "Memory to stay under: 8GiB or 50%.", metavar="SIZE")
NO_RESUME = _how("--no-resume", bool, "Start over in this folder.", default=False)
ALLOW_NONFINITE = _how("--allow-nonfinite", bool, "Count NaN in the weights as warnings.", default=False)
JSON = _how("--json", bool, "One JSON object on standard output.", default=False)

WHAT = (RECIPE, STEP, SIZE, TARGET, MTP, SEED)
TEXT = (FILES, DATASET, SAMPLES, LENGTH, MODE)
HOW = (DEVICE, DTYPE, MAX_MEMORY, NO_RESUME, ALLOW_NONFINITE, JSON)

# Options that have a recipe's own names.
_ALIKE = ("model", "samples", "length", "mode", "seed", "target", "size", "mtp")


def takes(*options: Declared) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put options on a verb, behind its own parameters; their values are found in its context."""

    def put_on(verb: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(verb, eval_str=True)
        parameters = (*own.parameters.values(), *options)

        @functools.wraps(verb)
        def command(**given: Any) -> None:
            verb(**{name: given[name] for name in own.parameters})

        command.__signature__ = own.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return put_on


def recipe_of(options: Mapping[str, Any]) -> Recipe:
    """What is asked for: the recipe that was given, and the options that are followed instead of its
    fields."""
    from moespresso.run import Recipe

    recipe = Recipe.load(Path(options["recipe"])) if options.get("recipe") else Recipe()
    recipe = recipe.with_options(
        steps=options.get("step"),
        texts=options.get("text"),
        datasets=options.get("dataset"),
        **{name: options[name] for name in _ALIKE if name in options},
    )
    if "model" in options and recipe.model is None:
        raise UserError(
            "no MODEL was given: name a checkpoint folder or a hub id, or write `model:` in the recipe"
        )
    return recipe


def check_wish(options: Mapping[str, Any]) -> None:
    """Refuse a verb that was given neither a step nor a recipe."""
    if options["recipe"] is None and not options["step"] and not options["mtp"]:
        raise UserError(
            "nothing was asked for: say --step KIND:key=value (see `moespresso methods`) or --recipe FILE"
        )


def runtime_of(options: Mapping[str, Any], progress: Progress) -> Runtime:
    """How it is carried out."""
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
