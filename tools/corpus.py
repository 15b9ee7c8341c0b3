"""Makes the demo models' text: training stream, tokenizer, and the bundled calibration and held-out text.

    python tools/corpus.py --work DIR           # make everything that is not there yet
    python tools/corpus.py --work DIR --check   # prove that the three parts share no text

The order matters.  First every document is put, by the hash of its name, into *held-out*, *calibration*
or *train*; then whatever two parts have in common is removed (any run of 13 words that two parts share
costs the less precious part the paragraphs it lies in); only then is anything trained, the tokenizer
included.  Thus what the models are measured on was never seen, not even as a copied licence header.

The work folder holds ``train.bin`` (token ids, uint16) and ``text/train/<domain>.jsonl``; the text that
travels with the package, the facts and the tokenizer go to ``src/moespresso/bundled``.
"""

import argparse
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import knowledge
import numpy as np
from sources import DOMAINS, Document, documents, fetch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

BUNDLED = Path(__file__).resolve().parent.parent / "src/moespresso/bundled"
SPLITS = ("heldout", "calibration")  # the most precious first; "train" comes after them
RUN = 13  # words in a row that no two parts may share
SPLIT_BYTES = 60_000  # of each domain, in each of the two bundled splits
EXCERPT_BYTES = 4_000  # of one document, so that a split has many
PIECE_BYTES = 6_000  # training documents are cut to this, so that the domains mix finely
REPEATS = {"man_es": 2}  # the smallest domain is shown twice a pass
VOCABULARY = 2048
END = "<|endoftext|>"
SPECIAL = (END, "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def paragraphs(text: str) -> list[str]:
    return [part for part in text.split("\n\n") if part.strip()]


def runs(text: str) -> Iterator[int]:
    """The hash of every run of 13 words (case and punctuation left out)."""
    words = re.findall(r"\w+", text.lower())
    for start in range(len(words) - RUN + 1):
        yield hash(tuple(words[start : start + RUN]))


def without_runs(text: str, forbidden: set[int]) -> str:
    """``text`` less the paragraphs in which a forbidden run of words lies, until none is left."""
    parts = paragraphs(text)
    while True:
        owner = [place for place, part in enumerate(parts) for _ in re.findall(r"\w+", part)]
        hit: set[int] = set()
        for start, run in enumerate(runs("\n\n".join(parts))):
            if run in forbidden:
                hit.update(range(owner[start], owner[start + RUN - 1] + 1))
        if not hit:
            return "\n\n".join(parts) + "\n" if parts else ""
        parts = [part for place, part in enumerate(parts) if place not in hit]


def excerpt(text: str) -> str:
    """Whole paragraphs of about ``EXCERPT_BYTES``, from a place that the text's hash chooses."""
    parts = paragraphs(text)
    sizes = [len(part.encode()) for part in parts]
    last = max((place for place in range(len(parts)) if sum(sizes[place:]) >= EXCERPT_BYTES), default=0)
    start = hash_of(text) % (last + 1)
    taken: list[str] = []
    while start < len(parts) and sum(len(part.encode()) for part in taken) < EXCERPT_BYTES:
        taken.append(parts[start])
        start += 1
    return "\n\n".join(taken) + "\n"


def split(all_documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Documents by part: the first by hash, as many as the bundled splits need, and the rest to train on."""
    parts: dict[str, list[Document]] = {name: [] for name in (*SPLITS, "train")}
    seen: set[int] = set()
    by_hash = sorted(all_documents, key=lambda document: hash_of(document.source))
    sizes = dict.fromkeys(((name, domain) for name in SPLITS for domain in DOMAINS), 0)
    rest: list[Document] = []
    for document in by_hash:
        name = next((name for name in SPLITS if sizes[name, document.domain] < SPLIT_BYTES), None)
        if name is None or not document.licence or len(document.text) < EXCERPT_BYTES // 2:
            rest.append(document)
            continue
        text = without_runs(excerpt(document.text), seen)
        if len(text) < 500:
            rest.append(document)  # nearly a copy of one that is held out already: cleaned below
            continue
        parts[name].append(replace(document, text=text))
        sizes[name, document.domain] += len(text.encode())
        seen.update(runs(text))
    parts["train"] = list(cleaned(rest, seen))
    return parts


def cleaned(candidates: list[Document], forbidden: set[int]) -> Iterator[Document]:
    """Training documents without held-out text; one that mostly repeats earlier ones is dropped."""
    known: set[int] = set()
    for document in candidates:
        text = without_runs(document.text, forbidden)
        own = set(runs(text))
        if own and len(own & known) <= 0.5 * len(own):
            known |= own
            yield replace(document, text=text)


def check(work: Path) -> None:
    """Raise unless held-out, calibration and training text share no run of 13 words, nor repeat their own."""
    owner: dict[int, str] = {}
    for name in (*SPLITS, "train"):
        folder = work / "text" / name if name == "train" else BUNDLED / "text" / name
        count = 0
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                found = set(runs(json.loads(line)["text"]))
                count += 1
                shared = {owner[run] for run in found if run in owner}
                if name == "train":
                    assert not shared, f"{path.name}: a training document shares a run of words with {shared}"
                    continue
                assert not shared, f"{name}/{path.name}: a document shares a run of words with {shared}"
                owner.update(dict.fromkeys(found, name))
        print(f"{name}: {count} documents, disjoint from all before")


def save_text(parts: dict[str, list[Document]], work: Path) -> None:
    for name, chosen in parts.items():
        folder = work / "text" / name if name == "train" else BUNDLED / "text" / name
        folder.mkdir(parents=True, exist_ok=True)
        for domain in DOMAINS:
            own = [document for document in chosen if document.domain == domain]
            keys = ("text", "source", "licence", "credit")
            lines = (json.dumps({key: getattr(d, key) for key in keys}, ensure_ascii=False) for d in own)
            (folder / f"{domain}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            print(f"{name}/{domain}: {len(own)} documents, {sum(len(d.text.encode()) for d in own):,} bytes")


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GPT-2's way of splitting words, which other programs know by that name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=SPECIAL[1],
        additional_special_tokens=list(SPECIAL[2:]),
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saved under the class name that every version of transformers, and other readers, know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def pieces(text: str) -> Iterator[str]:
    """A long document in parts of about ``PIECE_BYTES``, cut between paragraphs."""
    taken = ""
    for part in paragraphs(text):
        taken += part + "\n\n"
        if len(taken) >= PIECE_BYTES:
            yield taken.rstrip() + "\n"
            taken = ""
    if taken:
        yield taken.rstrip() + "\n"


def training_texts(work: Path) -> list[str]:
    """One pass of everything the models learn from, in a fixed random order."""
    texts: list[str] = []
    for domain in DOMAINS:
        path = work / "text/train" / f"{domain}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            texts.extend(list(pieces(json.loads(line)["text"])) * REPEATS.get(domain, 1))
    texts.extend(knowledge.fact_documents(knowledge.make_facts()))
    random.Random(knowledge.SEED).shuffle(texts)
    return texts


def save_tokens(texts: list[str], tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """All texts in a row, each after an end-of-text token, as 16-bit ids."""
    end = tokenizer.convert_tokens_to_ids(END)
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = np.concatenate([np.array([end, *ids], dtype=np.uint16) for ids in encoded])
    stream.tofile(path)
    print(
        f"{path.name}: {len(stream):,} tokens, {sum(len(t.encode()) for t in texts) / len(stream):.2f} bytes each"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads and training text")
    parser.add_argument("--check", action="store_true", help="only prove that the parts are disjoint")
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.work)
        return
    work: Path = arguments.work
    fetch(work)
    save_text(split(documents(work)), work)
    facts = knowledge.make_facts()
    knowledge.save_facts(facts, BUNDLED / "facts.json")
    print(f"facts: {knowledge.describe(facts)}")
    texts = training_texts(work)
    tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, work / "tokenizer")
    save_tokens(texts, tokenizer, work / "train.bin")


if __name__ == "__main__":
    main()
