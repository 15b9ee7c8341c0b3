"""The border from text to model: which texts a tokenizer takes, and which of its tokens the model has a row
for.

A tokenizer may know more tokens than the embedding has rows (one was added, or it is another model's). That
alone is no fault, since most texts hold none of them; a text that does is refused with file and line. Where
there are such tokens, or texts that the tokenizer does not take at all, everything that could be drawn is
looked through, not only what is: the same files are refused whatever the seed. The token that fills short
rows is chosen among those that have a row, since its answer is never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moespresso.core.errors import UserError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moespresso.data.text import Document

# Words and letters that few vocabularies hold: small ones, capitals, digits, signs, scripts, what is no character.
STRANGE = "zqxjkvbqpw QZXJK 7310942 §¤ ꙮ ᚠ 〠 𒀀 𪚥 \U0001fae0 \U000e0041 \U0010fffe " + "q" * 200


@dataclass(frozen=True)
class Border:
    """A tokenizer, and how many rows the embedding behind it has (None: as many as it likes)."""

    tokenizer: PreTrainedTokenizerBase
    rows: int | None = None

    @cached_property
    def wide(self) -> bool:
        """Whether the tokenizer has tokens beyond the embedding."""
        known = [
            *self.tokenizer.get_vocab().values(),
            *self.tokenizer.added_tokens_decoder,
            len(self.tokenizer) - 1,
        ]
        return self.rows is not None and max(known) >= self.rows

    @cached_property
    def partial(self) -> bool:
        """Whether there are texts that the tokenizer does not take: it has no token for what it does not
        know."""
        try:
            return any(None in self._ids(text) for text in (STRANGE, *STRANGE.split()))
        except Exception:  # whatever it raises, as in `encode`
            return True

    def _ids(self, text: str) -> list[Any]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @cached_property
    def stop(self) -> list[int]:
        """What follows every document: the end-of-text token, where the tokenizer has one."""
        token = self.tokenizer.eos_token_id
        if not isinstance(token, int):
            return []
        if self.rows is not None and token >= self.rows:
            raise UserError(
                f"the tokenizer ends a text with {self.tokenizer.eos_token!r}, its token {token}, for which the model has no row "
                f"(its embedding has {self.rows}): give the model the tokenizer that it was made with"
            )
        return [token]

    @cached_property
    def pad(self) -> int:
        """A token to fill rows with."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(token, int) and (self.rows is None or token < self.rows):
                return token
        return 0

    def encode(self, text: str, document: Document, *, verbatim: bool = True) -> list[int]:
        """The tokens of a text of `document`, without special ones of ours; `verbatim`: it is the document's
        own text.

        Raises `UserError` with file and line where the tokenizer does not take it, or the model not its
        tokens.
        """
        try:
            ids = self._ids(text)
        except Exception as error:  # whatever a tokenizer raises on a text it was not made for
            raise UserError(
                f"{document.place}: the tokenizer does not take this text ({reason(error)}): mend or take it out"
            ) from error
        if None in ids:
            raise UserError(
                f"{document.place}: the tokenizer has no token for a part of this text, not even one for what it does not know: "
                "mend or take it out"
            )
        if self.rows is not None and ids and max(ids) >= self.rows:
            bad = next(index for index, token in enumerate(ids) if token >= self.rows)
            where = document.at(self._offset(text, bad)) if verbatim else document.place
            raise UserError(
                f"{where}: {self.tokenizer.convert_ids_to_tokens(ids[bad])!r} is the tokenizer's token {ids[bad]}, for which the "
                f"model has no row (its embedding has {self.rows}): give the model the tokenizer that it was made with, or take "
                "the text that holds it out"
            )
        return ids

    def _offset(self, text: str, index: int) -> int:
        """Where in the text the token begins; its start, where the tokenizer cannot say."""
        if not self.tokenizer.is_fast:
            return 0
        encoding = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        return encoding["offset_mapping"][index][0]
