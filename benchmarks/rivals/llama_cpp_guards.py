"""Does llama.cpp's converter take a folder, or say that it cannot?

Converts each folder to a GGUF file beside it; prints one JSON object a folder: that it is converted, or where it stopped. The
hash by which it recognises tokenizers is taken as known, since that is no question here. It needs a copy of llama.cpp (the
source package of llama-cpp-python has one under vendor/) and, besides what moespresso needs, sentencepiece:

    python benchmarks/rivals/llama_cpp_guards.py LLAMA_CPP FOLDER [FOLDER ...]
"""

from __future__ import annotations

import importlib
import json
import logging
import sys


def main() -> None:
    """Convert one folder after the other."""
    root, *folders = sys.argv[1:]
    sys.path.insert(0, root)
    converter = importlib.import_module("convert_hf_to_gguf")
    importlib.import_module("conversion.base").TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    errors: list[str] = []
    logging.Handler.handle = lambda _, record: bool(
        record.levelno >= logging.ERROR and errors.append(record.getMessage())
    )
    for folder in folders:
        said = {"folder": folder, "engine": "llama.cpp converter"}
        sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", f"{folder}.gguf", "--outtype", "f32"]
        errors.clear()
        try:
            converter.main()
            said["answered"] = "converted"
        except BaseException as error:
            said["stopped"] = f"{type(error).__name__}: {'; '.join(errors) or error}"[:300]
        print("SAID " + json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
