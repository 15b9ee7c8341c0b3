"""Makes docs/results/*.md, the tables of README.md and docs/compatibility.md and the charts from benchmarks/results/*.json.

    python benchmarks/pages.py              # write what is not current
    python benchmarks/pages.py --check      # write nothing; exit with 1 and say what is not current
    python benchmarks/pages.py --figures    # draw docs/figures as well (needs matplotlib)

A page is its prose in `prose/NAME.md` with `{{name}}` where a table or a figure of speech comes from the results: a number in
a sentence is computed like the tables are, so that it cannot stay behind. README.md and docs/compatibility.md are written by
hand but for what stands between `<!-- NAME -->` and `<!-- /NAME -->`. Of several results of one kind the newest counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import tables
from tables import number

ROOT = Path(__file__).resolve().parents[1]
BOTH_MODELS = ("mixtral", "deepseek_v2")
COMMANDS = {
    "pruning_qwen3": "pruning.py FOLDER", "pruning_adam": "pruning.py FOLDER ...", "engines": "engines.py --gptqmodel PYTHON",
    "rounding_speed": "rounding_speed.py FOLDER --rival PYTHON --threads 2", "build_speed": "build_speed.py --work DIR",
    "rounding_speed_1thread": "rounding_speed.py FOLDER --rival PYTHON", "depth": "depth.py --dense FOLDER",
    "families": "families.py --work DIR",
}  # fmt: skip
REFITTED = "channel_prune:ratio={},score=obs,refit=layer"
OWN = ",per_expert=true,scope=global"
# Of a share that two steps remove together, what the first takes: r / (1 + r); the second takes r^2 of the rest.
TOGETHER = {"0.25": ("0.2", "0.0625"), "0.5": ("0.3333", "0.25")}


# What a setting was called when results were measured, and what it is called now.
RENAMED = {"score=surgeon": "score=obs"}


def renamed(text: str) -> str:
    """Results with the present names of settings."""
    for was, now in RENAMED.items():
        text = text.replace(was, now)
    return text


class Results:
    """The newest result of every kind, as the files hold it."""

    def __init__(self, folder: Path) -> None:
        dated = sorted(folder.glob("????-??-??_*.json"))
        self.files = {path.stem.partition("_")[2]: path for path in dated}
        self.read = {kind: json.loads(renamed(path.read_text())) for kind, path in self.files.items()}

    def __getitem__(self, kind: str) -> Any:
        body = self.read[kind]
        return body.get("results", body.get("models", body))

    def made(self, kind: str, up: str = "../..") -> str:
        """How a table came about: the command, the file (its folder is `up` from the page), the day, the machine, the versions."""
        body, name = self.read[kind], self.files[kind].name
        machine, versions = body["machine"], body["versions"]
        return (
            f"`python benchmarks/{COMMANDS.get(kind, f'{kind}.py')}`, [{name}]({up}/benchmarks/results/{name}): "
            f"{body['date']}, {machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}, transformers "
            f"{versions['transformers']}, moespresso {versions['moespresso']}."
        )

    def kl(self, steps: str, model: str, kind: str = "pruning") -> float:
        """Mean KL over the samples."""
        return mean(self[kind][model][steps]["kl"])

    def both(self, amount: str, model: str, kind: str = "pruning") -> float:
        """KL of widths of their own, then shared bases."""
        own, bases = TOGETHER[amount]
        return self.kl(f"{REFITTED.format(own)}{OWN} low_rank:method=shared_basis,ratio={bases}", model, kind)

    def way(self, model: str, share: float, what: str, how: str) -> float:
        """KL of a way of `depth.py`."""
        rows = self["depth"][model]["rows"]
        [kl] = [r["kl"]["mean"] for r in rows if (r["share"], r["what"], r["how"]) == (share, what, how)]
        return kl


def span(values: Iterable[float], form: str) -> str:
    """The least and the most of some values, or the one that they come to."""
    told = list(dict.fromkeys(format(value, form) for value in sorted(values)))
    return told[0] if len(told) == 1 else f"{told[0]} to {told[-1]}"


def less(after: float, before: float) -> float:
    """The share by which a KL is lower."""
    return 1 - after / before


# Pages: what stands for each name in the prose


def experts(found: Results) -> Iterator[tuple[str, str]]:
    """Scores."""
    models = found["scores"]
    yield "scores", tables.scores(models)
    yield "perplexities", " and ".join(f"{models[m]['perplexity']['value']:.2f}" for m in BOTH_MODELS)
    for name, model in (("mixtral", "mixtral"), ("deepseek", "deepseek_v2")):
        rows = {label: row["kl"]["mean"] for label, row in models[model]["scores"].items()}
        drawn = [kl for label, kl in rows.items() if label.startswith("random")]
        yield f"random_{name}", f"{mean(drawn) / min(rows.values()):.1f}"
        if name == "mixtral":
            yield "luckiest", f"{min(drawn):.3f}"
            yield "unluckiest", f"{max(drawn):.3f}"


def depth(found: Results) -> Iterator[tuple[str, str]]:
    """Experts, layers, blocks."""
    shares, greedy = (0.1, 0.25, 0.4), ("one-shot", "greedy KL")
    for name, model in (("mixtral", "mixtral"), ("deepseek", "deepseek_v2"), ("dense", "dense twin")):
        yield name, tables.depth(found["depth"][model])
        yield f"{name}_25", span((found.way(model, 0.25, "layers", how) for how in greedy), ".2f")
        for label, what in (("", "layers"), ("blocks_", "blocks")):
            saved = [less(found.way(model, s, what, f"{h}, linear"), found.way(model, s, what, h)) for s in shares for h in greedy]  # fmt: skip
            yield f"repair_{label}{name}", f"{max(saved):.0%}"
    ratios = [found.way(m, s, "blocks", h) / found.way(m, s, "layers", h) for m in BOTH_MODELS for s in shares for h in greedy]  # fmt: skip
    yield "blocks_over_layers", span(ratios, ".1f")
    yield "expert_25", number(found.way("deepseek_v2", 0.25, "experts", "one-shot"))


def bits(found: Results) -> Iterator[tuple[str, str]]:
    """Quantization."""
    rows = found["slimming"]
    yield "bits", tables.bits(rows)
    yield "engines", tables.engines(found["engines"])
    times: list[float] = []
    for name, model in (("mixtral", "mixtral"), ("deepseek", "deepseek_v2")):
        ours, other = (rows[f"{model}, 2 bits"][way] for way in ("gptq", "autoround"))
        lower = less(mean(other["kl"]), mean(ours["kl"]))
        yield f"autoround_{name}", f"{abs(lower):.0%} {'better' if lower > 0 else 'worse'}"
        times.append(other["seconds"] / ours["seconds"])
    yield "autoround_time", span(times, ".1f")


def engines(found: Results) -> Iterator[tuple[str, str]]:
    """Guards of plugin folders."""
    results = found["engine_guards"]
    rows = [tables.guarded(said) for said in results.values()]
    forms = [form for form in rows[0] if form != "plain"]
    assert not any(any(each[form]["as written"]) for each in rows for form in forms), (
        "a plugin folder was taken"
    )
    yield "guards", tables.guards(results)
    yield "forms", str(len(forms))
    taken = [sum(sum(each[form]["numbers alone"]) for form in forms) for each in rows]
    yield "taken", f"{max(taken)} of the {sum(len(rows[0][form]['numbers alone']) for form in forms)}"


def pruning(found: Results) -> Iterator[tuple[str, str]]:
    """Narrower and sparser experts."""
    yield "cuts", tables.pruning(found["pruning"], ["0.15", "0.25", "0.5"], *tables.CUTS)
    yield "masks", tables.pruning(found["pruning"], ["0.5", "2:4", "4:8"], *tables.MASKS)
    yield "qwen3", tables.pruning(found["pruning_qwen3"], ["0.15", "0.25", "0.5"])
    yield "adam", tables.pruning(found["pruning_adam"], ["0.25", "0.5"])
    yield "attention", tables.sized(found["attention"]["mixtral"])
    yield from structures(found)
    yield from gains(found)
    yield from patterns(found)
    yield from training(found)


def structures(found: Results) -> Iterator[tuple[str, str]]:
    """What was tried beside channels."""
    yield "structures_mixtral", tables.sized(found["structures"]["mixtral"])
    yield "structures_deepseek", tables.sized(found["structures"]["deepseek_v2"])
    yield "planted", f"{min(row['found'] for row in found['structures']['planted'].values()):.0%}"


def gains(found: Results) -> Iterator[tuple[str, str]]:
    """What refits, and widths that differ, take off."""
    amounts = ("0.15", "0.25", "0.5")
    scores = ("random", "magnitude", "wanda", "camera", "heapr", "obs")
    plain = "channel_prune:ratio={},score={},refit={}"
    yield "refit", span((less(found.kl(plain.format(a, s, "expert"), m), found.kl(plain.format(a, s, "none"), m))
                         for m in BOTH_MODELS for a in amounts for s in scores), ".0%")  # fmt: skip
    for step, key in (("expert_drop", "refit_drop"), ("expert_merge", "refit_merge")):
        yield key, span((less(found.kl(f"{step}:ratio={a} refit", m), found.kl(f"{step}:ratio={a}", m))
                         for m in BOTH_MODELS for a in amounts), ".0%")  # fmt: skip
    wider = {(m, a): found.kl(REFITTED.format(a), m) for m in BOTH_MODELS for a in ("0.25", "0.5")}
    yield "by_layer", span((less(found.kl(f"{REFITTED.format(a)},scope=global", m), even) for (m, a), even in wider.items()), ".0%")  # fmt: skip
    for name, model in (("mixtral", "mixtral"), ("deepseek", "deepseek_v2")):
        uneven = {a: found.kl(f"{REFITTED.format(a)}{OWN}", model) for a in ("0.25", "0.5")}
        yield f"by_expert_{name}", span((less(kl, wider[model, a]) for a, kl in uneven.items()), ".0%")
        alone = found.kl(plain.format("0.5", "obs", "expert"), model)
        yield f"joint_{name}", f"{less(wider[model, '0.5'], alone):.0%}"
        yield f"uneven_{name}", number(uneven["0.5"])
        yield f"both_{name}", number(found.both("0.5", model))
    yield "bases_deepseek", f"{wider['deepseek_v2', '0.25'] / found.kl('low_rank:method=shared_basis,ratio=0.25', 'deepseek_v2'):.1f}"  # fmt: skip


def patterns(found: Results) -> Iterator[tuple[str, str]]:
    """What patterns, and shared experts, cost."""
    steps = ("magnitude:sparsity={}", "wanda:sparsity={}", "sparsegpt:sparsity={}")
    for key, pattern in (("two_four", "2:4"), ("four_eight", "4:8")):
        yield key, span((found.kl(s.format(pattern), m) / found.kl(s.format("0.5"), m) for m in BOTH_MODELS for s in steps), ".1f")  # fmt: skip
    yield "shared", span((found.kl(f"{s.format(p)},parts=experts+shared", "deepseek_v2") / found.kl(s.format(p), "deepseek_v2")
                          for s in steps[1:] for p in ("0.5", "2:4")), ".1f")  # fmt: skip


def training(found: Results) -> Iterator[tuple[str, str]]:
    """What a refit makes up for, by how the experts were trained; on a quarter of the channels by CAMERA's energy."""
    none = "channel_prune:ratio=0.25,score=camera,refit=none"
    muon = {"mixtral": "pruning", "qwen3_moe": "pruning_qwen3"}
    for name, kind in muon.items():
        refit = none.replace("none", "expert")
        short = name.removesuffix("_moe")
        yield f"muon_{short}", f"{less(found.kl(refit, name, kind), found.kl(none, name, kind)):.0%}"
        refit, name = f"{refit},damping=0.01", f"{name}_adam"
        yield (
            f"adam_{short}",
            f"{less(found.kl(refit, name, 'pruning_adam'), found.kl(none, name, 'pruning_adam')):.0%}",
        )
    halves = f"{REFITTED.format('0.143')}{OWN} low_rank:method=shared_basis,ratio=0.125"
    yield "half_half", number(found.kl(halves, "qwen3_moe", "pruning_qwen3"))


