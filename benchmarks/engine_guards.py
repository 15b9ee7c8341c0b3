"""Do engines that do not know moespresso stop at every folder that only the plugin reads?

Presses a small Mixtral and a small Qwen3-MoE (random weights, widths that engines take) in every plugin form and shows the
folders to vLLM (`rivals/vllm_guards.py`, an environment of its own) and to llama.cpp's converter (`rivals/llama_cpp_guards.py`). Each form is shown three
times: as it is written, with the stock name put back in `architectures`, and without the numbers in `per_layer_config` that
guard it, so that both guards are seen to hold alone. A plainly cut model is loaded as a check of the check. Exits with 1
where a folder that is as it was written is loaded or converted.

    python benchmarks/engine_guards.py [--vllm PYTHON] [--llama-cpp PYTHON FOLDER] [--out FILE.json]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness import save, saving
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from moespresso.api import press
from moespresso.bundled import MODELS, TEXT
from moespresso.data import load_tokenizer

RIVALS = Path(__file__).parent / "rivals"
TAKEN = "taken"
FORMS = {
    "plain": ["expert_drop:keep=6"],
    "uneven counts": ["expert_drop:ratio=0.25,scope=global"],
    "width by layer": ["channel_prune:ratio=0.25,scope=global"],
    "width of every expert": ["channel_prune:ratio=0.25,per_expert=true"],
    "router=preserve": ["expert_drop:keep=6,router=preserve"],
    "replace=novice": ["expert_drop:keep=6,replace=novice"],
    "no attention": ["layer_drop:drop=1,part=attention"],
    "no mixture": ["layer_drop:drop=1"],
    "no mixture but a bias": ["layer_drop:drop=1,repair=bias"],
    "preserve, then widths": [
        "expert_drop:keep=6,router=preserve",
        "channel_prune:ratio=0.25,per_expert=true",
    ],
}


def sources(work: Path) -> list[Path]:
    """Two small random models with the tokenizer of a bundled one."""
    tokenizer = load_tokenizer(MODELS["mixtral"])
    common = {"vocab_size": len(tokenizer), "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 32, "num_experts_per_tok": 2, "max_position_embeddings": 256}  # fmt: skip
    configs: list[PreTrainedConfig] = [
        MixtralConfig(**common, intermediate_size=128, num_local_experts=8),
        Qwen3MoeConfig(**common, intermediate_size=256, moe_intermediate_size=128, num_experts=8),
    ]
    for config in configs:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(work / config.model_type)
        tokenizer.save_pretrained(work / config.model_type)
    return [work / config.model_type for config in configs]


def named_stock(config: dict) -> None:
    """Put the stock name back, as somebody might by hand."""
    config["architectures"] = [name.removeprefix("Moespresso") for name in config["architectures"]]


def without_numbers(config: dict) -> None:
    """Take out all that differs between layers, so that the name alone can stop an engine."""
    config.pop("per_layer_config")


def folders(work: Path) -> dict[str, Path]:
    """Every form as it is written, and with either guard alone."""
    found: dict[str, Path] = {}
    for source in sources(work):
        for number, (form, steps) in enumerate(FORMS.items()):
            out = work / f"{source.name}-{number}"
            press(
                source,
                out=out,
                steps=steps,
                target="plugin",
                texts=[str(TEXT / "calibration")],
                samples=4,
                length=64,
            )
            found[f"{source.name}, {form}"] = out
            for words, change in (("numbers alone", named_stock), ("name alone", without_numbers)):
                if form == "plain":
                    continue
                changed = Path(shutil.copytree(out, f"{out}-{words.replace(' ', '-')}"))
                config = json.loads((out / "config.json").read_text())
                change(config)
                (changed / "config.json").write_text(json.dumps(config))
                found[f"{source.name}, {form}, {words}"] = changed
    return found


def said_by(command: list[str], shown: dict[str, Path]) -> tuple[str, dict[str, str]]:
    """The engine, and what it says to each folder."""
    done = subprocess.run([*command, *map(str, shown.values())], capture_output=True, text=True, check=False)
    lines = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("SAID ")]
    said = {row["folder"]: row.get("stopped") or TAKEN for row in lines}
    return lines[0]["engine"], {
        label: said.get(str(path), "the process ended") for label, path in shown.items()
    }


def main() -> int:
    """Run, print and save."""
    parser = saving(__doc__)
    parser.add_argument("--vllm", metavar="PYTHON", help="python of vLLM's environment")
    parser.add_argument("--llama-cpp", nargs=2, metavar=("PYTHON", "FOLDER"), help="a copy of llama.cpp")
    asked = parser.parse_args()
    commands = [[asked.vllm, str(RIVALS / "vllm_guards.py")]] if asked.vllm else []
    if asked.llama_cpp:
        commands.append([asked.llama_cpp[0], str(RIVALS / "llama_cpp_guards.py"), asked.llama_cpp[1]])
    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as work:
        shown = folders(Path(work))
        for engine, said in (said_by(command, shown) for command in commands):
            results[engine] = said
            for label, words in said.items():
                print(f"{engine:20} {label:50} {words.splitlines()[0][:110]}", flush=True)
    save(asked.out, {"results": results})
    taken = [label for said in results.values() for label, words in said.items()
             if words == TAKEN and "plain" not in label and "alone" not in label]  # fmt: skip
    return int(bool(taken))


if __name__ == "__main__":
    sys.exit(main())
