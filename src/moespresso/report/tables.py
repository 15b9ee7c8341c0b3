"""Results as text for people: pure functions from data to at most 100 columns without terminal codes.

Every renderer reads the same JSON that the verb prints with `--json`, so what people see and what programs
read cannot drift apart. Sections without content are left out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moespresso.core.plan import Plan
from moespresso.core.stats import Stats
from moespresso.report import words
from moespresso.report.report import Report

WIDTH = 100
Body = Mapping[str, Any]
# Rows of the cost table: key, what people call it, how its numbers are said.
COSTS = (
    ("bytes", "tensor bytes", words.size),
    ("params", "parameters", words.number),
    ("active_params", "active per token", words.number),
    ("flops", "forward, 2,048 tokens", words.flops),
    ("kv_bytes_per_token", "key-value cache per token", words.size),
    ("peak_load_bytes", "largest layer", words.size),
)


def render_report(report: Report | Body) -> str:
    """One page: cost before and after, dropped experts by layer, warnings, notes, time and memory."""
    body = report.to_dict() if isinstance(report, Report) else report
    return _page(
        _title("pressed", body.get("recipe", {}).get("model"), body["out"] and f"into {body['out']}"),
        _costs(body),
        *_removed_parts(body.get("gone", {}), body["plan"]["stages"]),
        *_dropped_experts(body.get("scores", {})),
        *_titled_list("warnings", body.get("warnings", ())),
        *_titled_list("notes", body.get("notes", ())),
        _effort(body),
    )


def render_inspection(inspection: Body) -> str:
    """What a model is: its layers (equal neighbours on one line), where its bytes lie, what it takes to
    run."""
    params, sizes = inspection["params"], inspection["bytes"]
    headline = (
        inspection["family"],
        f"{inspection['num_layers']} layers",
        words.size(sizes["total"]),
        f"{words.number(params['total'])} parameters, {words.number(params['active'])} active per token",
    )
    return _page(
        Text(" · ".join(headline)),
        _layers(inspection["layers"]),
        _shares(sizes),
        _pairs(
            ("key-value cache per token", words.size(inspection["kv_bytes_per_token"])),
            ("forward, 2,048 tokens", words.flops(inspection["flops_2048"])),
        ),
        *_titled_list("notes", inspection.get("notes", ())),
    )


def render_evaluation(scores: Body) -> str:
    """How good a model is: perplexity with its interval and, against the original, KL and agreement."""
    rows = [("tokens", f"{scores['tokens']:,}"), ("perplexity", _with_interval(scores["perplexity"]))]
    if "perplexity_ratio" in scores:
        rows.append(("perplexity, times the original's", words.figure(scores["perplexity_ratio"])))
    if "kl" in scores:
        rows.append(("KL to the original per token", _with_interval(scores["kl"])))
    if "top1_agreement" in scores:
        rows.append(("same first choice", words.percent(scores["top1_agreement"])))
    return _page(
        _pairs(*rows),
        *_titled_list("warnings", scores.get("warnings", ())),
        *_titled_list("notes", scores.get("notes", ())),
    )


def render_verdict(verdict: Body) -> str:
    """What `verify` found: every check with its outcome, and the sum of it."""
    table = _table("", "check", "")
    for check in verdict["checks"]:
        table.add_row("ok" if check["ok"] else "FAILED", check["name"], check.get("detail") or "")
    failed = sum(not check["ok"] for check in verdict["checks"])
    count = len(verdict["checks"])
    return _page(table, Text(f"{failed} of {count} checks failed" if failed else f"all {count} checks hold"))


def render_methods(methods: Sequence[Body]) -> str:
    """Step kinds with their settings."""
    return _page(*(part for method in methods for part in _method(method)))


def render_stats(stats: Stats, out: str = "") -> str:
    """What was measured and what went wrong."""
    layers = {unit.layer for unit in stats.values if unit.layer is not None}
    # Weights are measured without text.
    tokens = [("tokens", f"{stats.tokens:,}")] if stats.tokens else []
    rows = [*tokens, ("layers", words.spans(layers)), ("measured", ", ".join(stats.needs))]
    return _page(
        _title("measured", "", out and f"into {out}"),
        _pairs(*rows),
        *_titled_list("warnings", stats.warnings),
    )


def render_plan(plan: Plan, out: str = "") -> str:
    """What is to happen to each unit, stage by stage."""
    parts: list[RenderableType] = [_title("plan", "", out and f"in {out}")]
    for number, stage in enumerate(plan.stages, start=1):
        settings = ", ".join(
            f"{name}={value}" for name, value in stage.method.items() if name != "kind" and value is not None
        )
        table = _table("unit", "treatment")
        for unit, treatment in sorted(stage.treatments.items()):
            table.add_row(
                str(unit), "; ".join(f"{name} {_value(value)}" for name, value in treatment.as_dict().items())
            )
        parts += [Text(f"stage {number}: {stage.method.get('kind', '')} ({settings})"), table]
    return _page(*parts, *([] if plan.stages else [Text("nothing is changed")]))


def render_demo(result: Body) -> str:
    """The demo on one page: what was pressed, that it is right, how good it is."""
    parts = (
        render_report(result["press"]),
        render_verdict(result["verify"]),
        render_evaluation(result["evaluate"]),
    )
    return "\n".join(parts)


def _page(*parts: RenderableType) -> str:
    """Lay the parts out with a blank line between, as text."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False,
                      markup=False, emoji=False, highlight=False, no_color=True)  # fmt: skip
    pages: list[str] = []
    for part in parts:
        with console.capture() as caught:
            console.print(part)
        lines = [line.rstrip() for line in caught.get().splitlines()]
        pages.append("\n".join(line for line in lines if line))
    return "\n\n".join(page for page in pages if page) + "\n"


