"""What every benchmark does, written once: models, texts, compressing and evaluating, samples, processes, and dated results.

A script says *what* is tried and what of it is kept; everything that two scripts would have in common is here. A model is
compressed as a view of its checkpoint (`Bench.press`), so nothing is written, and compared with the original on held-out
text (`Bench.compare`). A result is one JSON file that says the date, the machine and the versions (`save`);
`pages.py` makes docs/results/ of these files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import moespresso.methods
from moespresso.build import Tensors, View, make_meta_model, open_view
from moespresso.bundled import MODELS, TEXT
from moespresso.core.plan import Plan
from moespresso.core.registry import parse_step
from moespresso.core.runtime import Runtime
from moespresso.core.stats import Stats
from moespresso.data import Batches, Sampling, Source, calibration, load_tokenizer, sequences
from moespresso.fit import Job, measure, see_text
from moespresso.fit.repairs import fit
from moespresso.quality import score_tokens
from moespresso.quality.compare import summary
from moespresso.report import machine, versions
from moespresso.run import Decided, decide
from moespresso.stream import sweep

assert moespresso.methods  # importing it registers the step kinds

# Calibration text: so many rows of so many tokens; held-out text: every tenth row, which covers all domains.
SAMPLES, LENGTH, STRIDE = 48, 512, 10
HERE = Path(__file__).parent
HELDOUT = Source(str(TEXT / "heldout"))
Task, Row = TypeVar("Task"), TypeVar("Row")


def folder_of(model: str | Path) -> Path:
    """A bundled model by its name, or a folder."""
    return MODELS.get(str(model), Path(model))


def calibration_rows(
    model: str | Path, samples: int = SAMPLES, length: int = LENGTH, seed: int = 0, split: str = "calibration"
) -> Batches:
    """Rows of the bundled text in the model's tokens: another `seed` draws other rows."""
    source = Source(str(TEXT / split))
    return calibration([source], load_tokenizer(folder_of(model)), Sampling(samples, length, seed))


@dataclass(frozen=True)
class Pressed:
    """A model compressed without being written: the view, what was decided, and processor seconds."""

    view: View
    decided: Decided
    seconds: float


class Bench:
    """One model with its original's hidden states on every `stride`-th row of the held-out text, ready to compare with."""

    def __init__(self, model: str | Path, stride: int = STRIDE, samples: int = SAMPLES) -> None:
        torch.set_num_threads(
            1
        )  # small matrices gain nothing from more; the other core has a process of its own
        self.folder, self.samples = folder_of(model), samples
        self.view = open_view(self.folder)
        whole = sequences([HELDOUT], load_tokenizer(self.folder), LENGTH)
        self.heldout: Batches = replace(whole, ids=whole.ids[::stride], mask=whole.mask[::stride])
        self.original = self.hidden(self.view)

    def text(self, seed: int = 0) -> Batches:
        """A sample of the calibration text."""
        return calibration_rows(self.folder, self.samples, seed=seed)

    def hidden(self, view: View) -> Tensor:
        """Last hidden states of the held-out text."""
        with Tensors(view.checkpoint.folder) as reader:
            return sweep(make_meta_model(view, reader, Runtime()), self.heldout.ids, self.heldout.mask)

    def compare(self, view: View) -> dict[str, Any]:
        """The figures of a view against the original."""
        with Tensors(view.checkpoint.folder) as reader:
            models = [make_meta_model(v, reader, Runtime()) for v in (view, self.view)]
            scored = score_tokens(models, [self.hidden(view), self.original], self.heldout)
        return summary(scored, self.heldout, compared=True)

    def alone(self) -> dict[str, Any]:
        """The figures of the original by itself."""
        with Tensors(self.view.checkpoint.folder) as reader:
            scored = score_tokens(
                [make_meta_model(self.view, reader, Runtime())], [self.original], self.heldout
            )
        return summary(scored, self.heldout, compared=False)

    def measure(self, steps: Sequence[str]) -> Stats:
        """Statistics that several steps are then decided on."""
        with tempfile.TemporaryDirectory() as work:
            return measure(Job(self.view, Path(work), self.text()), list(map(parse_step, steps)), self.view)

    def press(self, steps: Sequence[str], text: Batches | None = None, stats: Stats | None = None) -> Pressed:
        """The model after these steps."""
        settings = [parse_step(step) for step in steps]
        with tempfile.TemporaryDirectory() as work:
            start = time.process_time()
            batches = text or self.text()
            decided = decide(Job(self.view, Path(work), batches), settings, stats)
            seconds = time.process_time() - start
        return Pressed(replace(self.view, plan=decided.plan, fits=decided.fits), decided, seconds)

    def fitted(self, plan: Plan) -> View:
        """The model after a plan, with what the plan needs that is found on text."""
        with tempfile.TemporaryDirectory() as work:
            fits = fit(Job(self.view, Path(work), self.text()), self.view, plan)
        return replace(self.view, plan=plan, fits=fits)

    def sampled(
        self, steps: Sequence[str], seeds: int, size: Callable[[View], dict[str, float]]
    ) -> dict[str, Any]:
        """A row of results: KL on `seeds` samples of calibration text (one where no text is read), all else on the first."""
        on_text = see_text(list(map(parse_step, steps)))
        pressed = [self.press(steps, self.text(seed)) for seed in range(seeds if on_text else 1)]
        found = [self.compare(each.view) for each in pressed]
        first = {"perplexity_ratio": found[0]["perplexity_ratio"], "seconds": pressed[0].seconds}
        kl = {"kl": [each["kl"]["mean"] for each in found], "ci95": found[0]["kl"]["ci95"]}
        return kl | size(pressed[-1].view) | first


