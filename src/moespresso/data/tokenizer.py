"""The tokenizer of a checkpoint, or the reason why there is none in the library's own words.

A checkpoint's code is never run, so a tokenizer that is nothing but code is refused like one that is not
there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moespresso.core.errors import UserError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What one of these holds, `transformers` can read; the others beside it say how.
FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "tiktoken.model",
         "qwen.tiktoken", "vocab.tiktoken", "sentencepiece.bpe.model", "merges.txt", "spm.model", "tokenizer_config.json")  # fmt: skip
PACKAGES = ("sentencepiece", "tiktoken", "protobuf", "mistral-common", "blobfile")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; raises `UserError` with the library's reason when there is none."""

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **_config(folder))
    except Exception as error:  # the library's own, whatever it raises
        raise UserError(
            f"{folder} has no tokenizer that transformers can load, so no text can be read ({reason(error)}): "
            f"{_cure(folder, error)}"
        ) from error
    if len(tokenizer) < 2 or set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens}:
        raise UserError(
            f"{folder} has a tokenizer without any tokens, so no text can be read: copy {FILES[0]} from the original model into it"
        )
    return tokenizer


def _config(folder: Path) -> dict[str, PreTrainedConfig]:
    """An empty config instead of that of a family which transformers does not have, and may stumble over."""
    file = folder / "config.json"
    family = json.loads(file.read_text()).get("model_type") if file.is_file() else None
    return {} if family is None or family in CONFIG_MAPPING else {"config": PreTrainedConfig()}


def _cure(folder: Path, error: Exception) -> str:
    files = [name for name in FILES if (folder / name).is_file()]
    wanted = [name for name in PACKAGES if any(name in str(link) for link in _chain(error))]
    if files and files != [FILES[-1]] and wanted:
        return f"pip install {' '.join(wanted)}, or copy {FILES[0]} from the original model into the folder"
    if files and "trust_remote_code" in str(error):
        return f"its own code is never run, so put a {FILES[0]} beside it"
    return f"copy {FILES[0]} and {FILES[-1]} from the original model into the folder"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it came of: the library tries one reader after the other, and says what the last one
    lacked."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
