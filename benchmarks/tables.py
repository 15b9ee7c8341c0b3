"""Results as Markdown: the tables that the scripts print and that `pages.py` puts into docs/results/.

Everything is made from what the JSON files hold, and from nothing else: a row is a step or a way, a column a model at a
size. Imports nothing heavy, so that pages are checked in no time.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
NAMES = {"mixtral": "Mixtral form", "deepseek_v2": "DeepSeek-V2 form", "qwen3_moe": "Qwen3 form",
         "mixtral_adam": "Mixtral form, AdamW", "qwen3_moe_adam": "Qwen3 form, AdamW",
         "dense twin": "Dense twin of the Mixtral form"}  # fmt: skip


def title(name: str) -> str:
    """A model as people call it."""
    return NAMES.get(name, name)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in lines)
        .replace("| --- ", "|---")
        .replace("---|---", "---|---")
    )


def number(value: float, like: float | None = None) -> str:
    """Three digits that say something, or as many behind the point as `like` has."""
    digits = max(0, 2 - math.floor(math.log10(like or value)))
    return f"{value:.{digits}f}"


def spread(values: Sequence[float]) -> str:
    """The mean of several samples with their range, or the one value."""
    middle = statistics.mean(values)
    if len(set(values)) == 1:
        return number(middle)
    return f"{number(middle)} ({number(min(values), middle)} to {number(max(values), middle)})"


def interval(mean: float, ci95: Sequence[float]) -> str:
    """A KL with its 95% interval."""
    low, high = (number(end, mean) for end in ci95)
    return f"{number(mean)} ({low} to {high})"


# Which score


def scores(models: Results) -> str:
    """Best first by the first model; random scores are one row: the mean of the seeds, and their range."""
    first = next(iter(models.values()))["scores"]
    labels = [label for label in first if not label.startswith("random")]
    head = [f"{title(name)}: {what}" for name in models for what in ("KL (95% CI)", "perplexity x")]
    rows = [
        [label, *(cell for model in models.values() for cell in _score(model["scores"][label]))]
        for label in sorted(labels, key=lambda label: first[label]["kl"]["mean"])
    ]
    seeds = len(first) - len(labels)
    drawn = [cell for model in models.values() for cell in _random(model["scores"])]
    return markdown(["score", *head], [*rows, [f"random, {seeds} seeds (range)", *drawn]])


def _score(row: Results) -> list[str]:
    return [interval(**row["kl"]), f"{row['perplexity_ratio']:.3f}"]


def _random(rows: Results) -> list[str]:
    drawn = [row for label, row in rows.items() if label.startswith("random")]
    kl = [row["kl"]["mean"] for row in drawn]
    ratio = statistics.mean(row["perplexity_ratio"] for row in drawn)
    return [spread(kl), f"{ratio:.3f}"]


# Experts, layers or blocks

DEPTH = {"experts": "Expert Drop", "layers": "Layer Drop", "blocks": "Block Drop",
         "compensated": "`renormalise=compensate`", "re-scored": "re-scored every 16th of the experts",
         "over all layers (plugin)": "`scope=global` (plugin)", "novices (plugin)": "`replace=novice` (plugin)",
         "greedy KL": "`kl`", "scale": "`repair=scale`", "linear": "`repair=linear`",
         "one run, cosine": "`contiguous`"}  # fmt: skip


def way(what: str, how: str) -> str:
    """What is dropped and how, in words and settings."""
    one_shot = "`easy_ep`" if what == "experts" else "`cosine`"
    words = [how] if how in DEPTH else how.removeprefix("merged, ").split(", ")
    verb = "merging" if how.startswith("merged") else DEPTH[what]
    return ", ".join(
        [verb, *(DEPTH.get(word, one_shot if word == "one-shot" else f"`{word}`") for word in words)]
    )


def depth(model: Results) -> str:
    """One model: ways down, shares of the bytes across; below, what was really removed of bytes and FLOPs."""
    rows = model["rows"]
    shares = list(dict.fromkeys(row["share"] for row in rows))
    ways = dict.fromkeys((row["what"], row["how"]) for row in rows)
    body = [
        [way(what, how), *(interval(**_way(rows, share, what, how)["kl"]) for share in shares)]
        for what, how in ways
    ]
    for what in dict.fromkeys(what for what, _ in ways):
        removed = [_way(rows, share, what, "one-shot") for share in shares]
        cells = [f"{row['removed']:.0%} / {abs(row['flops']):.0%}" for row in removed]
        body.append([f"*{DEPTH[what]}: bytes / FLOPs removed*", *cells])
    return markdown(["way", *(f"{share:.0%} of the bytes" for share in shares)], body)


def _way(rows: Sequence[Results], share: float, what: str, how: str) -> Results:
    [found] = [row for row in rows if (row["share"], row["what"], row["how"]) == (share, what, how)]
    return found


# How many bits


def bits(
    results: Results, models: Sequence[str] = ("mixtral", "deepseek_v2"), widths: Sequence[int] = (4, 3, 2)
) -> str:
    """Ways down, models and bits across."""
    columns = [f"{name}, {width} bits" for name in models for width in widths]
    columns = [column for column in columns if column in results]
    ways = dict.fromkeys(way for column in columns for way in results[column])
    body = [[f"`{way}`", *(spread(results[column][way]["kl"]) for column in columns)] for way in ways]
    return markdown(["KL to the original", *(titled(column) for column in columns)], body)


def titled(column: str) -> str:
    """A column's model as people call it."""
    name, _, rest = column.partition(", ")
    return f"{title(name)}, {rest}"


