"""The order of samples: shares of languages, every window once an epoch, the circle, independence of what was asked before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaxelm.corpus.sampling import BLOCK_SAMPLES, Blend, Permutation, Stream, Windows
from megaxelm.corpus.token_index import TokenIndex, TokenIndexWriter
from megaxelm.errors import RecipeError, TokenIndexError


class FakeIndex:
    """Tokens first, first + 1, ... in documents of given lengths, without files."""

    def __init__(self, *lengths: int, first: int = 0) -> None:
        self.starts = np.cumsum([0, *lengths])
        self.num_tokens = int(self.starts[-1])
        self.first = first

    def read(self, places: np.ndarray, out: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found_rows, found_columns = [], []
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            end = place + out.shape[1]
            assert 0 <= place <= end <= self.num_tokens
            out[row] = np.arange(place, end) + self.first
            columns = [start - place for start in self.starts[:-1].tolist() if place <= start < end]
            found_columns += columns
            found_rows += [row] * len(columns)
        return np.array(found_rows, np.int64), np.array(found_columns, np.int64)


def blend(sizes: dict[str, int], length: int = 8, alpha: float = 1.0, seed: int = 0, weights: dict[str, float] | None = None) -> Blend:
    return Blend({language: [FakeIndex(size)] for language, size in sizes.items()}, length, alpha, seed, weights)  # type: ignore[list-item]


def starts_of(windows: Windows, row: int) -> list[int]:
    """Where documents begin in one window, ascending."""
    return sorted(windows.start_columns[windows.start_rows == row].tolist())


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
    assert list(order.read(0, 12).languages) == ["en", "sw", "en", "en", "en", "en", "en", "en", "en", "en", "en", "sw"]


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
        counts = Counter(order.read(block * BLOCK_SAMPLES, BLOCK_SAMPLES).languages)
        assert counts["en"] == pytest.approx(614.4, abs=2)
        assert counts["ur"] == pytest.approx(102.4, abs=2)


def test_alpha_flattens_the_shares() -> None:
    sizes = {"en": 10_000, "sw": 100}
    assert blend(sizes, alpha=0).shares == {"en": 0.5, "sw": 0.5}
    assert blend(sizes, alpha=0.5).shares["sw"] == pytest.approx(10 / 110)
    assert blend(sizes, alpha=1).shares["sw"] == pytest.approx(100 / 10_100)


def test_given_weights_take_the_place_of_the_exponent() -> None:
    sizes = {"en": 10_000, "sw": 100, "ur": 7}
    order = blend(sizes, weights={"en": 2, "sw": 1, "ur": 1, "elsewhere": 5})
    assert order.shares == {"en": 0.5, "sw": 0.25, "ur": 0.25}
    assert order.counts(4 * BLOCK_SAMPLES) == {"en": 2048, "sw": 1024, "ur": 1024}
    assert Counter(order.read(0, 4 * BLOCK_SAMPLES).languages) == order.counts(4 * BLOCK_SAMPLES)


def test_a_language_without_a_given_weight_is_named() -> None:
    with pytest.raises(RecipeError, match=r"train\.language_weights has no weight for sw, ur"):
        blend({"en": 10, "sw": 10, "ur": 10}, weights={"en": 1.0})


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(1, 200), length=st.integers(1, 24), epochs=st.integers(1, 6), seed=st.integers(0, 1000))
def test_every_token_is_a_target_once_an_epoch_but_for_the_very_first(num_tokens: int, length: int, epochs: int, seed: int) -> None:
    """Counted over the samples themselves: whole epochs, and what the last of their windows takes of the next one's head."""
    order = blend({"sw": num_tokens}, length=length, seed=seed)
    samples = order.first_window("sw", epochs)
    windows = order.read(0, samples)
    assert (np.diff(windows.tokens, axis=1) % num_tokens == 1 % num_tokens).all(), "a window is consecutive tokens"
    targets = np.bincount(windows.tokens[:, 1:].ravel(), minlength=num_tokens)
    expected = np.full(num_tokens, epochs)
    expected[0] -= 1
    overhang = samples * length - (epochs * num_tokens - 1)
    assert 0 <= overhang <= length
    np.add.at(expected, np.arange(overhang) % num_tokens, 1)
    assert targets.tolist() == expected.tolist()


