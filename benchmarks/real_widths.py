"""Rounding at the widths of Mixtral-8x7B: experts of random weights (3 x 4096 x 14336 each) by each method.

Prints seconds, bytes of bfloat16 source per second, and the peak of anonymous memory, the expert's own weights included. GPTQ
takes second moments of 4,096 random tokens. A layer has eight such experts, which are rounded one after the other where the
memory for second moments is 1 GiB, and so takes eight times as long as one.

    python benchmarks/real_widths.py [--device cpu] [--experts 1] [--no-gptq] [--out FILE.json]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from harness import save, saving
from torch import Tensor

from moespresso.core.format import Format
from moespresso.methods import Gptq, Hqq, Rtn
from moespresso.stream import PeakMemory

HIDDEN, WIDTH, TOKENS = 4096, 14336, 4096
FORMAT = Format("integer", 4, 128)


def timed(label: str, work: Callable[[], object], weights: int) -> dict[str, Any]:
    """Seconds, speed and memory of one call."""
    with PeakMemory() as memory:
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    row = {
        "seconds": seconds,
        "source_bytes_per_second": 2 * weights / seconds,
        "peak_anonymous_bytes": memory.peak,
    }
    print(
        f"{label:24} {seconds:8.1f} s  {2e-9 * weights / seconds:6.2f} GB/s  {memory.peak / 2**30:5.1f} GiB",
        flush=True,
    )
    return row


def moments(count: int, width: int, device: str) -> Tensor:
    """Second moments [count, width, width] of random correlated tokens."""
    rows = torch.randn(TOKENS, width, device=device) * torch.rand(width, device=device)
    return (rows.T @ rows / len(rows)).expand(count, width, width)


def main() -> None:
    """Run, print and save."""
    asking = saving(__doc__)
    asking.add_argument("--device", default="cpu")
    asking.add_argument("--experts", type=int, default=1)
    asking.add_argument("--no-gptq", action="store_true", help="only what needs no text")
    asked = asking.parse_args()
    shapes = [(WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    total, found = asked.experts * sum(out * width for out, width in shapes), {}
    with torch.inference_mode():
        for step in (Rtn(scales="minmax", unbiased=False), Rtn(), Hqq()):
            label = f"{step.kind} {getattr(step, 'scales', '')}".strip()
            layer = [
                torch.randn(1, out, width, dtype=torch.bfloat16, device=asked.device) for out, width in shapes
            ]

            def all_experts(step: Any = step, layer: list[Tensor] = layer) -> None:
                for _ in range(asked.experts):  # expert by expert, as the build does
                    for weights in layer:
                        step.quantize(weights, FORMAT, torch.bfloat16)

            found[label] = timed(label, all_experts, total)
        solved = {} if asked.no_gptq else {"gate and up": (2 * WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
        for name, (out, width) in solved.items():
            weights = torch.randn(asked.experts, out, width, device=asked.device)
            seen = moments(asked.experts, width, asked.device)
            label = f"gptq, {name} x {asked.experts}"
            found[label] = timed(
                label, lambda w=weights, h=seen: Gptq().solved(w, h, FORMAT, torch.bfloat16), weights.numel()
            )
    save(asked.out, {"device": asked.device, "results": found})


if __name__ == "__main__":
    main()
