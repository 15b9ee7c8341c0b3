"""How signatures are checked while the tests run: jaxtyping's shapes and dtypes by beartype, in kernels and formats.

`install()` comes before anything imports these two rooms, and asks jaxtyping to decorate all their functions and dataclasses.
Nothing of it happens outside of tests: there, annotations are text.
"""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

ROOMS = ["moespresso.kernels", "moespresso.formats"]
# Steps of loops over columns and ranges: called a hundred thousand times, by functions that are checked.
INNERMOST = {
    "moespresso.kernels.gptq": {"_Columns.round"},
    "moespresso.kernels.sparsegpt": {"_Columns.pull", "_Columns.settle", "_Grid.round"},
    "moespresso.formats.grids": {"raised", "stored", "chosen", "_symmetric"},
    "moespresso.formats.integer": {"levels"},
}
# As for static type checkers, an int is a float as well.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """What jaxtyping hands every function to, twice: once for its parameters, once for all of it."""
    if function.__qualname__ in INNERMOST.get(function.__module__, ()):
        function.__no_type_check__ = True
    return _check(function)


def install() -> None:
    """Check both rooms from now on."""
    install_import_hook(ROOMS, "shapes.checked")
