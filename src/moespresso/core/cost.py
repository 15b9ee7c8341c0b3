"""The price of a model, from facts alone: no tensor is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model weighs and takes.

    `bytes` is the sum of tensor bytes (equal to the sum over the headers of what is written); `params` counts
    stored weights; `active_params` those one token passes through; `flops` are those of a forward over 2,048
    tokens (two per weight and token, and full, unmasked attention products); `kv_bytes_per_token` is the
    16-bit key-value cache; `peak_load_bytes` the bytes of the largest decoder layer.
    """

    bytes: int
    params: int
    active_params: int
    flops: int
    kv_bytes_per_token: int
    peak_load_bytes: int
