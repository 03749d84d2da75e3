"""What counts as a term of a text: pieces of a tokenizer and their pairs, character n-grams, or words by the published pattern.

A term is a 64-bit code, so that a batch of text is looked up with numpy. Codes of subword terms are exact. Character n-grams and words
are hashed into 64 bits: among ten million distinct ones the chance that any two collide is about 3 in a million.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from megaxelm.errors import ClusterError

_MASK = (1 << 64) - 1
_FACTOR = 0x9E3779B97F4A7C15  # odd, with bits spread evenly (2^64 over the golden ratio)
PAIR_SHIFT = 32
_LONGEST = 4
_INTEGERS = (int, np.integer)


class TextEncoder(Protocol):
    """What clustering needs of a tokenizer: token ids without special tokens."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        ...


@dataclass
class TermState:
    """How far an analyzer has read: codes of the last terms, which longer ones are made of, and text that may still change."""

    context: tuple[int, ...] = ()
    tail: str = ""


class Analyzer(Protocol):
    """Turns text into the codes of its terms, at once or bit by bit."""

    name: ClassVar[str]
    reads_text: ClassVar[bool]
    """Whether terms are made of text; else of token ids."""

    def symbols(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Each text as the numbers that its terms are made of, in the smallest type that holds them all."""
        ...

    def codes(self, symbols: NDArray[np.integer]) -> NDArray[np.uint64]:
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
    reads_text: ClassVar[bool] = False

    def __init__(self, tokenizer: TextEncoder | None) -> None:
        self.tokenizer = tokenizer

    def symbols(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Token ids of each text.

        Raises:
            ClusterError: if there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ClusterError("tfidf.analyzer = subword: texts need the run's tokenizer; pass it to load_partitioner or TfidfSpace.load")
        return [np.array(ids, dtype=np.int32) for ids in self.tokenizer.encode(list(texts))]

    def codes(self, symbols: NDArray[np.integer]) -> NDArray[np.uint64]:
        """Codes of the ids and of the pairs."""
        ids = symbols.astype(np.uint64) + np.uint64(1)
        return np.concatenate([ids, (ids[:-1] << np.uint64(PAIR_SHIFT)) | ids[1:]])

    def push(self, state: TermState, piece: int | Sequence[int] | str) -> list[int]:
        """Codes that come with one token id or several."""
        if isinstance(piece, str):
            raise TypeError("a subword space is pushed token ids, not text")
        found = []
        for token in (piece,) if isinstance(piece, _INTEGERS) else piece:
            code = int(token) + 1
            found.append(code)
            if state.context:
                found.append(state.context[0] << PAIR_SHIFT | code)
            state.context = (code,)
        return found

    def pending(self, state: TermState) -> list[int]:
        """None: a token is final."""
        return []


class CharAnalyzer:
    """Character n-grams of 1 to 4 of NFC-normalised, lower-cased text with runs of whitespace as one space."""

    name: ClassVar[str] = "char"
    reads_text: ClassVar[bool] = True

    def symbols(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Code points of each normalised text."""
        return [_code_points(re.sub(r"\s+", " ", _fold(text))) for text in texts]

    def codes(self, symbols: NDArray[np.integer]) -> NDArray[np.uint64]:
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


class WordAnalyzer:
    r"""Words by the pattern of the published vectoriser, `\b\w\w+\b` over lower-cased text: runs of two or more letters, digits or `_`.

    For comparison with the published clusters. Vowel signs and tone marks are no letters to it, so it cuts Hindi and Thai to pieces, and
    where nothing stands between words, as in Chinese and Japanese, a whole clause is one word. The two small sigmas of Greek are one
    letter here: which of them a capital becomes depends on text that may not have come yet.
    """

    name: ClassVar[str] = "word"
    reads_text: ClassVar[bool] = True

    def words(self, text: str) -> list[str]:
        """The words of a text, in order, with repetition."""
        return [run for run in _RUN.findall(_lower(text)) if len(run) > 1]

    def symbols(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Codes of the words of each text."""
        return [np.array([_word_code(word) for word in self.words(text)], dtype=np.uint64) for text in texts]

    def codes(self, symbols: NDArray[np.integer]) -> NDArray[np.uint64]:
        """The symbols themselves."""
        return symbols.astype(np.uint64, copy=False)

    def push(self, state: TermState, piece: int | Sequence[int] | str) -> list[int]:
        """Codes of the words that end within more text. A word that reaches its end stays in `state.tail`."""
        if not isinstance(piece, str):
            raise TypeError("a word space is pushed text, not token ids")
        text = state.tail + _lower(piece)
        runs = _RUN.findall(text)
        # A letter at the end means that the last run may go on.
        state.tail = runs.pop() if runs and text.endswith(runs[-1]) else ""
        return [_word_code(run) for run in runs if len(run) > 1]

    def pending(self, state: TermState) -> list[int]:
        """Code of the word at the end, which may go on."""
        return [_word_code(state.tail)] if len(state.tail) > 1 else []


_RUN = re.compile(r"\w+")


def _word_code(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))


def _lower(text: str) -> str:
    return text.lower().replace("ς", "σ")


def _fold(text: str) -> str:
    # The two small sigmas become one: which of them lower() makes of a capital depends on the text that follows.
    return _lower(unicodedata.normalize("NFC", text))


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _joins_backwards(character: str) -> bool:
    """Whether NFC may compose the character with the one before: only marks and the inner jamo of Hangul syllables do."""
    return "\u1160" <= character <= "\u11ff" or unicodedata.category(character)[0] == "M"


def _grams_after(context: tuple[int, ...], text: str) -> tuple[list[int], tuple[int, ...]]:
    """Codes of the n-grams that end in `text`, and the context after it: codes of the n-grams that end in the last character, short to
    long. `context` is that of the text before."""
    found: list[int] = []
    space = ord(" ") + 1
    for character in _fold(text):
        point = space if character.isspace() else ord(character) + 1
        if point == space and context and context[0] == space:
            continue
        context = (point, *((code * _FACTOR + point) & _MASK for code in context[: _LONGEST - 1]))
        found += context
    return found, context


def make_analyzer(name: str, tokenizer: TextEncoder | None) -> Analyzer:
    """The analyzer that a recipe names.

    Raises:
        ClusterError: for an unknown name.
    """
    if name == SubwordAnalyzer.name:
        return SubwordAnalyzer(tokenizer)
    if name not in _READERS:
        raise ClusterError(f"clusters.tfidf.analyzer = {name!r}: unknown; choose {SubwordAnalyzer.name}, {' or '.join(_READERS)}")
    return _READERS[name]()


def reads_text(name: str) -> bool:
    """Whether the terms of the analyzer that a recipe names are made of text; else of token ids."""
    return name in _READERS


_READERS: dict[str, type[CharAnalyzer | WordAnalyzer]] = {kind.name: kind for kind in (CharAnalyzer, WordAnalyzer)}
