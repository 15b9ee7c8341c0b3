"""GPTQ here and in llm-compressor: the same model, tokens, machine and run, whole processes, files included.

Presses a Qwen3-MoE of 10M parameters (`tools/train_demo.py --form qwen3_moe`) to 4 bits in groups of 32, experts only, with
both tools, and measures the held-out mean token KL of both folders with our own evaluation, which reads both. The other tool
needs an environment of its own (see `rivals/llm_compressor.py`). Both get the same number of threads.

    python benchmarks/rounding_speed.py MODEL --rival PYTHON [--threads 1] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from moespresso.api import evaluate, load_tokenizer
from moespresso.bundled import TEXT
from moespresso.data import Source, calibration
from moespresso.report import machine, versions

SAMPLES, LENGTH, WINDOWS = 48, 512, 80
RIVAL = Path(__file__).parent / "rivals" / "llm_compressor.py"


def ours(model: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Press in a process of its own."""
    command = [sys.executable, "-m", "moespresso", "press", str(model), "--out", str(folder), "--json",
               "--step", "gptq:bits=4,group_size=32", "--text", str(TEXT / "calibration"),
               "--samples", str(SAMPLES), "--length", str(LENGTH)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    process = time.perf_counter() - start
    said = json.loads(done.stdout)
    return {"process": process, "after_imports": said["seconds"], "peak_rss_bytes": said["peak_rss_bytes"],
            "phases": said["phases"]}  # fmt: skip


def theirs(python: Path, model: Path, tokens: Path, folder: Path, threads: int, *more: str) -> dict[str, Any]:
    """The same by llm-compressor."""
    told = folder.with_suffix(".json")
    command = [str(python), str(RIVAL), "--model", str(model), "--tokens", str(tokens), "--out", str(folder),
               "--json", str(told), "--threads", str(threads), *more]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, text=True)
    return {"process": time.perf_counter() - start, "said": json.loads(told.read_text())}


def kl(folder: Path, model: Path) -> dict[str, Any]:
    """Held-out figures of a folder."""
    return evaluate(
        folder, against=model, texts=[Source(str(TEXT / "heldout"))], length=LENGTH, limit=WINDOWS
    )


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rival", type=Path, help="python of llm-compressor's environment")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        rows = calibration(
            [Source(str(TEXT / "calibration"))], load_tokenizer(asked.model), SAMPLES, LENGTH, 0
        )
        np.save(work / "tokens.npy", rows.ids.numpy())
        results = {"moespresso": ours(asked.model, work / "ours", asked.threads)}
        results["moespresso"]["heldout"] = kl(work / "ours", asked.model)
        for label, more in (
            ("llm-compressor", ()),
            ("llm-compressor, routed tokens only", ("--no-all-experts",)),
        ):
            if asked.rival:
                out = work / f"theirs{len(more)}"
                results[label] = theirs(
                    asked.rival, asked.model, work / "tokens.npy", out, asked.threads, *more
                )
                results[label]["heldout"] = kl(out, asked.model)
    body = {"date": date.today().isoformat(), "machine": machine(), "versions": versions(), "threads": asked.threads,
            "load": os.getloadavg(), "results": results}  # fmt: skip
    for label, row in results.items():
        print(f"{label:36} process {row['process']:.1f} s  KL {row['heldout']['kl']['mean']:.5f}")
    if asked.out:
        asked.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
