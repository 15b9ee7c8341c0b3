"""Experts, layers or blocks? What each costs at equal bytes: the tables of docs/results/depth.md.

For each bundled model and for 10, 25 and 40% of the tensor bytes removed: Expert Drop, Layer Drop and Block Drop with the
amount that comes nearest, one-shot (easy_ep; cosine) and greedy (in re-scored steps; true KL with swaps), without and with
repair. KL is the mean token KL to the original on a third of the held-out text, with a 95% bootstrap interval over sequences. With
`--dense FOLDER` a dense twin is dropped by layers and blocks beside the Mixtral form (the paper's Table 2). Nothing is
written: a plan is evaluated as a view of the checkpoint.

    python benchmarks/depth.py [--models mixtral deepseek_v2] [--dense FOLDER] [--out FILE.json]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import tables
from harness import Bench, Pressed, save, saving, side_by_side, sizes

from moespresso.build import View
from moespresso.core.errors import UserError
from moespresso.core.registry import parse_step
from moespresso.core.unit import Unit
from moespresso.effect import dropped_units, price, validated

SHARES = (0.10, 0.25, 0.40)
STRIDE = 3  # every third row of the held-out text: all domains, a third of the time
ROWS = 16  # of the calibration text, for what is chosen by true KL
Recipe = tuple[str, ...]
Job = tuple[str, str, tuple[float, ...], int, int]


def ways(view: View, share: float) -> Iterator[tuple[str, str, Recipe]]:
    """What is dropped, how it is chosen and repaired, and the steps: the amounts nearest to `share` of the bytes."""
    if view.source.moe_layers:
        experts = view.source.moe_layers[0].experts
        keep = nearest(view, share, [f"expert_drop:keep={keep}" for keep in range(experts - 1, 1, -1)])
        yield "experts", "one-shot", (keep,)
        yield "experts", "one-shot, compensated", (f"{keep},renormalise=compensate",)
        last = int(keep.partition("keep=")[2])
        stride = max(1, experts // 16)
        stops = [*range(experts - stride, last, -stride), last]
        yield "experts", "re-scored", tuple(f"expert_drop:keep={stop}" for stop in stops)
        yield "experts", "over all layers (plugin)", (f"{keep},scope=global",)
        yield "experts", "novices (plugin)", (f"{keep},replace=novice",)
        for method in ("hc_smoe", "m_smoe", "ream"):
            yield "experts", f"merged, {method}", (f"expert_merge:keep={last},method={method}",)
    for what, kind in (("layers", "layer_drop"), ("blocks", "block_drop")):
        most = len(view.source.layers if what == "blocks" else view.source.moe_layers or view.source.layers)
        step = nearest(view, share, [f"{kind}:drop={drop}" for drop in range(1, most)])
        for how, score in (("one-shot", "score=cosine"), ("greedy KL", f"score=kl,rows={ROWS}")):
            yield what, how, (f"{step},{score}",)
        if what == "blocks":
            yield what, "one run, cosine", (f"{step},contiguous=true",)


def nearest(view: View, share: float, steps: list[str]) -> str:
    """The step whose result is nearest to `share` of the bytes removed; those that cannot be done are passed over."""
    whole = view.source.cost().bytes
    priced: list[tuple[float, str]] = []
    for text in steps:
        step = parse_step(text)
        try:
            step.check(view.source)
            plan = validated(replace(view.plan, stages=(step.outline(view.source, view.plan),)), view.source)
        except UserError:  # below the floor of a router
            continue
        priced.append((abs(1 - price(plan, view.source).bytes / whole - share), text))
    return min(priced)[1]


def run(job: Job) -> dict[str, Any]:
    """All ways on one model."""
    name, folder, shares, stride, samples = job
    bench = Bench(folder, stride, samples)
    whole = bench.view.source.cost()
    rows: list[dict[str, Any]] = []
    for share in shares:
        for what, how, steps in ways(bench.view, share):
            for repair, view, order in results_of(bench, steps):
                cost, figures = view.blueprint.cost(), bench.compare(view)
                rows.append({
                    "share": share, "what": what, "how": f"{how}, {repair}" if repair else how, "steps": list(steps),
                    "removed": 1 - cost.bytes / whole.bytes, "flops": 1 - cost.flops / whole.flops,
                    "kl": figures["kl"], "perplexity_ratio": figures["perplexity_ratio"], "order": order,
                })  # fmt: skip
                told = f"{what:8} {rows[-1]['how']:22} KL {figures['kl']['mean']:.4f}"
                print(f"{name:12} {share:.0%} {told}", flush=True)
    return {"bytes": whole.bytes, "flops": whole.flops, "rows": rows}


def results_of(bench: Bench, steps: Recipe) -> Iterator[tuple[str, View, list[str]]]:
    """The repair, the view, and the units that go in order: chosen once, then repaired in every way."""
    chosen = bench.press(steps)
    dropped = dropped_units(chosen.decided.plan)
    order = [str(unit) for unit in chosen.decided.scores if Unit(unit.layer, unit.part) in dropped]
    yield "", chosen.view, order
    if order and not getattr(parse_step(steps[0]), "contiguous", False):
        for repair in ("scale", "linear"):
            yield repair, repaired(bench, chosen, repair), order


def repaired(bench: Bench, chosen: Pressed, repair: str) -> View:
    """The same cuts with a repair before each."""
    [stage] = chosen.decided.plan.stages
    treatments = {unit: replace(treatment, repair=repair) for unit, treatment in stage.treatments.items()}
    return bench.fitted(replace(chosen.decided.plan, stages=(replace(stage, treatments=treatments),)))


def main() -> None:
    """Run, print and save."""
    asking = saving(__doc__, "--models")
    asking.add_argument(
        "--dense", type=Path, help="a dense twin of the Mixtral form (tools/train_demo.py --form mistral)"
    )
    asking.add_argument("--shares", nargs="*", type=float, default=SHARES)
    asked = asking.parse_args()
    folders = {name: name for name in asked.models} | (
        {"dense twin": str(asked.dense)} if asked.dense else {}
    )
    jobs = [
        (name, folder, tuple(asked.shares), *sizes(asked, STRIDE, 64)) for name, folder in folders.items()
    ]
    results = {job[0]: found for job, found in side_by_side(run, jobs)}
    for name, result in results.items():
        print(tables.title(name), tables.depth(result), "", sep="\n")
    save(asked.out, {"models": results})


if __name__ == "__main__":
    main()
