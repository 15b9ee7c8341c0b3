"""Is there a structure of experts that costs less than fewer channels do, at equal bytes? Two that were published.

    joint    channels and rank of every expert on one curve of loss against bytes, by equal slopes (arXiv 2105.11228)
    blocks   block-diagonal experts under permutations that are learned (arXiv 2002.08127)

Each is fitted layer by layer on 48 rows of calibration text, every layer on what the ones before let through, and rounded to
bfloat16 as it would be stored; bytes are counted, nothing is written. KL is the mean token KL to the original on a tenth of
the held-out text, with a 95% bootstrap over sequences. Beside them channels alone, as `channel_prune` chooses and refits them;
`time` compares how long experts take.

    python benchmarks/structures.py [MODEL ...] [--parts joint blocks time] [--left 0.875 0.75 0.5] [--out FILE.json]
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from harness import Bench, folder_of, save, saving, sizes
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from moespresso.build import Tensors, make_meta_model
from moespresso.core.runtime import Runtime
from moespresso.data import Batches
from moespresso.kernels import RoutedExperts, conditioning, joint_refit, low_rank, neurons, obs
from moespresso.quality import score_tokens
from moespresso.quality.compare import summary
from moespresso.stream import SweepOptions, sweep

DAMPING = 0.003
# The joint menu: channels in steps, and factors that take these shares of a dense matrix's bytes (1: dense); it is chosen
# from by so many tokens of an expert, and checked on as many others.
STEP, SHARES, TOKENS = 8, (0.25, 0.5, 0.75, 0.875, 1.0), 1024


@dataclass
class Cut:
    """What becomes of the experts of a layer: `up` [E, 2 I, H] and `down` [E, H, I] as they multiply (zeros where something
    is gone), how many `numbers` are stored, and what else is to be told."""

    up: Tensor
    down: Tensor
    numbers: int
    notes: dict[str, float] = field(default_factory=dict[str, float])


Way = Callable[[RoutedExperts], Cut]


def measured(bench: Bench, text: Batches, way: Way) -> dict[str, Any]:
    """Cut every layer in turn, on the calibration text; then KL on the held-out text, bytes left, seconds and notes."""
    found: dict[int, Cut] = {}

    def visit(layer: Any, taps: Any) -> dict[str, Tensor] | None:
        if layer.experts is None:
            return None
        if layer.spec.index not in found:
            found[layer.spec.index] = way(RoutedExperts.of(layer.experts, taps.fed({})))
        cut = found[layer.spec.index]
        new = {id(layer.experts.gate_up_proj): cut.up, id(layer.experts.down_proj): cut.down}
        return {name: new[id(own)] for name, own in layer.module.named_parameters() if id(own) in new}

    start = time.process_time()
    with Tensors(bench.view.checkpoint.folder) as reader:
        model = make_meta_model(bench.view, reader, Runtime())
        sweep(model, text.ids, text.mask, visit, SweepOptions("rebuilt"))
        seconds = time.process_time() - start
        hidden = sweep(model, bench.heldout.ids, bench.heldout.mask, visit, SweepOptions("rebuilt"))
        scored = score_tokens([model, model], [hidden, bench.original], bench.heldout)
    kl, cuts = summary(scored, bench.heldout, compared=True)["kl"], list(found.values())
    left = sum(cut.numbers for cut in cuts) / sum(cut.up.numel() + cut.down.numel() for cut in cuts)
    notes = {key: mean(cut.notes[key] for cut in cuts) for key in cuts[0].notes}
    return {"kl": kl["mean"], "ci95": kl["ci95"], "left": left, "seconds": seconds} | notes


def stored(weights: Tensor) -> Tensor:
    """As it comes back from the disk."""
    return weights.bfloat16().float()


def solved(anchor: Tensor, gram: Tensor, pull: Tensor) -> Tensor:
    """The W [out, K] with the least E|y - W a|^2, drawn to `anchor`: `gram` is E[a a^T], `pull` E[y a^T]."""
    upper, _, _ = conditioning.damped_factors(gram[None].flip(1, 2), DAMPING)
    return anchor + torch.cholesky_solve((pull - anchor @ gram).mT, upper[0].flip(0, 1)).mT


def seen_by(experts: RoutedExperts, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs x [n, H] of an expert, its gates g [n, 1], and what it answers times the gate [n, H]."""
    tokens, gates = experts.rows(expert)
    hidden, gates = experts.hidden[tokens], gates[:, None]
    return hidden, gates, gates * experts.inner(expert, hidden, experts.up[expert]) @ experts.down[expert].T


