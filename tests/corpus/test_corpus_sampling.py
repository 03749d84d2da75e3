"""The order of samples: shares of languages, every window once an epoch, the circle, independence of what was asked before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaxelm.corpus.sampling import BLOCK_SAMPLES, Blend, Permutation, Stream
from megaxelm.corpus.token_index import TokenIndex, TokenIndexWriter
from megaxelm.errors import TokenIndexError


class FakeIndex:
    """Tokens 0, 1, 2, ... in documents of given lengths, without files."""

    def __init__(self, *lengths: int, first: int = 0) -> None:
        self.document_starts = np.cumsum([0, *lengths])
        self.num_tokens = int(self.document_starts[-1])
        self.first = first

    def tokens(self, start: int, count: int) -> np.ndarray:
        assert start >= 0 and start + count <= self.num_tokens
        return np.arange(start, start + count) + self.first


def blend(sizes: dict[str, int], length: int = 8, alpha: float = 1.0, seed: int = 0) -> Blend:
    return Blend({language: [FakeIndex(size)] for language, size in sizes.items()}, length, alpha, seed)  # type: ignore[list-item]


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**63))
def test_a_permutation_hits_every_value_once(size: int, key: int) -> None:
    images = Permutation(size, key).many(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))


def test_a_permutation_mixes_and_depends_on_its_key() -> None:
    one, two = (Permutation(10_000, 0, "sw", epoch).many(np.arange(10_000)) for epoch in (0, 1))
    assert (one == two).mean() < 0.01
    assert (one == np.arange(10_000)).mean() < 0.01
    assert abs(np.corrcoef(one, np.arange(10_000))[0, 1]) < 0.05
    assert (np.abs(np.diff(one)) == 1).mean() < 0.01
    assert Permutation(10_000, 0, "sw", 0)(17) == one[17]


def test_the_order_is_the_same_on_every_machine() -> None:
    assert Permutation(1000, 7, "sw", 3).many(np.arange(6)).tolist() == [680, 788, 819, 178, 607, 202]
    order = blend({"en": 5000, "sw": 700, "ur": 90}, seed=3)
    assert [order.sample(s).language for s in range(12)] == ["en", "sw", "en", "en", "en", "en", "en", "en", "en", "en", "en", "sw"]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=40),
    alpha=st.floats(0, 1),
    samples=st.integers(1, 10**12),
)
def test_counts_are_exact_add_up_and_never_fall(sizes: list[int], alpha: float, samples: int) -> None:
    order = blend({f"l{i}": size for i, size in enumerate(sizes)}, alpha=alpha)
    total = sum(size**alpha for size in sizes)
    for s in (samples, samples + 1):
        counts = order._count(s)
        assert sum(counts) == s
        for language, count in zip(order._languages, counts, strict=True):
            # 2^-40 of quantised weights shows in the longest runs
            assert abs(count - s * sizes[int(language[1:])] ** alpha / total) < 3 + s * 2.0**-36
    grown = np.array(order._count(samples + 1)) - np.array(order._count(samples))
    assert sorted(grown.tolist()) == [0] * (len(sizes) - 1) + [1]


def test_shares_hold_in_every_block() -> None:
    order = blend({"en": 60_000, "sw": 30_000, "ur": 10_000})
    for block in range(5):
        counts = Counter(order.sample(s).language for s in range(block * BLOCK_SAMPLES, (block + 1) * BLOCK_SAMPLES))
        assert counts["en"] == pytest.approx(614.4, abs=2)
        assert counts["ur"] == pytest.approx(102.4, abs=2)


def test_alpha_flattens_the_shares() -> None:
    sizes = {"en": 10_000, "sw": 100}
    assert blend(sizes, alpha=0).shares == {"en": 0.5, "sw": 0.5}
    assert blend(sizes, alpha=0.5).shares["sw"] == pytest.approx(10 / 110)
    assert blend(sizes, alpha=1).shares["sw"] == pytest.approx(100 / 10_100)


@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=4), seed=st.integers(0, 1000), length=st.integers(1, 16))
def test_every_window_comes_once_an_epoch(sizes: list[int], seed: int, length: int) -> None:
    order = blend({f"l{i}": size for i, size in enumerate(sizes)}, length=length, seed=seed)
    seen: dict[tuple[str, int], list[int]] = {}
    for s in range(1100):
        window = order.sample(s)
        seen.setdefault((window.language, window.epoch), []).append(int(window.tokens[0]))
    last = {language: max(epoch for name, epoch in seen if name == language) for language, _ in seen}
    for (language, epoch), starts in seen.items():
        windows = range(0, order.streams[language].num_tokens, length)
        assert len(set(starts)) == len(starts)
        if epoch < last[language]:
            assert sorted(starts) == list(windows)


def test_epochs_differ_and_seeds_differ() -> None:
    def starts(seed: int, epoch: int) -> list[int]:
        order = blend({"sw": 800}, seed=seed)
        return [int(order.sample(s).tokens[0]) for s in range(100 * epoch, 100 * (epoch + 1))]

    assert starts(0, 0) != starts(0, 1)
    assert starts(0, 0) != starts(1, 0)


def test_a_sample_does_not_depend_on_what_was_asked_before() -> None:
    sizes = {"en": 5000, "sw": 300}
    forward = blend(sizes)
    expected = [forward.sample(s) for s in range(2100)]
    for s in (2099, 5, 1500, 5):
        window = blend(sizes).sample(s)
        assert (window.language, window.epoch, window.tokens.tolist()) == (
            expected[s].language,
            expected[s].epoch,
            expected[s].tokens.tolist(),
        )
    assert forward.counts(2100) == Counter(window.language for window in expected)


def test_a_window_goes_round_the_circle() -> None:
    stream = Stream([FakeIndex(3, 2), FakeIndex(4, first=100)])  # type: ignore[list-item]
    tokens, starts = stream.read(4, 8)
    assert tokens.tolist() == [4, 100, 101, 102, 103, 0, 1, 2]
    assert starts.tolist() == [1, 5]


def test_a_stream_shorter_than_a_window_is_repeated() -> None:
    window = Blend({"sw": [FakeIndex(2, 1)]}, 8, 1.0, 0).sample(5)  # type: ignore[list-item]
    assert window.tokens.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert window.starts.tolist() == [0, 2, 3, 5, 6, 8]
    assert window.epoch == 5


def test_starts_are_the_beginnings_of_documents_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with TokenIndexWriter(tmp_path / "sw", 100) as writer:
        for _ in range(60):
            writer.add([1, *rng.integers(10, 100, rng.integers(1, 12)), 2])
    order = Blend({"sw": [TokenIndex(tmp_path / "sw")]}, 16, 1.0, 0)
    for s in range(200):
        window = order.sample(s)
        assert window.starts.tolist() == np.flatnonzero(window.tokens == 1).tolist()


def test_a_language_without_tokens_is_an_error() -> None:
    with pytest.raises(TokenIndexError, match="language sw has no tokens"):
        blend({"en": 10, "sw": 0})
    with pytest.raises(TokenIndexError, match="no language"):
        blend({})
