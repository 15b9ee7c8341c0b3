"""The README of a pressed folder: a model card that says what was done, how to load it and how to check it.

The same recipe must give the same bytes, so a card says nothing of time, memory, machine or folder; the
report does. It is made to be published, so absolute paths in the recipe are cut to their last part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from moespresso.report import words
from moespresso.report.report import LayerScores, Report
from moespresso.report.tables import COSTS

Body = Mapping[str, Any]

TAGS = ("moespresso", "mixture-of-experts")
PLUGIN = """\
Its layers differ, which transformers on its own cannot build: put `import moespresso` (`pip install moespresso`) first.

"""
LOAD = """\
```python
from transformers import {auto_class}, AutoTokenizer

folder = "path/to/this/folder"
model = {auto_class}.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```
"""
PACKED = """\
Its weights are packed integers, which transformers unpacks with the package `compressed-tensors` (0.18 or newer).

"""
FP8 = """\
Its weights are floats of eight bits (FP8) as its original has them. transformers needs the package `accelerate` for these, and
decodes them where there is no GPU that computes with them.

"""
OWN = """\
Its packed experts are in formats that stock loaders would read wrongly, so they stop at it; moespresso reads it:

```python
import moespresso
from transformers import AutoTokenizer

folder = "path/to/this/folder"
model = moespresso.load(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```
"""
OTHER = """\
Its weights are packed in the layout of {layout}, for engines that read that, such as GPTQModel. `moespresso.load` loads it, decoded.
"""


@dataclass(frozen=True)
class Licence:
    """A licence as model cards state it; all None: not known."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


def source_licence(folder: Path) -> Licence:
    """The licence that the card (README.md) of a source folder states, if it has one that can be read."""

    card = folder / "README.md"
    try:
        stated: Body = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, yaml.YAMLError):
        return Licence()
    return Licence(**{name: stated[name] for name in asdict(Licence()) if isinstance(stated.get(name), str)})


def model_card(report: Report, base_model: str | None = None, licence: Licence | None = None) -> str:
    """Return the card (Markdown with YAML front matter) of what `report` describes.

    `base_model` is the source's hub id (None: it was a folder); `licence` what the source's card states.
    """
    recipe = shareable(report.recipe)
    name = base_model or recipe.get("model", "model")
    sections = (
        f"---\n{_yaml(_front(report, base_model, licence or Licence()))}---\n",
        f"# {PurePath(name).name}, pressed\n",
        _summary(name, report),
        _numbers(report),
        _dropped_table(report.scores),
        _notes((*report.warnings, *report.notes)),
        f"## Load it\n\n{_load(report)}",
        _check(base_model),
        f"## Recipe\n\n```yaml\n{_yaml(recipe)}```\n",
        f"Made with moespresso {report.versions['moespresso']}.\n",
    )
    return "\n".join(section for section in sections if section)


def _load(report: Report) -> str:
    """How the folder is loaded, by whoever can read its packed matrices and unequal layers."""
    if report.packing == "own":
        return OWN
    if report.packing in ("gptq", "awq"):
        return OTHER.format(layout=report.packing.upper())
    return (
        (PLUGIN if report.plugin else "")
        + (FP8 if report.packing == "fp8" else PACKED if report.packing else "")
        + LOAD.format(auto_class=report.auto_class)
    )


def shareable(recipe: Body) -> dict[str, Any]:
    """The recipe with absolute paths cut to their last part: what is published says nothing about a disk."""
    body = dict(recipe)
    if "model" in body:
        body["model"] = _last(str(body["model"]))
    if texts := body.get("calibration", {}).get("texts"):
        cut = [{**text, "path": _last(text["path"])} if "path" in text else text for text in texts]
        body["calibration"] = {**body["calibration"], "texts": cut}
    return body


def _last(path: str) -> str:
    return PurePath(path).name if PurePath(path).is_absolute() else path


def _yaml(body: Body) -> str:
    return yaml.safe_dump(dict(body), sort_keys=False, allow_unicode=True, width=100)


def _front(report: Report, base_model: str | None, licence: Licence) -> dict[str, Any]:
    stated = {name: value for name, value in asdict(licence).items() if value}
    base = {"base_model": base_model} if base_model else {}
    return {
        "library_name": "transformers",
        **base,
        **stated,
        "pipeline_tag": "text-generation",
        "tags": [*TAGS, *_kinds(report)],
    }


def _kinds(report: Report) -> list[str]:
    """What was done, in the hub's words."""
    trimmed = report.gone or any(row.dropped for row in report.scores.values())
    return [*(["pruned"] if trimmed else []), *(["quantized"] if report.packing else [])]


def _summary(name: str, report: Report) -> str:
    """What was taken away, in a sentence or two."""
    dropped = sum(len(row.dropped) for row in report.scores.values())
    experts = sum(len(row.kept) for row in report.scores.values()) + dropped
    sizes = f"{words.size(report.before.bytes)} of tensors became {words.size(report.after.bytes)}"
    merged = sum(len(row.merged) for row in report.scores.values())
    deeds = [
        f"{', '.join(map(str, report.gone))} were taken out whole" if report.gone else "",
        f"{dropped - merged} of its {experts} routed experts were dropped" if dropped > merged else "",
        f"{merged} of its {experts} routed experts were averaged into others" if merged else "",
    ]
    done = ", ".join(filter(None, deeds))
    if not done:
        return f"A smaller {name}: {sizes}.\n"
    return f"A smaller {name}: {done}, and {sizes}. Nothing was trained.\n"


def _numbers(report: Report) -> str:
    before, after = asdict(report.before), asdict(report.after)
    rows = [
        f"| {name} | {say(before[key])} | {say(after[key])} | {words.change(before[key], after[key])} |"
        for key, name, say in COSTS
    ]
    return "\n".join(["| | before | after | change |", "|---|---:|---:|---:|", *rows, ""])


def _dropped_table(scores: Mapping[int, LayerScores]) -> str:
    rows = [
        f"| {layer} | {len(row.kept)} | {words.spans(row.dropped)} | {words.spans(row.protected)} |"
        for layer, row in sorted(scores.items())
        if row.dropped
    ]
    if not rows:
        return ""
    head = (
        "## Dropped experts\n",
        "Numbered as in the original.\n",
        "| layer | kept | dropped | super experts, kept |",
    )
    return "\n".join([*head, "|---:|---:|---|---|", *rows, ""])


def _notes(lines: Sequence[str]) -> str:
    return "\n".join(["## To know\n", *(f"- {line}" for line in lines), ""]) if lines else ""


def _check(base_model: str | None) -> str:
    return (
        "## Check it\n\n```sh\n"
        f"moespresso verify path/to/this/folder --against {base_model or 'path/to/the/original'}\n"
        "```\n\nThis proves that the files are those that were written, that every expert of the plan is there and finite, "
        "and that the model loads. The plan, the digest of every file and all versions are in `moespresso.json`.\n"
    )
