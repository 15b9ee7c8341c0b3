"""How much do 4, 3 and 2 bits cost, and which method spends them best? The table of docs/results/bits.md.

Routed experts only, in groups of 32, on both bundled models: every method, and GPTQ with and without what is added to the
published algorithm, each on three samples of calibration text (methods without text have one). KL is the mean token KL to
the original on a tenth of the held-out text; the interval is a 95% bootstrap over sequences for the first sample, the range
that of the samples. Nothing is written: a plan is evaluated as a view of the checkpoint.

    python benchmarks/slimming.py [--models mixtral deepseek_v2] [--bits 4 3 2] [--seeds 3] [--out FILE.json]
"""

from __future__ import annotations

from typing import Any

import tables
from harness import Bench, save, saving, side_by_side, sizes

PUBLISHED = "damping=0.01,sweeps=0,unbiased=false,weighted=false"
WAYS = {
    "rtn, min-max, biased": "rtn:scales=minmax,unbiased=false",
    "rtn": "rtn:",
    "hqq": "hqq:",
    "awq": "awq:",
    "gptq, as published": f"gptq:weighting=none,{PUBLISHED}",
    "gptq, as published, gate2": f"gptq:weighting=gate2,{PUBLISHED}",
    "gptq": "gptq:",
    "gptq, gate2": "gptq:weighting=gate2",
    "gptq, gate2, shrunk (kappa = 256)": "gptq:weighting=gate2,shrink=256",
    "autoround": "autoround:",
}
Job = tuple[str, int, int, int, int]


def run(job: Job) -> dict[str, Any]:
    """All ways on one model at one width."""
    name, bits, seeds, stride, samples = job
    bench, rows, form = Bench(name, stride, samples), {}, f"bits={bits},group_size=32"
    for label, text in WAYS.items():
        step = text + form if text.endswith(":") else f"{text},{form}"
        row = bench.sampled([step], seeds, lambda view: {"bytes": view.blueprint.cost().bytes})
        rows[label] = {key: row[key] for key in ("kl", "ci95", "perplexity_ratio", "seconds", "bytes")}
        print(f"{name:12} {bits} bits  {label:28} KL {row['kl']}", flush=True)
    return rows


def main() -> None:
    """Run, print and save."""
    asking = saving(__doc__, "--models")
    asking.add_argument("--bits", nargs="*", type=int, default=[4, 3, 2])
    asking.add_argument("--seeds", type=int, default=3)
    asked = asking.parse_args()
    jobs = [(name, bits, asked.seeds, *sizes(asked)) for bits in asked.bits for name in asked.models]
    results: dict[str, dict[str, Any]] = {}
    for (name, bits, *_), rows in side_by_side(run, jobs):
        results[f"{name}, {bits} bits"] = rows
        save(asked.out, {"results": results})
    print(tables.bits(results, asked.models, asked.bits))


if __name__ == "__main__":
    main()
