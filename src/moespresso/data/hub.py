"""Hub datasets by ready names, through the `datasets` extra.

The table is all there is to a ready name: where it lies and how it is read. What a record means is told from
its fields, as for local files, so nothing here knows a schema. `load_records` is the only place that touches
the network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moespresso.core.errors import UserError, did_you_mean

EXTRA = 'pip install "moespresso[datasets]"'


@dataclass(frozen=True)
class HubDataset:
    """Where a dataset lies on the hub. `join`: records are lines of one running text, not documents."""

    repo: str
    config: str | None = None
    split: str = "train"
    files: str | None = None
    streaming: bool = False
    join: bool = False


READY = {
    "c4": HubDataset("allenai/c4", "en", streaming=True),
    # The first 10,000 documents: the whole Pile is no longer served from its own repository.
    "pile": HubDataset("NeelNanda/pile-10k"),
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", join=True),
    "alpaca": HubDataset("tatsu-lab/alpaca"),
    # The repository is a loading script, which `datasets` no longer runs; the file beside it is read instead.
    "lima": HubDataset("GAIR/lima", files="train.jsonl"),
    "metamathqa": HubDataset("meta-math/MetaMathQA"),
}


_URL = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/datasets/([^/]+/[^/?#]+).*|hf://datasets/([^/]+/[^/]+)"
)


def repo_of(name: str) -> str:
    """``owner/name`` of a dataset whose page's address was given; anything else as it is."""
    match = _URL.fullmatch(name.strip().rstrip("/"))
    return name.strip() if match is None else match[1] or match[2]


def hub_dataset(name: str) -> HubDataset:
    """Look up a ready name; ``owner/name`` is any dataset of the hub, its default configuration."""
    name = repo_of(name)
    if name in READY:
        return READY[name]
    if name.startswith(("/", "./", "../", "~")):
        raise UserError(f"{name} is a path, not a hub dataset: say --text {name}")
    if "/" in name:
        return HubDataset(name, streaming=True)
    raise UserError(
        f"unknown dataset {name!r}{did_you_mean(name, READY)}; any hub dataset can be given as owner/name"
    )


def load_records(dataset: HubDataset, split: str | None) -> Iterator[Mapping[str, Any]]:
    """Yield the records of a hub dataset in order; `split` overrides the table's."""
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(f"{dataset.repo} is a hub dataset, which needs one more package: {EXTRA}") from None
    settings: dict[str, Any] = {"split": split or dataset.split, "streaming": dataset.streaming}
    if dataset.files:
        path, settings["data_files"] = "json", f"hf://datasets/{dataset.repo}/{dataset.files}"
    else:
        path, settings["name"] = dataset.repo, dataset.config
    try:
        yield from load_dataset(path, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"cannot read {dataset.repo} from the hub ({reason}); a local copy can be given as a file"
        ) from error
