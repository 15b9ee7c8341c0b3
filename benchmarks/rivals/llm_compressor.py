"""What does llm-compressor make of the same model and the same tokens, how fast and in how much memory?

Quantizes the routed experts, and nothing else, to symmetric integers in groups along the input, and saves the folder
in the compressed-tensors format.  All else is llm-compressor's default: the dampening, the order of the columns, the
observers, one row a batch, every expert calibrated on every token.  Its documentation loads Mixture-of-Experts models
under `load_context`, which gives every expert matrices of its own.  With some versions of transformers that fails where
torchvision is not installed (which llm-compressor does not ask for); there the model is loaded plainly, and `oneshot`
parts the experts by itself before it calibrates.  The JSON says which.

llm-compressor pins other versions of torch, transformers and compressed-tensors than moespresso does, so it needs an
environment of its own, and this script imports nothing of moespresso:

    python -m venv ENV
    ENV/bin/pip install llmcompressor
    ENV/bin/python benchmarks/rivals/llm_compressor.py --model FOLDER --tokens FILE.npy --out FOLDER --json FILE

The tokens are int64 ids, [rows, length], whole rows without padding; `--method rtn` rounds and reads none of them.
The seconds of the whole process count from its start, interpreter and imports included, to when the JSON is written.
"""

from __future__ import annotations

import time

BEGUN = time.perf_counter()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
from importlib.metadata import version  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from compressed_tensors.quantization import (  # noqa: E402
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
)
from compressed_tensors.quantization.utils import is_module_quantized  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers import Modifier  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: E402
from llmcompressor.pipelines.cache import IntermediatesCache  # noqa: E402
from llmcompressor.utils import load_context  # noqa: E402
from loguru import logger  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: E402

IMPORTED = time.perf_counter()

# A routed expert is a number under `experts`; shared experts, dense MLPs, routers and attention have other names.
EXPERTS = r".*\.experts\.\d+\.(gate|up|down)_proj$"
LIBRARIES = ("llmcompressor", "compressed-tensors", "transformers", "torch", "numpy")


def recipe(asked: argparse.Namespace) -> list[Modifier]:
    """The modifiers of the method; what is not asked for stays at its default."""
    weights = QuantizationArgs(
        num_bits=asked.bits, group_size=asked.group, strategy=QuantizationStrategy.GROUP, symmetric=True
    )
    groups = {"experts": QuantizationScheme(targets=[f"re:{EXPERTS}"], weights=weights)}
    if asked.method == "gptq":
        chosen = {} if asked.matrices is None else {"batched_quantization": asked.matrices}
        return [GPTQModifier(config_groups=groups, **chosen)]
    rounding = QuantizationModifier(config_groups=groups)
    return [AWQModifier(), rounding] if asked.method == "awq" else [rounding]


def calibration(tokens: Path) -> Dataset:
    """The rows as llm-compressor takes what is already tokenized."""
    rows = np.load(tokens)
    if rows.ndim != 2 or rows.dtype != np.int64:
        raise SystemExit(f"{tokens}: expected int64 token ids [rows, length], got {rows.dtype} {rows.shape}")
    return Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()})


def quantize(model: PreTrainedModel, asked: argparse.Namespace) -> None:
    """Calibrate and quantize in place."""
    if asked.method == "rtn":
        oneshot(model=model, recipe=recipe(asked))
        return
    if not torch.accelerator.is_available():
        # AWQ pins what it caches, which needs an accelerator and would serve only that; without, it would stop here.
        IntermediatesCache.pin_memory = lambda *_: None
    dataset = calibration(asked.tokens)
    oneshot(
        model=model,
        recipe=recipe(asked),
        dataset=dataset,
        num_calibration_samples=len(dataset),
        max_seq_length=len(dataset[0]["input_ids"]),
        batch_size=asked.batch,
        moe_calibrate_all_experts=asked.all_experts,
    )


def counts(model: PreTrainedModel) -> dict[str, int]:
    """How many matrices are quantized, and whether they are those of the routed experts."""
    quantized = {name for name, module in model.named_modules() if is_module_quantized(module)}
    experts = {name for name, _ in model.named_modules() if re.match(EXPERTS, name)}
    return {
        "expert_matrices": len(experts),
        "quantized": len(quantized & experts),
        "others": len(quantized - experts),
    }


def main() -> None:
    """Load, quantize, save, and write down what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the model, tokenizer included")
    parser.add_argument("--tokens", type=Path, help="calibration rows (.npy); not needed by rtn")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--method", choices=("gptq", "awq", "rtn"), default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument(
        "--all-experts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="calibrate every expert on every token, not only on those routed to it",
    )
    parser.add_argument("--batch", type=int, default=1, help="calibration rows in a batch")
    parser.add_argument("--matrices", type=int, help="GPTQ: matrices of one shape quantized at once")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    asked = parser.parse_args()
    if asked.tokens is None and asked.method != "rtn":
        parser.error(f"--method {asked.method} needs --tokens")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    warnings: list[str] = []
    logger.add(
        lambda message: warnings.append(message.record["message"]),
        filter=lambda record: record["level"].name in ("WARNING", "ERROR"),
    )

    marks = [time.perf_counter()]
    parted = find_spec("torchvision") is not None
    with load_context() if parted else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    marks.append(time.perf_counter())
    quantize(model, asked)
    marks.append(time.perf_counter())
    found = counts(model)
    model.save_pretrained(asked.out, save_compressed=True)
    tokenizer.save_pretrained(asked.out)
    marks.append(time.perf_counter())

    loading, calibrating, saving = (end - start for start, end in pairwise(marks))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    body: dict[str, Any] = {
        "versions": {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
        "settings": {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(asked).items()
        },
        "load_context": parted,
        "threads": torch.get_num_threads(),
        "matrices": found,
        "seconds": {
            "imports": IMPORTED - BEGUN,
            "loading": loading,
            "calibration": calibrating,
            "saving": saving,
            "after_imports": marks[-1] - marks[0],
            "process": time.time() - psutil.Process().create_time(),
        },
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "written_bytes": sum(path.stat().st_size for path in asked.out.iterdir()),
        "warnings": warnings,
    }
    asked.json.write_text(json.dumps(body, indent=1) + "\n")
    print(json.dumps({key: body[key] for key in ("matrices", "seconds", "peak_rss_bytes", "written_bytes")}))
    if not found["quantized"] == found["expert_matrices"] > 0 == found["others"]:
        raise SystemExit("what was quantized is not the routed experts, all of them and nothing else")


if __name__ == "__main__":
    main()
