"""Documents to token batches, the same every time.

Packed rows are made like pre-training data: documents are tokenized without BOS, EOS follows each, all are
joined and cut into windows of `length`; the remainder is dropped. Chat rows hold one conversation each, in
the tokenizer's chat template, cut at `length` or padded on the right (the mask leaves padding out).

Calibration draws by one rule. Each source gives `weight` of the rows. Its first documents, up to 16
characters per token needed and at least 4 Mi characters, are the *pool*; the pool is ordered by SHA-256 of
(seed, source number, document number), and rows are made from it until there are enough; if it runs dry, the
documents behind it follow in file order. So the order is the same on every machine, and no more than the pool
is held of a source of any size. A text longer than 16 Ki characters takes part as several documents.

What cannot be measured on is looked for in the whole pool, whichever rows are drawn: a conversation that the
chat template refuses, a text among conversations, a token that the model has no row for. So another seed
meets no other faults.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from moespresso.core.errors import UserError
from moespresso.data.border import Border
from moespresso.data.chat import unread
from moespresso.data.template import Template
from moespresso.data.text import Document, Source, documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Mode = Literal["auto", "pack", "chat"]

POOL_CHARACTERS = 4 * 1024 * 1024
POOL_CHARACTERS_PER_TOKEN = 16
CALIBRATION_PIECE = 16 * 1024
# A pool of so few characters is tokenized whole: that costs nothing.
ASKED = 64 * 1024
# A conversation of fewer characters may come to less than two tokens.
SHORT = 16
# Evaluation cuts as seldom as memory allows: a cut can split a token.
EVALUATION_PIECE = 1024 * 1024


@dataclass(frozen=True, eq=False)
class Batches:
    """Token rows of one shape, and how they were made.

    `ids` is int64 and `mask` is bool, both [samples, length]; the mask is False on padding, which is always
    at the right.
    """

    ids: Tensor
    mask: Tensor
    description: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Guard the shapes and dtypes that everyone downstream relies on."""
        assert self.ids.ndim == 2
        assert self.ids.shape == self.mask.shape
        assert self.ids.dtype == torch.int64
        assert self.mask.dtype == torch.bool

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """Tokens in a row, padding included."""
        return self.ids.shape[1]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in all rows, padding left out."""
        return int(self.mask.sum())

    @cached_property
    def digest(self) -> str:
        """SHA-256 of shape, ids (little-endian int64) and mask, in hex."""
        total = hashlib.sha256(f"{len(self)}x{self.length}".encode())
        total.update(self.ids.numpy().astype("<i8").tobytes())
        total.update(self.mask.numpy().tobytes())
        return total.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return what stands in a plan: sources and their digests, settings, tokens, token digest."""
        return {**self.description, "tokens": self.num_tokens, "digest": self.digest}

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ids, mask), `size` rows at a time; the last chunk may be shorter."""
        yield from zip(self.ids.split(size), self.mask.split(size), strict=True)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a text is drawn: so many `samples` of `length` tokens, by `seed`.

    `mode`: "pack" joins and cuts (conversations as plain text), "chat" gives every row one conversation, and
    "auto" decides for each source by its first document.
    """

    samples: int = 128
    length: int = 2048
    seed: int = 0
    mode: Mode = "auto"


AS_USUAL = Sampling()


def calibration(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling = AS_USUAL,
    vocab: int | None = None,
) -> Batches:
    """Draw rows from weighted sources, the same on every machine; `vocab` is how many tokens the model has a
    row for.

    Raises `UserError` where a source is missing, malformed, too short or beyond the model.
    """
    samples = sampling.samples
    _check_request(sources, samples=samples, length=sampling.length)
    border = Border(tokenizer, vocab)
    draws = [
        _draw(source, number, border, replace(sampling, samples=rows))
        for number, (source, rows) in enumerate(zip(sources, _share(sources, samples), strict=True))
    ]
    description = {
        "sources": [draw.described for draw in draws],
        "samples": samples,
        "length": sampling.length,
        "seed": sampling.seed,
        "mode": sampling.mode,
    }
    return Batches(
        torch.cat([draw.ids for draw in draws]), torch.cat([draw.mask for draw in draws]), description
    )


