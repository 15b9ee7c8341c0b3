"""Pure functions on tensors: the mathematics of the methods, batched over experts. Sees no file, no model and
no plan.

One file for each piece of mathematics, imported as a whole: `from moespresso.kernels import gptq`, then
`gptq.solve(...)`. Each file opens with its formula and with a legend of the shapes in its signatures.
"""

from moespresso.kernels import (
    allocation,
    attention_rank,
    autoround,
    conditioning,
    gptq,
    hqq,
    joint_refit,
    low_rank,
    masks,
    neurons,
    obs,
    shared_bases,
    sparsegpt,
)
from moespresso.kernels.routed import RoutedExperts

__all__ = [
    "RoutedExperts",
    "allocation",
    "attention_rank",
    "autoround",
    "conditioning",
    "gptq",
    "hqq",
    "joint_refit",
    "low_rank",
    "masks",
    "neurons",
    "obs",
    "shared_bases",
    "sparsegpt",
]
