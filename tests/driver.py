"""A small press equivalent for tests: runs the command line in real processes that can be killed, starved or cut short.

Started once, it imports everything and then forks a child per job, so that a test of twenty kills pays for one
import of torch. Jobs come as JSON lines on standard input, exit codes go out the same way. In the child every step
that matters for resuming is logged when it begins and when it ends; `kill` and `full` name the line at which the child
kills itself (SIGKILL), or finds the disk full.
"""

import errno
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

# The exit code of a child whose memory the kernel does not limit.
NO_LIMIT = 99


@dataclass(frozen=True)
class Outcome:
    """How a job ended: exit code (negative: the signal), what it printed, and its log."""

    code: int
    stdout: str
    stderr: str
    events: tuple[str, ...]

    def numbers(self, beginning: str) -> list[str]:
        """The rest of every logged line that starts with `beginning`, in order."""
        return [line.removeprefix(beginning).strip() for line in self.events if line.startswith(beginning)]


class Driver:
    """The press equivalent; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> "Driver":
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(self, argv: list[str], **job: Any) -> Outcome:
        """Run `moespresso ARGV`.

        Options: `shard_bytes` (largest shard), `kill`, `full` (a log line), `kill_after` (a number of lines), `memory` (bytes
        that may be allocated above what imports took, and some that are more).
        """
        paths = {name: self._folder / name for name in ("stdout", "stderr", "log")}
        for path in paths.values():
            path.write_text("")
        body = {"argv": argv, **job, **{name: str(path) for name, path in paths.items()}}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(body) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        said = {name: path.read_text() for name, path in paths.items()}
        return Outcome(code, said["stdout"], said["stderr"], tuple(said["log"].splitlines()))


class Log:
    """Writes down what the child does, and lets it die where the job says so."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job, self._lines = job, 0
        self._file = os.open(job["log"], os.O_WRONLY | os.O_APPEND)

    def note(self, line: str) -> None:
        os.write(self._file, f"{line}\n".encode())
        self._lines += 1
        if line == self._job.get("kill") or self._lines == self._job.get("kill_after"):
            os.kill(os.getpid(), signal.SIGKILL)
        if line == self._job.get("full"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def watch(self, owner: Any, name: str, say: Callable[..., str | None]) -> None:
        """Log the calls of `owner.name`; `say(*args)` puts them into words (None: not worth a line)."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            words = say(*args)
            if words is None:
                return original(*args, **kwargs)
            self.note(f"begin {words}")
            result = original(*args, **kwargs)
            self.note(f"end {words}")
            return result

        setattr(owner, name, watched)


def serve() -> None:
    """Fork a child per job."""

    import torch

    import moespresso.api  # noqa: F401  (so that children need not)
    from moespresso.cli import main

    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_child(json.loads(line), main))
        _, status = os.waitpid(child, 0)
        os.write(1, f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _child(job: dict[str, Any], main: Callable[[list[str]], int]) -> int:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY), number)
    _instrument(Log(job), job)
    if "memory" in job and not _limited(*job["memory"]):
        return NO_LIMIT
    code = main(job["argv"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _limited(allowed: int, more: int) -> bool:
    """Let the kernel refuse what is beyond `allowed` bytes above the level now; whether it refuses `more`."""
    import resource

    import torch

    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    level = int(status["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (level + allowed, resource.RLIM_INFINITY))
    try:
        torch.empty(more, dtype=torch.uint8)
    except RuntimeError:
        return True
    return False


def _instrument(log: Log, job: dict[str, Any]) -> None:
    import torch

    from moespresso.build import write
    from moespresso.checkpoint import Journal, journal
    from moespresso.statistics import Measurer
    from moespresso.stream import SweepState

    if "shard_bytes" in job:
        write._SMALLEST = job["shard_bytes"]
    log.watch(Measurer, "__call__", lambda _, layer, taps: f"measure {layer.spec.index}")
    log.watch(SweepState, "save", lambda _, layer, hidden: f"remember {layer - 1}")
    log.watch(write, "write_shard", lambda folder, shard, tensors: f"shard {shard.name}")
    log.watch(Journal, "record", lambda _, written: f"record {written.name}")
    log.watch(torch, "from_file", lambda path, **_: f"map {_plain(path)}")
    log.watch(os, "replace", lambda source, target: f"rename {_plain(target)}")
    log.watch(os, "unlink", lambda path, **_: f"unlink {_plain(path)}")
    log.watch(
        shutil, "rmtree", lambda path, *_: f"clear {_plain(path)}" if journal.WORK in str(path) else None
    )


def _plain(path: Any) -> str:
    """The file's name without the digests that some names carry."""
    return re.sub(r"-[0-9a-f]{16}", "", Path(path).name)


if __name__ == "__main__":
    serve()