def sequences(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    limit: int | None = None,
    vocab: int | None = None,
) -> Batches:
    """Cut the sources into packed windows of `length` tokens, in file order, for evaluation; at most `limit`
    of them.

    The remainder behind the last whole window is dropped; a text that fills no window gives one, padded.
    Conversations are read as plain text. Raises `UserError` for weights (everything is read), for fewer
    than two tokens and for a token beyond the model's `vocab`.
    """
    _check_request(sources, samples=1 if limit is None else limit, length=length)
    if any(source.weight != 1 for source in sources):
        raise UserError("evaluation reads every source whole, in order: leave the weights out")
    border = Border(tokenizer, vocab)
    readings = [_Reading(documents(source, EVALUATION_PIECE)) for source in sources]
    pieces = _tokens(itertools.chain.from_iterable(readings), border, eos="ends")
    windows, count = pack_windows(pieces, length, limit)
    if count < 2:
        raise UserError(
            f"{_names(sources)}: evaluation needs at least 2 tokens, but there are {count}: give more text"
        )
    ids, mask = _one_window(windows, length, border)
    for source, reading in zip(sources, readings, strict=True):
        reading.say_unread(source)
    described = [_description(source, reading) for source, reading in zip(sources, readings, strict=True)]
    description = {
        "sources": described,
        "samples": len(ids),
        "length": length,
        "seed": None,
        "mode": "sequences",
    }
    return Batches(ids, mask, description)


def pack_windows(
    pieces: Iterable[Sequence[int]], length: int, limit: int | None = None
) -> tuple[Tensor, int]:
    """Join token lists and cut them into windows; stops reading at `limit` windows.

    Returns the int64 windows [windows, length] without the remainder, and how many tokens were read.
    Where not even one window fills, the tokens come back as one shorter window [1, tokens].
    """
    joined = array("q")
    for piece in pieces:
        joined.extend(piece)
        if limit is not None and len(joined) >= limit * length:
            break
    count = len(joined) // length if limit is None else min(limit, len(joined) // length)
    flat = torch.from_numpy(np.array(joined, dtype=np.int64))
    if count == 0:
        return flat[None], len(joined)
    return flat[: count * length].view(count, length), len(joined)


@dataclass(frozen=True)
class _Draw:
    ids: Tensor
    mask: Tensor
    described: dict[str, Any]


class _Reading:
    """Documents as they are read, counted and digested on the way: the plan records what was really seen.

    Of conversations in a `template`, that is also whatever else the template asks for.
    """

    def __init__(self, stream: Iterator[Document], template: Template | None = None) -> None:
        self._stream = stream
        self._seen = ((), ()) if template is None else (template.words, template.fields)
        self._read = self._seen if template is not None else ((), ("tools", "documents"))
        self._unread: Counter[str] = Counter()
        self._chats = 0
        self._digest = hashlib.sha256()
        self._inside = False
        self.documents = 0

    def __iter__(self) -> Iterator[Document]:
        for document in self._stream:
            self._digest.update(document.digest(*self._seen))
            self.documents += not self._inside
            self._inside = not document.ends
            if document.chat is not None:
                self._chats += 1
                self._unread.update(unread(document.chat, document.text, *self._read))
            yield document

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def say_unread(self, source: Source) -> None:
        """Say which fields of conversations hold words that nothing has read."""
        for name, count in sorted(self._unread.items()):
            logger.warning(
                "%s: %d of %d conversations hold words in %r, which is not read: put them into a turn, or take the field out",
                source.name, count, self._chats, name,
            )  # fmt: skip