def _table(*columns: str, right: Iterable[int] = ()) -> Table:
    """An open table; the columns numbered in `right` hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=True, show_header=any(columns))
    numbers = set(right)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numbers else "left", overflow="fold")
    return table


def _pairs(*rows: tuple[str, str]) -> Table:
    table = _table("", "")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _title(verb: str, model: str | None, where: str) -> Text:
    return Text(" ".join(filter(None, (verb, model, where))), overflow="fold")


def _titled_list(title: str, lines: Iterable[str]) -> list[RenderableType]:
    """A titled list, or nothing."""
    rows = list(lines)
    if not rows:
        return []
    table = Table.grid(padding=(0, 1))
    for row in rows:
        table.add_row("-", row)
    return [_under(title, table)]


def _under(title: str, inner: RenderableType) -> Table:
    grid = Table.grid()
    grid.add_row(Text(title))
    grid.add_row(Padding(inner, (0, 0, 0, 1)))
    return grid


def _costs(body: Body) -> Table:
    table = _table("", "before", "after", "change", right=(1, 2, 3))
    for key, name, say in COSTS:
        before, after = body[key]["before"], body[key]["after"]
        table.add_row(name, say(before), say(after), words.change(before, after))
    return table


def _removed_parts(gone: Mapping[str, float | None], stages: Sequence[Body]) -> list[RenderableType]:
    """Blocks and parts of layers that were removed, with what stands in for them."""
    if not gone:
        return []
    table = _table("dropped", "score", "in its place", right=(1,))
    for unit, score in gone.items():
        repairs = [stage["treatments"][unit].get("repair") for stage in stages if unit in stage["treatments"]]
        table.add_row(unit, "" if score is None else words.figure(score), next(filter(None, repairs), ""))
    return [table]


def _dropped_experts(scores: Mapping[str, Body]) -> list[RenderableType]:
    """Experts by layer; layers that lose none are summed up in one line."""
    losing = {layer: row for layer, row in scores.items() if row["dropped"]}
    if not losing:
        return []
    shielded = any(row["protected"] for row in losing.values())
    table = _table("layer", "experts", "dropped", *(["super experts, kept"] if shielded else []), right=(1,))
    for layer, row in losing.items():
        count = f"{len(row['kept']) + len(row['dropped'])} → {len(row['kept'])}"
        lists = [_dropped_words(row), *([words.spans(row["protected"])] if shielded else [])]
        table.add_row(layer, count, *lists)
    untouched = [layer for layer in scores if layer not in losing]
    return [table, *_titled_list("no expert dropped in", [", ".join(untouched)] if untouched else [])]


def _dropped_words(row: Body) -> str:
    """Dropped experts; those that were averaged into another one with it."""
    merged = {int(expert): int(leader) for expert, leader in row.get("merged", {}).items()}
    plain = [expert for expert in row["dropped"] if expert not in merged]
    joined = [f"{expert} into {merged[expert]}" for expert in row["dropped"] if expert in merged]
    return ", ".join(filter(None, (words.spans(plain), *joined)))


def _effort(body: Body) -> Table:
    """Time by phase and peak memory: what of it was taken."""
    phases = " · ".join(f"{name} {words.duration(value)}" for name, value in body.get("phases", {}).items())
    total = words.duration(body["seconds"])
    rows = [("time", f"{total} ({phases})" if phases else total)]
    if body.get("peak_rss_bytes"):
        rows.append(("peak memory", _memory(body)))
    if body.get("machine"):
        rows.append(("machine", _machine(body["machine"])))
    return _pairs(*rows)


def _memory(body: Body) -> str:
    resident, anonymous = body["peak_rss_bytes"], body.get("peak_anonymous_bytes")
    return words.size(resident) + (f", of which {words.size(anonymous)} anonymous" if anonymous else "")


def _machine(machine: Body) -> str:
    parts = [
        machine["cpu"],
        f"{machine['cores']} cores",
        words.size(machine["memory_bytes"]),
        *machine.get("accelerators", ()),
    ]
    return ", ".join(parts)


def _layers(layers: Sequence[Body]) -> Table:
    """Equal neighbours on one line; widths, and parts that a layer lacks, where there are any."""
    rows = [_layer(layer) for layer in layers]
    shown = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
    table = _table(
        "layers", *shown, right=[at for at, name in enumerate(shown, 1) if name not in ("mixer", "without")]
    )
    numbered = zip((layer["index"] for layer in layers), rows, strict=True)
    for row, run in groupby(numbered, key=lambda pair: pair[1]):
        table.add_row(words.spans([index for index, _ in run]), *(row[name] or "-" for name in shown))
    return table


def _layer(layer: Body) -> dict[str, str]:
    """The columns of one layer; empty where there is nothing to say."""
    skipped, parts = layer.get("skipped", 0), layer.get("parts", ("attention", "mlp"))
    of = f" of {layer['experts'] + skipped}" if skipped else ""
    lacks = [
        label for part, label in (("attention", "attention"), ("mlp", "feed-forward")) if part not in parts
    ]
    return {
        "mixer": str(layer["mixer"]),
        "experts": f"{layer['experts'] or ''}{of}",
        "shared": str(layer["shared_experts"] or ""),
        "top_k": str(layer["top_k"] or ""),
        "width": f"{min(widths)} to {max(widths)}"
        if (widths := layer.get("widths"))
        else str(layer.get("width") or ""),
        "without": ", ".join(lacks) if parts else "",
    }


def _shares(sizes: Mapping[str, int]) -> Table:
    table = _table("part", "bytes", "share", right=(1, 2))
    total = sizes["total"]
    for part, count in sizes.items():
        if part != "total" and count:
            table.add_row(part, words.size(count), words.percent(count / total))
    return table


def _with_interval(score: Body) -> str:
    value = words.figure(score["value"] if "value" in score else score["mean"])
    low_high = score.get("ci95")
    return (
        f"{value}  (95 %: {words.figure(low_high[0])} to {words.figure(low_high[1])})" if low_high else value
    )


def _method(method: Body) -> list[RenderableType]:
    table = _table("setting", "type", "default", "")
    for setting in method["settings"]:
        default = setting["default"]
        table.add_row(
            setting["name"],
            _type(setting["type"]),
            "" if default is None else str(default),
            setting.get("doc") or "",
        )
    _, _, story = method["doc"].partition("\n\n")
    story = _reflow(story)
    paragraphs = [Padding(Text(story), (0, 0, 0, 1))] if story else []
    return [Text(f"{method['kind']}: {method['summary']}"), *paragraphs, table]


def _reflow(story: str) -> str:
    """Join the lines of running text; indented lines (formulas) stay as they are."""
    return re.sub(r"(?<=\S)\n(?=[^\s])", " ", story)


def _type(name: str) -> str:
    """A type as people write it: ``Literal['layer', 'global']`` is ``layer | global``."""
    return re.sub(r"Literal\[(.*)\]", lambda match: match[1].replace("'", "").replace(", ", " | "), str(name))


def _value(value: Any) -> str:
    return words.spans(value) if isinstance(value, tuple) else str(value)
