"""GPTQ here and in llm-compressor: the same model, tokens, machine and run, whole processes, files included.

Presses a Qwen3-MoE of 10M parameters (`tools/train_demo.py --form qwen3_moe`) to 4 bits in groups of 32, experts only, with
both tools, and measures the held-out mean token KL of both folders with our own evaluation, which reads both. The other tool
needs an environment of its own (see `rivals/llm_compressor.py`). Both get the same number of threads.

    python benchmarks/rounding_speed.py MODEL --rival PYTHON [--threads 1] [--out FILE.json]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import HELDOUT, LENGTH, SAMPLES, calibration_rows, folder_of, rival, save, save_tokens, saving

from moespresso.api import evaluate
from moespresso.bundled import TEXT

WINDOWS = 80
RIVALS = {"llm-compressor": (), "llm-compressor, routed tokens only": ("--no-all-experts",)}


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


def theirs(python: Path, *arguments: object, out: Path) -> dict[str, Any]:
    """The same by llm-compressor."""
    told = out.with_suffix(".json")
    start = time.perf_counter()
    rival(python, "llm_compressor.py", *arguments, "--out", out, "--json", told)
    return {"process": time.perf_counter() - start, "said": json.loads(told.read_text())}


def kl(folder: Path, model: Path) -> dict[str, Any]:
    """Held-out figures of a folder."""
    return evaluate(folder, against=model, texts=[HELDOUT], length=LENGTH, limit=WINDOWS)


def compared(model: Path, python: Path | None, threads: int, work: Path) -> dict[str, Any]:
    """Every tool's time, memory and held-out figures."""
    tokens = save_tokens(calibration_rows(model), work)
    results = {"moespresso": ours(model, work / "ours", threads)}
    results["moespresso"]["heldout"] = kl(work / "ours", model)
    for index, (label, more) in enumerate(RIVALS.items() if python else ()):
        given = ("--model", model, "--tokens", tokens, "--threads", threads, *more)
        results[label] = theirs(python, *given, out=work / f"theirs{index}")
        results[label]["heldout"] = kl(work / f"theirs{index}", model)
    return results


def main() -> None:
    """Run, print and save."""
    asking = saving(__doc__)
    asking.add_argument("model")
    asking.add_argument("--rival", type=Path, help="python of llm-compressor's environment")
    asking.add_argument("--threads", type=int, default=1)
    asked = asking.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = compared(folder_of(asked.model), asked.rival, asked.threads, Path(name))
    for label, row in results.items():
        print(f"{label:36} process {row['process']:.1f} s  KL {row['heldout']['kl']['mean']:.5f}")
    save(asked.out, {"threads": asked.threads, "load": os.getloadavg(), "results": results})


if __name__ == "__main__":
    main()
