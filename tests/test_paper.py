"""The paper's arithmetic, from the two models' real configs alone (benchmarks/paper_arithmetic.py).

Weights are exact to 0.01 GiB, FLOPs of a forward over 2,048 tokens within one per cent. The paper's own memory column
was measured, and lies above the weights by what its programs held beside them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import moespresso

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from paper_arithmetic import CONFIGS, GIB, MODELS, Row, cost_of  # noqa: E402

from moespresso.build import config_view  # noqa: E402

ROWS = [(model, row) for model, rows in MODELS.items() for row in rows]


@pytest.mark.parametrize(("model", "row"), ROWS, ids=[f"{model} {row.name}" for model, row in ROWS])
@pytest.mark.few(4)
def test_bytes_and_flops_are_the_papers(model: str, row: Row):
    cost = cost_of(config_view(CONFIGS / f"{model}.json"), row.step)
    assert cost.bytes / GIB == pytest.approx(row.gib, abs=0.01)
    assert cost.flops / 1e12 == pytest.approx(row.tflops, rel=0.01)
    assert 0.1 < row.memory - cost.bytes / GIB < 0.8


def test_blocks_take_their_share_of_the_cache_along_and_layers_do_not():
    view = config_view(CONFIGS / "mixtral-8x7b.json")
    assert view.source.cost().kv_bytes_per_token == 128 << 10
    assert cost_of(view, "layer_drop:drop=8").kv_bytes_per_token == 128 << 10
    assert cost_of(view, "block_drop:drop=5").kv_bytes_per_token == (128 << 10) * 27 // 32


def test_inspecting_a_config_says_that_no_tensor_was_seen():
    found = moespresso.inspect(CONFIGS / "deepseek-moe-16b.json")
    assert found["num_layers"] == 28
    assert found["layers"][0]["experts"] == 0
    assert any("no tensor was seen" in note for note in found["notes"])
