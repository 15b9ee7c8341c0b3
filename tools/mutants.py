"""Plants known faults, one at a time, and tells which of them the tests miss: `make mutants`.

A suite is worth what it catches. `faults.py` lists mistakes in kernels and in what writes files; here each is planted in a copy
of the sources, and the tests that are about it run until one fails. The exit status is 1 where a fault is missed, where a
test fails without any, or where the text of a fault is not found just once in its module, so that the list cannot go stale
in silence.

The large libraries are imported once; each run is a fork that then imports the copy. Nothing is planted in the checkout.

    python tools/mutants.py                  all of them
    python tools/mutants.py gptq masks       those of some modules
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from faults import FAULTS, MODULES, Fault

ROOT = Path(__file__).resolve().parents[1]
# Runs at a time.
JOBS = 2
# Seconds after which a run is given up: a fault that hangs is none that a test caught.
PATIENCE = 600
# Exit codes of pytest.
PASSED, FAILED = 0, 1


def main(names: Sequence[str]) -> int:
    """Plant the faults of the modules `names` (all, where there are none); 1 where something is wrong."""
    unknown = set(names) - MODULES.keys()
    if unknown:
        print(f"no such modules: {', '.join(sorted(unknown))} (there are {', '.join(MODULES)})")
        return 1
    faults = [fault for fault in FAULTS if not names or fault.module in names]
    stale = [line for fault in faults for line in troubles(fault)]
    if stale:
        print(*stale, sep="\n")
        return 1
    os.environ["OMP_NUM_THREADS"] = "1"
    _preload()
    start, missed = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        tests = sorted({name for fault in faults for name in _tests(fault)})
        # With nothing planted all pass, or else a test that fails says nothing.
        jobs: list[Job] = [*((None, [name]) for name in tests), *((fault, _tests(fault)) for fault in faults)]
        for fault, files, code, seconds, words in _runs(Path(scratch), jobs):
            fine = code == (FAILED if fault else PASSED)
            missed += not fine
            what = f"{fault.module}: {fault.what}" if fault else f"{', '.join(files)}, with nothing planted"
            print(f"{_verdict(fault, fine)} {seconds:4.0f} s  {what}", flush=True)
            if not fine and (code != PASSED or not fault):
                print(f"(ends with {code}) {words}")
    print(
        f"{len(faults)} faults, {missed} runs that should have ended otherwise, {time.monotonic() - start:.0f} s"
    )
    return min(missed, 1)


def _verdict(fault: Fault | None, fine: bool) -> str:
    return ("caught" if fine else "MISSED") if fault else ("passed" if fine else "FAILED")


def troubles(fault: Fault) -> Iterator[str]:
    """What is wrong with a fault itself."""
    who, path = f"{fault.module}: {fault.what}:", ROOT / "src" / _path(fault)
    if not path.exists():
        yield f"{who} no {path}: say in MODULES where it went"
        return
    found = path.read_text().count(fault.old)
    if found != 1:
        yield f"{who} the old text is found {found} times in {path}: {fault.old!r}"
    if fault.old == fault.new:
        yield f"{who} changes nothing"
    yield from (
        f"{who} no tests/{name}"
        for name in _tests(fault)
        if not (ROOT / "tests" / name.partition("::")[0]).exists()
    )


def _path(fault: Fault) -> str:
    return f"moespresso/{MODULES[fault.module][0].replace('.', '/')}.py"


def _tests(fault: Fault) -> tuple[str, ...]:
    return fault.tests or MODULES[fault.module][1]


def _preload() -> None:
    """Import what takes long and is not ours."""
    sys.path.insert(0, str(ROOT / "tests"))

    import families  # noqa: F401  (transformers' models)

    assert not any(name.partition(".")[0] == "moespresso" for name in sys.modules), "forks import the copy"


Job = tuple[Fault | None, Sequence[str]]


def _runs(
    scratch: Path, jobs: Sequence[Job]
) -> Iterator[tuple[Fault | None, Sequence[str], int, float, str]]:
    """Every job with the exit code of its tests (a signal, where that is negative), the seconds and the last words."""
    waiting = list(enumerate(jobs))
    running: dict[int, tuple[Path, float, Job]] = {}
    while waiting or running:
        while waiting and len(running) < JOBS:
            number, (fault, tests) = waiting.pop(0)
            room = _planted(scratch / str(number), fault)
            child = os.fork()
            if child == 0:
                _child(room, tests)
            running[child] = room, time.monotonic(), (fault, tests)
        for child, (room, start, (fault, tests)) in list(running.items()):
            seconds = time.monotonic() - start
            if seconds > PATIENCE:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG if seconds <= PATIENCE else 0)
            if ended:
                del running[child]
                words = "\n".join((room / "said").read_text().splitlines()[-15:])
                shutil.rmtree(room)
                yield fault, tests, os.waitstatus_to_exitcode(status), seconds, words
        time.sleep(0.02)


def _planted(room: Path, fault: Fault | None) -> Path:
    """A checkout with a fault: the sources are copied, the rest is linked."""
    source, copy = ROOT / "src/moespresso", room / "src/moespresso"
    shutil.copytree(source, copy, ignore=lambda _, names: {"__pycache__", "bundled"} & set(names))
    (copy / "bundled").symlink_to(source / "bundled")
    if fault:
        path = room / "src" / _path(fault)
        path.write_text(path.read_text().replace(fault.old, fault.new))
    return room


def _child(room: Path, tests: Sequence[str]) -> NoReturn:
    """Run `tests` against the sources of `room`, and end."""
    code = 99
    try:
        source = str(room / "src")
        sys.path.insert(0, source)
        os.environ["PYTHONPATH"] = source
        said = os.open(room / "said", os.O_WRONLY | os.O_CREAT, 0o644)
        for number in (1, 2):
            os.dup2(said, number)
        code = _tested(room, [str(ROOT / "tests" / name) for name in tests])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _tested(room: Path, files: list[str]) -> int:
    import pytest

    # Some plugins' modules were imported before the fork.
    options = ["-x", "-q", "-m", "not breadth", "-p", "no:cacheprovider", f"--basetemp={room / 'tmp'}"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning", f"--rootdir={ROOT}"]
    code = pytest.main([*options, "-c", str(ROOT / "pyproject.toml"), *files])
    import moespresso

    assert Path(moespresso.__file__).is_relative_to(room), "something else was tested"
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
