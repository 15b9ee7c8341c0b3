"""How much do 4, 3 and 2 bits cost, and which method spends them best? The rounding table of the README.

Routed experts only, in groups of 32, on both bundled models: every method, and GPTQ with and without what is added to the
published algorithm, each on three drawings of calibration text (methods without text have one). KL is the mean token KL to
the original on a tenth of the held-out text; the interval is a 95% bootstrap over sequences for the first drawing, the range
that of the drawings. Nothing is written: a plan is evaluated as a view of the checkpoint.

    python benchmarks/slimming.py [--models mixtral deepseek_v2] [--bits 4 3 2] [--out FILE.json]
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
from moespresso.core.registry import parse_step
from moespresso.core.runtime import Runtime
from moespresso.data import Source, calibration
from moespresso.pipeline import Clock, decide
from moespresso.report import machine, versions

STRIDE, SEEDS, SAMPLES = 10, (0, 1, 2), 48
PUBLISHED = "damping=0.01,sweeps=0,unbiased=false,weighted=false"
WAYS = {
    "rtn, min-max, biased": "rtn:scales=minmax,unbiased=false",
    "rtn": "rtn:",
    "hqq": "hqq:",
    "awq": "awq:",
    "gptq, as published": f"gptq:weighting=none,{PUBLISHED}",
    "gptq, as published, gate2": f"gptq:weighting=gate2,{PUBLISHED}",
    "gptq": "gptq:",
    "gptq, gate2": "gptq:weighting=gate2",
    "gptq, gate2, shrunk (kappa = 256)": "gptq:weighting=gate2,shrink=256",
    "autoround": "autoround:",
}


def run(name: str, folder: str, bits: int) -> dict[str, Any]:
    """All ways on one model at one width."""
    torch.set_num_threads(1)
    bench, rows = Bench(Path(folder), STRIDE), {}
    form = f"bits={bits},group_size=32"
    texts = [
        calibration([Source(str(TEXT / "calibration"))], load_tokenizer(Path(folder)), SAMPLES, LENGTH, seed)
        for seed in SEEDS
    ]
    for label, text in WAYS.items():
        step = parse_step(text + form if text.endswith(":") else f"{text},{form}")
        found = []
        for batches in texts if step.on_text else texts[:1]:
            with tempfile.TemporaryDirectory() as work:
                start = time.process_time()
                decided = decide(bench.view, [step], batches, None, Path(work), Runtime(), Clock())
                seconds = time.process_time() - start
                view = replace(bench.view, plan=decided.plan, fits=decided.fits)
                found.append(bench.compare(view) | {"seconds": seconds})
        rows[label] = {
            "kl": [row["kl"]["mean"] for row in found],
            "ci95": found[0]["kl"]["ci95"],
            "perplexity_ratio": found[0]["perplexity_ratio"],
            "seconds": found[0]["seconds"],
            "bytes": view.blueprint.cost().bytes,
        }
        print(f"{name:12} {bits} bits  {label:28} KL {rows[label]['kl']}", flush=True)
    return rows


def table(results: dict[str, dict[str, Any]]) -> str:
    """Rows are ways, columns a model at a width: mean KL over the drawings (their range)."""
    lines = [f"| KL to the original | {' | '.join(results)} |", "|---|" + "---|" * len(results)]
    lines += [f"| {label} | {' | '.join(cell(rows[label]) for rows in results.values())} |" for label in WAYS]
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    """The mean, and the range where there were several drawings."""
    values = row["kl"]
    mean = sum(values) / len(values)
    return f"{mean:.4f}" + (f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else "")


def main() -> None:
    """Run, print and save."""
    assert moespresso.methods
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3, 2])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    jobs = [(name, str(MODELS[name]), bits) for bits in asked.bits for name in asked.models]
    results: dict[str, dict[str, Any]] = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for (name, _, bits), rows in zip(jobs, pool.map(run, *zip(*jobs, strict=True)), strict=True):
            results[f"{name}, {bits} bits"] = rows
            if asked.out:
                body = {
                    "date": date.today().isoformat(),
                    "machine": machine(),
                    "versions": versions(),
                    "results": results,
                }
                asked.out.write_text(json.dumps(body, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
