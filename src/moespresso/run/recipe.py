"""What a run is asked for: one frozen `Recipe`, from YAML, from options, or from both.

A recipe is checked whole before any work begins: a misspelt field is answered with the one that was meant,
and every complaint names the field (and file and line, where it came from one). Options given beside a recipe
are followed instead of its fields, and the log says so. Both doors, command line and Python, hand the same
`Recipe` on; written out as plain data (`resolved`) it stands in the manifest of what comes of it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, Unpack

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    ValidationError,
    ValidationInfo,
    field_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

import moespresso.methods  # noqa: F401  # pyright: ignore[reportUnusedImport]  (registers the step kinds)
from moespresso._place import place, typed
from moespresso.core import method
from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.later import not_yet
from moespresso.core.plan import Wish
from moespresso.core.registry import opened, parse_step
from moespresso.data import Mode, Sampling, Source
from moespresso.run.recipe_file import Place, line_of, read_yaml

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

logger = logging.getLogger(__name__)

TargetName = Literal["transformers", "vllm", "llama.cpp", "plugin"]

LENGTH = 2048
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|[A-Za-z]*)")


def parse_size(text: str | int, of: int) -> int:
    """Return bytes: ``"20GiB"``, ``"1.5GB"``, ``"123456"``, or ``"25%"`` of the bytes `of`; raises
    `UserError`."""
    match = _SIZE.fullmatch(str(text).strip())
    number, unit = (match["number"], match["unit"].upper()) if match else ("", "")
    if unit == "%" and 0 < float(number) <= 100:
        return math.floor(of * Fraction(number) / 100)
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
    meant = _as_value_error(typed)(value)
    return str(info.context["folder"] / meant) if info.context else meant


def _anchor_model(value: object, info: ValidationInfo) -> object:
    """Only what is clearly a path: `owner/name` is a hub id, or a folder as seen from where the run
    starts."""
    if not isinstance(value, str):
        return value
    meant = _as_value_error(typed)(value)
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


def _as_value_error(read: Callable[..., Any]) -> Callable[..., Any]:
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


def _open_steps(steps: tuple[Any, ...]) -> tuple[Any, ...]:
    """Steps that are short for others give way to those, and the log says so."""
    steps_in_full: list[Any] = []
    for number, step in enumerate(steps, 1):
        others = opened(step)
        if others != (step,):
            logger.info(
                "step %d, %s, stands for %s (give those to set more)",
                number,
                _step_text(step),
                " and then ".join(map(_step_text, others)),
            )
        steps_in_full += others
    return tuple(steps_in_full)


def _step_text(step: Any) -> str:
    """A step as it is written on the command line, defaults left out."""
    settings = (
        f"{setting.name}={getattr(step, setting.name)}"
        for setting in fields(step)
        if getattr(step, setting.name) != setting.default
    )
    return ":".join(filter(None, (step.kind, ",".join(settings))))


Count = Annotated[int, Field(strict=True, ge=1)]
StepField = Annotated[Any, BeforeValidator(_as_value_error(_settings))]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class _Text(_Section):
    """How a recipe spells a source of text: a local `path`, or a hub `dataset` by name; the rest as in
    `data.Source`."""

    path: Annotated[str | None, BeforeValidator(_anchor)] = None
    dataset: str | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    field: str | None = None
    split: str | None = None
    join: bool = False

    @model_validator(mode="after")
    def _one_name(self) -> _Text:
        if bool(self.path) == bool(self.dataset):
            raise ValueError("needs either a path or a dataset")
        return self


def _read_text(value: object, read: Callable[[object], _Text]) -> Source:
    """Take a source as it is, and read what a file says of one."""
    if isinstance(value, Source):
        return value
    text = read(value)
    name, hub = text.path or text.dataset or "", text.dataset is not None
    return Source(name, text.weight, text.field, text.split, text.join, hub=hub)


def _spelt_text(source: Source) -> dict[str, Any]:
    """A source as a recipe spells it, what it does not say left out."""
    body = {"dataset" if source.hub else "path": source.name, "weight": float(source.weight), "field": source.field,
            "split": source.split, "join": source.join}  # fmt: skip
    return {name: value for name, value in body.items() if value is not None}


def _text_schema(_: object, schema_of: GetCoreSchemaHandler) -> CoreSchema:
    spelt = core_schema.plain_serializer_function_ser_schema(_spelt_text)
    return core_schema.no_info_wrap_validator_function(_read_text, schema_of(_Text), serialization=spelt)


Text = Annotated[Source, GetPydanticSchema(_text_schema)]


class Calibration(_Section):
    """The text that is measured on: `samples` rows of `length` tokens, drawn by `seed` (None: the
    recipe's)."""

    texts: tuple[Text, ...] = ()
    samples: Count = 128
    length: Annotated[int, Field(strict=True, ge=2)] = LENGTH
    seed: Annotated[int, Field(strict=True, ge=0)] | None = None
    mode: Mode = "auto"


class Budget(_Section):
    """What may remain: bytes or a share of the original's tensor bytes, as `parse_size` reads it."""

    size: Annotated[str | None, BeforeValidator(_as_value_error(_size))] = None


class Options(TypedDict, total=False):
    """What may be said in the place of a recipe's fields; None says nothing.

    A step is ``kind:key=value,...``, a mapping with `kind`, or a settings object; a text is a path with
    options (``PATH:weight=2``) or a `Source`; texts come before datasets.
    """

    steps: Sequence[Any] | None
    texts: Sequence[str | Path | Source] | None
    datasets: Sequence[str] | None
    samples: int | None
    length: int | None
    mode: str | None
    seed: int | None
    target: str | None
    size: int | str | None
    mtp: str | None


class Recipe(_Section):
    """What the user asked for. `steps` holds settings objects, read from mappings or ``kind:key=value,...``;
    `model` is None where only the caller knows it."""

    model: Annotated[str | None, BeforeValidator(_anchor_model)] = None
    calibration: Calibration = Calibration()
    steps: Annotated[tuple[StepField, ...], AfterValidator(_open_steps)] = ()
    budget: Budget = Budget()
    target: TargetName = "transformers"
    mtp: Wish = "like_trunk"
    seed: Annotated[int, Field(strict=True, ge=0)] = 0

    @model_validator(mode="after")
    def _one_seed(self) -> Recipe:
        """The seed of the run is `seed`, wherever it was written."""
        written = self.calibration.seed
        if written not in (None, self.seed) and "seed" in self.model_fields_set:
            raise ValueError("seed and calibration.seed differ: one seed serves both, so leave one out")
        if written is not None:
            object.__setattr__(self, "seed", written)
        return self

    @field_serializer("steps")
    def _plain_steps(self, steps: tuple[Any, ...]) -> list[dict[str, Any]]:
        return [{"kind": step.kind, **asdict(step)} for step in steps]

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file; raises `UserError` in one sentence with file, line and field."""
        path = place(path, "--recipe")
        node, body = read_yaml(path)
        try:
            return cls.model_validate(body, context={"folder": path.parent})
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path}:{line_of(node, first['loc'])}: {_complaint(first)}") from error

    def with_options(self, *, model: str | Path | None = None, **options: Unpack[Options]) -> Recipe:
        """The same with what is given beside it, which is followed; the log says what that takes the place
        of.

        Raises `UserError` naming the option.
        """
        _check_known(options)
        asked_options = _asked_fields(model, options)
        body = {
            **_fields(self),
            **_of(Recipe, asked_options),
            "calibration": {**_fields(self.calibration), **_of(Calibration, asked_options)},
            "budget": {**_fields(self.budget), **_of(Budget, asked_options)},
        }
        try:
            asked = Recipe.model_validate(body)
        except ValidationError as error:
            raise UserError(_complaint(error.errors()[0])) from error
        _say_overrides(self, asked, asked_options)
        return asked

    @property
    def sampling(self) -> Sampling:
        """How its text is drawn."""
        asked = self.calibration
        return Sampling(asked.samples, asked.length, self.seed, asked.mode)

    def within(self, positions: int | None) -> Recipe:
        """The same for a model with so many positions (see `row_length`)."""
        section = self.calibration
        length = row_length(
            section.length if "length" in section.model_fields_set else None, LENGTH, positions
        )
        if length == section.length:
            return self
        return self.model_copy(update={"calibration": section.model_copy(update={"length": length})})

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default and every step's settings written out, ready for JSON or YAML."""
        body = self.model_dump(mode="json", exclude_none=True)
        body["calibration"].pop("seed", None)
        return {name: value for name, value in body.items() if value != {}}


def _check_known(options: Options) -> None:
    """Python hands on whatever it is given: a misspelt option is not passed over."""
    known = Options.__annotations__
    if strangers := [name for name in options if name not in known]:
        raise UserError(f"there is no option {strangers[0]!r}{did_you_mean(strangers[0], known)}")


def _asked_fields(model: str | Path | None, options: Options) -> dict[str, Any]:
    """The options that were given, under the names of a recipe's fields."""
    texts = map(_source, options.get("texts") or ())
    datasets = (Source.parse(name, hub=True) for name in options.get("datasets") or ())
    fields: dict[str, Any] = {
        **options,
        "model": None if model is None else str(model),
        "steps": tuple(options.get("steps") or ()),
        "texts": (*texts, *datasets),
    }
    return {name: value for name, value in fields.items() if value not in (None, ())}


def _of(section: type[BaseModel], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a section has a field for."""
    return {name: value for name, value in options.items() if name in section.model_fields}


def _source(text: str | Path | Source) -> Source:
    return text if isinstance(text, Source) else Source.parse(str(text))


def _fields(section: BaseModel) -> dict[str, Any]:
    """What a section was told, defaults left out."""
    return {name: getattr(section, name) for name in section.model_fields_set}


def _say_overrides(recipe: Recipe, asked: Recipe, options: Mapping[str, Any]) -> None:
    before, after = _flat(recipe), _flat(asked)
    for name in options:
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
    if refusal := not_yet("field", where):
        return f"{refusal}: leave it out"
    sections: dict[Place, type[BaseModel]] = {
        (): Recipe, ("calibration",): Calibration, ("calibration", "texts"): _Text, ("budget",): Budget,
    }  # fmt: skip
    inside = f" in {'.'.join(map(str, section))}" if section else ""
    return f"unknown field {name!r}{inside}{did_you_mean(name, sections[section].model_fields)}"
