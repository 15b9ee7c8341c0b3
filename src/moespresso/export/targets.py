"""The engines a result can be meant for, and what a plan may do for each (checked; see docs/architecture.md)."""

from __future__ import annotations

from dataclasses import dataclass

from moespresso.core.blueprint import Blueprint
from moespresso.core.errors import UserError, did_you_mean
from moespresso.core.plan import Plan
from moespresso.core.rewrite import pressed_blueprint


@dataclass(frozen=True, slots=True)
class Target:
    """One engine. `unequal_experts`: it loads layers with different numbers of experts."""

    name: str
    available: bool = True
    unequal_experts: bool = False


TARGETS = {
    target.name: target
    for target in (
        Target("transformers"),
        Target("vllm"),
        Target("llama.cpp"),
        Target("plugin", available=False, unequal_experts=True),
    )
}


def find_target(name: str) -> Target:
    """The target called `name`; raises `UserError` when there is none or it is not built yet."""
    if name not in TARGETS:
        raise UserError(f"target {name!r} is unknown{did_you_mean(name, TARGETS)}")
    if not TARGETS[name].available:
        raise UserError(f"target {name!r} is not available in this version")
    return TARGETS[name]


def check_target(name: str, plan: Plan, blueprint: Blueprint) -> None:
    """Raise `UserError` when `plan` makes something that the target cannot load, naming the nearest plan that it can."""
    target = find_target(name)
    layers = pressed_blueprint(blueprint, plan).moe_layers
    counts = [layer.experts for layer in layers]
    if target.unequal_experts or len(set(counts)) <= 1:
        return
    steps = max(layer.groups for layer in layers)
    nearest = max(round(sum(counts) / len(counts) / steps) * steps, *(layer.floor for layer in layers))
    raise UserError(
        f"this plan leaves unequal layers ({min(counts)} to {max(counts)} experts), which {target.name} cannot load; "
        f"the nearest plan that it can is scope=layer,keep={nearest}"
    )