def with_down(experts: RoutedExperts, up: Tensor, numbers: int, refit: str) -> Cut:
    """A cut with new `up`, and with down refitted `expert` by expert, or then for the whole `layer`."""
    down = experts.down.clone()
    for expert in range(experts.count):
        hidden, gates, wanted = seen_by(experts, expert)
        inner = gates * experts.inner(expert, hidden, up[expert])
        down[expert] = solved(down[expert], inner.T @ inner, wanted.T @ inner)
    if refit == "layer":
        every = torch.arange(down.shape[2]).expand(experts.count, -1)
        narrowed = joint_refit.Narrowed(up, down, list(every))
        down, _ = joint_refit.refit(experts, narrowed, damping=[DAMPING] * experts.count, sweeps=2)
    return Cut(up, stored(down), numbers)


def obs_kept(experts: RoutedExperts, hessians: Tensor, keep: int, turns: int = obs.TURNS) -> Tensor:
    """The channels [E, keep] that `channel_prune` keeps, by its default score."""
    counts = obs.portions(experts.down.shape[2] - keep, turns)
    return neurons.keep_last(obs.remove(experts.down, hessians, DAMPING, counts)[0], keep)


def channels(experts: RoutedExperts, left: float, refit: str) -> Cut:
    """Fewer channels, as many for every expert."""
    count, size, width = experts.down.shape
    hessians = experts.hessians_inner(range(count), experts.up, by_gate=True)
    kept = obs_kept(experts, hessians, round(left * width))
    rows = torch.cat([kept, kept + width], 1).unsqueeze(2).expand(-1, -1, size)
    up = torch.zeros_like(experts.up).scatter_(1, rows, experts.up.gather(1, rows))
    return with_down(experts, up, count * 3 * size * kept.shape[1], refit)


# Channels and rank


@dataclass(frozen=True)
class Option:
    """One way to store an expert: its channels `kept`, and gate and up (`halves`) and `down` as factors of a share of their
    bytes; the error of its answers times the gate on tokens it was fitted to, and on others (`check`)."""

    numbers: int
    loss: float
    check: float
    kept: Tensor
    halves: float
    down: float


def rank_of(out: int, width: int, share: float) -> int:
    """The rank at which two factors take a share of the bytes of a matrix [out, width]."""
    return int(share * out * width / (out + width))


def numbers_of(out: int, width: int, share: float) -> int:
    """What is stored of a matrix: itself, or two factors."""
    return out * width if share == 1 else rank_of(out, width, share) * (out + width)