def speed(found: Results) -> Iterator[tuple[str, str]]:
    """Seconds and bytes."""
    built = found["build_speed"]
    yield "build", tables.build(built)
    yield "source_gb", f"{built['source_bytes'] / 1e9:.2f}"
    yield "rounds", str(len(built["mb_per_second"]["warm"]["cp"]))
    for phase in ("open", "measure", "build"):
        yield f"{phase}_s", f"{built['press_seconds'][phase]:.2f}"
    yield "two_threads", tables.rivals(found["rounding_speed"])
    yield "one_thread", tables.rivals(found["rounding_speed_1thread"])
    yield "threads", str(found.read["rounding_speed"]["threads"])
    versions = found["rounding_speed"]["llm-compressor"]["said"]["versions"]
    yield (
        "rival",
        f"{versions['llmcompressor']} (torch {versions['torch']}, transformers {versions['transformers']})",
    )
    yield "widths", tables.widths(found["real_widths"])
    yield "milliseconds", tables.milliseconds(found["structures"]["milliseconds"])


# README


def facts(found: Results) -> str:
    """Three of the measurements, in a sentence each."""
    drop = {m: number(found.kl("expert_drop:ratio=0.5", m)) for m in BOTH_MODELS}
    both = {m: number(found.both("0.5", m)) for m in BOTH_MODELS}
    rows, built = found["rounding_speed"], found["build_speed"]
    [ours, theirs] = (tables.rival(rows[name]) for name in ("moespresso", "llm-compressor"))
    kls = [row[3].partition(" ")[0] for row in (ours, theirs)]
    rates = built["build_over_cp"]
    pruned, gptq, build = (
        f"([{page}](docs/results/{page}.md), {found.files[kind].name})"
        for page, kind in (("pruning", "pruning"), ("speed", "rounding_speed"), ("speed", "build_speed"))
    )
    return "\n".join([
        "- **Half of the routed experts' bytes removed, without training**: mean token KL to the original "
        f"{both['deepseek_v2']} where",
        f"  a layer has 32 experts, {both['mixtral']} where it has 8; dropping half of the experts costs "
        f"{drop['deepseek_v2']} and {drop['mixtral']}",
        f"  {pruned}.",
        f"- **GPTQ to 4 bits in {ours[0]} and {ours[2]}; llm-compressor takes {theirs[0]} and {theirs[2]}** (10 M",
        f"  parameters), at a KL of {kls[0]} and {kls[1]} {gptq}.",
        f"- **A trim-only build writes at {rates['warm']} to {rates['cold']} times the rate of `cp` and `sync`** of the same "
        f"{built['source_bytes'] / 1e9:.2f} GB",
        f"  {build}.",
    ])  # fmt: skip


