"""The paper's bytes and FLOPs, from the two models' configs alone: nothing is downloaded, no tensor is made.

Weights in bf16 of Mixtral-8x7B and DeepSeek-MoE-16B, whole and after E (experts), L (MoE layers) and B (blocks) of
arXiv 2406.02500, Table 3, and the FLOPs of a forward over 2,048 tokens. The paper's memory column was *measured* and lies
0.2 to 0.7 GiB above the weights: both are printed, and no constant is added to make them meet.

    python benchmarks/paper_arithmetic.py [--check]

`--check` exits with 1 when bytes differ by more than 0.01 GiB or FLOPs by more than 1% from what they must be.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from harness import HERE, parser

from moespresso.build import View, config_view
from moespresso.core.cost import Cost
from moespresso.core.registry import parse_step
from moespresso.effect import price, validated

CONFIGS = HERE / "configs"
GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """One row of the paper: what goes, weights that must come out in GiB, and its printed memory (GB) and TFLOPs."""

    name: str
    step: str | None
    gib: float
    memory: float
    tflops: float


MODELS = {
    "mixtral-8x7b": (
        Row("whole", None, 86.99, 87.7, 54.4),
        Row("E2/8", "expert_drop:keep=6", 65.99, 66.7, 54.4),
        Row("L8/32", "layer_drop:drop=8", 65.99, 66.6, 42.9),
        Row("B5/32", "block_drop:drop=5", 73.47, 74.1, 46.0),
    ),
    "deepseek-moe-16b": (
        Row("whole", None, 30.50, 30.8, 11.7),
        Row("E16/64", "expert_drop:keep=48", 23.54, 23.9, 11.7),
        Row("L4/28", "layer_drop:drop=4", 26.25, 26.6, 10.6),
        Row("B4/28", "block_drop:drop=4", 26.12, 26.4, 10.1),
    ),
}


def cost_of(view: View, step: str | None) -> Cost:
    """The cost of the model, or of what a step leaves of it (which layers go makes no difference to the price)."""
    if step is None:
        return view.source.cost()
    settings = parse_step(step)
    settings.check(view.source)
    plan = validated(replace(view.plan, stages=(settings.outline(view.source, view.plan),)), view.source)
    return price(plan, view.source)


def main() -> int:
    """Print the table; with `--check`, return 1 when it is not as it must be."""
    asking = parser(__doc__)
    asking.add_argument("--check", action="store_true")
    asked, wrong = asking.parse_args(), 0
    print("| model | | weights, GiB | must be | paper's memory, measured | TFLOPs | paper |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for model, rows in MODELS.items():
        view = config_view(CONFIGS / f"{model}.json")
        for row in rows:
            cost = cost_of(view, row.step)
            gib, tflops = cost.bytes / GIB, cost.flops / 1e12
            wrong += abs(gib - row.gib) > 0.01 or abs(tflops / row.tflops - 1) > 0.01
            print(
                f"| {model} | {row.name} | {gib:.2f} | {row.gib:.2f} | {row.memory} | {tflops:.1f} | {row.tflops} |"
            )
    return 1 if asked.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
