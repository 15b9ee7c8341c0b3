"""An output folder in the making: who works in it, what is finished, and when it counts as done.

While a run is under way the folder holds `.moespresso/`: a lock (one run at a time), the journal (one line
per finished file, synced) and what the run wants to find again (measured layers, stats, the plan). The
manifest `moespresso.json` is written last; its existence means done, and the work folder goes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moespresso._place import real, sayable
from moespresso.checkpoint.manifest import MANIFEST, WORK, Manifest
from moespresso.checkpoint.writer import Written, write_text
from moespresso.core.errors import UserError

# Ways in which a path leads to no place for a folder.
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)
_SHARDS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
_OUR_FILES = re.compile(rf"{_SHARDS}|\.({_SHARDS}|[\w.-]+\.(json|md|txt|jinja|model))\.tmp")


class Journal:
    """The finished files of one run, identified by `identity` (what the result depends on)."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.work = folder, folder / WORK
        self._path = self.work / "journal.jsonl"
        rows = self._read()
        if rows and rows[0].get("identity") != identity:
            raise UserError(
                f"{folder} holds an unfinished run with other settings: repeat that command, "
                "add --no-resume to start over, or choose another --out"
            )
        self.finished = {row["name"]: Written(**row) for row in rows[1:] if self._stands(row)}
        if not rows:
            self._append({"identity": identity})

    def record(self, written: Written) -> None:
        """Note a finished file, durably."""
        self.finished[written.name] = written
        self._append(asdict(written))

    def _read(self) -> list[dict[str, Any]]:
        """Whole lines only: a line cut short by a crash did not happen."""
        if not self._path.is_file():
            return []
        lines = self._path.read_text().split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def _stands(self, row: dict[str, Any]) -> bool:
        path = self.folder / row["name"]
        return path.is_file() and path.stat().st_size == row["nbytes"]

    def _append(self, row: dict[str, Any]) -> None:
        text = self._path.read_text() if self._path.is_file() else ""
        # A torn last line of a killed run is overwritten, not continued.
        lines = text[: text.rfind("\n") + 1]
        if lines != text:
            write_text(self._path, lines)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def claim(folder: Path, source: Path, *, resume: bool = True) -> Generator[Path]:
    """Take `folder` for one run: create it, refuse what is not ours, lock it; yields the work folder."""
    _refuse_foreign(folder, source)
    work = folder / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in NOWHERE:
            raise
        raise UserError(f"--out {folder} cannot be made ({error.strerror}): choose another place") from error
    with (work / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{folder} is in use by another run: wait for it or choose another --out"
            ) from error
        if not resume:
            _clear_own(folder)
        yield work


def _refuse_foreign(folder: Path, source: Path) -> None:
    target, origin = real(sayable(folder, "--out")), real(source)
    if target == origin or origin in target.parents:
        raise UserError(
            f"--out {folder} lies in the source folder {source}, which is never written to: choose another"
        )
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"--out {folder} is a link that leads nowhere: take it away, or choose another place")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder):
        raise UserError(
            f"--out {folder} is not empty and not a moespresso result: choose an empty or new folder"
        )


def is_ours(folder: Path) -> bool:
    """Whether a run of ours made, or was making, this folder."""
    return (folder / MANIFEST).is_file() or (folder / WORK).is_dir()


def _clear_own(folder: Path) -> None:
    """Remove what runs of ours left, but the lock; the manifest first, so that a half-cleared folder never
    counts as done. What the manifest does not list is known by its name."""
    manifest = folder / MANIFEST
    names = {"config.json", "README.md"}
    if manifest.is_file():
        # A damaged manifest lists nothing, and must not keep anybody from starting over.
        with suppress(UserError):
            names |= set(Manifest.load(folder).files)
        manifest.unlink()
    for path in folder.iterdir():
        if path.is_file() and (path.name in names or _OUR_FILES.fullmatch(path.name)):
            path.unlink()
    for path in (folder / WORK).iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def finish(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, then let the work folder go."""
    write_text(folder / MANIFEST, manifest.to_json())
    sweep_up(folder)


def sweep_up(folder: Path) -> None:
    """Remove what only an unfinished run needs, from a folder that has its manifest."""
    for path in folder.iterdir():
        if path.name.endswith(".tmp") and _OUR_FILES.fullmatch(path.name):
            path.unlink()
    if (folder / WORK).is_dir():
        shutil.rmtree(folder / WORK, ignore_errors=True)
