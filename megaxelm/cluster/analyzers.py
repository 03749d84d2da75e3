"""What counts as a term of a text: pieces of a tokenizer and their pairs, or character n-grams.

A term is a 64-bit code, so that a batch of text is looked up with numpy. Codes of subword terms are exact. Character n-grams are
hashed into 64 bits: among ten million distinct ones the chance that any two collide is about 3 in a million.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from megaxelm.errors import ClusterError

_MASK = (1 << 64) - 1
_FACTOR = 0x9E3779B97F4A7C15  # odd, with bits spread evenly (2^64 over the golden ratio)
_PAIR_SHIFT = 32
_LONGEST = 4


class TextEncoder(Protocol):
    """What clustering needs of a tokenizer: token ids without special tokens."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        ...


@dataclass
class TermState:
    """How far an analyzer has read: the last symbols it needs for longer terms, and text that may still change."""

    context: tuple[int, ...] = ()
    tail: str = ""


class Analyzer(Protocol):
    """Turns text into the codes of its terms, at once or bit by bit."""

    name: ClassVar[str]

    def symbols(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Each text as the numbers that its terms are made of."""
        ...

    def codes(self, symbols: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Codes of all terms of one text, with repetition."""
        ...

    def push(self, state: TermState, piece: int | Sequence[int] | str) -> list[int]:
        """Codes of the terms that are settled by more text; changes `state`."""
        ...

    def pending(self, state: TermState) -> list[int]:
        """Codes of the terms that the text so far has beyond the settled ones; more text may undo them."""
        ...


class SubwordAnalyzer:
    """Token ids and pairs of neighbouring ids, without special tokens.

    Without a tokenizer only `push` and `codes` work, on token ids.
    """

    name: ClassVar[str] = "subword"

    def __init__(self, tokenizer: TextEncoder | None) -> None:
        self.tokenizer = tokenizer

    def symbols(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Token ids of each text.

        Raises:
            ClusterError: if there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ClusterError("tfidf.analyzer = subword: texts need the run's tokenizer; pass it to load_partitioner or TfidfSpace.load")
        return [np.array(ids, dtype=np.int64) for ids in self.tokenizer.encode(list(texts))]

    def codes(self, symbols: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Codes of the ids and of the pairs."""
        ids = symbols.astype(np.uint64) + np.uint64(1)
        return np.concatenate([ids, (ids[:-1] << np.uint64(_PAIR_SHIFT)) | ids[1:]])

    def push(self, state: TermState, piece: int | Sequence[int] | str) -> list[int]:
        """Codes that come with one token id or several."""
        if isinstance(piece, str):
            raise TypeError("a subword space is pushed token ids, not text")
        found = []
        for token in (piece,) if isinstance(piece, int | np.integer) else piece:
            code = int(token) + 1
            found.append(code)
            if state.context:
                found.append(state.context[0] << _PAIR_SHIFT | code)
            state.context = (code,)
        return found

    def pending(self, state: TermState) -> list[int]:
        """None: a token is final."""
        return []


class CharAnalyzer:
    """Character n-grams of 1 to 4 of NFC-normalised, lower-cased text with runs of whitespace as one space."""

    name: ClassVar[str] = "char"

    def symbols(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Code points of each normalised text."""
        return [_code_points(re.sub(r"\s+", " ", _fold(text))) for text in texts]

    def codes(self, symbols: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Codes of the n-grams."""
        points = symbols.astype(np.uint64) + np.uint64(1)
        grams = points
        found = [grams]
        for length in range(2, _LONGEST + 1):
            if len(points) < length:
                break
            grams = grams[:-1] * np.uint64(_FACTOR) + points[length - 1 :]
            found.append(grams)
        return np.concatenate(found)

    def push(self, state: TermState, piece: int | Sequence[int] | str) -> list[int]:
        """Codes that come with more text. The last character with what may still combine with it stays in `state.tail`."""
        if not isinstance(piece, str):
            raise TypeError("a char space is pushed text, not token ids")
        text = state.tail + piece
        cut = len(text) - 1
        while cut > 0 and _joins_backwards(text[cut]):
            cut -= 1
        if cut <= 0:
            state.tail = text
            return []
        state.tail = text[cut:]
        found, state.context = _grams_after(state.context, text[:cut])
        return found

    def pending(self, state: TermState) -> list[int]:
        """Codes of the n-grams that end in the tail."""
        return _grams_after(state.context, state.tail)[0]


def _fold(text: str) -> str:
    # The two small sigmas become one: which of them lower() makes of a capital depends on the text that follows.
    return unicodedata.normalize("NFC", text).lower().replace("ς", "σ")


def _code_points(text: str) -> NDArray[np.int64]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64)


def _joins_backwards(character: str) -> bool:
    """Whether NFC may compose the character with the one before: only marks and the inner jamo of Hangul syllables do."""
    return "\u1160" <= character <= "\u11ff" or unicodedata.category(character)[0] == "M"


def _grams_after(context: tuple[int, ...], text: str) -> tuple[list[int], tuple[int, ...]]:
    """Codes of the n-grams that end in `text` when `context` (code points + 1) goes before, and the context after it."""
    found = []
    space = ord(" ") + 1
    for character in _fold(text):
        point = space if character.isspace() else ord(character) + 1
        if point == space and context and context[-1] == space:
            continue
        context = (*context, point)[-_LONGEST:]
        for start in range(len(context)):
            code = 0
            for symbol in context[start:]:
                code = (code * _FACTOR + symbol) & _MASK
            found.append(code)
    return found, context


def make_analyzer(name: str, tokenizer: TextEncoder | None) -> Analyzer:
    """The analyzer that a recipe names.

    Raises:
        ClusterError: for an unknown name.
    """
    if name == SubwordAnalyzer.name:
        return SubwordAnalyzer(tokenizer)
    if name == CharAnalyzer.name:
        return CharAnalyzer()
    raise ClusterError(f"clusters.tfidf.analyzer = {name!r}: unknown; choose subword or char")
