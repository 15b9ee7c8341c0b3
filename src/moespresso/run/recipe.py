"""What a run is asked for: YAML to a frozen `Recipe`, and a recipe or options to a `Request`.

This is the only file that reads YAML. A recipe is checked whole before any work begins: a misspelt field is
answered with the one that was meant, and every complaint names file, line and field. Options given beside a
recipe are followed instead of its fields, and the log says so. Both doors, command line and Python, end in the same
`Request`, whose `recipe` (the request written out as plain data) stands in the manifest of what comes of it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    model_validator,
)

import moespresso.methods  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers the step kinds)
from moespresso.core import method
from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.place import place, typed
from moespresso.core.registry import opened, parse_step
from moespresso.data import Mode, Source

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

logger = logging.getLogger(__name__)

Target = Literal["transformers", "vllm", "llama.cpp", "plugin"]
Place = tuple[int | str, ...]

LENGTH = 2048
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|[A-Za-z]*)")

# Fields of the design that this version does not have yet, by the section they belong to.
LATER: dict[Place, tuple[str, ...]] = {
    (): ("heal", "export", "evaluate"),
    ("budget",): ("memory", "context", "batch", "quality"),
}


def parse_size(text: str | int, of: int) -> int:
    """Return bytes: ``"20GiB"``, ``"1.5GB"``, ``"123456"``, or ``"25%"`` of the bytes `of`; raises `UserError`."""
    found = _SIZE.fullmatch(str(text).strip())
    number, unit = (found["number"], found["unit"].upper()) if found else ("", "")
    if unit == "%" and 0 < float(number) <= 100:
        return math.floor(of * float(number) / 100)
    if number.isdigit() and not unit and int(number) > 0:
        return int(number)
    if unit in UNITS and 0 < float(number) < math.inf:
        return round(float(number) * UNITS[unit])
    raise UserError(
        f"size {str(text)!r} is not understood: say bytes (123456), a unit (1.5GB, 20GiB) or a share (25%)"
    )


def _size(value: Any) -> Any:
    """Check a size without knowing yet what it is a share of."""
    if value is None:
        return None
    parse_size(value, of=1 << 40)
    return str(value)


def _anchor(value: object, info: ValidationInfo) -> object:
    """A path in a recipe file is relative to that file, unless it begins with `~` or at the root."""
    if not isinstance(value, str):
        return value
    meant = _told(typed)(value)
    return str(info.context["folder"] / meant) if info.context else meant


def _anchor_model(value: object, info: ValidationInfo) -> object:
    """Only what is clearly a path: `owner/name` is a hub id, or a folder as seen from where the run starts."""
    if not isinstance(value, str):
        return value
    meant = _told(typed)(value)
    return _anchor(value, info) if meant.startswith(("./", "../")) else meant


def row_length(asked: int | None, usual: int, positions: int | None) -> int:
    """How many tokens a row has, for a model with so many positions (None: as many as one likes).

    Raises `UserError` where more were asked for; where nobody asked for a number, `say_shorter` is to tell.
    """
    length = usual if asked is None else asked
    if positions is None or length <= positions:
        return length
    if asked is not None:
        raise UserError(
            f"--length {asked} is more than the {positions} positions that the model was made for: say --length {positions}"
        )
    return positions


def say_shorter(length: int, usual: int) -> None:
    """Say that rows are shorter than usual, once it is sure that there are any."""
    if length < usual:
        logger.warning(
            "rows have %d tokens and not %d: the model was made for no more positions", length, usual
        )


def _told(read: Callable[..., Any]) -> Callable[..., Any]:
    """Let pydantic see a `UserError` of a reader, so that it reports where in the recipe it happened."""

    def reader(value: Any) -> Any:
        try:
            return read(value)
        except UserError as error:
            raise ValueError(str(error)) from error

    return reader


def _settings(step: Any) -> Any:
    """Read a step; settings objects (from Python) are already read."""
    if isinstance(step, str | Mapping):
        return parse_step(step)  # pyright: ignore[reportUnknownArgumentType]
    if not isinstance(step, method.Step):
        raise UserError(f"step {step!r} is neither text (kind:key=value,...) nor a mapping with `kind`")
    return step


def _opened(steps: tuple[Any, ...]) -> tuple[Any, ...]:
    """Steps that are short for others give way to those, and the log says so."""
    found: list[Any] = []
    for number, step in enumerate(steps, 1):
        others = opened(step)
        if others != (step,):
            logger.info(
                "step %d, %s, stands for %s (give those to set more)",
                number,
                _spelt(step),
                " and then ".join(map(_spelt, others)),
            )
        found += others
    return tuple(found)


def _spelt(step: Any) -> str:
    """A step as it is written on the command line, defaults left out."""
    told = (
        f"{each.name}={getattr(step, each.name)}"
        for each in fields(step)
        if getattr(step, each.name) != each.default
    )
    return ":".join(filter(None, (step.kind, ",".join(told))))


Count = Annotated[int, Field(strict=True, ge=1)]
Step = Annotated[Any, BeforeValidator(_told(_settings))]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class Text(_Section):
    """One source of calibration text: a local `path`, or a hub `dataset` by name; the rest as in `data.Source`."""

    path: Annotated[str | None, BeforeValidator(_anchor)] = None
    dataset: str | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    field: str | None = None
    split: str | None = None
    join: bool = False

    @model_validator(mode="after")
    def _one_name(self) -> Text:
        if bool(self.path) == bool(self.dataset):
            raise ValueError("needs either a path or a dataset")
        return self

    def source(self) -> Source:
        """The source as the data room knows it."""
        name = self.path or self.dataset or ""
        return Source(name, self.weight, self.field, self.split, self.join, hub=self.dataset is not None)

    @classmethod
    def of(cls, source: Source) -> Text:
        """The recipe's way of writing a source."""
        body = asdict(source)
        hub, name = body.pop("hub"), body.pop("name")
        return cls(**{"dataset" if hub else "path": name}, **body)


