"""What all tests share: the zoo on disk with a tokenizer beside each model, and a text to calibrate on.

Whatever is handed out here is shared by the whole session: read it, never write into it.

`make test` leaves out what is marked `breadth`, which is more of what other cases show. Tests over all families keep those of
`CORE`, and tests marked `few(n)` keep `n` of their cases, the first, the last and some between; `pytest` without options, as
`make test-all`, runs everything.
"""

import gc
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import shapes

shapes.install()  # before anything imports what is to be checked

from driver import Driver  # noqa: E402
from families import COMMON, CORE, FAMILIES, build, write_checkpoint  # noqa: E402
from moespresso import api  # noqa: E402

Zoo = Callable[[str], Path]

# With <pad>, <s> and </s> in front, and a few merges behind, all fit into the zoo's 96 token ids.
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,;:!?'()-_=+*/"
_MERGES = ["th", "he", "in", "er", "an", "on", "re"]

# How long an example takes says more about the machine's other work than about ours.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as breadth what other cases of the same test show."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        found = [_families_of(case) for case in cases]
        if (
            len(CORE & set().union(*found)) > 3
        ):  # a test over families, not one of a few with something special
            _leave_out(case for case, families in zip(cases, found, strict=True) if families - CORE)
        few = cases[0].get_closest_marker("few")
        if few:
            left = [case for case in cases if not case.get_closest_marker("breadth")]
            places = _spread(len(left), *few.args)
            _leave_out(case for place, case in enumerate(left) if place not in places)


def pytest_collection_finish() -> None:
    """Half a million objects of libraries stay until the end: whoever looks for garbage leaves them out."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_setup() -> None:
    """Every test looks at the shapes it meets."""
    shapes.begin_anew()


def _families_of(item: pytest.Item) -> set[str]:
    """The families of the zoo among the parameters of a case."""
    call = getattr(item, "callspec", None)
    return (
        {value for value in call.params.values() if isinstance(value, str) and value in FAMILIES}
        if call
        else set()
    )


def _leave_out(cases: Iterable[pytest.Item]) -> None:
    for case in cases:
        case.add_marker("breadth")


def _spread(count: int, few: int) -> set[int]:
    """`few` places of `count`, as far apart as can be, the first among them."""
    return (
        {place * (count - 1) // max(few - 1, 1) for place in range(few)} if few < count else set(range(count))
    )


@pytest.fixture(scope="session", autouse=True)
def _calm() -> None:
    """Tiny matrices are slower on many threads, and transformers talks a lot."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """`zoo(name)` is the folder of that family's tiny checkpoint with a tokenizer, written when first asked for."""
    root = tmp_path_factory.mktemp("zoo")

    def folder(name: str) -> Path:
        path = root / name
        if not path.exists():
            write_model(name, path)
        return path

    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain text of some 3,000 tokens in the zoo's tokenizer, different all the way."""
    return write_words(tmp_path_factory.mktemp("text") / "words.txt", 800)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """Runs commands in processes of their own, and kills them where a test says."""
    with Driver(tmp_path_factory.mktemp("driver")) as running:
        yield running


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral whose widths groups of 32 divide."""
    return write_wide(tmp_path_factory.mktemp("wide") / "mixtral")


@pytest.fixture(scope="session")
def packed(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, with its experts rounded by gptq to 4 bits in groups of 32."""
    out = tmp_path_factory.mktemp("packed") / "out"
    api.press(source, out=out, steps=["gptq:group_size=32"], texts=[text], samples=8, length=24)
    return out


def write_wide(folder: Path, family: str = "mixtral", **changes: Any) -> Path:
    """Write a tiny checkpoint whose widths groups of 32 divide, and a tokenizer."""
    build(family, **({"hidden_size": 64, "intermediate_size": 96} | changes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_model(family: str, folder: Path, **options) -> Path:
    """Write the zoo's checkpoint of `family` and a tokenizer; `options` are those of `write_checkpoint`."""
    write_checkpoint(family, folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_words(path: Path, count: int, *, seed: int = 0) -> Path:
    """Write `count` random words, ten on a line."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfw", k=rng.randint(1, 7))) for _ in range(count)]
    lines = [" ".join(words[start : start + 10]) for start in range(0, count, 10)]
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE for lower-case English within the zoo's vocabulary; what it does not know becomes <pad>."""
    byte = {letter: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(letter)[0][0]
            for letter in _LETTERS}  # fmt: skip
    tokens = ["<pad>", "<s>", "</s>", *byte.values(), *_MERGES]
    assert len(tokens) <= COMMON["vocab_size"]
    vocab = {token: index for index, token in enumerate(tokens)}
    bare = Tokenizer(models.BPE(vocab=vocab, merges=[(a, b) for a, b in _MERGES], unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
