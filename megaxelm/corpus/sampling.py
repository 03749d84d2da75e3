"""Sample order by arithmetic: sample number -> (language, epoch, window), without state and independent of the world size.

Languages: in blocks of 1024 samples every language has its exact count, in a seeded order. Windows: the running number of a
language's samples is divided into epochs, and in each epoch a keyed permutation (a Feistel network with cycle walking) visits
every window once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from megaxelm.corpus.token_index import TokenIndex
from megaxelm.errors import TokenIndexError

BLOCK_SAMPLES = 1024
_TOTAL_WEIGHT = 1 << 40
_ROUNDS = 6
_MASK64 = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Window:
    """What one sample reads.

    `tokens` int64 [sequence_length + 1]; `starts`: the positions in it where a document begins, ascending, 0..sequence_length.
    """

    tokens: np.ndarray
    starts: np.ndarray
    language: str
    sample: int
    epoch: int


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
        self.indexes = list(indexes)
        self._offsets = np.cumsum([0, *(index.num_tokens for index in self.indexes)])
        self.num_tokens = int(self._offsets[-1])

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` tokens from `start` on, round the circle: tokens int64 [count], positions where documents begin."""
        tokens = np.empty(count, np.int64)
        starts: list[np.ndarray] = []
        done = 0
        while done < count:
            place = (start + done) % self.num_tokens
            i = int(np.searchsorted(self._offsets, place, side="right")) - 1
            index, local = self.indexes[i], place - int(self._offsets[i])
            size = min(count - done, index.num_tokens - local)
            tokens[done : done + size] = index.tokens(local, size)
            borders = index.document_starts[:-1]
            low, high = np.searchsorted(borders, (local, local + size))
            starts.append(borders[low:high] - local + done)
            done += size
        return tokens, np.concatenate(starts)


class Blend:
    """All samples of a run, by number.

    Args:
        streams: for each language its token indexes.
        sequence_length: T; a window has T + 1 tokens. Windows of one epoch overlap in that token; the last wraps round to the start.
        alpha: languages are drawn with p ~ tokens^alpha.
        seed: of the order of languages and windows.

    Raises:
        TokenIndexError: no language, or one without tokens.
    """

    def __init__(self, streams: Mapping[str, Sequence[TokenIndex]], sequence_length: int, alpha: float, seed: int) -> None:
        self.streams = {language: Stream(indexes) for language, indexes in sorted(streams.items())}
        if not self.streams:
            raise TokenIndexError("the token index holds no language: make it again (megaxelm run --from index)")
        for language, stream in self.streams.items():
            if not stream.num_tokens:
                raise TokenIndexError(f"language {language} has no tokens in the index: leave it out of corpus.languages or give it text")
        self.sequence_length = sequence_length
        self.seed = seed
        weights = {language: float(stream.num_tokens) ** alpha for language, stream in self.streams.items()}
        total = sum(weights.values())
        self.shares = {language: weight / total for language, weight in weights.items()}
        # Integers from here on, so that the order is the same on every machine. Heavy languages first: see _count.
        self._languages = sorted(self.streams, key=lambda language: (-self.shares[language], language))
        self._weights = [max(1, round(self.shares[language] * _TOTAL_WEIGHT)) for language in self._languages]
        self._block = lru_cache(maxsize=8)(self._make_block)
        self._permutation = lru_cache(maxsize=4 * len(self.streams))(self._make_permutation)

    def num_windows(self, language: str) -> int:
        """Windows of one epoch of a language."""
        return -(-self.streams[language].num_tokens // self.sequence_length)

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples each language has."""
        whole, rest = divmod(samples, BLOCK_SAMPLES)
        counts = self._count(whole * BLOCK_SAMPLES)
        order, _ = self._block(whole)
        inside = np.bincount(order[:rest], minlength=len(counts))
        return {language: counts[i] + int(inside[i]) for i, language in enumerate(self._languages)}

    def sample(self, s: int) -> Window:
        """Sample number `s` >= 0."""
        block, offset = divmod(s, BLOCK_SAMPLES)
        order, numbers = self._block(block)
        language = self._languages[int(order[offset])]
        stream = self.streams[language]
        epoch, place = divmod(int(numbers[offset]), self.num_windows(language))
        window = self._permutation(language, epoch)(place)
        tokens, starts = stream.read(window * self.sequence_length, self.sequence_length + 1)
        return Window(tokens, starts, language, s, epoch)

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

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Languages of a block's samples, and the running number of each sample in its language: int64 [BLOCK_SAMPLES] both."""
        before, after = self._count(block * BLOCK_SAMPLES), self._count((block + 1) * BLOCK_SAMPLES)
        sizes = np.array(after) - np.array(before)
        sorted_order = np.repeat(np.arange(len(sizes)), sizes)
        order = sorted_order[Permutation(BLOCK_SAMPLES, self.seed, "block", block).many(np.arange(BLOCK_SAMPLES))]
        numbers = np.empty(BLOCK_SAMPLES, np.int64)
        for i, first in enumerate(before):
            mine = order == i
            numbers[mine] = first + np.arange(int(mine.sum()))
        return order, numbers

    def _make_permutation(self, language: str, epoch: int) -> Permutation:
        return Permutation(self.num_windows(language), self.seed, language, epoch)
