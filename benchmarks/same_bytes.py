"""Does a redesign write the same bytes? Both bundled models by recipes of all kinds, with another commit and with this tree.

    python benchmarks/same_bytes.py --before COMMIT [--only NAME ...] [--model mixtral]

Each side runs in a process of its own, from a checkout of its own; what is compared are the SHA-256 of all tensor files. Then this
tree's `verify` is asked about the other side's folder. Settings that were renamed are mapped in `RENAMED`, here alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
# Old text of a step, and what it is called now.
RENAMED: dict[str, str] = {
    "channel_prune:ratio=0.25,score=surgeon": "channel_prune:ratio=0.25,score=obs",
}
TEXT = ("--samples", "6", "--length", "128")

# Name: target, steps, and what the result is exported to (nothing: not at all).
RECIPES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "experts": ("transformers", ("expert_drop:ratio=0.25",), ""),
    "merged": ("transformers", ("expert_merge:ratio=0.25,method=ream",), ""),
    "layers": ("plugin", ("layer_drop:drop=1,part=attention,repair=linear",), ""),
    "blocks": ("transformers", ("block_drop:drop=1,score=kl,rows=4",), ""),
    "rtn": ("transformers", ("rtn:group_size=32",), ""),
    "hqq": ("plugin", ("hqq:bits=gate_up:3+down:4,group_size=32",), ""),
    "gptq": ("transformers", ("gptq:group_size=32",), "gptq"),
    "awq": ("transformers", ("awq:group_size=32,grid=4",), ""),
    "autoround": ("transformers", ("autoround:group_size=32,iterations=8",), ""),
    "channels": ("transformers", ("channel_prune:ratio=0.25",), ""),
    "channels by obs": ("transformers", ("channel_prune:ratio=0.25,score=obs",), ""),
    "uneven widths": ("plugin", ("channel_prune:ratio=0.25,per_expert=true,scope=global",), ""),
    "masked": ("plugin", ("sparsegpt:sparsity=0.5,pack=true",), ""),
    "zeros": ("transformers", ("wanda:sparsity=2:4",), ""),
    "shared bases": ("plugin", ("low_rank:method=shared_basis,ratio=0.3",), ""),
    "experts, refit, 4 bits": ("transformers", ("expert_drop:ratio=0.25", "refit", "gptq:group_size=32"), ""),
    "channels, 4 bits": ("transformers", ("channel_prune:ratio=0.25", "rtn:group_size=8"), ""),
}


def press_all(out: Path, models: list[str], names: list[str]) -> None:
    """In a child: press every recipe with whatever moespresso is on the path; print the digests as JSON."""
    from moespresso import export
    from moespresso.bundled import MODELS
    from moespresso.bundled import TEXT as BUNDLED
    from moespresso.cli import main

    found: dict[str, dict[str, str] | str] = {}
    for model in models:
        for name in names:
            target, steps, layout = RECIPES[name]
            folder = out / f"{model} {name}"
            told = [word for step in steps for word in ("--step", step)]
            text = ["--text", str(BUNDLED / "calibration"), *TEXT]
            code = main(
                [
                    "press",
                    str(MODELS[model]),
                    "--out",
                    str(folder),
                    *told,
                    *text,
                    "--target",
                    target,
                    "--no-resume",
                    "--json",
                ]
            )
            if code:
                found[folder.name] = f"refused ({code})"
                continue
            found[folder.name] = digests(folder)
            if layout:
                exported = out / f"{folder.name} {layout}"
                export(folder, to=layout, out=exported)
                found[exported.name] = digests(exported)
    (out / "digests.json").write_text(json.dumps(found))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor file."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("*.safetensors"))
    }


def run(
    tree: Path, out: Path, options: argparse.Namespace, recipes: dict[str, str]
) -> dict[str, dict[str, str] | str]:
    """One side, in a process whose moespresso is that of `tree`."""
    out.mkdir()
    words = json.dumps({"out": str(out), "models": options.model, "names": options.only, "renamed": recipes})
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", words]
    subprocess.run(
        command, env=environment, cwd=tree, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return json.loads((out / "digests.json").read_text())


def child(words: str) -> None:
    """What a side does."""
    told = json.loads(words)
    for name, (target, steps, layout) in RECIPES.items():
        RECIPES[name] = (target, tuple(told["renamed"].get(step, step) for step in steps), layout)
    press_all(Path(told["out"]), told["models"], told["names"])


def verified(folder: Path) -> bool:
    """Whether this tree's `verify` holds for a folder that the other wrote."""
    command = [sys.executable, "-m", "moespresso", "verify", str(folder), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(HERE / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def main() -> int:
    """Compare; the exit code is the number of recipes that differ."""
    from harness import parser  # not in a child, whose moespresso may be another than the harness knows

    made = parser(__doc__)
    made.add_argument("--before", required=True, help="the commit to compare with")
    made.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    made.add_argument("--model", nargs="+", default=["mixtral", "deepseek_v2"])
    options = made.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), options.before],
            cwd=HERE,
            check=True,
            capture_output=True,
        )
        try:
            old = run(tree, Path(scratch) / "before", options, {new: was for was, new in RENAMED.items()})
            new = run(HERE, Path(scratch) / "now", options, {})
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=HERE, check=True)
        different = 0
        for name in old | new:
            same = old.get(name) == new.get(name)
            holds = isinstance(old.get(name), str) or verified(Path(scratch) / "before" / name)
            different += not (same and holds)
            said = old[name] if isinstance(old.get(name), str) else f"{len(old[name])} files"
            print(
                f"{'same' if same else 'DIFFERENT':10} {'verified' if holds else 'NOT VERIFIED':14} {said:14} {name}"
            )
    return different


if __name__ == "__main__":
    raise SystemExit(child(sys.argv[2]) if sys.argv[1:2] == ["--child"] else main())
