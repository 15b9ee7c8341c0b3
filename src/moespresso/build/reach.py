"""How long a text the model was made for: the positions that its config speaks of.

A table of learned positions ends there; rotary positions can be computed for any length, but behind the last
one that the model was trained on its answers mean nothing, and so would every statistic of them. A config
that stretches them (yarn, linear, dynamic, longrope) speaks of either end of the stretch, depending on who
wrote it: the further one holds here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moespresso.build.view import View
from moespresso.model import read_config

# As families call it; a recurrent model may have none.
NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "max_seq_length", "seq_length",
         "seq_len", "n_ctx", "max_context_length")  # fmt: skip


def num_positions(view: View) -> int | None:
    """How many tokens a row may have; None where the config does not say."""
    text: Any = read_config(view.checkpoint.config, str(view.checkpoint.folder)).get_text_config()
    limits = (getattr(text, name, None) for name in NAMES)
    positions = next((count for count in limits if isinstance(count, int) and count > 0), None)
    if positions is None:
        return None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    return max([positions, *_stretched_lengths(rope, positions)])


def _stretched_lengths(rope: Any, positions: int) -> Iterator[int]:
    """What every stretch of a config comes to; layers of different kinds may have one each."""
    if not isinstance(rope, Mapping):
        return
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    if isinstance(factor, int | float):
        yield int((original or positions) * factor)
    for inside in rope.values():
        yield from _stretched_lengths(inside, positions)