@settings(max_examples=20, deadline=None)
@given(num_tokens=st.integers(1, 300), length=st.integers(1, 24), seed=st.integers(0, 1000))
def test_windows_of_an_epoch_begin_in_it_and_come_once(num_tokens: int, length: int, seed: int) -> None:
    order = blend({"sw": num_tokens}, length=length, seed=seed)
    windows = order.read(0, 600)
    assert (np.diff(windows.epochs) >= 0).all(), "an epoch begins when the one before it is through"
    for epoch in range(int(windows.epochs[-1])):
        places = windows.tokens[windows.epochs == epoch, 0].tolist()
        expected = [place for place in range(-(-epoch * num_tokens // length) * length - epoch * num_tokens, num_tokens, length)]
        assert sorted(places) == expected


@settings(max_examples=8, deadline=None)
@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=4), seed=st.integers(0, 1000), length=st.integers(1, 16))
def test_each_language_of_a_blend_counts_its_own_targets(sizes: list[int], seed: int, length: int) -> None:
    order = blend({f"l{i}": size for i, size in enumerate(sizes)}, length=length, seed=seed)
    windows = order.read(0, 1500)
    languages = np.array(windows.languages)
    for i, size in enumerate(sizes):
        mine = windows.epochs[languages == f"l{i}"]
        whole = windows.tokens[languages == f"l{i}"][mine < mine.max()] if len(mine) else windows.tokens[:0]
        targets = np.bincount(whole[:, 1:].ravel(), minlength=size)
        assert targets[1:].max(initial=0) - targets[1:].min(initial=10**9) <= 1 or size == 1


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 10**7), count=st.integers(1, 24), ranks=st.sampled_from([1, 2, 3, 4]))
def test_ranks_and_micro_batches_together_read_what_one_process_reads(first: int, count: int, ranks: int) -> None:
    sizes = {"en": 5000, "sw": 300, "ur": 3}
    whole = blend(sizes).read(first, count * ranks)
    for rank in range(ranks):
        part = blend(sizes).read(first + rank * count, count)
        rows = slice(rank * count, (rank + 1) * count)
        assert part.tokens.tolist() == whole.tokens[rows].tolist()
        assert part.languages == whole.languages[rows]
        assert (part.samples.tolist(), part.epochs.tolist()) == (whole.samples[rows].tolist(), whole.epochs[rows].tolist())
        for row in range(count):
            assert starts_of(part, row) == starts_of(whole, rank * count + row)


def test_epochs_differ_and_seeds_differ() -> None:
    def places(seed: int, epoch: int) -> list[int]:
        return blend({"sw": 800}, seed=seed).read(100 * epoch, 100).tokens[:, 0].tolist()

    assert places(0, 0) != places(0, 1)
    assert places(0, 0) != places(1, 0)
    assert sorted(places(0, 0)) == sorted(places(0, 1)) == sorted(places(1, 0)) == list(range(0, 800, 8))


def test_a_sample_does_not_depend_on_what_was_asked_before() -> None:
    sizes = {"en": 5000, "sw": 300}
    forward = blend(sizes)
    expected = forward.read(0, 2100)
    for s in (2099, 5, 1500, 5):
        window = blend(sizes).read(s, 1)
        assert window.languages == (expected.languages[s],)
        assert (window.tokens[0].tolist(), int(window.epochs[0])) == (expected.tokens[s].tolist(), int(expected.epochs[s]))
    assert forward.counts(2100) == Counter(expected.languages)


def test_a_window_goes_round_the_circle() -> None:
    stream = Stream([FakeIndex(3, 2), FakeIndex(), FakeIndex(4, first=100)])  # type: ignore[list-item]
    out = np.zeros((2, 8), np.int64)
    rows, columns = stream.read(np.array([4, 0]), out, np.array([1, 0]))
    assert out.tolist() == [[0, 1, 2, 3, 4, 100, 101, 102], [4, 100, 101, 102, 103, 0, 1, 2]]
    assert sorted(columns[rows == 1].tolist()) == [1, 5]
    assert sorted(columns[rows == 0].tolist()) == [0, 3, 5]


def test_a_stream_shorter_than_a_window_is_repeated() -> None:
    window = Blend({"sw": [FakeIndex(2, 1)]}, 8, 1.0, 0).read(2, 1)  # type: ignore[list-item]
    assert window.tokens.tolist() == [[1, 2, 0, 1, 2, 0, 1, 2, 0]]
    assert starts_of(window, 0) == [1, 2, 4, 5, 7, 8]
    assert window.epochs.tolist() == [5]


def test_starts_are_the_beginnings_of_documents_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        with TokenIndexWriter(tmp_path / name, 100) as writer:
            for _ in range(30):
                writer.add([1, *rng.integers(10, 100, rng.integers(1, 12)), 2])
    order = Blend({"sw": [TokenIndex(tmp_path / name) for name in "ab"], "ur": [TokenIndex(tmp_path / "c")]}, 16, 1.0, 0)
    windows = order.read(0, 200)
    for row in range(200):
        assert starts_of(windows, row) == np.flatnonzero(windows.tokens[row] == 1).tolist()
    assert len(set(windows.languages)) == 2


def test_a_language_without_tokens_is_an_error() -> None:
    with pytest.raises(TokenIndexError, match="language sw has no tokens"):
        blend({"en": 10, "sw": 0})
    with pytest.raises(TokenIndexError, match="no language"):
        blend({})
