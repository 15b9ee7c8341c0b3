"""How fast is a trim-only press, against `cp` followed by `sync` of the same files from the same cache state?

Makes a random checkpoint in OLMoE-1B-7B's shape with a few layers (3.6 GB with four), writes it shard by shard, and
presses a quarter of its experts away by `aimer`. `cp` and the build alternate; before each, the files are either read
once (warm) or dropped from the file cache (cold). Bytes per second are bytes written over seconds, sync included.
The build takes SHA-256 of what it writes as it goes; the scoring read and the digest of the source are timed apart.

    python benchmarks/build_speed.py --work /tmp/bench [--layers 4] [--rounds 3] [--out benchmarks/results/FILE.json]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from statistics import median

import torch
from harness import save, saving
from safetensors.torch import save_file
from transformers import OlmoeConfig

from moespresso import api

HIDDEN, WIDTH, EXPERTS, VOCAB = 2048, 1024, 64, 50304


def make_checkpoint(folder: Path, layers: int) -> None:
    """Random bf16 weights in OLMoE-1B-7B's shapes, one shard per layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = OlmoeConfig(
        num_hidden_layers=layers, intermediate_size=WIDTH, tie_word_embeddings=False, dtype="bfloat16"
    )
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"architectures": ["OlmoeForCausalLM"]}, indent=2)
    )
    if (folder / "model.safetensors.index.json").is_file():
        return
    shards = [outer_tensors(), *(layer_tensors(index) for index in range(layers))]
    weight_map: dict[str, str] = {}
    for number, make in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        tensors = {key: torch.randn(shape, generator=torch.Generator().manual_seed(number)).mul_(0.02).bfloat16()
                   for key, shape in make.items()}  # fmt: skip
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def outer_tensors() -> dict[str, tuple[int, ...]]:
    """Names and shapes outside the layers."""
    return {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }


def layer_tensors(index: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer."""
    prefix = f"model.layers.{index}."
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"
    }
    shapes |= {f"{prefix}self_attn.{p}_norm.weight": (HIDDEN,) for p in "qk"}
    shapes |= {f"{prefix}{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    shapes[f"{prefix}mlp.gate.weight"] = (EXPERTS, HIDDEN)
    for expert in range(EXPERTS):
        stem = f"{prefix}mlp.experts.{expert}."
        shapes |= {f"{stem}gate_proj.weight": (WIDTH, HIDDEN), f"{stem}up_proj.weight": (WIDTH, HIDDEN),
                   f"{stem}down_proj.weight": (HIDDEN, WIDTH)}  # fmt: skip
    return shapes


def cache_state(folder: Path, state: str) -> None:
    """Bring the folder's files into the file cache, or out of it."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            if state == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 24):
                    pass


def copy_rate(source: Path, out: Path) -> float:
    """Bytes per second of `cp` and `sync`."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    subprocess.run(["sync"], check=True)
    return folder_bytes(out) / (time.perf_counter() - start)


def build_rate(source: Path, plan: Path, out: Path) -> float:
    """Bytes per second of the build of a saved plan (it syncs every file itself)."""
    shutil.rmtree(out, ignore_errors=True)
    report = api.build(source, plan=plan, out=out)
    return folder_bytes(out) / report.seconds["build"]


def folder_bytes(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def alternating(source: Path, plan: Path, work: Path, state: str, rounds: int) -> dict[str, list[float]]:
    """MB per second of copies and builds in turn, each from the same cache state."""
    rows: dict[str, list[float]] = {"cp": [], "build": []}
    for _ in range(rounds):
        cache_state(source, state)
        rows["cp"].append(copy_rate(source, work / "copied") / 1e6)
        shutil.rmtree(work / "copied")
        cache_state(source, state)
        rows["build"].append(build_rate(source, plan, work / "pressed") / 1e6)
    return rows


def main() -> None:
    """Run, print and save the comparison."""
    asking = saving(__doc__)
    asking.add_argument("--work", type=Path, required=True)
    asking.add_argument("--layers", type=int, default=4)
    asking.add_argument("--rounds", type=int, default=3)
    asked = asking.parse_args()
    source, pressed = asked.work / f"olmoe-{asked.layers}", asked.work / "pressed"
    make_checkpoint(source, asked.layers)
    shutil.rmtree(pressed, ignore_errors=True)
    cache_state(source, "warm")
    report = api.press(source, out=pressed, steps=["expert_drop:ratio=0.25,score=aimer"])
    plan = asked.work / "plan.json"
    report.plan.save(plan)
    rates = {state: alternating(source, plan, asked.work, state, asked.rounds) for state in ("warm", "cold")}
    result = {
        "source_bytes": folder_bytes(source),
        "pressed_bytes": folder_bytes(pressed),
        "press_seconds": {name: round(value, 2) for name, value in report.seconds.items()},
        "peak_anonymous_mib": report.peak_anonymous_bytes >> 20,
        "mb_per_second": {state: {name: [round(v) for v in values] for name, values in rows.items()}
                          for state, rows in rates.items()},
        "build_over_cp": {state: round(median(b / c for b, c in zip(rows["build"], rows["cp"], strict=True)), 2)
                          for state, rows in rates.items()},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    save(asked.out, result)


if __name__ == "__main__":
    main()
