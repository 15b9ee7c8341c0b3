"""What does it cost to make attention smaller, and which cut costs least?

Dims of heads (`attention_rank`: queries and keys, values and outputs, both; the same of every layer, or by entropy), at shares
of the bytes of what is treated; beside them every matrix as two factors (`low_rank`), and the attention of whole layers dropped.
`left` is the share of all attention bytes that is kept, as stored. KL is the mean token KL to the original on a tenth of the
held-out text, for three samples of calibration text; the interval is a 95% bootstrap over sequences for the first. Nothing is
written: a plan is evaluated as a view of the checkpoint. Bundled is one model with such attention (the other's is latent,
which `attention_rank` refuses).

    python benchmarks/attention.py [MODEL ...] [--ratios 0.15 0.25 0.5] [--seeds 3] [--out FILE.json]
"""

from __future__ import annotations

from typing import Any

import tables
from harness import Bench, folder_of, left_of, save, saving, side_by_side, sizes

from moespresso.build import open_view

CUTS = [
    f"attention_rank:ratio={{}},modules={modules},allocation={allocation}"
    for allocation in ("even", "entropy")
    for modules in ("qk", "vo", "qk+vo")
]
FACTORS = "low_rank:ratio={},parts=attention"
DROPS = ["layer_drop:part=attention,drop={},score=cosine", "layer_drop:part=attention,drop={},score=kl"]
Job = tuple[str, str, int, int, int]


def ways(ratios: list[float], layers: int) -> list[str]:
    """Every step to be tried; as many layers lose their attention as come nearest to a ratio."""
    cuts = [step.format(ratio) for ratio in ratios for step in [*CUTS, FACTORS]]
    return cuts + [step.format(max(1, round(ratio * layers))) for ratio in ratios for step in DROPS]


def run(job: Job) -> dict[str, Any]:
    """One way on one model."""
    model, step, seeds, stride, samples = job
    bench = Bench(model, stride, samples)
    row = bench.sampled([step], seeds, lambda view: {"left": left_of(bench, view, "attention")})
    told = f"{row['left']:6.1%} kept  KL {tables.spread(row['kl'])}"
    print(f"{bench.folder.name:12} {step:62} {told}", flush=True)
    return row


def main() -> None:
    """Run, print and save."""
    asking = saving(__doc__, "models", ["mixtral"])
    asking.add_argument("--ratios", nargs="*", type=float, default=[0.15, 0.25, 0.5])
    asking.add_argument("--seeds", type=int, default=3)
    asking.add_argument("--workers", type=int, default=2)
    asked = asking.parse_args()
    jobs = [
        (model, step, asked.seeds, *sizes(asked))
        for model in asked.models
        for step in ways(asked.ratios, len(open_view(folder_of(model)).source.layers))
    ]
    results: dict[str, dict[str, Any]] = {folder_of(model).name: {} for model in asked.models}
    for (model, step, *_), row in side_by_side(run, jobs, asked.workers):
        results[folder_of(model).name][step] = row
        save(asked.out, {"results": results})
    for name, rows in results.items():
        print(tables.title(name), tables.sized(rows), sep="\n")


if __name__ == "__main__":
    main()