def _draw(source: Source, number: int, border: Border, sampling: Sampling) -> _Draw:
    """Take one source's rows by the rule at the top of this module."""
    rows, length, mode = sampling.samples, sampling.length, sampling.mode
    stream = documents(source, CALIBRATION_PIECE)
    first = next(stream, None)
    if first is None:
        raise UserError(f"{source.name}: holds no text: give a file that does")
    template = _template(mode, first, border.tokenizer)
    reading = _Reading(itertools.chain([first], stream), template)
    rest = iter(reading)
    pool = _pool(rest, rows * length)
    _check_pool(pool, border, template, mode)
    drawn = itertools.chain(_shuffled(pool, f"{sampling.seed}:{number}"), rest)
    if template is None:
        ids, mask = _packed_rows(drawn, source, border, rows, length)
    else:
        ids, mask = _chat_rows(drawn, source, border, template, rows, length)
    reading.say_unread(source)
    described = {
        **_description(source, reading),
        "samples": rows,
        "mode": "pack" if template is None else "chat",
    }
    return _Draw(ids, mask, described)


def _pool(stream: Iterator[Document], tokens: int) -> list[Document]:
    """The first documents of a source, which rows are drawn from."""
    pool: list[Document] = []
    room = max(POOL_CHARACTERS, POOL_CHARACTERS_PER_TOKEN * tokens)
    while room > 0 and (document := next(stream, None)) is not None:
        pool.append(document)
        room -= len(document.text)
    return pool


def _shuffled(pool: Sequence[Document], key: str) -> Iterator[Document]:
    """Yield the pool in the order of its keyed hashes."""
    order = sorted(range(len(pool)), key=lambda index: hashlib.sha256(f"{key}:{index}".encode()).digest())
    return (pool[index] for index in order)


def _check_pool(pool: Sequence[Document], border: Border, template: Template | None, mode: Mode) -> None:
    """Refuse what any draw could meet. A tokenizer that can do with every text need not be asked about
    each."""
    ask = border.wide or border.partial or sum(len(document.text) for document in pool) <= ASKED
    if template is None:
        chat = next((document.place for document in pool if document.chat), None)
        if mode == "auto" and chat is not None and not pool[0].chat:
            logger.warning("%s: a conversation among texts, which are all packed as plain text", chat)
        for document in pool if ask else ():
            border.encode(document.text, document)
        return
    for document in pool:
        rendered = _render(document, template)
        if ask or len(rendered) < SHORT or len(rendered.split()) < 2:
            _row(rendered, document, border)


def _row(rendered: str, document: Document, border: Border) -> list[int]:
    """The tokens of a conversation, which must be enough to foresee one from another."""
    ids = border.encode(rendered, document, verbatim=False)
    if len(ids) < 2:
        raise UserError(
            f"{document.place}: in the tokenizer's chat template this conversation comes to {len(ids)} token{'' if len(ids) == 1 else 's'}, "
            "and a row needs at least 2: mend it or take it out"
        )
    return ids


def _render(document: Document, template: Template) -> str:
    if document.chat is None:
        raise UserError(
            f"{document.place}: chat mode needs conversations, but this is plain text; use mode pack"
        )
    return template.render(document.chat, document.place)[1]


def _packed_rows(
    drawn: Iterator[Document], source: Source, border: Border, rows: int, length: int
) -> tuple[Tensor, Tensor]:
    windows, count = pack_windows(_tokens(drawn, border, eos="always"), length, rows)
    if count < rows * length:
        fewer = f"at most {count // length} samples or shorter ones" if count >= length else "shorter ones"
        raise UserError(
            f"{source.name}: {rows} samples of {length} tokens need {rows * length:,} tokens, "
            f"but there are {count:,}; "
            f"give more text, or ask for {fewer}"
        )
    return windows, torch.ones_like(windows, dtype=torch.bool)


