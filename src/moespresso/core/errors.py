"""What can go wrong, and whose fault it is.

```
MoespressoError
├── UserError         the user's mistake: one sentence with the place and the cure; exit code 2
│   └── NonFiniteError    a NaN or infinity in the weights (settings can turn it into warnings)
└── CheckFailed       a check did not hold (`verify`); exit code 3
```

Our own mistakes are `AssertionError`s and leave by exit code 1 with a traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class MoespressoError(Exception):
    """Root of the errors that moespresso raises on purpose."""

    exit_code = 1


class UserError(MoespressoError):
    """The user's mistake: the message is one sentence saying what, where and how to mend it."""

    exit_code = 2


class NonFiniteError(UserError):
    """A tensor of the source holds a NaN or an infinity."""


class CheckFailed(MoespressoError):
    """`verify` found a written folder wanting; the message names every finding."""

    exit_code = 3


def text_missing(who: str, more: str = "") -> UserError:
    """The refusal of what `who` asks for without the text that it is found on; `more` is said behind the
    cure."""
    return UserError(f"{who} real text: give --text FILE or --dataset NAME{more}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` when `word` is close to a known one, else list the choices."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (choose from {', '.join(choices)})"


def reason(error: BaseException, longest: int = 300) -> str:
    """What another library's error says, to stand inside one sentence of ours: one line, no full stop, not
    too long."""
    said = (
        re.sub(r"[.!?]\s+(?=[A-Z])", "; ", " ".join(str(error).split())).rstrip(".") or type(error).__name__
    )
    return said if len(said) <= longest else f"{said[:longest].rpartition(' ')[0]} ..."
