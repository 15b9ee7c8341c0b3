"""The charts in docs/figures, drawn from the JSON files: `pages.py --figures` calls all of them.

KL is on a logarithmic axis throughout: what differs between ways is how many times as much a cut costs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from tables import MASKS, Results, parted, title, way

EVEN = "channel_prune:score=obs,refit=layer"
UNEVEN = f"{EVEN},per_expert=true,scope=global"
BOTH = f"{UNEVEN} low_rank:method=shared_basis"
# What the README's chart shows, cheapest kind of cut last.
HEADLINE = {"expert_drop": ("whole experts", "#8d99ae", "o:"), EVEN: ("channels, all experts alike", "#e07a1f", "o--"),
            UNEVEN: ("channels, every expert its own width", "#1b6ca8", "o-"),
            BOTH: ("the same, then shared bases", "#2a7f3f", "o-")}  # fmt: skip
COLOURS = {"experts": "#1b6ca8", "layers": "#c1121f", "blocks": "#2a7f3f"}
DEPTH_SHOWN = {("experts", "one-shot"): "-", ("layers", "one-shot"): ":", ("layers", "greedy KL"): "--",
               ("layers", "greedy KL, linear"): "-", ("blocks", "one-shot"): ":", ("blocks", "greedy KL"): "--",
               ("blocks", "greedy KL, linear"): "-"}  # fmt: skip
PRUNING_SHOWN = [
    "expert_drop", "expert_drop refit", "expert_merge", "low_rank", "channel_prune:score=random,refit=none",
    "channel_prune:score=camera,refit=none", "channel_prune:score=camera,refit=expert",
    "channel_prune:score=obs,refit=expert", EVEN, f"{EVEN},scope=global", f"{EVEN},per_expert=true", UNEVEN, BOTH,
    "low_rank:method=shared_basis", "magnitude", "wanda", "sparsegpt",
]  # fmt: skip


def panels(results: Results, draw: Callable[[Axes, Any], None], path: Path, *, legend: float = 0) -> None:
    """One panel a model; `legend` inches beside the last one, or inside the first."""
    count = len(results)
    made, axes = plt.subplots(1, count, figsize=(4.6 * count + legend, 3.8), squeeze=False, sharey=not legend)
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        draw(axis, rows)
        axis.set(title=title(name), yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean token KL to the original")
    if legend:
        made.legend(*axes[0][0].get_legend_handles_labels(), loc="center right", fontsize=8)
    else:
        axes[0][0].legend(fontsize=8)
    made.tight_layout(rect=(0, 0, 1 - legend / made.get_figwidth(), 1))
    # Without a date and with fixed ids the same results give the same file.
    mpl.rcParams["svg.hashsalt"] = path.stem
    made.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else {})
    plt.close(made)


def lines(rows: Results, label: str) -> tuple[list[float], list[float]]:
    """Shares of bytes kept, and KL, of one step at all amounts."""
    found = [row for steps, row in rows.items() if parted(steps)[0] == label]
    found.sort(key=lambda row: row["left"])
    return [100 * row["left"] for row in found], [mean(row["kl"]) for row in found]


def headline(results: Results, path: Path) -> None:
    """The README's: four ways to make experts smaller."""

    def draw(axis: Axes, rows: Results) -> None:
        for label, (told, colour, style) in HEADLINE.items():
            axis.plot(*lines(rows, label), style, color=colour, label=told, markersize=4)
        axis.set(xlabel="bytes of routed experts kept, %")

    panels(results, draw, path)


def pruning(results: Results, path: Path) -> None:
    """KL against bytes of routed experts, for most ways."""

    def draw(axis: Axes, rows: Results) -> None:
        for index, label in enumerate(PRUNING_SHOWN):
            style = "x" if label in MASKS else "o-"
            told = (
                "  the same, then shared bases"
                if label == BOTH
                else label.replace("channel_prune:", "channels: ")
            )
            axis.plot(
                *lines(rows, label), style, color=plt.get_cmap("tab20")(index), label=told, markersize=4
            )
        for steps, row in rows.items():
            if parted(steps)[0] == "sparsegpt":
                axis.annotate(parted(steps)[1], (100 * row["left"], mean(row["kl"])), xytext=(5, -3),
                              textcoords="offset points", fontsize=7)  # fmt: skip
        axis.set(xlabel="bytes of routed experts kept, %")

    panels(results, draw, path, legend=4.9)


def depth(results: Results, path: Path) -> None:
    """KL over bytes removed, by what is dropped and how it is chosen."""

    def draw(axis: Axes, model: Results) -> None:
        for (what, how), style in DEPTH_SHOWN.items():
            rows = [row for row in model["rows"] if (row["what"], row["how"]) == (what, how)]
            axis.plot([100 * row["removed"] for row in rows], [row["kl"]["mean"] for row in rows], style,
                      color=COLOURS[what], marker="o", markersize=4, label=way(what, how).replace("`", ""))  # fmt: skip
        axis.set(xlabel="tensor bytes removed, %")

    panels(results, draw, path)