def choices(found: Results) -> str:
    """Goals, and the step for each with its KL at a quarter (of the routed experts' bytes, or of all)."""

    def pair(of: Callable[[str], float]) -> str:
        return " / ".join(number(of(model)) for model in BOTH_MODELS)

    def cut(steps: str) -> str:
        return pair(lambda model: found.kl(steps, model))

    gptq = pair(lambda model: mean(found["slimming"][f"{model}, 4 bits"]["gptq"]["kl"]))
    layers, blocks = (
        pair(lambda m, w=w: found.way(m, 0.25, w, "greedy KL, linear")) for w in ("layers", "blocks")
    )
    rows = [
        ["4-bit weights", "`gptq:bits=4,group_size=32`", f"{gptq} (4 bits)", "transformers"],
        ["smaller experts, stock code", "`channel_prune:ratio=0.25`", cut(REFITTED.format("0.25")), "transformers"],
        ["smaller experts, least loss", "`channel_prune:ratio=0.25,per_expert=true,scope=global`", cut(REFITTED.format("0.25") + OWN), "plugin"],
        ["half of the bytes", "the same, 0.333, then `low_rank:method=shared_basis,ratio=0.25`",
         f"{pair(lambda m: found.both('0.5', m))} (50%)", "`moespresso.load`"],
        ["fewer experts", "`expert_drop:ratio=0.25`, then `refit`", cut("expert_drop:ratio=0.25 refit"), "transformers, vLLM, llama.cpp"],
        ["fewer MoE layers", "`layer_drop:drop=2,score=kl,repair=linear`", f"{layers} (all bytes)", "transformers (some families)"],
        ["fewer layers, smaller cache", "`block_drop:drop=2,score=kl,repair=linear`", f"{blocks} (all bytes)", "transformers, vLLM, llama.cpp"],
        ["sparse weights", "`sparsegpt:sparsity=2:4`", f"{cut('sparsegpt:sparsity=2:4')} (2:4)", "transformers"],
    ]  # fmt: skip
    return tables.markdown(["goal", "`--step`", "KL at 25%: Mixtral / DeepSeek-V2 form", "loads in"], rows)


