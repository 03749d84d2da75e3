"""Windows over long texts: each token once, with the context that was promised, as lm-evaluation-harness cuts them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaxelm.ensemble.packed import Job, batches, pack
from megaxelm.ensemble.windows import Window, Windows
from megaxelm.errors import RoutingError


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 60), st.integers(0, 60))
def test_each_token_is_scored_once_with_its_context(size: int, context: int, length: int, first: int) -> None:
    context = min(context, size)
    found = Windows(size, context).cut(length, 12, min(first, length))
    scored = [position for window in found for position in range(window.first, window.end)]
    assert scored == list(range(min(first, length), length))
    for window in found:
        assert 0 <= window.begin <= window.first < window.end and window.length <= size
        for position in range(window.first, window.end):
            assert position - window.begin + 1 >= min(context, position + 1)
    if found and length <= size:
        assert found == [Window(0, min(first, length), length)], "a text that fits is read in one go"


@settings(deadline=None)  # the first one imports the harness
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 60))
def test_windows_are_those_of_the_harness(size: int, context: int, length: int) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed")
    context, ids = min(context, size), list(range(100, 100 + length))
    expected = list(utils.get_rolling_token_windows(ids, 7, size, context))
    text = [7, *ids]
    found = [(text[begin:end], ids[first:end]) for begin, first, end in Windows(size, context).cut(length, 12)]
    assert found == expected


def test_the_default_is_all_positions_of_which_half_is_context() -> None:
    assert Windows().cut(20, 8) == [Window(0, 0, 8), Window(5, 8, 13), Window(10, 13, 18), Window(12, 18, 20)]
    assert Windows().resolve(1) == (1, 1)


@pytest.mark.parametrize(("size", "context", "words"), [(0, None, "window = 0"), (9, None, "choose 1 to 8"), (4, 5, "min_context = 5")])
def test_a_window_that_cannot_be_is_refused(size: int, context: int | None, words: str) -> None:
    with pytest.raises(RoutingError, match=words):
        Windows(size, context).cut(3, 8)


def test_a_packed_window_reads_its_context_and_scores_its_rows() -> None:
    documents = [[10, 11, 12, 13, 14], [20, 21]]
    packed = pack(documents, [Job(0, Window(2, 3, 5)), Job(1, Window(0, 0, 2))], 1)
    assert packed.tokens.tolist() == [11, 12, 13, 1, 20]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1] and packed.cu_seqlens.tolist() == [0, 3, 5]
    assert packed.rows is not None and packed.rows.tolist() == [1, 2, 3, 4]
    assert packed.labels.tolist() == [13, 14, 20, 21] and packed.counts == [2, 2]
    assert pack(documents, [Job(1, Window(0, 0, 2))], 1).rows is None


def test_batches_hold_similar_lengths_under_the_budget() -> None:
    assert list(batches([3, 0, 9, 4, 2], 6)) == [[2], [3], [0, 4]]
