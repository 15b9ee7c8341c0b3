"""Where the checkpoint is that somebody means by MODEL: a folder, something in it or just above it, or the
hub.

People paste what they have at hand: the address of a model's page, `owner/name@revision`, the path of a shard
or of config.json, the folder that a download made around the checkpoint, the hub cache's own folder. What is
meant is clear in each of these, so it is taken, and the log says what was taken; where it is not, the
sentence names the choices.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import huggingface_hub

from moespresso._place import sayable, typed
from moespresso.core.errors import UserError

logger = logging.getLogger(__name__)

CONFIG = "config.json"
# Weights in other containers, of which the same model's safetensors are wanted.
OTHER = (".gguf", ".ggml", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".h5", ".msgpack", ".npz")
IGNORED = [f"*{ending}" for ending in OTHER if ending not in (".ggml", ".ckpt", ".onnx", ".npz")]
_NAME = r"[\w.-]+/[\w.-]+"
_URL = re.compile(
    rf"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?:models/)?(?P<kind>datasets/|spaces/)?(?P<name>{_NAME})"
    r"(?:@(?P<at>[^/?#]+))?(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#]+))?(?:[/?#].*)?"
)
_ID = re.compile(rf"(?P<name>{_NAME})(?:@(?P<revision>[^/@]+))?/?")


def locate(model: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint; what is no path and reads as a hub id is downloaded (safetensors and small
    files).

    Raises `UserError` where it is on neither, or could be several.
    """
    text = typed(model, "MODEL")
    folder = sayable(Path(text), "MODEL")
    if _exists(folder):
        return _folder_of(folder) if folder.is_file() else _checkpoint_in(folder)
    if match := _URL.fullmatch(text):
        if match["kind"]:
            raise UserError(
                f"{text} is no model but one of the hub's {match['kind'][:-1]}: give a model's owner/name"
            )
        logger.warning("%s: taken as the hub id %s", text, match["name"])
        return _fetch(match["name"], match["revision"] or match["at"])
    if (match := _ID.fullmatch(text)) and not text.startswith("."):
        return _fetch(match["name"], match["revision"])
    return folder


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a name, or in a folder that may not be looked into
        return False


def _fetch(name: str, revision: str | None) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, ignore_patterns=IGNORED))  # pyright: ignore[reportUnknownMemberType]
    except Exception as error:  # the hub client raises a dozen kinds of errors
        first = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{name} is neither a folder nor can it be fetched from the hub ({first}): mend the name, or give a folder"
        ) from error


def _folder_of(file: Path) -> Path:
    """The folder of a file of a checkpoint."""
    if file.suffix.lower() in OTHER:
        raise UserError(
            f"{file} holds weights in a container that is not read: give the folder of the same model in safetensors"
        )
    if not (file.parent / CONFIG).is_file():
        raise UserError(
            f"{file} is a file without a {CONFIG} beside it: give the folder of a Hugging Face checkpoint"
        )
    logger.warning("%s: taken as its folder, %s", file, file.parent)
    return file.parent


def _checkpoint_in(folder: Path) -> Path:
    """The checkpoint's own folder, where `folder` is the one around it; itself, where nothing better is
    found."""
    if (folder / CONFIG).exists() or not os.access(folder, os.R_OK | os.X_OK):
        return folder
    cache = folder.parent if folder.name == "snapshots" else folder
    if (cache / "snapshots").is_dir() and (revision := _main(cache)):
        folders = [cache / "snapshots" / revision]
    else:
        around = cache / "snapshots" if (cache / "snapshots").is_dir() else folder
        folders = sorted(
            child for child in around.iterdir() if child.name[0] != "." and (child / CONFIG).is_file()
        )
    if len(folders) > 1:
        examples = ", ".join(child.name for child in folders[:3]) + (", ..." if len(folders) > 3 else "")
        raise UserError(
            f"{folder} is no checkpoint but holds {len(folders)} of them ({examples}): give the folder of one"
        )
    if not folders:
        return folder
    logger.warning("%s: taken as the checkpoint in it, %s", folder, folders[0])
    return folders[0]


def _main(cache: Path) -> str | None:
    """The revision that a model's folder in the hub cache holds as its newest, where it is there."""
    ref = cache / "refs" / "main"
    revision = ref.read_text().strip() if ref.is_file() else ""
    return revision if revision and (cache / "snapshots" / revision / CONFIG).is_file() else None
