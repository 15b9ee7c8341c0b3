"""Experts, layers or blocks? What each costs at equal bytes: the table and the figure of the README.

For each bundled model and for 10, 25 and 40% of the tensor bytes removed: Expert Drop, Layer Drop and Block Drop with the
amount that comes nearest, one-shot (easy_ep; cosine) and greedy (in re-scored steps; true KL with swaps), without and with
repair. KL is the mean token KL to the original on a third of the held-out text, with a 95% bootstrap interval over sequences. With
`--dense FOLDER` a dense twin is dropped by layers and blocks beside the Mixtral form (the paper's Table 2). Nothing is
written: a plan is evaluated as a view of the checkpoint.

    python benchmarks/depth.py [--models mixtral deepseek_v2] [--dense FOLDER] [--out FILE.json] [--figure FILE.png]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from scores import Bench

import moespresso.methods
from moespresso.bundled import MODELS
from moespresso.core.errors import UserError
from moespresso.core.registry import parse_step
from moespresso.core.remains import dropped_units
from moespresso.core.runtime import Runtime
from moespresso.core.unit import Unit
from moespresso.fitting import fit
from moespresso.model import View
from moespresso.pipeline import Clock, decide
from moespresso.report import machine, versions

SHARES = (0.10, 0.25, 0.40)
STRIDE = 3  # every third row of the held-out text: all domains, a third of the time
ROWS = 16  # of the calibration text, for what is chosen by true KL
Recipe = tuple[str, ...]


def ways(view: View, share: float) -> Iterator[tuple[str, str, Recipe]]:
    """What is dropped, how it is chosen and repaired, and the steps: the amounts nearest to `share` of the bytes."""
    if view.source.moe_layers:
        experts = view.source.moe_layers[0].experts
        keep = nearest(view, share, [f"expert_drop:keep={keep}" for keep in range(experts - 1, 1, -1)])
        yield "experts", "one-shot", (keep,)
        yield "experts", "one-shot, compensated", (f"{keep},renormalise=compensate",)
        last = int(keep.partition("keep=")[2])
        stride = max(1, experts // 16)
        stops = [*range(experts - stride, last, -stride), last]
        yield "experts", "re-scored", tuple(f"expert_drop:keep={stop}" for stop in stops)
        yield "experts", "over all layers (plugin)", (f"{keep},scope=global",)
        yield "experts", "novices (plugin)", (f"{keep},replace=novice",)
        for method in ("hc_smoe", "m_smoe", "ream"):
            yield "experts", f"merged, {method}", (f"expert_merge:keep={last},method={method}",)
    for what, kind in (("layers", "layer_drop"), ("blocks", "block_drop")):
        most = len(view.source.layers if what == "blocks" else view.source.moe_layers or view.source.layers)
        step = nearest(view, share, [f"{kind}:drop={drop}" for drop in range(1, most)])
        for how, score in (("one-shot", "score=cosine"), ("greedy KL", f"score=kl,rows={ROWS}")):
            yield what, how, (f"{step},{score}",)
        if what == "blocks":
            yield what, "one run, cosine", (f"{step},contiguous=true",)


def nearest(view: View, share: float, steps: list[str]) -> str:
    """The step whose result is nearest to `share` of the bytes removed; those that cannot be done are passed over."""
    whole = view.source.cost().bytes
    priced: list[tuple[float, str]] = []
    for text in steps:
        step = parse_step(text)
        try:
            step.check(view.source)
            plan = replace(view.plan, stages=(step.outline(view.source, view.plan),)).validated(view.source)
        except UserError:  # below the floor of a router
            continue
        priced.append((abs(1 - plan.cost(view.source).bytes / whole - share), text))
    return min(priced)[1]


def run(name: str, folder: str) -> dict[str, Any]:
    """All ways on one model."""
    torch.set_num_threads(1)
    bench = Bench(Path(folder), STRIDE)
    whole = bench.view.source.cost()
    rows: list[dict[str, Any]] = []
    for share in SHARES:
        for what, how, steps in ways(bench.view, share):
            for repair, view, order in results_of(bench, steps):
                cost, figures = view.blueprint.cost(), bench.compare(view)
                rows.append({
                    "share": share, "what": what, "how": f"{how}, {repair}" if repair else how, "steps": list(steps),
                    "removed": 1 - cost.bytes / whole.bytes, "flops": 1 - cost.flops / whole.flops,
                    "kl": figures["kl"], "perplexity_ratio": figures["perplexity_ratio"], "order": order,
                })  # fmt: skip
                print(
                    f"{name:12} {share:.0%} {what:8} {rows[-1]['how']:22} KL {figures['kl']['mean']:.4f}",
                    flush=True,
                )
    return {"bytes": whole.bytes, "flops": whole.flops, "rows": rows}


def results_of(bench: Bench, steps: Recipe) -> Iterator[tuple[str, View, list[str]]]:
    """The repair, the view, and the units that go in order: chosen once, then repaired in every way."""
    with tempfile.TemporaryDirectory() as work:
        settings = [parse_step(step) for step in steps]
        decided = decide(bench.view, settings, bench.calibration, None, Path(work), Runtime(), Clock())
        order = [
            str(unit) for unit in decided.scores if Unit(unit.layer, unit.part) in dropped_units(decided.plan)
        ]
        yield "", replace(bench.view, plan=decided.plan, fits=decided.fits), order
        if not order or getattr(settings[0], "contiguous", False):
            return
        for repair in ("scale", "linear"):
            [stage] = decided.plan.stages
            treatments = {
                unit: replace(treatment, repair=repair) for unit, treatment in stage.treatments.items()
            }
            plan = replace(decided.plan, stages=(replace(stage, treatments=treatments),))
            fits = fit(bench.view, plan, bench.calibration, Path(work), Runtime())
            yield repair, replace(bench.view, plan=plan, fits=fits), order


def table(results: dict[str, Any]) -> str:
    """One table: rows are ways, columns KL (95% CI) at each share, per model."""
    lines: list[str] = []
    for name, result in results.items():
        shares = [f"{share:.0%} of the bytes" for share in SHARES]
        lines += [f"| {name} | | {' | '.join(shares)} |", "|---|---|" + "---|" * len(SHARES)]
        kinds = list(dict.fromkeys((row["what"], row["how"]) for row in result["rows"]))
        for kind in kinds:
            cells = [cell(row) for row in result["rows"] if (row["what"], row["how"]) == kind]
            lines.append(f"| {kind[0]} | {kind[1]} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    """KL with its interval, the perplexity ratio, what was really removed of bytes and FLOPs."""
    low, high = row["kl"]["ci95"]
    return (
        f"{row['kl']['mean']:.3f} ({low:.3f} to {high:.3f}), ppl x{row['perplexity_ratio']:.2f} "
        f"(-{row['removed']:.0%} bytes, -{row['flops']:.0%} FLOPs)"
    )


def figure(results: dict[str, Any], path: Path) -> None:
    """KL over bytes removed: one panel per model, one line per way."""
    import matplotlib.pyplot as plt

    shown = {
        ("experts", "one-shot"): ("Expert Drop", "#1b6ca8", "-"),
        ("layers", "one-shot"): ("Layer Drop, cosine", "#c1121f", ":"),
        ("layers", "greedy KL"): ("Layer Drop, greedy KL", "#c1121f", "--"),
        ("layers", "greedy KL, linear"): ("Layer Drop, greedy KL, repaired", "#c1121f", "-"),
        ("blocks", "one-shot"): ("Block Drop, cosine", "#2a7f3f", ":"),
        ("blocks", "greedy KL"): ("Block Drop, greedy KL", "#2a7f3f", "--"),
        ("blocks", "greedy KL, linear"): ("Block Drop, greedy KL, repaired", "#2a7f3f", "-"),
    }
    panels, axes = plt.subplots(1, len(results), figsize=(5.2 * len(results), 4), sharey=True, squeeze=False)
    for axis, (name, result) in zip(axes[0], results.items(), strict=True):
        for key, (label, colour, style) in shown.items():
            rows = [row for row in result["rows"] if (row["what"], row["how"]) == key]
            if rows:
                axis.plot([100 * r["removed"] for r in rows], [r["kl"]["mean"] for r in rows], style, color=colour,
                          marker="o", markersize=4, label=label)  # fmt: skip
        axis.set(title=name, xlabel="tensor bytes removed, %", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean token KL to the original")
    axes[0][0].legend(fontsize=8)
    panels.tight_layout()
    panels.savefig(path, dpi=130)


def main() -> None:
    """Run, print and save."""
    assert moespresso.methods
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument(
        "--dense", type=Path, help="a dense twin of the Mixtral form (tools/train_demo.py --form mistral)"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args()
    folders = {name: str(MODELS[name]) for name in asked.models}
    folders |= {"dense twin": str(asked.dense)} if asked.dense else {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        results = dict(zip(folders, pool.map(run, folders, folders.values()), strict=True))
    print(table(results))
    if asked.figure:
        figure(results, asked.figure)
    if asked.out:
        body = {
            "date": date.today().isoformat(),
            "models": results,
            "machine": machine(),
            "versions": versions(),
        }
        asked.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
