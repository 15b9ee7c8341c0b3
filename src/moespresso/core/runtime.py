"""How a run is carried out, as opposed to what it is asked for: nothing here changes what is decided.

Where the work is done, how much memory it may take, whether an interrupted run is taken up again, and who
watches. The one field that a result can show is `dtype`, the precision scores are computed in.
"""

from __future__ import annotations

from dataclasses import dataclass

from moespresso.core.progress import Progress, Silent

DTYPES = ("auto", "float32", "bfloat16", "float16")
SILENT = Silent()


@dataclass(frozen=True, slots=True)
class Runtime:
    """The conditions of one run.

    `device` is a torch device or `auto`; `dtype` one of `DTYPES` (`auto`: the checkpoint's own); `max_memory`
    in bytes (None: as much as there is). `resume` takes up an unfinished run in the same folder;
    `allow_nonfinite` counts a NaN or infinity in the weights as warnings instead of refusing it.
    """

    device: str = "auto"
    dtype: str = "auto"
    max_memory: int | None = None
    resume: bool = True
    allow_nonfinite: bool = False
    progress: Progress = SILENT