class Calibration(_Section):
    """The text that is measured on: `samples` rows of `length` tokens, drawn by `seed` (None: the recipe's)."""

    texts: tuple[Text, ...] = ()
    samples: Count = 128
    length: Annotated[int, Field(strict=True, ge=2)] = LENGTH
    seed: Annotated[int, Field(strict=True, ge=0)] | None = None
    mode: Mode = "auto"


class Budget(_Section):
    """What may remain: bytes or a share of the original's tensor bytes, as `parse_size` reads it."""

    size: Annotated[str | None, BeforeValidator(_told(_size))] = None


class Recipe(_Section):
    """What the user asked for. `steps` holds settings objects, read from mappings or ``kind:key=value,...``."""

    model: Annotated[str | None, BeforeValidator(_anchor_model)] = None
    calibration: Calibration = Calibration()
    steps: Annotated[tuple[Step, ...], AfterValidator(_opened)] = ()
    budget: Budget = Budget()
    target: Target = "transformers"
    seed: Annotated[int, Field(strict=True, ge=0)] = 0

    @model_validator(mode="after")
    def _one_seed(self) -> Recipe:
        if self.calibration.seed not in (None, self.seed) and "seed" in self.model_fields_set:
            raise ValueError("seed and calibration.seed differ: one seed serves both, so leave one out")
        return self

    @field_serializer("steps")
    def _plain_steps(self, steps: tuple[Any, ...]) -> list[dict[str, Any]]:
        return [{"kind": step.kind, **asdict(step)} for step in steps]

    @property
    def the_seed(self) -> int:
        """The seed of this run, wherever it was written."""
        return self.seed if self.calibration.seed is None else self.calibration.seed

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file; raises `UserError` in one sentence with file, line and field."""
        path = place(path, "--recipe")
        node, body = _read_yaml(path)
        try:
            return cls.model_validate(body, context={"folder": path.parent})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path}:{_line(node, first['loc'])}: {_complaint(first)}") from error

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default and every step's settings written out, ready for JSON or YAML."""
        body = self.model_dump(mode="json", exclude_none=True)
        body["calibration"].pop("seed", None)
        return {name: value for name, value in body.items() if value != {}} | {"seed": self.the_seed}


@dataclass(frozen=True)
class Request:
    """What a run is asked for, whichever door it came through.

    `steps` are settings objects, `texts` the calibration sources, `size` what may remain (see `parse_size`),
    `recipe` all of it as plain data. `model` is None when only the caller knows it.
    """

    steps: tuple[Any, ...] = ()
    texts: tuple[Source, ...] = ()
    samples: int = 128
    length: int = LENGTH
    mode: Mode = "auto"
    seed: int = 0
    target: Target = "transformers"
    size: int | str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    model: str | None = None
    # Whether somebody asked for this length, which is not followed in silence then.
    length_asked: bool = field(default=False, compare=False)

    def within(self, positions: int | None) -> Request:
        """The same for a model with so many positions (see `row_length`)."""
        asked = self.length if self.length_asked or self.length != LENGTH else None
        length = row_length(asked, LENGTH, positions)
        if length == self.length:
            return self
        recipe = dict(self.recipe)
        if "calibration" in recipe:
            recipe["calibration"] = {**recipe["calibration"], "length": length}
        return replace(self, length=length, recipe=recipe)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Request:
        """Ask for exactly what a recipe says."""
        calibration = recipe.calibration
        return cls(
            steps=recipe.steps,
            texts=tuple(text.source() for text in calibration.texts),
            samples=calibration.samples,
            length=calibration.length,
            mode=calibration.mode,
            seed=recipe.the_seed,
            target=recipe.target,
            size=recipe.budget.size,
            recipe=recipe.resolved(),
            model=recipe.model,
            length_asked="length" in calibration.model_fields_set,
        )

    @classmethod
    def from_options(
        cls,
        *,
        recipe: Recipe | None = None,
        model: str | Path | None = None,
        steps: Sequence[Any] = (),
        texts: Sequence[str | Path | Source] = (),
        datasets: Sequence[str] = (),
        samples: int | None = None,
        length: int | None = None,
        mode: str | None = None,
        seed: int | None = None,
        target: str | None = None,
        size: int | str | None = None,
    ) -> Request:
        """Ask by options, which are followed instead of what a `recipe` given beside them says.

        A step is ``kind:key=value,...``, a mapping with `kind`, or a settings object; a text is a path with options
        (``PATH:weight=2``) or a `Source`; texts come before datasets. Raises `UserError` naming the option.
        """
        sources = [*map(_source, texts), *(Source.parse(name, hub=True) for name in datasets)]
        calibration = _said(
            texts=tuple(map(Text.of, sources)), samples=samples, length=length, mode=mode, seed=seed
        )
        general = _said(
            model=None if model is None else str(model), steps=tuple(steps), target=target, seed=seed
        )
        budget = _said(size=size)
        base = recipe or Recipe()
        body = {
            **_fields(base),
            **general,
            "calibration": {**_fields(base.calibration), **calibration},
            "budget": {**_fields(base.budget), **budget},
        }
        try:
            asked = Recipe.model_validate(body)
        except ValidationError as error:
            raise UserError(_complaint(error.errors()[0])) from error
        if recipe is not None:
            _say_overrides(recipe, asked, {**general, **calibration, **budget})
        return cls.from_recipe(asked)


