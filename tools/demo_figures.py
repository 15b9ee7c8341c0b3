"""Draws the demo models' training curves into docs/figures, from the checkpoints in the work folder.

python tools/demo_figures.py --work DIR
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from sources import DOMAINS

TARGET = Path(__file__).resolve().parent.parent / "docs/figures/demo-training.png"
TITLES = {"mixtral": "Mixtral form", "deepseek_v2": "DeepSeek-V2 form"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder that tools/train_demo.py filled")
    work: Path = parser.parse_args().work
    figure, rows = plt.subplots(2, 2, figsize=(10, 6.5), sharex="col", height_ratios=(3, 2))
    for form, (above, below) in zip(TITLES, rows.T, strict=True):
        history = torch.load(work / form / "checkpoint.pt", weights_only=True)["history"]
        tokens = [entry["tokens"] / 1e6 for entry in history]
        for name in (*DOMAINS, "all"):
            values = [entry["perplexity"][name] for entry in history]
            style = {"color": "black", "linewidth": 2} if name == "all" else {}
            above.semilogy(tokens, values, label=name, **style)
        for name in ("common", "medium", "rare"):
            below.plot(tokens, [entry["recall"][name] for entry in history], label=name)
        above.set(title=TITLES[form], ylim=(5, 120), yticks=(5, 10, 25, 50, 100))
        above.set_yticklabels(["5", "10", "25", "50", "100"])
        above.axhline(25, color="grey", linestyle=":", linewidth=1)
        above.grid(alpha=0.3)
        below.set(xlabel="million tokens", ylim=(-0.03, 1.03))
        below.grid(alpha=0.3)
    rows[0][0].set_ylabel("held-out perplexity")
    rows[1][0].set_ylabel("facts recalled")
    rows[0][1].legend(ncols=2, fontsize=8)
    rows[1][1].legend(fontsize=8)
    figure.tight_layout()
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET, dpi=110)


if __name__ == "__main__":
    main()
