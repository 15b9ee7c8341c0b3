"""What to say of a checkpoint whose files are whole but hold other tensors than its config asks for.

Fetching such files again brings the same ones, so the sentence says what is there, what is wanted, and what
would mend it: a renaming where the names are another writer's (llm-compressor calls Mixtral's w1, w3 and w2
gate_proj, up_proj and down_proj), a merge of adapters, or a config that belongs to the files. transformers
would fill what is missing with random numbers, so nothing is guessed here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moespresso.core.errors import UserError
from moespresso.model.names import Names, Slice

_ADAPTER = re.compile(r"\.lora_[A-Za-z]|\.base_layer\.|^base_model\.")
# Words that experts' matrices go by with different writers.
_ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


def not_whole(place: str, names: Names, missing: str, unknown: Sequence[str]) -> UserError:
    """The error for a parameter `missing` (its name in memory) of a checkpoint with tensors that its family
    does not know."""
    renamed, slices = names.own_layout()
    stored_names = [part.name for part in slices.get(missing, ())] or [renamed.get(missing, missing)]
    called = f" ({stored_names[0]})" if stored_names[0] != missing else ""
    sentence = f"{place} lacks the tensors of {missing}{called}, which its config asks for"
    adapters = [name for name in unknown if _ADAPTER.search(name)]
    if adapters:
        return UserError(
            f"{sentence}, and has those of an adapter ({adapters[0]}): merge it into its model first (merge_and_unload of peft)"
        )
    if not unknown:
        return UserError(
            f"{sentence} and none of its files announces: take config.json and the files from one place, for one of the two was "
            "changed"
        )
    cure = _renaming(_roles(slices, stored_names[0]), unknown) or _without_front(stored_names[0], unknown)
    return UserError(
        f"{sentence}, and has {len(unknown)} that a {names.family} model does not know (such as {unknown[0]}), so transformers would "
        f"fill it with random numbers: {cure or 'give the config.json that these files were written with'}"
    )


def _roles(slices: Mapping[str, Sequence[Slice]], name: str) -> dict[str, str]:
    """The names on disk of the matrices of the expert that one belongs to, with the role of each."""
    stem = name.rpartition("experts.")[0]
    roles: dict[str, str] = {}
    for stack, parts in slices.items():
        for part in parts:
            if stem and part.name.startswith(stem):
                half = "up" if part.first or "gate" not in stack else "gate"
                roles[part.name] = "down" if "down" in stack else half
    return roles


def _renaming(wanted: Mapping[str, str], unknown: Sequence[str]) -> str:
    """Which words of experts' names to replace by which, where they differ in these alone."""
    pairs: dict[str, str] = {}
    for name, role in wanted.items():
        for other, meant in _ROLES.items():
            words = [word for word in name.split(".") if word in _ROLES]
            if meant == role and words and name.replace(words[-1], other) in unknown:
                pairs[other] = words[-1]
    replacements = ", ".join(f"{old} to {new}" for old, new in sorted(pairs.items()))
    return f"rename these in the names of experts: {replacements}" if replacements else ""


def _without_front(stored_name: str, unknown: Sequence[str]) -> str:
    """What to take off the front of all names, where that is all that is wrong."""
    front = next((name.removesuffix(stored_name) for name in unknown if name.endswith(f".{stored_name}")), "")
    on_all = front and all(name.startswith(front) for name in unknown)
    return f"take {front} off the front of these names" if on_all else ""