# Narrower experts, fewer weights

CUTS = ("expert_", "channel_", "low_rank")
MASKS = ("magnitude", "wanda", "sparsegpt")

AMOUNT = re.compile(r"[:,]?(?:ratio|sparsity)=([\d.:]+)")


def parted(steps: str) -> tuple[str, str]:
    """Steps without their amounts, and the amount. Where channels and then bases take a share each, as `pruning.py` asks
    for them (r / (1 + r) and r^2 of the rest), the amount is the r of both together."""
    amounts = AMOUNT.findall(steps)
    label = re.sub(r"(^|\s)([a-z_]+),", r"\1\2:", AMOUNT.sub("", steps))
    if len(amounts) < 2:
        return label, "".join(amounts)
    own, share = float(amounts[0]), float(amounts[1])
    both = own / (1 - own)
    equal = abs(share - both * both) < 0.001
    return label if equal else f"{label} ({amounts[0]}, then {amounts[1]})", f"{both:.2f}".rstrip("0")


def pruning(results: Results, amounts: Sequence[str], *kinds: str) -> str:
    """Steps that begin with one of `kinds` (any) down, models and amounts across; below, the share of the routed experts'
    bytes that is kept."""
    found = {
        (name, parted(steps)): row
        for name, rows in results.items()
        for steps, row in rows.items()
        if steps.startswith(kinds or "")
    }
    columns = [(name, amount) for name in results for amount in amounts]
    labels = dict.fromkeys(label for _, (label, amount) in found if amount in amounts)
    body = [
        [f"`{label}`", *(spread(row["kl"]) if (row := found.get((name, (label, amount)))) else ""
                         for name, amount in columns)]
        for label in labels
    ]  # fmt: skip
    body.append(["*bytes of routed experts kept*", *(_kept(found, *column) for column in columns)])
    return markdown(["KL to the original", *(f"{title(name)}, {amount}" for name, amount in columns)], body)


def _kept(found: Mapping[tuple[str, tuple[str, str]], Results], model: str, amount: str) -> str:
    kept = [row["left"] for (name, (_, own)), row in found.items() if (name, own) == (model, amount)]
    if not kept:
        return ""
    low, high = f"{min(kept):.0%}", f"{max(kept):.0%}"
    return low if low == high else f"{low} to {high}"


def sized(rows: Results) -> str:
    """One model: every step with the share of bytes kept, the most first (attention, other structures)."""
    body = [
        [f"`{step}`", f"{row['left']:.1%}", _cost(row)]
        for step, row in sorted(rows.items(), key=lambda item: -round(item[1]["left"], 3))
    ]
    return markdown(["step", "bytes kept", "KL to the original"], body)


def _cost(row: Results) -> str:
    return spread(row["kl"]) if isinstance(row["kl"], list) else interval(row["kl"], row["ci95"])


# Speed


def build(result: Results) -> str:
    """Rates of `cp` with `sync` and of a build, by the state of the file cache."""
    rows = [
        ["in the file cache" if state == "warm" else "not cached", f"{_middle(rates['cp'])} MB/s",
         f"{_middle(rates['build'])} MB/s", f"{result['build_over_cp'][state]:.2f}"]
        for state, rates in result["mb_per_second"].items()
    ]  # fmt: skip
    return markdown(
        ["files before", "`cp` and `sync`", "build, SHA-256 included", "build / cp, median of rounds"], rows
    )


def _middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def rivals(results: Results) -> str:
    """Seconds, memory and held-out KL of each tool."""
    return markdown(
        ["tool", "after imports", "whole process", "peak memory", "held-out KL (95% CI)"],
        [[name, *rival(row)] for name, row in results.items()],
    )


def rival(row: Results) -> list[str]:
    """One tool: ours says what it took in the report of `press`, the other in its own JSON."""
    said, kl = row.get("said"), row["heldout"]["kl"]
    after = said["seconds"]["after_imports"] if said else row["after_imports"]
    peak = said["peak_rss_bytes"] if said else row["peak_rss_bytes"]
    told = f"{kl['mean']:.5f} ({kl['ci95'][0]:.5f} to {kl['ci95'][1]:.5f})"
    return [f"{after:.1f} s", f"{row['process']:.1f} s", f"{peak / 1e6:.0f} MB", told]


