"""What the heads of an attention are, and which of their dims may go, found by looking at the module.

Queries, keys, values and outputs must be one matrix each (`q_proj`, `k_proj`, `v_proj`, `o_proj`) of as many
rows or columns as the config's heads ask for; whatever else the module holds is a reason to leave dims alone,
unless it is known not to touch them. Which dims a rotary embedding turns together is seen by turning unit
vectors with the family's own function.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from moespresso.core.blueprint import Heads

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Parameters of an attention itself that do not touch the dims of a head: a logit for each head.
_BESIDE = frozenset({"sinks"})
_TURN = "apply_rotary_pos_emb"
# How families call dims' embeddings in their code where it is not that function that turns them.
_OTHERS = ("rotary", "rope", "freqs", "position_embeddings")


def find_heads(module: nn.Module, config: PreTrainedConfig, model: PreTrainedModel) -> Heads:
    """The heads of an attention `module` of `model`; `config` is that of its layer."""
    reason = _not_plain(module) or _shares_keys(config)
    if reason:
        return Heads(no_qk=reason, no_vo=reason)
    q, k, v, o = (tuple(module.get_submodule(name).weight.shape) for name in PROJECTIONS)  # pyright: ignore[reportArgumentType, reportCallIssue]
    count = int(config.num_attention_heads)
    kv_count = int(getattr(config, "num_key_value_heads", None) or count)
    qk_dim, v_dim = q[0] // count, v[0] // kv_count
    if (count * qk_dim, kv_count * qk_dim, kv_count * v_dim, count * v_dim) != (q[0], k[0], v[0], o[1]):
        reason = f"has projections that {count} heads on {kv_count} do not explain (an output gate may be one of them)"
        return Heads(no_qk=reason, no_vo=reason)
    norms = {side: [n for n in _norms(module) if n[0] in letters] for side, letters in _SIDES.items()}
    no_qk = f"has a norm over the dims of queries or keys ({norms['qk'][0]})" if norms["qk"] else ""
    no_vo = f"has a norm over the dims of values ({norms['vo'][0]})" if norms["vo"] else ""
    if getattr(config, "clip_qkv", None) is not None:
        no_vo = no_vo or "clips values (clip_qkv), dim by dim"
    units = () if no_qk else _units(module, model, qk_dim)
    if units is None:
        no_qk, units = "turns queries and keys in a way that this version cannot follow", ()
    return Heads(count, kv_count, qk_dim, v_dim, units, no_qk, no_vo)


# By their first letters: q_norm, k_norm, query_layernorm, key_layernorm; v_norm.
_SIDES = {"qk": "qk", "vo": "v"}


def _norms(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_children() if _is_norm(name, child)]


def _is_norm(name: str, child: nn.Module) -> bool:
    return "norm" in name.lower() or "norm" in type(child).__name__.lower()


def _not_plain(module: nn.Module) -> str:
    """What of a module this version does not understand."""
    children = dict(module.named_children())
    if any("kv_a_proj" in name or "kv_b_proj" in name for name in children):
        return "is a multi-head latent attention (MLA), whose queries, keys and values have no matrices of their own"
    lacking = [name for name in PROJECTIONS if not isinstance(children.get(name), nn.Linear)]
    if lacking:
        return f"has no {lacking[0]} of its own (it may be joined with others)"
    known = "".join(_SIDES.values())
    for name, child in children.items():
        harmless = name in PROJECTIONS or "rotary" in type(child).__name__.lower()
        if not harmless and (_is_norm(name, child) and name[0] not in known):
            return f"has a {name}, a norm over what the heads answer"
        if not harmless and not _is_norm(name, child) and any(True for _ in child.parameters()):
            return f"has a {name}, which this version does not know"
    beside = {name for name, _ in module.named_parameters(recurse=False)} - _BESIDE
    return f"has a {min(beside)}, which this version does not know" if beside else ""


def _shares_keys(config: PreTrainedConfig) -> str:
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    return "shares keys and values with other layers (num_kv_shared_layers)" if shared else ""


def _units(module: nn.Module, model: PreTrainedModel, width: int) -> tuple[tuple[int, ...], ...] | None:
    """The dims of a query that are turned together; None where that cannot be seen."""
    code = _code(type(module))
    if f"{_TURN}(" not in code:
        alone = not any(word in code.lower() for word in _OTHERS)
        return tuple((dim,) for dim in range(width)) if alone else None
    turn = getattr(sys.modules[type(module).__module__], _TURN, None)
    sizes = {
        buffer.numel()
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and "original" not in name
    }
    candidates = (
        {units for size in sizes if (units := _turn_units(turn, width, size)) is not None} if turn else set()
    )
    return candidates.pop() if len(candidates) == 1 else None


def _turn_units(turn: Callable[..., Any], width: int, frequencies: int) -> tuple[tuple[int, ...], ...] | None:
    """What `turn` does to unit vectors: the dims that it mixes, by pairs, and those that it leaves alone."""
    for angles in (2 * frequencies, frequencies):
        generator = torch.Generator().manual_seed(0)
        cos, sin = (torch.rand(1, 1, angles, generator=generator) + 0.5 for _ in range(2))
        vectors = torch.eye(width)[:, None, None, :]
        try:
            turned = turn(vectors, vectors, cos, sin)[0]
        except (RuntimeError, TypeError, ValueError):
            continue  # its tables are of another width
        if tuple(turned.shape) == tuple(vectors.shape):
            return _mixed_dims(turned[:, 0, 0] != 0)
    return None


def _mixed_dims(seen: Tensor) -> tuple[tuple[int, ...], ...] | None:
    """Dims by which others they are mixed with, from `seen` [d, d]; None where these are no pairs."""
    both = seen | seen.T | torch.eye(len(seen), dtype=torch.bool)
    units = dict.fromkeys(tuple(row.nonzero().flatten().tolist()) for row in both)
    in_pairs = sum(map(len, units)) == len(seen) and all(len(unit) <= 2 for unit in units)
    return tuple(units) if in_pairs else None


@cache
def _code(kind: type[nn.Module]) -> str:
    """The code of a class, without what decorates it: that names functions which the class may not call."""
    return inspect.getsource(kind).partition("class ")[2]