def _chat_rows(
    drawn: Iterator[Document], source: Source, border: Border, template: Template, rows: int, length: int
) -> tuple[Tensor, Tensor]:
    taken = list(itertools.islice(drawn, rows))
    texts = [_render(document, template) for document in taken]
    if len(taken) < rows:
        raise UserError(
            f"{source.name}: {rows} samples need {rows} conversations, but there are {len(taken)}; "
            f"give more, or ask for at most {len(taken)} samples"
        )
    _say_unseen(taken, template, source)
    pairs = zip(taken, texts, strict=True)
    encoded = [_row(text, document, border)[:length] for document, text in pairs]
    return _pad(encoded, length, border.pad)


def _say_unseen(taken: Sequence[Document], template: Template, source: Source) -> None:
    """Say how many conversations hold something that the template does not show."""
    unseen: Counter[str] = Counter()
    for document in taken:
        assert document.chat is not None
        unseen.update(template.unseen(*template.render(document.chat, document.place)))
    for name, count in unseen.items():
        logger.warning(
            "%s: %d of %d conversations hold %s, of which the tokenizer's chat template shows nothing", source.name, count,
            len(taken), name,
        )  # fmt: skip


def _pad(rows: Sequence[Sequence[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    """Pad on the right: causal layers never let a real token see what follows it."""
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = True
    return ids, mask


def _one_window(windows: Tensor, length: int, border: Border) -> tuple[Tensor, Tensor]:
    """Pad the single short window of a text that fills none; whole windows pass untouched."""
    if windows.shape[1] == length:
        return windows, torch.ones_like(windows, dtype=torch.bool)
    return _pad(windows.tolist(), length, border.pad)


def _tokens(
    stream: Iterable[Document], border: Border, eos: Literal["always", "ends"]
) -> Iterator[list[int]]:
    """Tokenize without BOS; EOS ends a document, or "always" every piece (shuffled ones have no next)."""
    for document in stream:
        ids = border.encode(document.text, document)
        yield ids + border.stop if eos == "always" or document.ends else ids


def _template(mode: Mode, first: Document, tokenizer: PreTrainedTokenizerBase) -> Template | None:
    """The chat template, where a source is to be read in it; None where it is packed."""
    has_template = bool(tokenizer.chat_template)
    if mode == "chat" and not has_template:
        raise UserError("chat mode needs a chat template, which this tokenizer does not have; use mode pack")
    if mode == "auto" and first.chat and not has_template:
        logger.warning(
            "%s: the tokenizer has no chat template; conversations are packed as plain text", first.place
        )
    wanted = mode == "chat" or (mode == "auto" and first.chat is not None and has_template)
    return Template(tokenizer) if wanted else None


def _share(sources: Sequence[Source], samples: int) -> list[int]:
    """Split `samples` by weight with the largest remainders, earlier sources first among equals."""
    # By a power of two, which changes no share: none is too large to be added up.
    scale = math.frexp(max(source.weight for source in sources))[1]
    weights = [math.ldexp(source.weight, -scale) for source in sources]
    exact = [samples * weight / math.fsum(weights) for weight in weights]
    rows = [int(part) for part in exact]
    by_remainder = sorted(range(len(rows)), key=lambda index: rows[index] - exact[index])
    for index in by_remainder[: samples - sum(rows)]:
        rows[index] += 1
    if 0 in rows:
        name = sources[rows.index(0)].name
        raise UserError(
            f"{name}: its weight leaves it none of the {samples} samples; raise the weight or the samples"
        )
    return rows


def _description(source: Source, reading: _Reading) -> dict[str, Any]:
    fields = {"name": source.name, "weight": source.weight, "field": source.field, "split": source.split}
    flags = {"join": source.join, "hub": source.hub}
    return {**fields, **flags, "documents": reading.documents, "digest": reading.digest}


def _check_request(sources: Sequence[Source], *, samples: int, length: int) -> None:
    if not sources:
        raise UserError("no text was given: name a file or folder (--text) or a dataset (--dataset)")
    if samples < 1 or length < 2:
        raise UserError(f"at least 1 sample of 2 tokens is needed, got {samples} of {length}")


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(source.name for source in sources)
