"""How signatures are checked while the tests run: jaxtyping's shapes and dtypes by beartype, in kernels and formats.

`install()` comes before anything imports these two rooms, and asks jaxtyping to decorate all their functions and dataclasses.
Nothing of it happens outside of tests: there, annotations are text. A check costs more than many a step of a loop, so in each
test a function is looked at for its first calls only (`begin_anew()`).
"""

import inspect
import pkgutil
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

ROOMS = ["moespresso.kernels", "moespresso.formats"]
# Looks at one function in one test. A call takes two: at its parameters, and with them at what it returns.
ENOUGH = 64
# As for static type checkers, an int is a float as well.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_looks: Counter[str] = Counter()
_released: list[Callable[..., Any]] = []


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """What jaxtyping hands every function's signature to, twice: once for its parameters, once for all of it."""
    name = f"{function.__module__}:{function.__qualname__}"
    check = _check(function)

    @wraps(function)
    def look(*args: Any, **kwargs: Any) -> Any:
        _looks[name] += 1
        if _looks[name] == ENOUGH and "<locals>" not in name:
            _release(name)
        return check(*args, **kwargs)

    return look


def _release(name: str) -> None:
    """Let jaxtyping call a function as it is from now on."""
    found = pkgutil.resolve_name(name)
    function = inspect.unwrap(getattr(found, "fget", found))
    function = getattr(function, "__func__", function)
    function.__no_type_check__ = True
    _released.append(function)


def begin_anew() -> None:
    """Look at every function again: a test begins."""
    _looks.clear()
    while _released:
        del _released.pop().__no_type_check__


def install() -> None:
    """Check both rooms from now on."""
    install_import_hook(ROOMS, "shapes.checked")
