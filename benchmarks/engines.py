"""Does an engine compute the same with our GPTQ and AWQ folders as we do?

Rounds the bundled models (or MODEL) in several formats, exports them, and lets GPTQModel, in an environment of its own
(`rivals/gptqmodel_logits.py`), compute the logits of 256 held-out tokens. Prints their mean token KL from ours in float32:
float16 arithmetic, which now and then sends a token to another expert, stays under 0.001, a misread matrix does not. Exits
with 1 where one is above that.

    python benchmarks/engines.py --gptqmodel PYTHON [MODEL ...] [--out FILE.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch

import moespresso
from moespresso.api import export, load_tokenizer, press
from moespresso.bundled import MODELS, TEXT
from moespresso.data import Source, calibration
from moespresso.report import machine, versions

LENGTH, MOST = 256, 1e-3
RIVAL = Path(__file__).parent / "rivals" / "gptqmodel_logits.py"
FORMATS = [
    ("gptq", "rtn:bits=8,group_size=32"),
    ("gptq", "rtn:bits=4,group_size=32"),
    ("gptq", "hqq:bits=4,group_size=32,parts=experts+attention"),
    ("gptq", "rtn:bits=3,group_size=32"),
    ("gptq", "rtn:bits=2,group_size=32"),
    ("gptq", "rtn:bits=4,group_size=0"),
    ("awq", "rtn:bits=4,group_size=32"),
    ("awq", "rtn:bits=4,group_size=32,symmetric=false"),
]


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Ours, in float32 [L, V]."""
    model = moespresso.load(folder, dtype="float32")
    with torch.inference_mode():
        return model(input_ids=ids).logits[0]


def kl(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean over tokens of KL(ours | theirs)."""
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def checked(python: Path, model: Path, work: Path) -> dict[str, float | str]:
    """KL by layout and step, of one model."""
    rows = calibration([Source(str(TEXT / "heldout"))], load_tokenizer(model), 1, LENGTH, 0)
    np.save(work / "tokens.npy", rows.ids.numpy())
    found: dict[str, float | str] = {}
    command, ours = [str(python), str(RIVAL), "--tokens", str(work / "tokens.npy")], {}
    for number, (layout, step) in enumerate(FORMATS):
        press(model, out=work / f"packed{number}", steps=[step], target="plugin")
        folder = work / f"{layout}{number}"
        export(work / f"packed{number}", out=folder, to=layout)
        ours[f"{layout} {step}"] = number, logits(folder, rows.ids)
        command += ["--folder", str(folder), layout, str(work / f"{number}.npy")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    said = json.loads(done.stdout.splitlines()[-1])
    found["engine"] = said["engine"]
    for label, (number, mine) in ours.items():
        layout = label.partition(" ")[0]
        error = said["failed"].get(str(work / f"{layout}{number}"))
        found[label] = error or kl(mine, torch.from_numpy(np.load(work / f"{number}.npy"))[0])
        print(f"{model.name:14} {label:60} {error or f'KL {found[label]:.1e}'}", flush=True)
    return found


def main() -> int:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", default=list(MODELS.values()))
    parser.add_argument("--gptqmodel", type=Path, required=True, help="python of GPTQModel's environment")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    results = {}
    for model in asked.models:
        with tempfile.TemporaryDirectory() as work:
            results[model.name] = checked(asked.gptqmodel, model, Path(work))
    if asked.out:
        body = {"date": date.today().isoformat(), "machine": machine(), "versions": versions(), "results": results}  # fmt: skip
        asked.out.write_text(json.dumps(body, indent=1) + "\n")
    # NaN is no agreement, wherever it stands.
    return int(
        not all(
            value <= MOST for row in results.values() for value in row.values() if isinstance(value, float)
        )
    )


if __name__ == "__main__":
    sys.exit(main())