def half(found: Results) -> str:
    """Half of the routed experts' bytes, by six ways."""
    own = REFITTED.format("0.5")
    ways = {
        "whole experts (`expert_drop`)": "expert_drop:ratio=0.5", "the same, then `refit`": "expert_drop:ratio=0.5 refit",
        "channels, all experts alike (`channel_prune`)": own, "channels, every expert its own width": own + OWN,
    }  # fmt: skip
    rows = [
        [told, *(tables.spread(found["pruning"][m][step]["kl"]) for m in BOTH_MODELS)]
        for told, step in ways.items()
    ]
    rows.append(["the same, then shared bases", *(number(found.both("0.5", m)) for m in BOTH_MODELS)])
    sparse = [tables.spread(found["pruning"][m]["sparsegpt:sparsity=0.5"]["kl"]) for m in BOTH_MODELS]
    rows.append(["half of the weights, stored with a mask (56%)", *sparse])
    return tables.markdown(["half of the routed experts' bytes", *map(tables.title, BOTH_MODELS)], rows)


# docs/compatibility.md


def families(found: Results) -> str:
    """What every family came to."""
    body = found.read["families"]
    steps = ["inspect", *body["steps"]]
    return "\n\n".join([
        tables.counted(body["results"], steps),
        tables.families(body["results"], steps),
        found.made("families", ".."),
    ])  # fmt: skip