def expert_bytes(view: View, part: str = "experts") -> int:
    """Stored bytes of the routed experts, or of another part of all layers."""
    return sum(entry.ref.nbytes for entry in view.blueprint.entries if entry.unit.part == part)


def left_of(bench: Bench, view: View, part: str = "experts") -> float:
    """The share of a part's bytes that is kept."""
    return expert_bytes(view, part) / expert_bytes(bench.view, part)


# Asking, running side by side, saving


def parser(
    story: str | None, models: str = "", default: Sequence[str] = tuple(MODELS)
) -> argparse.ArgumentParser:
    """A parser; where `models` names their argument (`models`, `--models`), with that and the sizes of texts."""
    made = argparse.ArgumentParser(description=(story or "").splitlines()[0])
    if models:
        made.add_argument(models, nargs="*", default=list(default), help="bundled names, or folders")
        made.add_argument("--stride", type=int, help="every so many-th row of the held-out text")
        made.add_argument("--samples", type=int, help="rows of calibration text")
    return made


def saving(
    story: str | None, models: str = "", default: Sequence[str] = tuple(MODELS)
) -> argparse.ArgumentParser:
    """The same, of a script that keeps its results."""
    made = parser(story, models, default)
    made.add_argument("--out", type=Path, help="the JSON file to write")
    return made


def sizes(asked: argparse.Namespace, stride: int = STRIDE, samples: int = SAMPLES) -> tuple[int, int]:
    """Stride and samples: those asked for, or the script's own."""
    return asked.stride or stride, asked.samples or samples


def side_by_side(
    run: Callable[[Task], Row], jobs: Sequence[Task], workers: int = 2
) -> Iterator[tuple[Task, Row]]:
    """Every job with what it came to, in order, in processes of their own."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from zip(jobs, pool.map(run, jobs), strict=True)


def save(out: Path | None, body: dict[str, Any]) -> None:
    """The results with their date, machine and versions, where they were asked for."""
    if out:
        made = {"date": date.today().isoformat(), "machine": machine(), "versions": versions()}
        out.write_text(json.dumps(made | body, indent=1) + "\n")


def save_tokens(rows: Batches, work: Path) -> Path:
    """The rows as a file that a rival, in an environment of its own, reads."""
    np.save(work / "tokens.npy", rows.ids.numpy())
    return work / "tokens.npy"


def rival(python: Path, script: str, *arguments: object) -> str:
    """What a script of `rivals/` prints, run by the python of its own environment."""
    command = [str(python), str(HERE / "rivals" / script), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
