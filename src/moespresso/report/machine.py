"""What a number was measured on: the machine in general terms, and the versions that matter.

Nothing that tells whose machine it was: no host name, no user, no path.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("moespresso", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def machine() -> dict[str, Any]:
    """Return `cpu`, `cores` this process may use, `memory_bytes`, `os`, and `accelerators` by name."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": total_memory(),
        "os": f"{platform.system()} {platform.release()}",
        "accelerators": _accelerators(),
    }


def total_memory() -> int:
    """Physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    by_package = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            by_package[package] = version(package)
        except PackageNotFoundError:
            # A source tree on PYTHONPATH has no metadata.
            by_package[package] = "unknown"
    return by_package


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _accelerators() -> list[str]:
    """Asked only where torch is loaded already: a run that never needed it has none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
