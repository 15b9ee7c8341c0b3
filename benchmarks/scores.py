"""Which score finds the experts a model can spare? The KL table of the README.

For each bundled model: measure once on the bundled calibration text, drop a quarter of the experts by every score (and
by controls: random seeds, the best experts instead of the worst), stream the held-out text through the original and
each pressed view, and report mean token KL with a 95% bootstrap interval over sequences, and the perplexity ratio.
Nothing is written: a plan is evaluated as a view of the checkpoint.

    python benchmarks/scores.py [--ratio 0.25] [--out benchmarks/results/FILE.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
from torch import Tensor

import moespresso.methods
from moespresso.api import load_tokenizer
from moespresso.bundled import MODELS, TEXT
from moespresso.checkpoint import Reader
from moespresso.core.registry import parse_step
from moespresso.core.runtime import Runtime
from moespresso.data import Batches, Source, calibration, sequences
from moespresso.evaluate import score_tokens
from moespresso.evaluate.compare import summary
from moespresso.methods.expert_drop import Score
from moespresso.model import View, make_skeleton, open_view
from moespresso.pipeline import Clock, decide, measure
from moespresso.report import machine, versions
from moespresso.stream import sweep

RANDOM_SEEDS = 8
NEEDS = frozenset({"routing", "reconstruction", "weights"})
LENGTH = 512


def steps(ratio: float) -> dict[str, str]:
    """Label -> step: every score, and the controls."""
    named = {score: f"score={score}" for score in get_args(Score) if score != "random"}
    named |= {f"random, seed {seed}": f"score=random,seed={seed}" for seed in range(RANDOM_SEEDS)}
    named |= {"reap, gates=softmax": "score=reap,gates=softmax", "reap, compensate": "score=reap,renormalise=compensate",
              "easy_ep, compensate": "score=easy_ep,renormalise=compensate", "aimer, reversed": "score=aimer,reverse=true",
              "reap, reversed": "score=reap,reverse=true,protect_super=false"}  # fmt: skip
    return {label: f"expert_drop:ratio={ratio},{settings}" for label, settings in named.items()}


class Bench:
    """One model with its original's hidden states, ready to compare views with it on every `stride`-th row of the held-out
    text."""

    def __init__(self, folder: Path, stride: int = 1) -> None:
        self.view = open_view(folder)
        tokenizer = load_tokenizer(folder)
        self.calibration = calibration([Source(str(TEXT / "calibration"))], tokenizer, 64, LENGTH)
        whole = sequences([Source(str(TEXT / "heldout"))], tokenizer, LENGTH)
        self.heldout: Batches = replace(whole, ids=whole.ids[::stride], mask=whole.mask[::stride])
        self.original = self.hidden(self.view)

    def hidden(self, view: View) -> Tensor:
        """Last hidden states of the held-out text."""
        with Reader(view.checkpoint.folder) as reader:
            return sweep(make_skeleton(view, reader, Runtime()), self.heldout.ids, self.heldout.mask)

    def compare(self, view: View) -> dict[str, Any]:
        """The figures of a view against the original."""
        with Reader(view.checkpoint.folder) as reader:
            models = [make_skeleton(v, reader, Runtime()) for v in (view, self.view)]
            scored = score_tokens(models, [self.hidden(view), self.original], self.heldout)
        return summary(scored, self.heldout, compared=True)


def run(name: str, ratio: float) -> dict[str, Any]:
    """All scores on one bundled model."""
    torch.set_num_threads(1)
    bench, rows = Bench(MODELS[name]), {}
    with tempfile.TemporaryDirectory() as work:
        stats = measure(bench.view, bench.calibration, NEEDS, Path(work), Runtime())
        for label, text in steps(ratio).items():
            decided = decide(
                bench.view, [parse_step(text)], bench.calibration, stats, Path(work), Runtime(), Clock()
            )
            rows[label] = bench.compare(replace(bench.view, plan=decided.plan))
            print(f"{name:12} {label:22} KL {rows[label]['kl']['mean']:.4f}", flush=True)
    base = summary(score_tokens_alone(bench), bench.heldout, compared=False)
    return {
        "perplexity": base["perplexity"],
        "tokens": bench.heldout.num_tokens,
        "trouble": list(stats.trouble),
        "scores": rows,
    }


def score_tokens_alone(bench: Bench) -> Any:
    """The original by itself."""
    with Reader(bench.view.checkpoint.folder) as reader:
        return score_tokens([make_skeleton(bench.view, reader, Runtime())], [bench.original], bench.heldout)


def table(results: dict[str, Any]) -> str:
    """The README's table, best first by the first model; random drops are one row (mean, least and most of the seeds)."""
    head = " | ".join(f"{name}: KL (95% CI) | perplexity x" for name in results)
    lines = [f"| score | {head} |", "|---|" + "---|---|" * len(results)]
    first = next(iter(results.values()))["scores"]
    labels = sorted(
        (label for label in first if not label.startswith("random")), key=lambda key: first[key]["kl"]["mean"]
    )
    lines += [
        f"| {label} | {' | '.join(cell(result['scores'][label]) for result in results.values())} |"
        for label in labels
    ]
    lines.append(
        f"| random, {RANDOM_SEEDS} seeds (range) | {' | '.join(random_cell(r['scores']) for r in results.values())} |"
    )
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    """KL with its interval, and the perplexity ratio."""
    low, high = row["kl"]["ci95"]
    return f"{row['kl']['mean']:.3f} ({low:.3f} to {high:.3f}) | {row['perplexity_ratio']:.3f}"


def random_cell(scores: dict[str, Any]) -> str:
    """Mean over the seeds, and their range."""
    drawn = [row for label, row in scores.items() if label.startswith("random")]
    kl, ratio = [row["kl"]["mean"] for row in drawn], [row["perplexity_ratio"] for row in drawn]
    return f"{mean(kl):.3f} ({min(kl):.3f} to {max(kl):.3f}) | {mean(ratio):.3f}"


def main() -> None:
    """Run, print and save."""
    assert moespresso.methods
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    # One process per model, each with its share of the cores: small matrices gain nothing from more threads.
    with ProcessPoolExecutor(len(asked.models), multiprocessing.get_context("spawn")) as pool:
        found = pool.map(run, asked.models, [asked.ratio] * len(asked.models))
        results = dict(zip(asked.models, found, strict=True))
    print(table(results))
    if asked.out:
        body = {
            "date": date.today().isoformat(),
            "ratio": asked.ratio,
            "models": results,
            "machine": machine(),
            "versions": versions(),
        }
        asked.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