def _source(text: str | Path | Source) -> Source:
    return text if isinstance(text, Source) else Source.parse(str(text))


def _said(**options: object) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def _fields(section: BaseModel) -> dict[str, Any]:
    """What a section was told, defaults left out."""
    return {name: getattr(section, name) for name in section.model_fields_set}


def _say_overrides(recipe: Recipe, asked: Recipe, said: Mapping[str, Any]) -> None:
    before, after = _flat(recipe), _flat(asked)
    for name in said:
        if name not in before or before[name] == after[name]:
            continue
        if name in ("steps", "texts"):
            logger.info("%s: those given are followed instead of the recipe's", name)
        else:
            logger.info("%s: %s is followed instead of the recipe's %s", name, after[name], before[name])


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Everything a recipe was told, sections opened."""
    body = recipe.model_dump(mode="json", exclude_unset=True)
    return {**body, **body.pop("budget", {}), **body.pop("calibration", {})}


# What YAML takes for a name: text, and the sign by which one mapping takes in another.
NAMES = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a field has a name and may be said only once (plain YAML takes the last in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag not in NAMES:
                said = f"{key.value!r} is" if isinstance(key, yaml.ScalarNode) else "a list or a mapping is"
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{said} no name of a field: write a word, in quotes where YAML takes it for something else",
                    key.start_mark,
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is said twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> tuple[yaml.Node, dict[str, Any]]:
    """The file's node tree (it knows the lines) and what it says."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        body = cast("object", loader.construct_document(node)) if node else None  # pyright: ignore[reportUnknownMemberType]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML ({error.problem})") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deep: write a recipe as in recipes/") from error
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or a date that is none
        raise UserError(f"{path}: not YAML text ({error})".replace("\n", " ")) from error
    except OSError as error:
        raise UserError(
            f"recipe {path} cannot be read ({error.strerror}): give the path of a YAML file"
        ) from error
    if not isinstance(body, dict):
        raise UserError(f"{path} does not hold a recipe: write fields such as `steps:` (see recipes/)")
    return node, body  # pyright: ignore[reportUnknownVariableType, reportReturnType]


def _line(node: yaml.Node, place: Place) -> int:
    """The line, counted from 1, of the innermost part of `place` that the file holds."""
    line = node.start_mark.line
    for part in place:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == part), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line
    return line + 1


def _complaint(error: ErrorDetails) -> str:
    """Say one pydantic finding as a sentence that names the field."""
    *section, name = error["loc"] or ("",)
    where = _say_place(error["loc"])
    if error["type"] == "extra_forbidden":
        return _unknown_field(tuple(part for part in section if isinstance(part, str)), str(name), where)
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}".removeprefix(": ")  # pyright: ignore[reportTypedDictNotRequiredAccess]
    if error["type"] == "literal_error":
        choices = re.findall("'([^']+)'", error["msg"])
        return f"{where} {error['input']!r} is unknown{did_you_mean(str(error['input']), choices)}"
    return f"{where}: {error['msg'].replace('Input should', 'it should')}, got {error['input']!r}"


def _say_place(place: Place) -> str:
    """``calibration.texts.2.path``; a step by its number."""
    if place and place[0] == "steps" and len(place) > 1:
        return f"step {int(place[1]) + 1}"
    return ".".join(map(str, place))


def _unknown_field(section: Place, name: str, where: str) -> str:
    if name in LATER.get(section, ()):
        return f"{where} is not available in this version: leave it out"
    sections: dict[Place, type[BaseModel]] = {
        (): Recipe, ("calibration",): Calibration, ("calibration", "texts"): Text, ("budget",): Budget,
    }  # fmt: skip
    inside = f" in {'.'.join(map(str, section))}" if section else ""
    return f"unknown field {name!r}{inside}{did_you_mean(name, sections[section].model_fields)}"
