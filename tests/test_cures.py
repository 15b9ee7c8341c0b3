"""Every refusal is tried with its cure applied: what a sentence says would do is read out of it, done, and does.

A cure is parsed as it stands, so that one which changes is tried as it then is. Most are tried by the dress rehearsal, which
walks through all steps on shapes and is where they are refused; what is refused later, or by another verb, is done as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conftest import Zoo, write_wide
from moespresso.build import open_view
from moespresso.core.errors import UserError
from moespresso.run import Recipe, rehearse


def amended(step: str, said: str) -> str:
    """A step with the settings that a cure says, or the step that it names instead."""
    if "=" not in said.partition(":")[0]:
        return said
    kind, _, settings = step.partition(":")
    before = dict(pair.split("=", 1) for pair in settings.split(",") if pair)
    after = before | dict(pair.split("=", 1) for pair in said.split(",") if pair)
    return f"{kind}:{','.join(f'{name}={value}' for name, value in after.items())}"


def without(step: str, name: str) -> str:
    """A step without a setting."""
    kind, _, settings = step.partition(":")
    return f"{kind}:{','.join(pair for pair in settings.split(',') if not pair.startswith(f'{name}='))}"


@dataclass(frozen=True)
class Wish:
    """Steps for a model; the last of them is refused in words that match `refused`, whose groups are what cures it.

    `at` is the step that a cure changes. A cure that names no settings is done by `cure`.
    """

    model: str
    steps: tuple[str, ...]
    refused: str
    at: int = -1
    cure: Callable[[tuple[str, ...], re.Match[str]], Iterable[str]] | None = None
    target: str = "transformers"
    more: dict[str, Any] = field(default_factory=dict[str, Any])

    def cured(self, found: re.Match[str]) -> Iterable[list[str]]:
        """The steps with each of the cures."""
        if self.cure is not None:
            yield list(self.cure(self.steps, found))
            return
        for said in filter(None, found.groups()):
            steps = list(self.steps)
            steps[self.at] = amended(steps[self.at], said)
            yield steps


USE = r"(?:use|say|give|add) ((?:[a-z_]+:)?[a-z_]+=[^ ,]+(?:,[a-z_]+=[^ ,]+)*)"
NEAREST = r"the nearest plan that it can is (?:to )?([a-z_]+(?::|=)[^ ]*[^ ,]|expert_drop|channel_prune)"
TWO = r"the nearest plan that it can is ([^ ]+) and then ([^ ]+) as the steps that treat matrices"
RAGGED = "channel_prune:ratio=0.4,per_expert=true"


def _leave_out(steps: tuple[str, ...], found: re.Match[str]) -> Iterable[str]:
    return [*steps[:-1], without(steps[-1], found[1])]


def _swapped(steps: tuple[str, ...], _: re.Match[str]) -> Iterable[str]:
    """The last step before the others."""
    return [steps[-1], *steps[:-1]]


def _prune_first(steps: tuple[str, ...], found: re.Match[str]) -> Iterable[str]:
    return [amended(steps[1], found[1]), steps[0]]


def _keep(steps: tuple[str, ...], found: re.Match[str]) -> Iterable[str]:
    return [*steps[:-1], amended(without(steps[-1], "ratio"), f"keep={found[1]}")]


WISHES = [
    # Groups of inputs: what is named fits every matrix that the step treats.
    Wish("wide", ("rtn:group_size=128",), USE),
    Wish("mixtral", ("rtn:group_size=32",), USE),
    Wish("mixtral", ("hqq:group_size=16,parts=experts+attention",), USE),
    Wish("mixtral", ("rtn",), USE),
    Wish("deepseek_v2", ("rtn:group_size=16,parts=experts+shared+attention+dense",), USE),
    Wish("deepseek_v3", ("gptq:group_size=24,parts=experts+shared+attention+dense",), USE),
    Wish("dots1", ("rtn:parts=experts+shared,group_size=40",), USE),
    Wish("qwen2_moe", ("rtn:parts=experts+dense+head+shared",), USE),
    Wish("olmoe", ("sparsegpt:bits=4",), USE),
    Wish("wide", ("channel_prune:width=72", "gptq:group_size=32"), USE),
    Wish("wide", (f"{RAGGED},refit=none", "gptq:group_size=32"), USE, target="plugin"),
    Wish("wide", ("channel_prune:ratio=0.4,scope=global", "rtn"), USE, target="plugin"),
    Wish("wide", (f"{RAGGED},multiple=16,least=16", "hqq:group_size=64"), USE, target="plugin"),
    Wish("wide", ("rtn:group_size=20",), r"must be 0 or a multiple of 8, such as (32) or 128",
         cure=lambda steps, found: [amended(steps[0], f"group_size={found[1]}")]),
    Wish("wide", ("sparsegpt:bits=4,group_size=20",), r"must be 0 or a multiple of 8, such as (32)",
         cure=lambda steps, found: [amended(steps[0], f"group_size={found[1]}")]),
    # Patterns.
    Wish("wide", ("magnitude:sparsity=5:7",), r"such as (\d+:\d+)",
         cure=lambda steps, found: [amended(steps[0], f"sparsity={found[1]}")]),
    Wish("deepseek_v2", ("wanda:sparsity=8:16,parts=experts+shared",), r"such as (\d+:\d+)",
         cure=lambda steps, found: [amended(steps[0], f"sparsity={found[1]}")]),
    Wish("odd", ("magnitude:sparsity=2:4",), r"a plain share such as ([\d.]+)",
         cure=lambda steps, found: [amended(steps[0], f"sparsity={found[1]}")]),
    Wish("odd", ("sparsegpt:sparsity=1:4",), r"a plain share such as ([\d.]+)",
         cure=lambda steps, found: [amended(steps[0], f"sparsity={found[1]}")]),
    Wish("wide", ("wanda:sparsity=3:2",), r"such as (2:4)",
         cure=lambda steps, found: [amended(steps[0], f"sparsity={found[1]}")]),
    Wish("wide", ("wanda:sparsity=1.5",), r"say ([\d.]+), or (2:4)",
         cure=lambda steps, found: [amended(steps[0], f"sparsity={found[1]}")]),
    Wish("wide", ("wanda:variant=true,sparsity=2:4",), r"such as ([\d.]+), not the pattern",
         cure=lambda steps, found: [amended(steps[0], f"sparsity={found[1]}")]),
    # Counts of experts.
    Wish("deepseek_v2", ("expert_drop:keep=8",), r"keep (\d+)(?: or \d+)?$", cure=_keep),
    Wish("deepseek_v2", ("expert_drop:keep=8",), r"keep \d+ or (\d+)$", cure=_keep),
    Wish("dots1", ("expert_drop:keep=15",), r"keep (\d+)(?: or \d+)?$", cure=_keep),
    Wish("dots1", ("expert_merge:keep=2",), r"is under (\d+), the fewest", cure=_keep),
    Wish("deepseek_v3", ("expert_drop:keep=1",), r"is under (\d+), the fewest", cure=_keep),
    Wish("mixtral", ("expert_drop:keep=9",), r"is more than the (\d+) experts", cure=_keep),
    Wish("mixtral", ("expert_drop:keep=5,scope=global",), NEAREST),
    Wish("mixtral", ("expert_drop:ratio=0.3,scope=global",), NEAREST),
    Wish("deepseek_v2", ("expert_drop:ratio=0.3,scope=global",), NEAREST),
    Wish("mixtral", ("expert_drop:keep=5,router=preserve",), NEAREST),
    Wish("mixtral", ("expert_drop:keep=5,replace=novice",), NEAREST),
    Wish("mixtral", ("expert_drop:keep=5,router=preserve", "expert_merge:keep=6"), "do this step before the one", cure=_swapped,
         target="plugin"),
    # Channels.
    Wish("wide", ("channel_prune:width=20",), r"(?:use) (\d+)", cure=lambda s, f: [amended(s[0], f"width={f[1]}")]),
    Wish("wide", ("channel_prune:width=24,multiple=16",), r"use (\d+)", cure=lambda s, f: [amended(s[0], f"width={f[1]}")]),
    Wish("wide", ("channel_prune:width=24,multiple=16",), r"leave (multiple) out", cure=_leave_out),
    Wish("wide", ("channel_prune",), r"say how much: ([a-z]+=[\d.]+)"),
    Wish("wide", ("channel_prune",), r"or (width=\d+)"),
    Wish("wide", ("channel_prune:ratio=0.5,width=24",), "leave one out", cure=lambda s, _: [without(s[0], "ratio")]),
    Wish("wide", ("channel_prune:ratio=0.4,scope=global",), NEAREST),
    Wish("wide", (RAGGED,), NEAREST),
    Wish("wide", (RAGGED, "channel_prune:ratio=0.2"), r"add (per_expert=true)", target="plugin"),
    Wish("wide", (RAGGED, "expert_merge:keep=6"), "do this step before the one", cure=_swapped, target="plugin"),
    Wish("wide", (RAGGED, "low_rank"), USE, target="plugin"),
    Wish("wide", ("rtn:group_size=32", "channel_prune:ratio=0.5"), r"use (\S+), and put this step before", cure=_prune_first),
    Wish("wide", ("rtn:group_size=32", "channel_prune:width=40"), r"use (\S+), and put this step before", cure=_prune_first),
    Wish("wide", ("rtn:group_size=32", "channel_prune:ratio=0.5,per_expert=true"), r"use (\S+), and put this step before", target="plugin",
         cure=_prune_first),
    Wish("packed", ("channel_prune:ratio=0.5",), USE),
    Wish("packed", ("channel_prune:width=40",), USE),
    Wish("packed", (RAGGED,), USE, target="plugin"),
    Wish("granitemoe", (RAGGED,), USE, target="plugin"),
    # Stacks, and what has a mask or factors.
    Wish("granitemoe", ("wanda:pack=true",), USE, target="plugin"),
    Wish("granitemoe", ("sparsegpt:bits=4,group_size=8",), USE),
    Wish("granitemoe", ("rtn:group_size=8",), USE),
    Wish("gpt_oss", ("rtn:group_size=8",), USE),
    Wish("gpt_oss", ("low_rank",), USE, target="plugin"),
    Wish("gpt_oss", ("channel_prune:ratio=0.4",), "drop experts", cure=lambda *_: ["expert_drop"]),
    Wish("wide", ("wanda:pack=true",), NEAREST),
    Wish("wide", ("low_rank",), NEAREST),
    Wish("wide", ("low_rank:method=shared_basis,ratio=0.1",), NEAREST),
    Wish("wide", ("attention_rank",), NEAREST),
    Wish("deepseek_v3", ("low_rank:parts=attention",), NEAREST),
    Wish("olmoe", ("low_rank:parts=attention,ratio=0.4",), NEAREST),
    Wish("gpt_oss", ("low_rank:parts=attention",), NEAREST),
    Wish("granitemoe", ("low_rank:parts=attention",), NEAREST),
    Wish("wide", ("low_rank:method=modegpt,ratio=0.4",), TWO, cure=lambda _, found: [*found.groups()]),
    Wish("granitemoe", ("low_rank:method=modegpt",), TWO, cure=lambda _, found: [*found.groups()]),
    Wish("wide", ("low_rank:parts=experts", "attention_rank:modules=qk"), TWO, cure=lambda _, found: [*found.groups()]),
    Wish("wide", ("magnitude:parts=experts+head,pack=true",), NEAREST),
    # Experts in one tensor: what is named is what the step takes, with groups that fit.
    Wish("gpt_oss", ("awq",), r": (drop experts)$", cure=lambda *_: ["expert_drop"]),
    Wish("granitemoe", ("autoround:group_size=0",), r": (drop experts)$", cure=lambda *_: ["expert_drop"]),
    Wish("gpt_oss", ("gptq:bits=gate_up:3+down:4",), r": (drop experts)$", cure=lambda *_: ["expert_drop"]),
    Wish("gpt_oss", ("rtn",), USE),
    Wish("granitemoe", ("hqq:bits=8",), USE),
    Wish("granitemoe", ("gptq",), USE),
    Wish("gpt_oss", ("sparsegpt:bits=4",), USE),
    Wish("gpt_oss", ("magnitude:parts=experts+attention",), USE),
    Wish("gpt_oss", ("wanda:pack=true",), rf"{USE} with --target plugin", target="plugin"),
    Wish("granitemoe", ("low_rank",), rf"{USE} with --target plugin", target="plugin"),
    Wish("wide", ("gptq:group_size=32,layers=0:8+1:3",), rf"{NEAREST} for all experts, with layers left out",
         cure=lambda s, f: [amended(without(s[0], "layers"), f[1])]),
    Wish("wide", ("rtn:group_size=32,layers=0:8,exclude=L1.experts",), rf"{NEAREST} for all experts, with layers and exclude left out",
         cure=lambda s, f: [amended(without(without(s[0], "layers"), "exclude"), f[1])]),
    Wish("wide", ("rtn:bits=gate_up:4+down:8,group_size=32",), NEAREST),
    Wish("wide", ("rtn:symmetric=false,group_size=32",), NEAREST),
    Wish("wide", ("rtn:parts=attention,group_size=32",), r"(parts=experts\+)",
         cure=lambda steps, found: [amended(steps[0], f"{found[1]}attention")]),
    Wish("wide", ("wanda:pack=true", "rtn:group_size=32"), r"say (pack=false) there", at=0),
    Wish("wide", ("wanda:pack=true", "channel_prune:ratio=0.4"), "put that step last", cure=_swapped, target="plugin"),
    Wish("wide", ("wanda:pack=true", "low_rank"), "leave one of the two out", cure=lambda s, _: s[1:], target="plugin"),
    Wish("wide", ("low_rank", "rtn:group_size=32"), "leave one of the two out", cure=lambda s, _: s[1:], target="plugin"),
    Wish("wide", ("rtn:group_size=32", "magnitude:pack=true"), "put the rounding last and say (pack=false) here", target="plugin",
         cure=lambda s, f: [amended(s[1], f[1]), s[0]]),
    Wish("wide", ("attention_rank", "rtn:parts=experts+attention,group_size=32"), r"say (pack=false) there", at=0, target="plugin"),
    Wish("wide", ("wanda", "channel_prune:ratio=0.4"), "put that step last", cure=_swapped),
    Wish("wide", ("rtn:group_size=32", "magnitude"), "put the rounding last", cure=_swapped),
    Wish("qwen2_moe", ("rtn:parts=shared,group_size=8", "awq:group_size=8"), r"use (inputs=false)", target="plugin"),
    Wish("qwen2_moe", ("rtn:parts=shared,group_size=8", "awq:group_size=8"), "run awq before that step", cure=_swapped,
         target="plugin"),
    # Parts, bits and layers.
    Wish("wide", ("rtn:bits=5",), r"use (2), 3, 4 or 8", cure=lambda s, f: [f"rtn:group_size=32,bits={f[1]}"]),
    Wish("wide", ("rtn:bits=attention:8,group_size=32",), r"add (attention) to parts",
         cure=lambda s, f: [f"rtn:group_size=32,bits=attention:8+4,parts=experts+{f[1]}"]),
    Wish("wide", ("rtn:bits=down:8,group_size=32",), r"add (gate_up:4)", target="plugin",
         cure=lambda s, f: [amended(s[0], f"bits=down:8+{f[1]}")]),
    Wish("wide", ("gptq:parts=head",), r"use rtn or (hqq) for it", target="plugin",
         cure=lambda _, f: [f"{f[1]}:parts=head,group_size=32"]),
    Wish("wide", ("low_rank:parts=head",), r"use (magnitude) for it", cure=lambda _, f: [f"{f[1]}:parts=head"]),
    Wish("wide", ("gptq:exclude=L0.experts.down,group_size=32",), r"exclude (L0.experts), or",  target="plugin",
         cure=lambda s, f: [amended(s[0], f"exclude={f[1]}")]),
    Wish("wide", ("gptq:exclude=L0.experts.down,group_size=32",), r"or use rtn or (hqq)", target="plugin",
         cure=lambda s, f: [s[0].replace("gptq", f[1])]),
    Wish("wide", ("rtn:exclude=L9.*,group_size=32",), r"such as (L0\.\*)", target="plugin",
         cure=lambda s, f: [amended(s[0], f"exclude={f[1]}")]),
    Wish("wide", ("low_rank:method=shared_basis,ratio=0.9",), r"use ([\d.]+) or less", target="plugin",
         cure=lambda s, f: [amended(s[0], f"ratio={f[1]}")]),
    Wish("wide", ("low_rank:method=shared_basis,bases=9",), r"more than the (\d+) experts", target="plugin",
         cure=lambda s, f: [amended(s[0], f"bases={f[1]},ratio=0.05")]),
    Wish("wide", ("low_rank:method=shared_basis,parts=attention",), r"use (method=svd)", target="plugin"),
    Wish("deepseek_v3", ("attention_rank",), r"use (low_rank:parts=attention)", target="plugin"),
    # Depth.
    Wish("mixtral", ("block_drop:drop=3",), r"drop at most (\d+)", cure=lambda s, f: [f"block_drop:drop={f[1]}"]),
    Wish("mixtral", ("layer_drop:part=attention,drop=2",), NEAREST),
    Wish("mixtral", ("layer_drop:part=attention,drop=3",), NEAREST),
    Wish("granitemoe", ("layer_drop:drop=2",), NEAREST),
    *(Wish(model, ("layer_drop:repair=bias",), r"nearest plan that it can is (repair=linear) or (repair=scale)")
      for model in ("mixtral", "qwen2_moe", "deepseek_v3")),
    *(Wish(model, ("layer_drop:repair=bias,drop=2",), NEAREST) for model in ("olmoe", "granitemoe", "gpt_oss")),
    *(Wish(model, (step,), r"use (low_rank:parts=attention) with --target plugin", target="plugin")
      for model in ("olmoe", "deepseek_v3") for step in ("attention_rank", "low_rank:method=modegpt")),
    Wish("jamba", ("block_drop",), r"drop experts or layers", cure=lambda *_: ["expert_drop"]),
    Wish("jamba", ("block_drop",), r"drop experts or layers", cure=lambda *_: ["layer_drop"]),
    Wish("mixtral", ("layer_drop:part=attention,score=cosine_moe",), r"use (score=cosine)", target="plugin"),
    Wish("mixtral", ("block_drop:contiguous=true,rescore=false",), r"leave (rescore)=false out", cure=_leave_out),
    Wish("mixtral", ("layer_drop:part=attention,repair=bias",), r"(?:nearest plan that it can is|use) (\S+[^ ,])"),
    # Sizes.
    Wish("wide", ("wanda",), r"use (pack=true) with a plain", target="plugin", more={"size": "90%"}),
    Wish("wide", ("magnitude:sparsity=2:4,pack=true",), r"(channel_prune) or rtn for --size", more={"size": "90%"},
         cure=lambda _, f: [f[1]]),
    Wish("wide", ("attention_rank:pack=false",), r"use (pack=true) for --size", target="plugin", more={"size": "98%"}),
    Wish("wide", ("expert_drop:ratio=0.25", "rtn"), r"exactly one step to fit in this version, such as --step (expert_drop)",
         more={"size": "60%"}, cure=lambda _, f: [f[1]]),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(
    zoo: Zoo, source: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`models(name)`: the zoo's, `wide`, the same `packed`, or one whose widths are `odd`."""
    root = tmp_path_factory.mktemp("cures")

    def find(name: str) -> Path:
        if name in ("wide", "packed"):
            return source if name == "wide" else packed
        if name == "odd" and not (root / name).exists():
            write_wide(root / name, hidden_size=54, intermediate_size=45)
        return root / name if name == "odd" else zoo(name)

    return find


def rehearsed(model: Path, steps: Iterable[str], target: str, more: dict[str, Any]) -> None:
    recipe = Recipe().with_options(model=str(model), steps=list(steps), target=target, **more)
    rehearse(open_view(model), recipe)


@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: f"{wish.model}-{'+'.join(wish.steps)}")
@pytest.mark.few(12)
def test_a_cure_cures(wish: Wish, models: Callable[[str], Path]):
    model = models(wish.model)
    with pytest.raises(UserError) as refused:
        rehearsed(model, wish.steps, wish.target, wish.more)
    said = str(refused.value)
    found = re.search(wish.refused, said)
    assert found, said
    for steps in wish.cured(found):
        rehearsed(model, steps, wish.target, wish.more)
    if "or say --target plugin" in said:
        rehearsed(model, wish.steps, "plugin", wish.more)
