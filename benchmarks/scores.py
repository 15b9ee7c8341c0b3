"""Which score finds the experts a model can spare? The first table of docs/results/experts.md.

For each bundled model: measure once on the bundled calibration text, drop a quarter of the experts by every score (and
by controls: random seeds, the best experts instead of the worst), stream the held-out text through the original and
each pressed view, and report mean token KL with a 95% bootstrap interval over sequences, and the perplexity ratio.
Nothing is written: a plan is evaluated as a view of the checkpoint.

    python benchmarks/scores.py [--ratio 0.25] [--out benchmarks/results/FILE.json]
"""

from __future__ import annotations

from typing import Any, get_args

import tables
from harness import Bench, save, saving, side_by_side, sizes

from moespresso.methods.expert_drop import Score

RANDOM_SEEDS = 8
# What all of them stand on.
MEASURED = ["expert_drop:score=reconstruction", "expert_drop:score=aimer"]
Job = tuple[str, float, int, int]


def steps(ratio: float) -> dict[str, str]:
    """Label -> step: every score, and the controls."""
    named = {score: f"score={score}" for score in get_args(Score) if score != "random"}
    named |= {f"random, seed {seed}": f"score=random,seed={seed}" for seed in range(RANDOM_SEEDS)}
    named |= {"reap, gates=softmax": "score=reap,gates=softmax", "reap, compensate": "score=reap,renormalise=compensate",
              "easy_ep, compensate": "score=easy_ep,renormalise=compensate", "aimer, reversed": "score=aimer,reverse=true",
              "reap, reversed": "score=reap,reverse=true,protect_super=false"}  # fmt: skip
    return {label: f"expert_drop:ratio={ratio},{settings}" for label, settings in named.items()}


def run(job: Job) -> dict[str, Any]:
    """All scores on one bundled model."""
    name, ratio, stride, samples = job
    bench, rows = Bench(name, stride, samples), {}
    stats = bench.measure(MEASURED)
    for label, step in steps(ratio).items():
        rows[label] = bench.compare(bench.press([step], stats=stats).view)
        print(f"{name:12} {label:22} KL {rows[label]['kl']['mean']:.4f}", flush=True)
    return {
        "perplexity": bench.alone()["perplexity"],
        "tokens": bench.heldout.num_tokens,
        "warnings": list(stats.warnings),
        "scores": rows,
    }


def main() -> None:
    """Run, print and save."""
    asking = saving(__doc__, "--models")
    asking.add_argument("--ratio", type=float, default=0.25)
    asked = asking.parse_args()
    jobs = [(name, asked.ratio, *sizes(asked, stride=1, samples=64)) for name in asked.models]
    results = {job[0]: found for job, found in side_by_side(run, jobs)}
    print(tables.scores(results))
    save(asked.out, {"ratio": asked.ratio, "models": results})


if __name__ == "__main__":
    main()
