"""Neurons of an expert in the order in which they match another expert's best.

Permuting the intermediate channels of an expert changes nothing it computes. Before two experts are averaged,
the channels of one are matched with those of the other, so that the weights that lead in and out agree most
(a linear assignment, as M-SMoE does it): order[c] is the channel that comes to stand where the leader has
channel c.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def channel_order(experts: Any, expert: int, leader: int) -> Tensor:
    """The order [I] of `expert`'s channels that matches `leader`'s, from a layer's stack of experts in
    memory."""
    match = _channels(experts, leader) @ _channels(experts, expert).T
    _, order = linear_sum_assignment(match.numpy(), maximize=True)
    return torch.from_numpy(order)


def _channels(experts: Any, expert: int) -> Tensor:
    """Everything that belongs to each channel of an expert [I, weights], in float64."""
    inward = (experts.gate_up_proj if experts.has_gate else experts.up_proj)[expert]
    outward = experts.down_proj[expert]
    if experts.is_transposed:
        inward, outward = inward.T, outward.T
    width = outward.shape[1]
    if not experts.has_gate:
        parts = [inward]
    elif getattr(experts, "is_concatenated", True):
        parts = [inward[:width], inward[width:]]
    else:
        parts = [inward[0::2], inward[1::2]]
    return torch.cat([*parts, outward.T], 1).detach().double().cpu()
