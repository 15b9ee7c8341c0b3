"""What does GPTQModel compute with folders in the GPTQ and AWQ layouts?

Loads each folder with its plain PyTorch kernels in float16 and saves the logits of one row of tokens. It needs an
environment of its own, and imports nothing of moespresso:

    python -m venv ENV
    ENV/bin/pip install gptqmodel
    ENV/bin/python benchmarks/rivals/gptqmodel_logits.py --tokens FILE.npy --folder FOLDER gptq OUT.npy [--folder ...]
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel

BACKENDS = {"gptq": BACKEND.TORCH, "awq": BACKEND.TORCH_AWQ}


def main() -> None:
    """Load one folder after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", required=True, help="int64 ids [1, length]")
    parser.add_argument(
        "--folder", nargs=3, action="append", required=True, metavar=("FOLDER", "LAYOUT", "OUT")
    )
    asked = parser.parse_args()
    failed: dict[str, str] = {}
    ids = torch.from_numpy(np.load(asked.tokens))
    for folder, layout, out in asked.folder:
        try:
            model = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=BACKENDS[layout])
            with torch.inference_mode():
                logits = model.model(input_ids=ids).logits
            np.save(out, logits.float().numpy())
        except Exception as error:  # the others are still of interest
            failed[folder] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps({"engine": f"gptqmodel {version('gptqmodel')}", "failed": failed}))


if __name__ == "__main__":
    main()
