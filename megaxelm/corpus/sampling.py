"""Sample order by arithmetic: sample number -> (language, epoch, window), without state and independent of the world size.

Languages: in blocks of 1024 samples every language has its exact count, in a seeded order. Windows: the windows of a language are numbered
over all epochs (see `Blend`), and in each epoch a keyed permutation (a Feistel network with cycle walking) visits every window
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import xxhash

from megaxelm.corpus.token_index import TokenIndex
from megaxelm.errors import RecipeError, TokenIndexError

BLOCK_SAMPLES = 1024
_TOTAL_WEIGHT = 1 << 40
_ROUNDS = 6
_MASK64 = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Windows:
    """What samples with consecutive numbers read, a window each.

    `tokens` int64 [windows, sequence_length + 1]. A document begins at each `tokens[start_rows[i], start_columns[i]]`, int64 [beginnings]
    both, in no certain order. `samples` (their numbers) and `epochs` (in which the window begins) are int64 [windows].
    """

    tokens: np.ndarray
    start_rows: np.ndarray
    start_columns: np.ndarray
    languages: tuple[str, ...]
    samples: np.ndarray
    epochs: np.ndarray


class Permutation:
    """A keyed permutation of 0..size-1, evaluated at a point in constant time and memory.

    A balanced Feistel network over the next even number of bits; values outside of the range are walked on (cycle walking, Black and
    Rogaway 2002). Equal on every machine and version of numpy: only integer arithmetic.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        assert size >= 1
        self.size = size
        self._half = np.uint64(max(2, -(-max(size - 1, 1).bit_length() // 2)))
        self._half_mask = np.uint64((1 << int(self._half)) - 1)
        name = "/".join(str(part) for part in key)
        self._keys = [np.uint64(xxhash.xxh3_64_intdigest(f"{name}#{i}".encode())) for i in range(_ROUNDS)]

    def __call__(self, i: int) -> int:
        """Image of `i`."""
        return int(self.many(np.array([i]))[0])

    def many(self, points: np.ndarray) -> np.ndarray:
        """Images of `points` [n] -> int64 [n]."""
        values = points.astype(np.uint64)
        outside = np.ones(len(values), bool)
        while outside.any():
            values[outside] = self._network(values[outside])
            outside = values >= self.size
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._half_mask)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Stream:
    """The token indexes of one language, one after the other, closed to a circle."""

    def __init__(self, indexes: Sequence[TokenIndex]) -> None:
        self.indexes = [index for index in indexes if index.num_tokens]
        self._ends = np.cumsum([index.num_tokens for index in self.indexes], dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if self.indexes else 0

    def read(self, places: np.ndarray, out: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copy windows of equal length, round the circle, and find the documents that begin in them.

        Args:
            places: where each window begins, 0..num_tokens - 1, int64 [windows], one at least.
            out: where the tokens go, int64 [any number, length].
            rows: the row of `out` for each window, int64 [windows].

        Returns:
            For each beginning of a document: its row and its position in the window, int64 [beginnings] both.
        """
        size = out.shape[1]
        numbers = np.searchsorted(self._ends, places, side="right")
        left = self._ends[numbers] - places
        whole = left >= size
        found = []
        for i in np.unique(numbers[whole]).tolist():
            mine = whole & (numbers == i)
            index = self.indexes[i]
            found.append(index.read(index.num_tokens - left[mine], out, rows[mine]))
        for place, row in zip(places[~whole].tolist(), rows[~whole].tolist(), strict=True):
            found += self._pieces(place, out, row)
        start_rows, columns = zip(*found, strict=True)
        return np.concatenate(start_rows), np.concatenate(columns)

    def _pieces(self, place: int, out: np.ndarray, row: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One window that runs beyond the end of an index."""
        done, size = 0, out.shape[1]
        while done < size:
            i = int(np.searchsorted(self._ends, place, side="right"))
            left = int(self._ends[i]) - place
            count = min(size - done, left)
            local = np.array([self.indexes[i].num_tokens - left])
            start_rows, columns = self.indexes[i].read(local, out[:, done : done + count], np.array([row]))
            yield start_rows, columns + done
            done += count
            place = (place + count) % self.num_tokens


class Blend:
    """All samples of a run, by number.

    A language's stream of n tokens, repeated without end, is cut into windows of T + 1 tokens that begin every T tokens: the last target
    of a window is the first input of the next. Window w belongs to the epoch in which its first token lies, so epoch e has the windows from
    ceil(e n / T) to ceil((e + 1) n / T), in an order of its own. Its last one runs on into epoch e + 1, whose first window begins where
    that one ends. So every token is a target exactly once an epoch, but for the very first of the language, which nothing
    precedes. A language of fewer than T tokens has windows that hold several epochs, and epochs without a window of their own.

    Args:
        streams: for each language its token indexes.
        sequence_length: T.
        alpha: languages are drawn with p ~ tokens^alpha.
        seed: of the order of languages and windows.
        weights: shares of the languages in place of `alpha`, normalised over the languages of `streams`.

    Raises:
        TokenIndexError: no language, or one without tokens.
        RecipeError: `weights` without some language.
    """

    def __init__(
        self,
        streams: Mapping[str, Sequence[TokenIndex]],
        sequence_length: int,
        alpha: float,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.streams = {language: Stream(indexes) for language, indexes in sorted(streams.items())}
        if not self.streams:
            raise TokenIndexError("the token index holds no language: make it again (megaxelm run --from index)")
        for language, stream in self.streams.items():
            if not stream.num_tokens:
                raise TokenIndexError(f"language {language} has no tokens in the index: leave it out of corpus.languages or give it text")
        self.sequence_length = sequence_length
        self.seed = seed
        if weights:
            missing = [language for language in self.streams if language not in weights]
            if missing:
                raise RecipeError(
                    f"train.language_weights has no weight for {', '.join(missing)}: every language that a model trains on needs one; add "
                    "them, or leave out train.language_weights to draw with train.language_alpha"
                )
            parts = {language: float(weights[language]) for language in self.streams}
        else:
            parts = {language: float(stream.num_tokens) ** alpha for language, stream in self.streams.items()}
        total = sum(parts.values())
        self.shares = {language: part / total for language, part in parts.items()}
        # Integers from here on, so that the order is the same on every machine. Heavy languages first: see _count.
        self._languages = sorted(self.streams, key=lambda language: (-self.shares[language], language))
        self._weights = [max(1, round(self.shares[language] * _TOTAL_WEIGHT)) for language in self._languages]
        self._block = lru_cache(maxsize=8)(self._make_block)

    def first_window(self, language: str, epoch: int) -> int:
        """The first window of an epoch of a language; those of the epoch end before the first of the next."""
        return -(-epoch * self.streams[language].num_tokens // self.sequence_length)

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples each language has."""
        whole, rest = divmod(samples, BLOCK_SAMPLES)
        counts = self._count(whole * BLOCK_SAMPLES)
        inside = np.bincount(self._block(whole).languages[:rest], minlength=len(counts))
        return {language: counts[i] + int(inside[i]) for i, language in enumerate(self._languages)}

    def read(self, first: int, count: int) -> Windows:
        """The samples `first` to `first + count`, `first` >= 0 and `count` >= 1."""
        numbers = np.arange(first, first + count)
        blocks = [self._block(block) for block in range(first // BLOCK_SAMPLES, (first + count - 1) // BLOCK_SAMPLES + 1)]
        inside = slice(first % BLOCK_SAMPLES, first % BLOCK_SAMPLES + count)
        languages, places, epochs = (np.concatenate([getattr(block, name) for block in blocks])[inside] for name in _Block._fields)
        tokens = np.empty((count, self.sequence_length + 1), np.int64)
        start_rows, start_columns = [], []
        for i in np.unique(languages).tolist():
            mine = np.flatnonzero(languages == i)
            found = self.streams[self._languages[i]].read(places[mine], tokens, mine)
            start_rows.append(found[0])
            start_columns.append(found[1])
        names = tuple(self._languages[i] for i in languages.tolist())
        return Windows(tokens, np.concatenate(start_rows), np.concatenate(start_columns), names, numbers, epochs)

    def _count(self, samples: int) -> list[int]:
        """Samples of each language among the first `samples`, exact to about one.

        Each language in turn takes its rounded share of what is left. Since round(q n) with q <= 1 grows by 0 or 1 when n does,
        no count ever falls, and they add up; rounding the cumulative shares directly would let the count of a rare language fall.
        """
        left, left_weight, counts = samples, sum(self._weights), []
        for weight in self._weights:
            count = (2 * weight * left + left_weight) // (2 * left_weight)
            counts.append(count)
            left, left_weight = left - count, left_weight - weight
        return counts

    def _make_block(self, block: int) -> _Block:
        before, after = self._count(block * BLOCK_SAMPLES), self._count((block + 1) * BLOCK_SAMPLES)
        sizes = np.array(after) - np.array(before)
        sorted_order = np.repeat(np.arange(len(sizes)), sizes)
        order = sorted_order[Permutation(BLOCK_SAMPLES, self.seed, "block", block).many(np.arange(BLOCK_SAMPLES))]
        places, epochs = np.empty(BLOCK_SAMPLES, np.int64), np.empty(BLOCK_SAMPLES, np.int64)
        for i in np.flatnonzero(sizes).tolist():
            mine = order == i
            places[mine], epochs[mine] = self._order(self._languages[i], before[i], after[i])
        return _Block(order, places, epochs)

    def _order(self, language: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in the stream and epochs of a language's samples `start` to `stop`: int64 [stop - start] both."""
        num_tokens, length = self.streams[language].num_tokens, self.sequence_length
        windows = np.arange(start, stop)
        # A language of at most T tokens has at most one window an epoch, so there is nothing to permute.
        while num_tokens > length and start < stop:
            epoch = start * length // num_tokens
            first, end = self.first_window(language, epoch), self.first_window(language, epoch + 1)
            many = min(stop, end) - start
            if end - first > 1:
                permutation = Permutation(end - first, self.seed, language, epoch)
                windows[len(windows) - (stop - start) :][:many] = first + permutation.many(np.arange(start - first, start - first + many))
            start += many
        return windows * length % num_tokens, windows * length // num_tokens


class _Block(NamedTuple):
    """What the samples of a block read: numbers of the languages, places in their streams and epochs, int64 [BLOCK_SAMPLES] each."""

    languages: np.ndarray
    places: np.ndarray
    epochs: np.ndarray
