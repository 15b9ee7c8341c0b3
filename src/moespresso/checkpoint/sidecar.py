"""The files beside the tensors: which travel with the model, and which are left behind (by name, never in
silence)."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path

from moespresso.checkpoint.files import is_other_weights
from moespresso.checkpoint.writer import Written, write_file

# By what their names are made of, since every family has tokenizer and processor files of its own: tekken.json,
# tiktoken.model, sentencepiece.bpe.model, audio_preprocessor_config.json.
_TRAVEL = ("generation_config.json", "*token*", "tekken*", "*vocab*", "*merges*", "*.model", "*.bpe", "*.spm",
           "*processor*.json", "*.jinja", "chat_template*", "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*",
           "USE_POLICY*")  # fmt: skip
# Written anew, or what the tensors came from: not worth a word. Weights in other forms are named with the source.
_OURS = ("config.json", "*.safetensors", "*.safetensors.index.json", "README.md", "moespresso.json", ".*")
_NEVER = ("*.py", "*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors")


def sidecars(folder: Path) -> tuple[list[str], list[str]]:
    """Names of files that travel with the model, and of files and folders that are left behind."""
    names = sorted(path.name for path in folder.iterdir())
    travel = [name for name in names if _matches(name, _TRAVEL) and not _matches(name, _NEVER)
              and (folder / name).is_file()]  # fmt: skip
    left = [name for name in names if name not in travel and not _matches(name, _OURS)
            and not (is_other_weights(name) and (folder / name).is_file())]  # named with the source  # fmt: skip
    return travel, left


def copy_sidecar(source: Path, folder: Path, name: str) -> Written:
    """Copy one file, carefully."""
    size, digest = write_file(folder / name, [memoryview((source / name).read_bytes())])
    shutil.copymode(source / name, folder / name)
    return Written(name, size, digest)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
