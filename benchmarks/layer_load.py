"""What does it take to load one layer for measuring, and to measure on real widths?

Uses the checkpoint that `build_speed.py` made (OLMoE-1B-7B's shape): seconds and peak anonymous memory of loading a layer,
in sizes of the layer, per precision.

    python benchmarks/layer_load.py --work /tmp/bench [--layers 4]
"""

from __future__ import annotations

import time
from pathlib import Path

from harness import parser

from moespresso.build import Tensors, make_meta_model, open_view
from moespresso.core.runtime import Runtime
from moespresso.stream import PeakMemory


def main() -> None:
    """Load the first two layers in each precision and print what it took (the first one warms up)."""
    asking = parser(__doc__)
    asking.add_argument("--work", type=Path, required=True)
    asking.add_argument("--layers", type=int, default=4)
    asked = asking.parse_args()
    view = open_view(asked.work / f"olmoe-{asked.layers}")
    for dtype in ("float32", "bfloat16"):
        with Tensors(view.checkpoint.folder) as reader:
            meta = make_meta_model(view, reader, Runtime(dtype=dtype))
            for index in range(min(2, asked.layers)):
                start = time.perf_counter()
                with PeakMemory() as memory, meta.layer(index) as layer:
                    size = sum(parameter.nbytes for parameter in layer.module.parameters())
                    seconds = time.perf_counter() - start
                print(
                    f"{dtype} layer {index}: {size >> 20} MiB in {seconds:.1f} s, peak {memory.peak / size:.2f} layers"
                )


if __name__ == "__main__":
    main()
