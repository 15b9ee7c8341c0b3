"""What does it cost to make experts smaller, and which cut costs least? The tables of docs/results/pruning.md.

At equal bytes of routed experts (15, 25 and 50% gone): whole experts dropped or merged, and channels by every score and refit;
beside them, at the size that a mask and the values take (`stored`), single weights. On the bundled models (or MODEL ...), on
three samples of calibration text. KL is the mean token KL to the original on a tenth of the held-out text; the interval is
a 95% bootstrap over sequences for the first sample, the range that of the samples. Nothing is written: a plan is evaluated as
a view of the checkpoint.

    python benchmarks/pruning.py [MODEL ...] [--ratios 0.15 0.25 0.5] [--seeds 3] [--steps ...] [--out FILE.json]
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import tables
from harness import Bench, folder_of, left_of, save, saving, side_by_side, sizes

from moespresso.build import View
from moespresso.core.registry import parse_step
from moespresso.formats import codec_of, pack
from moespresso.methods._pruning import Sparsity

RATIOS = [0.15, 0.25, 0.5]
# Widths of their own, then shared bases: of a share r that goes in all, r / (1 + r) first and r^2 of the rest.
BOTH = "channel_prune:ratio={0:own},score=obs,refit=layer,per_expert=true,scope=global low_rank:method=shared_basis,ratio={0:bases}"
CUTS = [
    "expert_drop:ratio={}",
    "expert_drop:ratio={} refit",
    "expert_merge:ratio={}",
    "expert_merge:ratio={} refit",
    "channel_prune:ratio={},score=random,refit=none",
    "channel_prune:ratio={},score=random,refit=expert",
    "channel_prune:ratio={},score=magnitude,refit=none",
    "channel_prune:ratio={},score=magnitude,refit=expert",
    "channel_prune:ratio={},score=wanda,refit=none",
    "channel_prune:ratio={},score=wanda,refit=expert",
    "channel_prune:ratio={},score=camera,refit=none",
    "channel_prune:ratio={},score=camera,refit=expert",
    "channel_prune:ratio={},score=camera,refit=layer",
    "channel_prune:ratio={},score=heapr,refit=none",
    "channel_prune:ratio={},score=heapr,refit=expert",
    "channel_prune:ratio={},score=leverage,refit=expert",
    "channel_prune:ratio={},score=obs,refit=none",
    "channel_prune:ratio={},score=obs,refit=expert",
    "channel_prune:ratio={},score=obs,refit=layer",
    "channel_prune:ratio={},score=obs,refit=layer,scope=global",
    "channel_prune:ratio={},score=camera,refit=none,per_expert=true",
    "channel_prune:ratio={},score=obs,refit=layer,per_expert=true",
    "channel_prune:ratio={},score=obs,refit=layer,per_expert=true,scope=global",
    "low_rank:ratio={}",
    "low_rank:method=shared_basis,ratio={}",
    BOTH,
]
MASKED = [
    "magnitude:sparsity={}",
    "wanda:sparsity={}",
    "wanda:sparsity={},gate=true",
    "wanda:sparsity={},variant=true",
    "sparsegpt:sparsity={}",
    "sparsegpt:sparsity={},weighting=gate2",
]
PATTERNS = ["0.5", "2:4", "4:8"]
# What pruning the shared experts as well costs (table 8 of arXiv 2406.02500), where there are any.
WITH_SHARED = ["wanda:sparsity={},parts=experts+shared", "sparsegpt:sparsity={},parts=experts+shared"]
Job = tuple[str, str, int, int, int]


class Amount(str):
    """A share or a pattern as it stands in a step; a part of it where the step says so."""

    def __format__(self, spec: str) -> str:
        """Itself, or of a share what channels (`own`) or `bases` take."""
        if not spec or ":" in self:
            return str(self)
        share = float(self)
        return f"{share / (1 + share) if spec == 'own' else share * share:.4g}"


def ways(ratios: list[float]) -> list[str]:
    """Every step to be tried."""
    cuts = [cut.format(Amount(ratio)) for ratio in ratios for cut in CUTS]
    masked = [
        step.format(pattern)
        for pattern in PATTERNS
        for step in MASKED
        if "variant" not in step or ":" not in pattern
    ]
    shared = [step.format(pattern) for pattern in PATTERNS[:2] for step in WITH_SHARED]
    return cuts + masked + shared


def stored(step: Any, bench: Bench, view: View) -> float:
    """Share of the bytes of routed experts that is kept; of single weights, as a mask and the values that are kept."""
    sparsity = getattr(step, "sparsity", None)
    if sparsity is None:
        return left_of(bench, view)
    form, before, after = replace(Sparsity(sparsity).pattern, kind="sparse"), 0, 0
    for entry in bench.view.source.entries:
        if entry.unit.part == "experts":
            before += entry.ref.nbytes
            after += pack(entry.ref, form, codec_of(form).layout).nbytes
    return after / before


def run(job: Job) -> dict[str, Any] | None:
    """One way on one model; None where it makes no sense there."""
    model, text, seeds, stride, samples = job
    bench, steps = Bench(model, stride, samples), text.split()
    if "+shared" in text and not any(layer.shared_experts for layer in bench.view.source.layers):
        return None
    row = bench.sampled(steps, seeds, lambda view: {"left": stored(parse_step(steps[0]), bench, view)})
    told = f"{row['left']:6.1%} kept  KL {tables.spread(row['kl'])}"
    print(f"{bench.folder.name:12} {text:52} {told}", flush=True)
    return row


def main() -> None:
    """Run, print and save."""
    asking = saving(__doc__, "models")
    asking.add_argument("--ratios", nargs="*", type=float, default=RATIOS)
    asking.add_argument("--seeds", type=int, default=3)
    asking.add_argument("--steps", nargs="*", help="these steps only; beside what --out holds already")
    asked = asking.parse_args()
    steps = asked.steps or ways(asked.ratios)
    jobs = [(model, step, asked.seeds, *sizes(asked)) for step in steps for model in asked.models]
    results: dict[str, dict[str, Any]] = {folder_of(model).name: {} for model in asked.models}
    if asked.steps and asked.out and asked.out.is_file():
        results |= json.loads(asked.out.read_text())["results"]
    for (model, step, *_), row in side_by_side(run, jobs):
        if row is not None:
            results[folder_of(model).name][step] = row
            save(asked.out, {"results": results})
    print(tables.pruning(results, [str(ratio) for ratio in asked.ratios], *tables.CUTS))
    print(tables.pruning(results, PATTERNS, *tables.MASKS))


if __name__ == "__main__":
    main()