def widths(results: Results) -> str:
    """Seconds, speed and memory of one expert of real widths."""
    rows = [
        [label, f"{row['seconds']:.1f} s", f"{row['source_bytes_per_second'] / 1e9:.2f} GB/s",
         f"{row['peak_anonymous_bytes'] / 2**30:.1f} GiB"]
        for label, row in results.items()
    ]  # fmt: skip
    return markdown(["step", "seconds", "bfloat16 read", "peak anonymous memory"], rows)


def engines(results: Results) -> str:
    """KL of an engine's float16 logits from ours, or that it refuses."""
    labels = dict.fromkeys(label for rows in results.values() for label in rows if label != "engine")
    body = [[f"`{label}`", *(_agreement(rows[label]) for rows in results.values())] for label in labels]
    return markdown(["layout and step", *(f"{title(n)}, {r['engine']}" for n, r in results.items())], body)


def guarded(said: Results) -> dict[str, dict[str, list[bool]]]:
    """By form and guard, whether an engine took the folders of each model."""
    found: dict[str, dict[str, list[bool]]] = {}
    for label, words in said.items():
        form = label.partition(", ")[2]
        guard = next((each for each in ("numbers alone", "name alone") if form.endswith(each)), "as written")
        form = form.removesuffix(f", {guard}")
        found.setdefault(form, {}).setdefault(guard, []).append(words == "taken")
    return found


def guards(results: Results) -> str:
    """Whether engines stop at each form as it is written, and with either guard alone."""
    engines = {engine: guarded(said) for engine, said in results.items()}
    columns = [
        (engine, guard) for engine in engines for guard in ("as written", "numbers alone", "name alone")
    ]
    forms = dict.fromkeys(form for found in engines.values() for form in found)
    body = [
        [form, *(_stops(engines[engine][form].get(guard)) for engine, guard in columns)] for form in forms
    ]
    return markdown(["form", *(f"{engine}, {guard}" for engine, guard in columns)], body)


def _stops(taken: list[bool] | None) -> str:
    if taken is None:
        return ""
    return "**taken**" if all(taken) else "stops" if not any(taken) else "takes some"


def _agreement(value: float | str) -> str:
    if isinstance(value, str):
        return f"fails: {value.partition(':')[0]}"
    return "NaN" if value != value else f"{value:.1e}"


def milliseconds(results: Results) -> str:
    """Time of one expert in each shape, by number of tokens."""
    shapes = next(iter(results.values()))
    body = [[shape, *(f"{times[shape]:.2f}" for times in results.values())] for shape in shapes]
    return markdown(["milliseconds for one expert", *results], body)


# Families: what each step came to, and the sentences where it did not


def families(results: Results, steps: Sequence[str]) -> str:
    """A row a family, a column a step: ok, or the number of a sentence below; a dash where `inspect` has the sentence."""
    sentences: dict[str, int] = {}
    body: list[list[str]] = []
    for name, row in results.items():
        told = [_came_to(row["steps"][step], sentences) for step in steps]
        body.append([f"`{name}`", row["class"], *told])
    told = [f"{place}. {words}" for words, place in sentences.items()]
    return "\n".join([markdown(["family", "class in config.json", *steps], body), "", *told])


def _came_to(words: str, sentences: dict[str, int]) -> str:
    if words in ("ok", ""):
        return words or "-"
    return f"[{sentences.setdefault(general(words), len(sentences) + 1)}]"


def general(sentence: str) -> str:
    """A sentence without the names of one family, so that families with the same fault share it; safe in Markdown."""
    for named, told in (
        (r"model_type '[^']+'", "model_type 'TYPE'"),
        (r"MODEL \([\w-]+\)", "MODEL"),
        (r"of an? [\w-]+ model\b", "of a TYPE model"),
        (r"wraps a language model \([\w-]+\)", "wraps a language model"),
        (r"\b(?:model|language_model|thinker|mtp|backbone)\.[\w.]+", "TENSOR"),
    ):
        sentence = re.sub(named, told, sentence)
    return re.sub(r"([*_<>|`])", r"\\\1", sentence)


KINDS = (("model types", r"[^+~@]*$"), ("pairs, and other forms", r".*[+~]"), ("layouts of the hub", r".*@"))


def counted(results: Results, steps: Sequence[str]) -> str:
    """How many checkpoints each step is ok for."""
    body: list[list[str]] = []
    for kind, pattern in KINDS:
        rows = [row["steps"] for name, row in results.items() if re.match(pattern, name)]
        passed = [sum(row[step] == "ok" for row in rows) for step in steps]
        whole = sum(all(row[step] == "ok" for step in steps) for row in rows)
        body.append([kind, *map(str, (len(rows), *passed, whole))])
    body.append(["all", *(str(sum(int(row[place]) for row in body)) for place in range(1, len(body[0])))])
    return markdown(["", "checkpoints", *steps, "all of them"], body)