PAGES = (experts, depth, bits, engines, pruning, speed)
BLOCKS = {"README.md": (facts, choices, half), "docs/compatibility.md": (families,)}


def written(found: Results, root: Path = ROOT) -> dict[Path, str]:
    """Every page as it has to be."""
    texts = {root / "docs" / "results" / f"{page.__name__}.md": filled(page, found) for page in PAGES}
    for place, blocks in BLOCKS.items():
        text = (root / place).read_text(encoding="utf-8")
        for block in blocks:
            text = between(text, block.__name__, block(found))
        texts[root / place] = text
    return texts


def filled(page: Callable[[Results], Iterator[tuple[str, str]]], found: Results) -> str:
    """A page's prose with everything in its place."""
    name, values = page.__name__, dict(page(found))
    prose = (Path(__file__).parent / "prose" / f"{name}.md").read_text(encoding="utf-8")

    def put(match: re.Match[str]) -> str:
        word, _, kind = match[1].partition(" ")
        return found.made(kind) if word == "made" else values[match[1]]

    text = re.sub(r"\{\{([\w ]+)\}\}", put, prose)
    return f"<!-- Made by benchmarks/pages.py from benchmarks/prose/{name}.md and the results: change those. -->\n\n{text}"


def between(text: str, name: str, body: str) -> str:
    """The text with another body between the marks of this name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    assert 0 <= text.find(begin) < text.find(end), f"the marks of {name} are gone"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{body}\n{end}{after}"


def stale(found: Results, root: Path = ROOT) -> list[Path]:
    """Pages that are not what the results make of them."""
    return [
        path
        for path, text in written(found, root).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main() -> int:
    """Check, or write."""
    asking = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asking.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where a page is not current"
    )
    asking.add_argument("--figures", action="store_true", help="draw docs/figures as well")
    asked = asking.parse_args()
    found = Results(ROOT / "benchmarks" / "results")
    old = stale(found)
    for path in old:
        print(f"not current: {path.relative_to(ROOT)}" if asked.check else f"wrote {path.relative_to(ROOT)}")
    if asked.check:
        return 1 if old else 0
    for path, text in written(found).items():
        path.write_text(text, encoding="utf-8")
    if asked.figures:
        import figures

        folder = ROOT / "docs" / "figures"
        figures.headline(found["pruning"], folder / "headline.svg")
        figures.pruning(found["pruning"], folder / "pruning.png")
        figures.depth(found["depth"], folder / "depth.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