def factors(weights: Tensor, hessian: Tensor, shares: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """Every share, and the products [N out, in] that come closest to `weights` [N, out, in] under `hessian`."""
    _, out, width = weights.shape
    ranks = {share: rank_of(out, width, share) for share in shares if share < 1}
    left, right = low_rank.truncate(weights, hessian[None], max(ranks.values(), default=1), DAMPING)
    for share in shares:
        kept = slice(ranks.get(share))
        product = stored(weights) if share == 1 else stored(left[..., kept]) @ stored(right[:, kept])
        yield share, product.flatten(0, 1)


def halves_of(experts: RoutedExperts, expert: int, kept: Tensor) -> Tensor:
    """Gate and up [2, K, H] of an expert on the channels `kept`."""
    return experts.up[expert].unflatten(0, (2, -1))[:, kept]


def options(
    experts: RoutedExperts, expert: int, kepts: Sequence[Tensor], shares: Sequence[float]
) -> Iterator[Option]:
    """The menu of one expert. Fitted to every other token, checked on the rest."""
    seen = seen_by(experts, expert)
    every = -(-len(seen[0]) // (2 * TOKENS))  # experts are compared by sums over all of their tokens
    hidden, gates, wanted = (each[::every] for each in seen)
    hessian = (hidden * gates).T @ (hidden * gates)
    for kept in kepts:
        for halves, up in factors(halves_of(experts, expert, kept), hessian, shares):
            inner = gates * experts.inner(expert, hidden, up)
            fit, check = (
                (a.T @ a, y.T @ a, y.square().sum())
                for a, y in ((inner[part::2], wanted[part::2]) for part in (0, 1))
            )
            refit = solved(experts.down[expert][:, kept], *fit[:2])
            for share, down in factors(refit[None], fit[0], shares):
                loss, checked = (
                    every * float(y - 2 * (down * pull).sum() + (down @ gram * down).sum())
                    for gram, pull, y in (fit, check)
                )
                numbers = sum(numbers_of(len(kept), len(down), each) for each in (halves, halves, share))
                yield Option(numbers, loss, checked, kept, halves, share)


def slope(wide: Option, narrow: Option) -> float:
    """What a number less costs."""
    return (narrow.loss - wide.loss) / (wide.numbers - narrow.numbers)


def hull(menu: list[Option]) -> list[Option]:
    """The lower convex hull of loss over size, largest first."""
    corners: list[Option] = []
    for option in sorted(menu, key=lambda o: (-o.numbers, o.loss)):
        while corners and corners[-1].loss >= option.loss:
            corners.pop()
        if corners and option.numbers == corners[-1].numbers:
            continue
        while len(corners) > 1 and slope(corners[-2], corners[-1]) >= slope(corners[-2], option):
            corners.pop()
        corners.append(option)
    return corners


def equal_slopes(menus: list[list[Option]], budget: int) -> list[Option]:
    """One option an expert: again and again that becomes smaller which loses the least by it; what is over is filled up."""
    paths = [hull(menu) for menu in menus]
    while sum(path[0].numbers for path in paths) > budget:
        min((path for path in paths if len(path) > 1), key=lambda path: slope(path[0], path[1])).pop(0)
    chosen = [path[0] for path in paths]
    for at, menu in enumerate(menus):
        room = budget - sum(option.numbers for option in chosen) + chosen[at].numbers
        chosen[at] = min((o for o in menu if o.numbers <= room), key=lambda o: o.loss)
    return chosen


def joint(
    experts: RoutedExperts,
    left: float,
    kinds: str,
    across: bool,
    turns: int = obs.TURNS,
    refit: str = "expert",
) -> Cut:
    """Every expert as its best option of `left` of its bytes, or of all options in the layer by equal slopes (`across`)."""
    count, size, width = experts.down.shape
    each, shares = round(left * 3 * size * width), SHARES if kinds != "channels" else (1.0,)
    hessians = experts.hessians_inner(range(count), experts.up, by_gate=True)
    least = STEP if across else round(left * width / STEP) * STEP
    widths = range(least, width, STEP) if kinds != "rank" else ()
    kepts = [obs_kept(experts, hessians, keep, turns) for keep in widths]
    kepts.append(torch.arange(width).expand(count, -1))
    menus = [
        list(options(experts, expert, [kept[expert] for kept in kepts], shares)) for expert in range(count)
    ]
    chosen = equal_slopes(menus, count * each) if across else [equal_slopes([m], each)[0] for m in menus]
    up, down = torch.zeros_like(experts.up), torch.zeros_like(experts.down)
    for expert, choice in enumerate(chosen):
        (hidden, gates, wanted), kept = seen_by(experts, expert), choice.kept
        hessian, halves = (hidden * gates).T @ (hidden * gates), halves_of(experts, expert, kept)
        up[expert, torch.cat([kept, kept + width])] = rows = dict(factors(halves, hessian, shares))[
            choice.halves
        ]
        inner = gates * experts.inner(expert, hidden, rows)
        new = solved(experts.down[expert][:, kept], inner.T @ inner, wanted.T @ inner)
        down[expert][:, kept] = dict(factors(new[None], inner.T @ inner, shares))[choice.down]
    numbers = sum(option.numbers for option in chosen)
    if refit == "layer":
        return with_down(experts, up, numbers, refit)
    notes = {"with_rank": mean(min(option.halves, option.down) < 1 for option in chosen)}
    if kinds == "joint" and not across:
        notes["no_worse_held_out"] = mean(map(no_worse, menus, chosen, [each] * count))
    return Cut(up, down, numbers, notes)


def no_worse(menu: list[Option], choice: Option, each: int) -> bool:
    """Whether a choice is, on tokens it did not see, as good as the better of channels alone and rank alone."""
    width = max(len(option.kept) for option in menu)
    alone = [o for o in menu if o.numbers <= each and (o.halves == o.down == 1 or len(o.kept) == width)]
    return choice.check <= min(alone, key=lambda option: option.loss).check


# Block-diagonal experts


def balanced(gains: Tensor) -> Tensor:
    """Groups [N] of equal size with the highest sum of `gains` [N, G]."""
    number, groups = gains.shape
    _, columns = linear_sum_assignment(gains.repeat(1, number // groups).numpy(), maximize=True)
    return torch.from_numpy(columns) % groups


def in_blocks(energy: Tensor, inner: Tensor, outer: Tensor) -> float:
    """Share of `energy` [E, I, 2 H] where the groups of channels [E, I] and of inputs and outputs [2 H] agree."""
    return float((energy * (inner[:, :, None] == outer)).sum() / energy.sum())


def arranged(energy: Tensor, groups: int, tries: int = 4) -> tuple[Tensor, Tensor]:
    """Groups of each expert's channels [E, I], and of the layer's inputs and outputs [2 H], that hold as much of `energy` as
    is found: one is assigned by the other, in turns, from random beginnings."""
    draw, half, found = torch.Generator().manual_seed(0), energy.shape[2] // 2, []
    for _ in range(tries):
        outer = torch.cat([torch.randperm(half, generator=draw) % groups for _ in range(2)])
        inner, last, held = outer, -1.0, 0.0
        while held > last:
            inner = torch.stack([balanced(own @ F.one_hot(outer, groups).float()) for own in energy])
            gains = torch.einsum("eih,eig->hg", energy, F.one_hot(inner, groups).float())
            outer = torch.cat([balanced(gains[:half]), balanced(gains[half:])])
            last, held = held, in_blocks(energy, inner, outer)
        found.append((held, inner, outer))
    return max(found, key=lambda each: each[0])[1:]


def blocks(experts: RoutedExperts, groups: int, learned: bool) -> Cut:
    """Experts of `groups` diagonal blocks, their places by what every weight moves: its square by that of its input, each
    expert's two ends as shares of one. All three matrices are refitted on what stays."""
    every, (gate, up) = range(experts.count), experts.up.square().chunk(2, dim=1)
    into = (gate + up) * experts.squares_in(every, by_gate=True)[:, None]
    out = experts.down.square().mT * experts.squares_inner(every, experts.up, by_gate=True)[:, :, None]
    energy = torch.cat([each / each.sum((1, 2), keepdim=True) for each in (into, out)], dim=2)
    draw = torch.Generator().manual_seed(0)
    noise = energy.flatten()[torch.randperm(energy.numel(), generator=draw)].view_as(energy)
    inner, outer = arranged(energy, groups)
    drawn = torch.stack([torch.randperm(inner.shape[1], generator=draw) % groups for _ in every])
    notes = {"energy": in_blocks(energy, inner, outer), "energy_random": in_blocks(energy, drawn, outer),
             "energy_of_noise": in_blocks(noise, *arranged(noise, groups))}  # fmt: skip
    inner, (inputs, outputs) = inner if learned else drawn, outer.chunk(2)
    up, down = torch.zeros_like(experts.up), torch.zeros_like(experts.down)
    for expert in every:
        hidden, gates, wanted = seen_by(experts, expert)
        hessian, whole = (hidden * gates).T @ (hidden * gates), experts.up[expert]
        blockwise(up[expert], whole, hessian, whole @ hessian, inner[expert].repeat(2), inputs, groups)
        a = gates * experts.inner(expert, hidden, up[expert])
        blockwise(down[expert], experts.down[expert], a.T @ a, wanted.T @ a, outputs, inner[expert], groups)
    return Cut(up, down, (up.numel() + down.numel()) // groups, notes)


def blockwise(
    out: Tensor, anchor: Tensor, gram: Tensor, pull: Tensor, rows: Tensor, columns: Tensor, groups: int
) -> None:
    """`solved`, with the weights of equal groups of `rows` and `columns` only, put into `out`."""
    for group in range(groups):
        row, column = (rows == group).nonzero(), (columns == group).nonzero().flatten()
        out[row, column] = stored(solved(anchor[row, column], gram[column][:, column], pull[row, column]))


def planted(groups: int, noise: float, count: int = 4, size: int = 128, width: int = 64) -> dict[str, float]:
    """Energy in blocks that random permutations hide: in those that were planted, and in those found."""
    torch.manual_seed(0)
    inner = torch.stack([torch.randperm(width) % groups for _ in range(count)])
    outer = torch.cat([torch.randperm(size) % groups for _ in range(2)])
    there = (inner[:, :, None] == outer).float()
    energy = (torch.randn_like(there) * (there + noise)).square()
    found = arranged(energy, groups, tries=16)
    return {"planted": in_blocks(energy, inner, outer), "found": in_blocks(energy, *found)}


# Time


def timed(
    tokens: int, size: int = 2048, width: int = 1408, copies: int = 8, rounds: int = 12
) -> dict[str, float]:
    """Milliseconds of one expert (median): dense, narrower, and in blocks with a gather before and one behind. Every call
    takes the next of several copies, so that no cache holds the weights."""
    hidden, order = torch.randn(tokens, size), torch.randperm(size)

    def run(gate: Tensor, up: Tensor, down: Tensor, groups: int) -> Tensor:
        if groups == 1:
            return (F.silu(hidden @ gate[0]) * (hidden @ up[0])) @ down[0]
        parts = hidden[:, order].view(tokens, groups, -1).transpose(0, 1)
        answers = torch.bmm(F.silu(torch.bmm(parts, gate)) * torch.bmm(parts, up), down)
        return answers.transpose(0, 1).reshape(tokens, size)[:, order]

    spent: dict[str, list[float]] = {}
    shapes = {"dense": (1, width), "1/2 of the channels": (1, width // 2), "2 blocks": (2, width),
              "1/4 of the channels": (1, width // 4), "4 blocks": (4, width)}  # fmt: skip
    for name, (groups, wide) in shapes.items():
        into, out = (groups, size // groups, wide // groups), (groups, wide // groups, size // groups)
        pool = [[torch.randn(shape) for shape in (into, into, out)] for _ in range(copies)]
        for gate, up, down in pool * (rounds + 1):
            start = time.perf_counter()
            run(gate, up, down, groups)
            spent.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
    return {name: median(times[copies:]) for name, times in spent.items()}


# All of it


def ways(part: str, lefts: list[float]) -> Iterator[tuple[str, Way]]:
    """Everything that is tried, and what it is called."""
    for left in lefts if part == "joint" else ():
        for across in (False, True):
            for kinds in ("channels", "rank", "joint"):
                label = f"{left}: {kinds}, {'equal slopes in a layer' if across else 'equal bytes an expert'}"
                yield label, partial(joint, left=left, kinds=kinds, across=across)
        label, across = (
            f"{left}: channels, equal slopes in a layer, refit=layer",
            {"across": True, "refit": "layer"},
        )
        yield label, partial(joint, left=left, kinds="channels", **across)
        label = f"{left}: joint, equal bytes an expert, channels scored once"
        yield label, partial(joint, left=left, kinds="joint", across=False, turns=1)
    for left in (1 / 2, 1 / 4) if part == "blocks" else ():
        for refit in ("expert", "layer"):
            yield f"{left}: channels, refit={refit}", partial(channels, left=left, refit=refit)
    for groups in (2, 4) if part == "blocks" else ():
        for learned in (True, False):
            label = f"{1 / groups}: {groups} blocks, {'learned' if learned else 'random'}"
            yield label, partial(blocks, groups=groups, learned=learned)


class Saved:
    """What is found, kept in the file that was asked for as it comes; what is there already is not run again."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.body: dict[str, Any] = json.loads(out.read_text()) if out and out.is_file() else {}

    def add(self, section: str, label: str, row: dict[str, Any]) -> None:
        """One row, printed and saved with the date, machine and versions of now."""
        self.body.setdefault(section, {})[label] = row
        told = {key: round(value, 4) for key, value in row.items() if key != "ci95"}
        print(f"{section:12} {label:62}", told, flush=True)
        save(self.out, {k: v for k, v in self.body.items() if k not in ("date", "machine", "versions")})


def main() -> None:
    """Run, print and save."""
    asking = saving(__doc__, "models")
    asking.add_argument("--parts", nargs="*", default=["joint", "blocks", "time"])
    asking.add_argument("--left", nargs="*", type=float, default=[0.875, 0.75, 0.5])
    asked = asking.parse_args()
    saved = Saved(asked.out)
    if "blocks" in asked.parts:
        for groups, noise in ((2, 0.0), (4, 0.0), (2, 0.1), (4, 0.1)):
            saved.add("planted", f"{groups} blocks, noise {noise}", planted(groups, noise))
    for tokens in (1, 16, 256) if "time" in asked.parts else ():
        saved.add("milliseconds", f"{tokens} tokens", timed(tokens))
    for model in asked.models if {"joint", "blocks"} & {*asked.parts} else ():
        bench, name = Bench(model, *sizes(asked)), folder_of(model).name
        tried = [each for part in asked.parts for each in ways(part, asked.remains)]
        for label, way in tried:
            if label not in saved.body.get(name, {}):
                saved.add(name, label, measured(bench, bench.text(), way))


if __name__ == "__main__":
    main()
