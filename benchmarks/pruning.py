"""What does it cost to make experts smaller, and which cut costs least? The pruning table and chart of the README.

At equal bytes of routed experts (15, 25 and 50% gone): whole experts dropped or merged, and channels by every score and refit;
beside them, at the size that a mask and the values take (`stored`), single weights. On the bundled models (or MODEL ...), on
three drawings of calibration text. KL is the mean token KL to the original on a tenth of the held-out text; the interval is
a 95% bootstrap over sequences for the first drawing, the range that of the drawings. Nothing is written: a plan is evaluated as
a view of the checkpoint.

    python benchmarks/pruning.py [MODEL ...] [--ratios 0.15 0.25 0.5] [--seeds 3] [--steps ...] [--out FILE.json] [--figure FILE.png]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from scores import LENGTH, Bench

import moespresso.methods
from moespresso.api import load_tokenizer
from moespresso.bundled import MODELS, TEXT
from moespresso.core.format import stored_parts
from moespresso.core.registry import parse_step
from moespresso.core.runtime import Runtime
from moespresso.data import Source, calibration
from moespresso.methods._prune import Sparsity
from moespresso.pipeline import Clock, all_needs, decide
from moespresso.report import machine, versions

STRIDE, SAMPLES = 10, 48
RATIOS = [0.15, 0.25, 0.5]
# Widths of their own, then shared bases: of a share r that goes in all, r / (1 + r) first and r^2 of the rest.
BOTH = "channel_prune:ratio={0:own},score=surgeon,refit=layer,per_expert=true,scope=global low_rank:method=shared_basis,ratio={0:bases}"
CUTS = [
    "expert_drop:ratio={}",
    "expert_drop:ratio={} refit",
    "expert_merge:ratio={}",
    "expert_merge:ratio={} refit",
    "channel_prune:ratio={},score=random,refit=none",
    "channel_prune:ratio={},score=random,refit=expert",
    "channel_prune:ratio={},score=magnitude,refit=none",
    "channel_prune:ratio={},score=magnitude,refit=expert",
    "channel_prune:ratio={},score=wanda,refit=none",
    "channel_prune:ratio={},score=wanda,refit=expert",
    "channel_prune:ratio={},score=camera,refit=none",
    "channel_prune:ratio={},score=camera,refit=expert",
    "channel_prune:ratio={},score=camera,refit=layer",
    "channel_prune:ratio={},score=heapr,refit=none",
    "channel_prune:ratio={},score=heapr,refit=expert",
    "channel_prune:ratio={},score=leverage,refit=expert",
    "channel_prune:ratio={},score=surgeon,refit=none",
    "channel_prune:ratio={},score=surgeon,refit=expert",
    "channel_prune:ratio={},score=surgeon,refit=layer",
    "channel_prune:ratio={},score=surgeon,refit=layer,scope=global",
    "channel_prune:ratio={},score=camera,refit=none,per_expert=true",
    "channel_prune:ratio={},score=surgeon,refit=layer,per_expert=true",
    "channel_prune:ratio={},score=surgeon,refit=layer,per_expert=true,scope=global",
    "low_rank:ratio={}",
    "low_rank:method=shared_basis,ratio={}",
    BOTH,
]
# Steps of the chart.
SHOWN = [
    *["expert_drop:ratio={}", "expert_drop:ratio={} refit", "expert_merge:ratio={}", "low_rank:ratio={}"],
    *["channel_prune:ratio={},score=random,refit=none", "channel_prune:ratio={},score=camera,refit=none"],
    *[
        "channel_prune:ratio={},score=camera,refit=expert",
        "channel_prune:ratio={},score=surgeon,refit=expert",
    ],
    *[
        "channel_prune:ratio={},score=surgeon,refit=layer",
        "channel_prune:ratio={},score=surgeon,refit=layer,scope=global",
    ],
    *["channel_prune:ratio={},score=surgeon,refit=layer,per_expert=true"],
    *["channel_prune:ratio={},score=surgeon,refit=layer,per_expert=true,scope=global"],
    *[BOTH, "low_rank:method=shared_basis,ratio={}"],
    *["magnitude:sparsity={}", "wanda:sparsity={}", "sparsegpt:sparsity={}"],
]
MASKED = [
    "magnitude:sparsity={}",
    "wanda:sparsity={}",
    "wanda:sparsity={},gate=true",
    "wanda:sparsity={},variant=true",
    "sparsegpt:sparsity={}",
    "sparsegpt:sparsity={},weighting=gate2",
]
PATTERNS = ["0.5", "2:4", "4:8"]
# What pruning the shared experts as well costs (table 8 of arXiv 2406.02500), where there are any.
WITH_SHARED = ["wanda:sparsity={},parts=experts+shared", "sparsegpt:sparsity={},parts=experts+shared"]


class Amount(str):
    """A share or a pattern as it stands in a step; a part of it where the step says so."""

    def __format__(self, spec: str) -> str:
        """Itself, or of a share what channels (`own`) or `bases` take."""
        if not spec or ":" in self:
            return str(self)
        share = float(self)
        return f"{share / (1 + share) if spec == 'own' else share * share:.4g}"


def ways(ratios: list[float]) -> list[str]:
    """Every step to be tried."""
    cuts = [cut.format(Amount(ratio)) for ratio in ratios for cut in CUTS]
    masked = [
        step.format(pattern)
        for pattern in PATTERNS
        for step in MASKED
        if "variant" not in step or ":" not in pattern
    ]
    shared = [step.format(pattern) for pattern in PATTERNS[:2] for step in WITH_SHARED]
    return cuts + masked + shared


def stored(step: Any, bench: Bench, view: Any) -> float:
    """Share of the bytes of routed experts that is left; of single weights, as a mask and the values that stay."""
    before = sum(e.ref.nbytes for e in bench.view.source.entries if e.unit.part == "experts")
    sparsity = getattr(step, "sparsity", None)
    if sparsity is None:
        return sum(e.ref.nbytes for e in view.blueprint.entries if e.unit.part == "experts") / before
    form, after = replace(Sparsity(sparsity).pattern, kind="sparse"), 0
    for entry in bench.view.source.entries:
        if entry.unit.part == "experts":
            for shape, dtype in stored_parts("bitmask", form, *entry.ref.shape, entry.ref.dtype).values():
                width = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "I64": 8}[dtype]
                after += torch.Size(shape).numel() * width
    return after / before


def run(folder: str, text: str, seeds: int) -> dict[str, Any] | None:
    """One way on one model; None where it makes no sense there."""
    torch.set_num_threads(1)
    bench, steps, found = Bench(Path(folder), STRIDE), [parse_step(step) for step in text.split()], []
    if "+shared" in text and not any(layer.shared_experts for layer in bench.view.source.layers):
        return None
    for seed in range(seeds if all_needs(steps) - {"weights"} else 1):
        batches = calibration(
            [Source(str(TEXT / "calibration"))], load_tokenizer(Path(folder)), SAMPLES, LENGTH, seed
        )
        with tempfile.TemporaryDirectory() as work:
            start = time.process_time()
            decided = decide(bench.view, steps, batches, None, Path(work), Runtime(), Clock())
            seconds = time.process_time() - start
            view = replace(bench.view, plan=decided.plan, fits=decided.fits)
            found.append(bench.compare(view) | {"seconds": seconds})
            left = stored(steps[0], bench, view)
    row = {"kl": [each["kl"]["mean"] for each in found], "ci95": found[0]["kl"]["ci95"], "left": left,
           "perplexity_ratio": found[0]["perplexity_ratio"], "seconds": found[0]["seconds"]}  # fmt: skip
    print(f"{Path(folder).name:12} {text:52} {left:6.1%} left  KL {cell(row)}", flush=True)
    return row


def table(results: dict[str, dict[str, Any]], amounts: list[str], steps: list[str]) -> str:
    """Rows are steps, columns models and amounts."""
    columns = [(name, amount) for name in results for amount in amounts]
    head = [f"{name}, {amount}" for name, amount in columns]
    lines = [f"| KL to the original | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for step in steps:
        rows = [results[name].get(step.format(Amount(amount))) for name, amount in columns]
        label = short(step)
        if any(rows):
            lines.append(f"| `{label}` | {' | '.join(cell(row) if row else '' for row in rows)} |")
    left = [
        {f"{row['left']:.0%}" for step in steps if (row := results[name].get(step.format(Amount(amount))))}
        for name, amount in columns
    ]
    lines.append(
        f"| *bytes of routed experts left* | {' | '.join(' to '.join(sorted(each)) for each in left)} |"
    )
    return "\n".join(lines)


def short(step: str) -> str:
    """A step without its amount."""
    for amount in (
        "ratio={0:own},",
        ",ratio={0:bases}",
        "ratio={},",
        ":ratio={}",
        ",ratio={}",
        "sparsity={},",
        ":sparsity={}",
    ):
        step = step.replace(amount, "")
    return step


def label(step: str) -> str:
    """A step in the legend of the chart."""
    return (
        "  the same, then shared bases"
        if step == BOTH
        else short(step).replace("channel_prune:", "channels: ")
    )


def cell(row: dict[str, Any]) -> str:
    """The mean, and the range where there were several drawings."""
    values = row["kl"]
    mean = sum(values) / len(values)
    digits = 4 if mean >= 0.001 else 6
    told = f"{mean:.{digits}f}"
    if len(set(values)) == 1:
        return told
    return f"{told} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def figure(results: dict[str, dict[str, Any]], path: Path) -> None:
    """KL against bytes, one panel a model. Weights pruned by a pattern are single points beside those of a plain share."""
    import matplotlib.pyplot as plt

    made, panels = plt.subplots(1, len(results), figsize=(5 * len(results) + 5, 4.5), squeeze=False)
    for panel, (name, rows) in zip(panels[0], results.items(), strict=True):
        for number, step in enumerate(SHOWN):
            found = (
                (amount, rows.get(step.format(Amount(amount))))
                for amount in dict.fromkeys([*map(str, RATIOS), *PATTERNS])
            )
            points = sorted(
                (row["left"], sum(row["kl"]) / len(row["kl"]), amount) for amount, row in found if row
            )
            masked = "sparsity" in step
            panel.plot([x for x, _, _ in points], [y for _, y, _ in points], "x" if masked else "o-",
                       color=plt.get_cmap("tab20")(number), label=label(step), markersize=5)  # fmt: skip
            if step.startswith("sparsegpt"):
                for left, kl, amount in points:
                    panel.annotate(
                        amount,
                        (left, kl),
                        xytext=(5, -3),
                        textcoords="offset points",
                        fontsize=7,
                    )
        panel.set(
            title=name, xlabel="bytes of routed experts left", ylabel="KL to the original", yscale="log"
        )
    handles, labels = panels[0][0].get_legend_handles_labels()
    made.legend(handles, labels, loc="center right", fontsize=8)
    made.tight_layout(rect=(0, 0, 1 - 4.9 / made.get_figwidth(), 1))
    made.savefig(path, dpi=130)


def main() -> None:
    """Run, print and save."""
    assert moespresso.methods
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[str(folder) for folder in MODELS.values()])
    parser.add_argument("--ratios", nargs="*", type=float, default=RATIOS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", nargs="*", help="these steps only; beside what --out holds already")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    asked = parser.parse_args()
    steps = asked.steps or ways(asked.ratios)
    jobs = [(folder, step, asked.seeds) for step in steps for folder in asked.models]
    results: dict[str, dict[str, Any]] = {Path(folder).name: {} for folder in asked.models}
    if asked.steps and asked.out and asked.out.is_file():
        results |= json.loads(asked.out.read_text())["results"]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for (folder, step, _), row in zip(jobs, pool.map(run, *zip(*jobs, strict=True)), strict=True):
            if row is None:
                continue
            results[Path(folder).name][step] = row
            if asked.out:
                body = {"date": date.today().isoformat(), "machine": machine(), "versions": versions(), "results": results}  # fmt: skip
                asked.out.write_text(json.dumps(body, indent=1) + "\n")
    print(table(results, [str(ratio) for ratio in asked.ratios], CUTS))
    print(table(results, PATTERNS, [*MASKED, *WITH_SHARED]))
    if asked.figure:
        figure(results, asked.figure)


if __name__ == "__main__":
    main()
