"""Expert merging done on a stock model in memory, the way `families.cut_by_hand` does Expert Drop.

Nothing here knows moespresso. What is to be averaged is read off the JSON of a plan by its words alone; which channels
belong together is found anew by scipy; how each family lays out its experts and routers is spelt out.
"""

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import PreTrainedModel

from families import cut_by_hand, experts_of, family_of, groups_of, moe_blocks, routers

STACKS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


@dataclass
class Merge:
    """One layer of one stage: which experts stay, leader -> member -> share, who is put in line, the router's fate."""

    keep: list[int]
    groups: dict[int, dict[int, float]] = field(default_factory=dict)
    aligned: set[int] = field(default_factory=set)
    mean: bool = False


Merges = dict[int, Merge]


def read_stage(stage: Mapping[str, Any]) -> Merges:
    """What a stage of a plan's JSON says, by layer."""
    rows = stage["treatments"]
    found = {int(unit[1:-8]): Merge(row["keep"]) for unit, row in rows.items() if unit.endswith(".experts")}
    for unit, row in rows.items():
        layer = found[int(re.match(r"L(\d+)", unit)[1])]
        if unit.endswith(".router"):
            layer.mean = row["repair"] == "mean"
        elif member := re.search(r"\.E(\d+)$", unit):
            layer.groups.setdefault(row["into"], {})[int(member[1])] = row.get("share", 1.0)
            layer.aligned |= {int(member[1])} if row.get("repair") == "align" else set()
    return found


def written_stage(merges: Merges) -> dict[str, Any]:
    """The other way round: a stage as JSON."""
    rows: dict[str, Any] = {}
    for layer, merge in merges.items():
        rows[f"L{layer}.experts"] = {"keep": merge.keep}
        if merge.mean:
            rows[f"L{layer}.router"] = {"repair": "mean"}
        for leader, shares in merge.groups.items():
            for member, share in shares.items():
                rows[f"L{layer}.E{member}"] = {"into": leader, "share": share}
                if member in merge.aligned:
                    rows[f"L{layer}.E{member}"]["repair"] = "align"
    return {"method": {"kind": "expert_merge"}, "treatments": rows}


def routed_groups(model: PreTrainedModel, layer: int) -> list[list[int]]:
    """The layer's experts by the groups its router chooses among."""
    count, groups = experts_of(model)[layer][0], groups_of(model)[layer]
    return torch.arange(count).view(groups, -1).tolist()


def channels(model: PreTrainedModel, layer: int, expert: int) -> Tensor:
    """What belongs to each intermediate channel of an expert [I, 3 H], in float64."""
    experts = moe_blocks(model)[layer].experts
    gate_up, down = experts.gate_up_proj.data[expert], experts.down_proj.data[expert]
    if family_of(model).name == "gpt_oss":  # [H, 2 I] with gate and up in turn, [I, H]
        parts = (gate_up[:, 0::2].T, gate_up[:, 1::2].T, down)
    else:  # [2 I, H] with the gate first, [H, I]
        parts = (*gate_up.chunk(2), down.T)
    return torch.cat(parts, 1).double()


def order_by_hand(model: PreTrainedModel, layer: int, expert: int, leader: int) -> Tensor:
    """Which channel of `expert` is to stand at each place so that the squared distance to the leader is least."""
    cost = torch.cdist(channels(model, layer, leader), channels(model, layer, expert)).square()
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def reordered(model: PreTrainedModel, layer: int, expert: int, order: Tensor) -> dict[str, Tensor]:
    """An expert's tensors with its channels in another order: it computes the same."""
    experts = moe_blocks(model)[layer].experts
    parts = {name: getattr(experts, name).data[expert] for name in STACKS if hasattr(experts, name)}
    if family_of(model).name == "gpt_oss":
        pairs = torch.stack([2 * order, 2 * order + 1], 1).reshape(-1)
        parts["gate_up_proj"] = parts["gate_up_proj"][:, pairs]
        parts["gate_up_proj_bias"] = parts["gate_up_proj_bias"][pairs]
        parts["down_proj"] = parts["down_proj"][order]
    else:
        parts["gate_up_proj"] = torch.cat([half[order] for half in parts["gate_up_proj"].chunk(2)])
        parts["down_proj"] = parts["down_proj"][:, order]
    return {name: part.clone() for name, part in parts.items()}


def put(model: PreTrainedModel, layer: int, expert: int, tensors: Mapping[str, Tensor]) -> None:
    """Write an expert's tensors into the model."""
    for name, tensor in tensors.items():
        getattr(moe_blocks(model)[layer].experts, name).data[expert] = tensor


def router_rows(model: PreTrainedModel, layer: int) -> list[Tensor]:
    """Views of all that has one entry per expert in a layer's router, experts first."""
    family, block, router = family_of(model).name, moe_blocks(model)[layer], routers(model)[layer]
    weight = (router.wg if family == "hunyuan_v1_moe" else router).weight.data
    match family:
        case "gpt_oss":
            return [weight, router.bias.data]
        case "deepseek_v3" | "glm4_moe" | "dots1":
            return [weight, router.e_score_correction_bias.data]
        case "minimax_m2":
            return [weight, block.e_score_correction_bias.data]
        case "ernie4_5_moe":
            return [weight, router.moe_statics.e_score_correction_bias.data[0]]
        case _:
            return [weight]


def average(model: PreTrainedModel, merges: Merges) -> None:
    """Put every group's average in its leader's place, in float64; the others stay where they are."""
    for layer, merge in merges.items():
        new = {leader: _average(model, layer, leader, shares, merge.aligned)
               for leader, shares in merge.groups.items()}  # fmt: skip
        for rows in router_rows(model, layer) if merge.mean else []:
            means = {leader: sum(share * rows[member].double() for member, share in shares.items())
                     for leader, shares in merge.groups.items()}  # fmt: skip
            for leader, mean in means.items():
                rows[leader] = mean
        for leader, tensors in new.items():
            put(model, layer, leader, tensors)


def _average(
    model: PreTrainedModel, layer: int, leader: int, shares: Mapping[int, float], aligned: set[int]
) -> dict[str, Tensor]:
    total: dict[str, Any] = {}
    for member, share in shares.items():
        order = torch.arange(len(channels(model, layer, member)))
        if member in aligned:
            order = order_by_hand(model, layer, member, leader)
        for name, tensor in reordered(model, layer, member, order).items():
            total[name] = total.get(name, 0) + share * tensor.double()
    return total


def merge_by_hand(model: PreTrainedModel, *stages: Merges) -> PreTrainedModel:
    """A copy of `model` after all stages, each done on what the one before left; experts are numbered as in `model`."""
    model = copy.deepcopy(model)
    kept = {layer: set(range(count)) for layer, (count, _) in experts_of(model).items()}
    for merges in stages:
        average(model, merges)
        kept |= {layer: kept[layer] & set(merge.keep) for layer, merge in merges.items()}
    return cut_by_hand(model, {layer: sorted(experts) for layer, experts in kept.items()})
