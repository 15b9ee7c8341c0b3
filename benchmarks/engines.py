"""Does an engine compute the same with our GPTQ and AWQ folders as we do?

Quantizes the bundled models (or MODEL) in several formats, exports them, and lets GPTQModel, in an environment of its own
(`rivals/gptqmodel_logits.py`), compute the logits of 256 held-out tokens. Prints their mean token KL from ours in float32:
float16 arithmetic, which now and then sends a token to another expert, stays under 0.001, a misread matrix does not. Exits
with 1 where one is above that.

    python benchmarks/engines.py --gptqmodel PYTHON [MODEL ...] [--out FILE.json]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import calibration_rows, folder_of, rival, save, save_tokens, saving

import moespresso
from moespresso.api import export, press
from moespresso.bundled import MODELS

LENGTH, MOST = 256, 1e-3
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


def exported(model: Path, work: Path) -> dict[str, tuple[str, Path]]:
    """Layout and folder of every format, by its label."""
    made: dict[str, tuple[str, Path]] = {}
    for index, (layout, step) in enumerate(FORMATS):
        press(model, out=work / f"packed{index}", steps=[step], target="plugin")
        export(work / f"packed{index}", out=work / f"{layout}{index}", to=layout)
        made[f"{layout} {step}"] = layout, work / f"{layout}{index}"
    return made


def checked(python: Path, model: Path, work: Path) -> dict[str, float | str]:
    """KL by layout and step, of one model."""
    rows = calibration_rows(model, 1, LENGTH, split="heldout")
    folders = exported(model, work)
    asked = [
        part for layout, folder in folders.values() for part in ("--folder", folder, layout, f"{folder}.npy")
    ]
    printed = rival(python, "gptqmodel_logits.py", "--tokens", save_tokens(rows, work), *asked)
    said = json.loads(printed.splitlines()[-1])
    found: dict[str, float | str] = {"engine": said["engine"]}
    for label, (_, folder) in folders.items():
        error = said["failed"].get(str(folder))
        found[label] = error or kl(logits(folder, rows.ids), torch.from_numpy(np.load(f"{folder}.npy"))[0])
        print(f"{model.name:14} {label:60} {error or f'KL {found[label]:.1e}'}", flush=True)
    return found


def main() -> int:
    """Run, print and save."""
    asking = saving(__doc__)
    asking.add_argument("models", type=Path, nargs="*", default=list(MODELS.values()))
    asking.add_argument("--gptqmodel", type=Path, required=True, help="python of GPTQModel's environment")
    asked = asking.parse_args()
    results: dict[str, dict[str, float | str]] = {}
    for model in map(folder_of, asked.models):
        with tempfile.TemporaryDirectory() as work:
            results[model.name] = checked(asked.gptqmodel, model, Path(work))
    save(asked.out, {"results": results})
    figures = [value for row in results.values() for value in row.values() if isinstance(value, float)]
    # NaN is no agreement, wherever it stands.
    return int(not all(value <= MOST for value in figures))


if __name__ == "__main__":
    sys.exit(main())
