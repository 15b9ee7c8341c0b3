"""What does it cost to make attention smaller, and which cut costs least?

Dims of heads (`attention_rank`: queries and keys, values and outputs, both; the same of every layer, or by entropy), at shares
of the bytes of what is treated; beside them every matrix as two factors (`low_rank`), and the attention of whole layers dropped.
`left` is the share of all attention bytes that is left, as stored. KL is the mean token KL to the original on a tenth of the
held-out text, for three drawings of calibration text; the interval is a 95% bootstrap over sequences for the first. Nothing is
written: a plan is evaluated as a view of the checkpoint. Bundled is one model with such attention (the other's is latent,
which `attention_rank` refuses).

    python benchmarks/attention.py [MODEL ...] [--ratios 0.15 0.25 0.5] [--seeds 3] [--out FILE.json]
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
from pruning import SAMPLES, STRIDE, cell
from scores import LENGTH, Bench

import moespresso.methods
from moespresso.api import load_tokenizer
from moespresso.bundled import MODELS, TEXT
from moespresso.core.blueprint import Blueprint
from moespresso.core.registry import parse_step
from moespresso.core.runtime import Runtime
from moespresso.data import Source, calibration
from moespresso.pipeline import Clock, decide
from moespresso.report import machine, versions

CUTS = [
    f"attention_rank:ratio={{}},modules={modules},allocation={allocation}"
    for allocation in ("even", "entropy")
    for modules in ("qk", "vo", "qk+vo")
]
FACTORS = "low_rank:ratio={},parts=attention"
DROPS = ["layer_drop:part=attention,drop={},score=cosine", "layer_drop:part=attention,drop={},score=kl"]


def ways(ratios: list[float], layers: int) -> list[str]:
    """Every step to be tried; as many layers lose their attention as come nearest to a ratio."""
    cuts = [step.format(ratio) for ratio in ratios for step in [*CUTS, FACTORS]]
    return cuts + [step.format(max(1, round(ratio * layers))) for ratio in ratios for step in DROPS]


def attention_bytes(blueprint: Blueprint) -> int:
    """Stored bytes of the attention of all layers."""
    return sum(entry.ref.nbytes for entry in blueprint.entries if entry.unit.part == "attention")


def run(folder: str, text: str, seeds: int) -> dict[str, Any]:
    """One way on one model."""
    torch.set_num_threads(1)
    bench, step, found, left = Bench(Path(folder), STRIDE), parse_step(text), [], 1.0
    for seed in range(seeds):
        batches = calibration(
            [Source(str(TEXT / "calibration"))], load_tokenizer(Path(folder)), SAMPLES, LENGTH, seed
        )
        with tempfile.TemporaryDirectory() as work:
            start = time.process_time()
            decided = decide(bench.view, [step], batches, None, Path(work), Runtime(), Clock())
            seconds = time.process_time() - start
            view = replace(bench.view, plan=decided.plan, fits=decided.fits)
            found.append(bench.compare(view) | {"seconds": seconds})
            left = attention_bytes(view.blueprint) / attention_bytes(bench.view.source)
    row = {"kl": [each["kl"]["mean"] for each in found], "ci95": found[0]["kl"]["ci95"], "left": left,
           "perplexity_ratio": found[0]["perplexity_ratio"], "seconds": found[0]["seconds"]}  # fmt: skip
    print(f"{Path(folder).name:12} {text:62} {left:6.1%} left  KL {cell(row)}", flush=True)
    return row


def table(results: dict[str, dict[str, Any]]) -> str:
    """All ways of every model, the most bytes left first."""
    lines = ["| step | attention bytes left | KL to the original |", "|---|---|---|"]
    for rows in results.values():
        for step, row in sorted(rows.items(), key=lambda item: -item[1]["left"]):
            lines.append(f"| `{step}` | {row['left']:.1%} | {cell(row)} |")
    return "\n".join(lines)


def main() -> None:
    """Run, print and save."""
    assert moespresso.methods
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[str(MODELS["mixtral"])])
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.15, 0.25, 0.5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    jobs = [
        (folder, step, asked.seeds)
        for folder in asked.models
        for step in ways(asked.ratios, len(Bench(Path(folder), 100).view.source.layers))
    ]
    results: dict[str, dict[str, Any]] = {Path(folder).name: {} for folder in asked.models}
    with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as pool:
        for (folder, step, _), row in zip(jobs, pool.map(run, *zip(*jobs, strict=True)), strict=True):
            results[Path(folder).name][step] = row
            if asked.out:
                body = {"date": date.today().isoformat(), "machine": machine(), "versions": versions(), "results": results}  # fmt: skip
                asked.out.write_text(json.dumps(body, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
