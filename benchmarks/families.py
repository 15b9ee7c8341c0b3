"""Does every mixture that the installed transformers knows go through every kind of step, and load without us afterwards?

Makes a tiny random checkpoint of each (`zoo.py`), as people download it, and takes it through `inspect`, one step of every
kind, and `verify --against`; then transformers alone (`rivals/stock_transformers.py`, a process that never imports
moespresso) loads each folder by the class that its config.json names. What a step came to is `ok` or a sentence.

    python benchmarks/families.py --work DIR [NAME ...] [--workers 1] [--out FILE.json]
    python benchmarks/families.py --list

A family that has its file in DIR/found is not tried again, so a run that was stopped goes on; of an older version of
moespresso or transformers, remove DIR. `--out` is written only where all families are there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import rival, save, saving, side_by_side
from transformers.utils import logging as transformers_logging
from zoo import found, write

from moespresso import api
from moespresso.bundled import TEXT
from moespresso.core.errors import UserError

STEPS = {
    "expert_drop": "expert_drop:ratio=0.25",
    "block_drop": "block_drop:drop=1",
    "gptq": "gptq:bits=4,group_size=32",
    "channel_prune": "channel_prune:ratio=0.25",
}
OK = "ok"
Task = tuple[str, Path]
Row = dict[str, Any]


def said(error: BaseException) -> str:
    """A refusal as it is; what is no refusal by its name."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"crashed: {type(error).__name__}: {text[:300]}"


def tried(step: Callable[[], object]) -> str:
    """`ok`, or what stopped it."""
    try:
        step()
    except Exception as error:
        return said(error)
    return OK


def press(source: Path, out: Path, step: str, text: Path) -> None:
    """Press and verify one folder."""
    api.press(source, out=out, steps=[step], texts=[str(text)], samples=4, length=64)
    checks = api.verify(out, against=source)["checks"]
    bad = [f"{check['name']}: {check['detail']}" for check in checks if not check["ok"]]
    if bad:
        raise UserError(f"verify fails: {bad[0]}")


def plain(sentence: str, folder: Path) -> str:
    """A sentence without the places and names of this run, so that what is the same reads the same."""
    for name in STEPS:
        sentence = sentence.replace(str(folder / name), "OUT")
    return sentence.replace(str(folder / "model"), "MODEL")


def steps_of(folder: Path, text: Path) -> Row:
    """What each step came to with us, then without us; "" where the model was refused as such."""
    source = folder / "model"
    came_to = {"inspect": tried(lambda: api.inspect(source))} | dict.fromkeys(STEPS, "")
    if came_to["inspect"] == OK:
        came_to |= {
            name: tried(partial(press, source, folder / name, step, text)) for name, step in STEPS.items()
        }
    came_to |= alone(source, [folder / name for name in STEPS if came_to[name] == OK])
    return {name: plain(words, folder) for name, words in came_to.items()}


def alone(source: Path, pressed: list[Path]) -> dict[str, str]:
    """What transformers alone says to pressed folders; if it does not run the original, that is all it can say."""
    if not pressed:
        return {}
    try:
        found = json.loads(rival(Path(sys.executable), "stock_transformers.py", source, *pressed))
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1:]
        return {folder.name: f"transformers alone: the process ended: {''.join(last)}" for folder in pressed}
    if found["original"]:
        return dict.fromkeys(
            found["folders"], f"transformers alone: the original: {'; '.join(found['original'])}"
        )
    return {
        name: f"transformers alone: {'; '.join(faults)}" if faults else OK
        for name, faults in found["folders"].items()
    }


def quiet() -> None:
    """One thread, no words but ours, and behind everything else on this machine."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    os.nice(max(0, 15 - os.nice(0)))


def row_of(name: str, work: Path) -> Row:
    """One family's row, from its file where it has one."""
    kept = work / "found" / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    row = {"class": write(name, folder / "model"), "steps": steps_of(folder, work / "calibration.txt")}
    shutil.rmtree(folder)
    kept.with_suffix(".part").write_text(json.dumps(row, indent=1))
    kept.with_suffix(".part").rename(kept)
    return row


def family(task: Task) -> Row:
    """The same in a process that is for nothing else."""
    quiet()
    return row_of(*task)


def text_for(work: Path) -> None:
    """A short text to calibrate on."""
    (work / "found").mkdir(parents=True, exist_ok=True)
    lines = sorted((TEXT / "calibration").glob("*.jsonl"))[0].read_text().splitlines()
    (work / "calibration.txt").write_text("\n".join(json.loads(line)["text"] for line in lines)[:12000])


def main() -> int:
    """Try, print and save."""
    parser = saving(__doc__)
    parser.add_argument("names", nargs="*", help="families; all where none is named")
    parser.add_argument("--work", type=Path, default=Path("families"), help="where checkpoints and rows go")
    parser.add_argument("--workers", type=int, default=1, help="families at once")
    parser.add_argument("--list", action="store_true", help="say the names and end")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(found()))
        return 0
    text_for(asked.work)
    rows: dict[str, Row] = {}
    tasks = [(name, asked.work) for name in asked.names or found()]
    for (name, _), row in side_by_side(family, tasks, asked.workers):
        rows[name] = row
        passed = [step for step, words in row["steps"].items() if words == OK]
        print(f"{name:30} {', '.join(passed) or 'refused'}", flush=True)
    if asked.out and set(found()) - set(rows):
        print(f"{asked.out} is not written: a result has all families")
        return 2
    save(asked.out, {"steps": STEPS, "results": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
