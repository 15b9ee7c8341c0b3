"""The one third-party version that is checked before anything else is imported.

Layer-wise loading stands on inner functions of transformers (`core_model_loading`), which move between minor
releases without notice. A wrong release would not always fail: some write tensors back under wrong names and
say nothing. So the range is tested at import, from the installed metadata (no import of transformers, well
under a millisecond), and widened only when the family tests pass.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

VERSION = version("moespresso")
TRANSFORMERS_SERIES = (5, 23)
CURE = 'install it with: pip install "transformers>=5.23,<5.24"'


def check_versions() -> None:
    """Raise `ImportError`, one sentence with the cure, unless transformers is in the supported series."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ImportError(f"moespresso needs transformers 5.23, which is not installed; {CURE}") from None
    if series(found) != TRANSFORMERS_SERIES:
        raise ImportError(f"moespresso needs transformers 5.23, but {found} is installed; {CURE}")


def series(release: str) -> tuple[int, int]:
    """Return the major and minor number of a version string: ``"5.23.0rc1"`` gives ``(5, 23)``."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    assert numbers, f"transformers has an unreadable version: {release!r}"
    return int(numbers[1]), int(numbers[2])
