"""Random matrices, inputs and their moments, and the least error that a matrix of a rank can make."""

from __future__ import annotations

import torch
from torch import Tensor


def samples(seed: int, count: int, width: int, tokens: int = 200, rank: int | None = None) -> Tensor:
    """Correlated inputs [N, tokens, width] of uneven size, within a space of `rank` dims."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(count, rank or width, width, generator=draw) / width**0.5
    size = 0.1 + 2 * torch.rand(count, 1, width, generator=draw)
    return torch.randn(count, tokens, rank or width, generator=draw) @ mix * size


def moments(inputs: Tensor) -> Tensor:
    return inputs.mT @ inputs / inputs.shape[-2]


def matrices(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1))


def error(lost: Tensor, seen: Tensor | None) -> Tensor:
    """tr(D C D^T) of each matrix, in float64."""
    lost = lost.double()
    return (lost * (lost if seen is None else lost @ seen.double())).sum((-2, -1))


def root(seen: Tensor) -> Tensor:
    """The symmetric square root, in float64."""
    values, vectors = torch.linalg.eigh(seen.double())
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT


def tail(weights: Tensor, seen: Tensor | None, rank: int) -> Tensor:
    """The least error of any matrix of a rank (Eckart, Young, Mirsky)."""
    moved = weights.double() if seen is None else weights.double() @ root(seen)
    return torch.linalg.svdvals(moved)[..., rank:].square().sum(-1)
