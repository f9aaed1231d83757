"""Texts to token tensors: tokenising, cutting to length, padding to the longest in a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from tokenizers import Tokenizer

from edgebert_runtime.errors import BundleError, InputError
from edgebert_runtime.session import Collated

if TYPE_CHECKING:
    from tokenizers import Encoding

__all__ = ["Encoded", "Text", "TextEncoder"]

Text = str | tuple[str, str]
"""One input: a text, or a pair of texts where the task is on pairs."""


class Encoded(msgspec.Struct, frozen=True):
    """One tokenised text.

    Attributes:
        ids: Token ids, special tokens included.
        type_ids: 0 for the first text's tokens and 1 for the second's; empty where the model has
            no such input.
        truncated: Whether the text was cut to fit ``max_length``.
    """

    ids: Sequence[int]
    type_ids: Sequence[int]
    truncated: bool


_OF_ROW: dict[str, Callable[[Any], Sequence[int]] | None] = {
    "input_ids": attrgetter("ids"),
    "attention_mask": None,
    "token_type_ids": attrgetter("type_ids"),
}
"""What each of a model's inputs holds of a row's tokens; ``None``: 1 for each of them."""


class TextEncoder:
    """Tokenises texts and pads them into the model's inputs. Safe to use from several threads.

    Args:
        tokenizer_json: A ``tokenizers`` JSON file's bytes.
        input_names: The model's inputs.
        max_length: Longest row in tokens; a pair is cut at its longer text first.
        pad_token_id: What fills short rows.
        text_pair: Whether each input is a pair.

    Raises:
        BundleError: The bytes are not a tokenizer, or the model has an input that text cannot
            fill.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        *,
        input_names: Sequence[str],
        max_length: int,
        pad_token_id: int,
        text_pair: bool,
    ) -> None:
        try:
            self._tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except Exception as exc:  # tokenizers raises bare Exception
            raise BundleError(f"the tokenizer cannot be read: {exc}") from exc
        unknown = set(input_names) - _OF_ROW.keys()
        if unknown:
            raise BundleError(f"the model wants inputs that text cannot fill: {sorted(unknown)}")
        # Set once, here: changing a tokenizer while other threads encode is not safe.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Truncating a pair makes every combination of what is cut off either side, 2 GB for two
        # texts of 10,000 words. So a long side is first cut to what could ever be kept of it.
        self._whole = Tokenizer.from_str(self._tokenizer.to_str()) if text_pair else None
        self._max_length = max_length
        self._tokenizer.enable_truncation(max_length, strategy="longest_first")
        self._inputs = [(name, _OF_ROW[name]) for name in input_names]
        self._typed = "token_type_ids" in input_names
        self._pad_token_id = pad_token_id
        self._text_pair = text_pair

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of what is put around every text, and of padding."""
        nothing: Text = ("", "") if self._text_pair else ""
        return frozenset([*self.encode([nothing])[0].ids, self._pad_token_id])

    def encode(self, texts: Sequence[Text], *, first_index: int = 0) -> list[Encoded]:
        """Tokenises ``texts``, in order.

        Args:
            texts: What to tokenise.
            first_index: The number of the first of them, for messages.

        Raises:
            InputError: A text is not a string (or a pair where pairs are wanted), or is not
                valid Unicode.
        """
        if len(texts) == 1:  # a batch would wake the threads that share its work
            (text,) = texts
            return [self._row(self._tokenised(text, first_index))]
        try:
            encodings = self._tokenizer.encode_batch([self._fitting(text) for text in texts])
        except (TypeError, UnicodeEncodeError) as exc:
            raise self._refusal(texts, first_index, exc) from exc
        return [self._row(encoding) for encoding in encodings]

    def encode_one(self, text: Text) -> tuple[Collated, bool]:
        """Does for one text what ``encode`` and ``collate`` do, in fewer steps.

        Returns:
            ``int64[1, seq]`` for each model input, and whether the text was cut.

        Raises:
            InputError: As ``encode`` does.
        """
        encoding = self._tokenised(text, 0)
        length = len(encoding)
        inputs = Collated()
        for name, of_row in self._inputs:
            array = inputs[name] = np.empty((1, length), np.int64)
            array[0] = 1 if of_row is None else of_row(encoding)
        return inputs, length == self._max_length and bool(encoding.overflowing)

    def _tokenised(self, text: Any, index: int) -> Encoding:
        try:
            if self._whole is None:
                return self._tokenizer.encode(text)
            return self._tokenizer.encode(*self._fitting(text))
        except (TypeError, UnicodeEncodeError) as exc:
            raise self._refusal([text], index, exc) from exc

    def _row(self, encoding: Encoding) -> Encoded:
        cut = len(encoding) == self._max_length and bool(encoding.overflowing)
        return Encoded(encoding.ids, encoding.type_ids if self._typed else (), cut)

    def _fitting(self, text: object) -> Text:
        """Returns what to tokenise of a text; raises ``TypeError`` if the task takes no such."""
        if self._whole is None:
            if isinstance(text, str):
                return text
        elif isinstance(text, tuple) and [isinstance(side, str) for side in text] == [True, True]:
            return self._bounded(text)
        raise TypeError

    def check(self, texts: Sequence[Text]) -> None:
        """Raises the ``InputError`` that ``encode`` would raise, without tokenising."""
        fault = self._fault(texts, 0)
        if fault is not None:
            raise fault

    def _refusal(self, texts: Sequence[object], first_index: int, exc: Exception) -> InputError:
        """Says which text cannot be tokenised: nobody pays for the search while all can be."""
        return self._fault(texts, first_index) or InputError(f"a text cannot be tokenised: {exc}")

    def _fault(self, texts: Sequence[object], first_index: int) -> InputError | None:
        wanted = "a pair (first, second)" if self._text_pair else "one string"
        for index, text in enumerate(texts, start=first_index):
            parts = text if isinstance(text, tuple) else (text,)
            if isinstance(text, str) == self._text_pair or len(parts) != 1 + self._text_pair:
                return InputError(f"text {index}: this model takes {wanted}, got {text!r:.80}")
            for part in parts:
                if not isinstance(part, str):
                    return InputError(f"text {index} is {type(part).__name__}, not a string")
                try:
                    part.encode()
                except UnicodeEncodeError as fault:
                    return InputError(f"text {index} is not valid Unicode: {fault}")
        return None

    def _bounded(self, pair: tuple[str, str]) -> tuple[str, str]:
        """Cuts a pair to what could be kept of it, so that truncating it gives what it would."""
        assert self._whole is not None
        if max(map(len, pair)) <= self._max_length:
            return pair
        sides = [self._whole.encode(side, add_special_tokens=False) for side in pair]
        cut = list(pair)
        # Which side is longer matters to ``longest_first``, so the longer one stays longer.
        least = self._max_length + 1
        for index in sorted((0, 1), key=lambda index: len(sides[index].ids)):
            word = sides[index].token_to_word(least) if least < len(sides[index].ids) else None
            if word is None:
                least = max(least, len(sides[index].ids))
                continue
            cut[index] = pair[index][: sides[index].word_to_chars(word)[1]]
            least = sides[index].word_to_tokens(word)[1]
        return cut[0], cut[1]

    def collate(self, rows: Sequence[Encoded]) -> Collated:
        """Pads ``rows`` to the longest of them: ``int64[batch, seq]`` for each model input."""
        inputs = Collated()
        length = max([len(row.ids) for row in rows])
        for name, of_row in self._inputs:
            array = inputs[name] = np.zeros((len(rows), length), dtype=np.int64)
            if name == "input_ids":
                array.fill(self._pad_token_id)
            for index, row in enumerate(rows):
                array[index, : len(row.ids)] = 1 if of_row is None else of_row(row)
        return inputs
