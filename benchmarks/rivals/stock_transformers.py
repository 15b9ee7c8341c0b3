"""What transformers alone makes of pressed folders: the class that config.json names, its tensors, its logits, its cache.

Imports nothing of moespresso, so that nothing of it can help. Prints one JSON object: for each folder the faults found, none
where it is as good as the folder that it was pressed from.

    python benchmarks/rivals/stock_transformers.py ORIGINAL FOLDER [FOLDER ...]

A fault is a key that is missing, left over or of another size; a tensor outside the language model that is not the original's
byte for byte; a prediction layer (`mtp.*`, or numbered behind the last decoder layer) whose experts are no longer like those
of the decoder layers; logits that are not finite; or an error on the way to two tokens, the second of which needs the cache.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

TOWER = re.compile("vis|audio|talker|code2wav|timestamp")
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")
IDS = torch.randint(100, 1900, (1, 40), generator=torch.Generator().manual_seed(0))
# Of an expert, or of all experts of a layer: the matrix that takes the width back to the hidden state.
DOWN = re.compile(r"(.*(?<!shared_)experts\.)(?:(\d+)\.)?(?:down_proj|w2)(\.weight|\.weight_shape|)$")
Size = tuple[int, int]


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    return found


def decoder(tensors: dict[str, Tensor]) -> str:
    """Where the layers of the language model are: the longest list with experts that is no tower's."""
    names = [
        name for name in tensors if "expert" in name and not TOWER.search(name) and not name.startswith("mtp")
    ]
    lists = [match[1] for name in names if (match := re.match(r"(.*?(?:layers|blocks)\.)\d+\.", name))]
    return max(set(lists), key=lists.count, default="model.layers.")


def outside(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Tensors outside the language model that are gone or changed."""
    mine = decoder(before)
    whole = re.escape(mine.removesuffix("layers.").removesuffix("blocks."))
    # What is numbered inside the language model belongs to its layers, whether or not it lies in their list.
    numbered = re.compile(rf"{whole}.*\.\d+(\.|$)")
    inner = {name for name in before if numbered.match(name) and not TOWER.search(name)}
    rest = [name for name in before if name not in inner and not name.startswith((mine, "mtp."))]
    return [name for name in rest if name not in after or not _same(before[name], after[name])]


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def is_ahead(name: str, mine: str, last: int) -> bool:
    """Whether a tensor is a prediction layer's."""
    match = re.match(rf"{re.escape(mine)}(\d+)\.", name)
    return name.startswith("mtp.") or bool(match and int(match[1]) >= last)


def num_layers(folder: Path) -> int:
    """Decoder layers that config.json counts; without a plain number, more than there are."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config") or config
    return text.get("num_hidden_layers") or 10_000


def sizes(folder: Path, tensors: dict[str, Tensor]) -> tuple[set[Size], set[Size]]:
    """(experts, width) of the decoder layers, and of the prediction layers, from what takes the width back."""
    mine, last = decoder(tensors), num_layers(folder)
    found: dict[tuple[bool, str], list[Size]] = {}
    for name, tensor in tensors.items():
        if match := DOWN.match(name):
            width = int(tensor[-1]) if match[3] == ".weight_shape" else tensor.shape[-1]
            count = 1 if match[2] else tensor.shape[0]
            found.setdefault((is_ahead(name, mine, last), match[1]), []).append((count, width))
    sums = {
        key: (sum(count for count, _ in each), max(width for _, width in each)) for key, each in found.items()
    }
    return {s for (ahead, _), s in sums.items() if not ahead}, {s for (ahead, _), s in sums.items() if ahead}


def behind(original: Path, folder: Path, before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """What is wrong with the prediction layers: they had experts like the decoder layers' and no longer do."""
    (decoders, ahead), (decoders_now, ahead_now) = sizes(original, before), sizes(folder, after)
    if not ahead_now or ahead != decoders:
        return []
    if ahead_now != decoders_now:
        both = told_set(ahead_now), told_set(decoders_now)
        return ["its prediction layers have (experts, width) {}, its decoder layers {}".format(*both)]
    plain = unnamed(folder, after)
    words = f"config.json takes {len(plain)} plain experts of its prediction layers for packed"
    return [f"{words} ({plain[0]})"] if plain else []


def told_set(found: set[Size]) -> str:
    """Sizes in words."""
    return ", ".join(map(str, sorted(found)))


def unnamed(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """Plain experts of prediction layers that `ignore` does not name, where the decoder layers' are packed."""
    config = json.loads((folder / "config.json").read_text())
    ignore = config.get("quantization_config", {}).get("ignore")
    if ignore is None:
        return []
    mine, last = decoder(tensors), num_layers(folder)
    names = [
        name for name in tensors if is_ahead(name, mine, last) and re.search(r"experts\..*\.weight$", name)
    ]
    owners = [name.removesuffix(".weight") for name in names]
    return [name for name in owners if not any(_named(entry, name) for entry in ignore)]


def _named(entry: str, name: str) -> bool:
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name


def load(folder: Path, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """The class that `architectures` names, and what its loading says."""
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=dtype)
    return getattr(model, "thinker", model).eval(), info


def run(model: Any) -> list[str]:
    """Logits of one text, then two tokens."""
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
        made = model.generate(input_ids=IDS, max_new_tokens=2, do_sample=False, eos_token_id=None)
    faults = [] if bool(torch.isfinite(logits).all()) else ["its logits are not finite"]
    return faults + ([] if made.shape[1] == IDS.shape[1] + 2 else ["it does not generate two tokens"])


def told(error: BaseException) -> str:
    """An error in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def keys(info: dict[str, Any], folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """What loading says of keys; those of prediction layers are left over in every class but at their published numbers."""
    mine, last, found = decoder(tensors), num_layers(folder), []
    for words in KEYS:
        names = sorted(name for name in map(str, info.get(words) or ()) if not is_ahead(name, mine, last))
        found += [f"{len(names)} {words.replace('_', ' ')} ({names[0]})"] if names else []
    return found


def loaded(folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    """Faults of loading and running a folder."""
    packed = "quantization_config" in json.loads((folder / "config.json").read_text())
    try:
        model, info = load(folder, "auto" if packed else torch.float32)
        return keys(info, folder, tensors) + run(model)
    except Exception as error:
        return [told(error)]


def faults(original: Path, folder: Path, before: dict[str, Tensor], known: list[str]) -> list[str]:
    """Everything that is wrong with a folder and not with its original."""
    after = read(folder)
    found = [fault for fault in loaded(folder, after) if fault not in known]
    if changed := outside(before, after):
        found.append(
            f"{len(changed)} tensors outside the language model are not the original's ({changed[0]})"
        )
    return found + behind(original, folder, before, after)


def main() -> None:
    """Check every folder against the first."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    original, *folders = map(Path, sys.argv[1:])
    before = read(original)
    known = loaded(original, before)
    found = {folder.name: faults(original, folder, before, known) for folder in folders}
    print(json.dumps({"original": known, "folders": found}))
    assert not any(name.partition(".")[0] == "moespresso" for name in sys.modules)


if __name__ == "__main__":
    main()
