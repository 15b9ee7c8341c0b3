"""Numbers as people say them."""

from __future__ import annotations

import math
from collections.abc import Iterable

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_THOUSANDS = ("", "k", "M", "G", "T", "P", "E")
# Parameters are counted in billions, not giga.
_COUNTS = ("", "K", "M", "B", "T")


def size(count: float) -> str:
    """Bytes in binary units: ``size(13 << 20)`` is ``13.0 MiB``."""
    return _with_unit(count, 1024, _BYTES)


def number(count: float) -> str:
    """Parameters and other counts: ``46.7 B``."""
    return _with_unit(count, 1000, _COUNTS).strip()


def flops(count: float) -> str:
    """Floating-point operations: ``1.2 TFLOP``."""
    return _with_unit(count, 1000, _THOUSANDS) + "FLOP"


def _with_unit(count: float, base: int, units: tuple[str, ...]) -> str:
    step = 0
    # Rounding must not show 1024.0 KiB.
    while round(count, 1) >= base and step < len(units) - 1:
        count, step = count / base, step + 1
    return f"{count:.0f} {units[step]}" if step == 0 else f"{count:.1f} {units[step]}"


def duration(seconds: float) -> str:
    """Seconds as ``850 ms``, ``12.3 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def percent(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.1f} %"


def change(before: float, after: float) -> str:
    """Relative change in per cent, with its sign; nothing when there is none."""
    if before == after or not before:
        return ""
    moved = 100 * (after / before - 1)
    return f"{moved:+.1f} %" if abs(moved) >= 0.1 else f"{moved:+.1g} %"


def figure(value: float, digits: int = 4) -> str:
    """A measured number with `digits` significant digits, thousands parted."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}" if places < 9 else f"{value:.{digits - 1}e}"


def spans(numbers: Iterable[int]) -> str:
    """Numbers as compact runs: ``0-3, 7, 12-15``."""
    runs: list[list[int]] = []
    for value in sorted(numbers):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(_run(run) for run in runs)


def _run(run: list[int]) -> str:
    return f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run))
