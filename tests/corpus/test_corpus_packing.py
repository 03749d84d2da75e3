"""Packing: segments, positions, labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaxelm.corpus.packing import IGNORED, pack
from megaxelm.corpus.sampling import Blend, Windows
from megaxelm.corpus.token_index import TokenIndex, TokenIndexWriter


def windows(tokens: list[list[int]], first_sample: int = 0, begin: int = 1) -> Windows:
    """Windows in which every token `begin` begins a document."""
    array = np.array(tokens, np.int64)
    rows, columns = np.nonzero(array == begin)
    samples = np.arange(first_sample, first_sample + len(tokens))
    return Windows(array, rows, columns, tuple(f"l{sample}" for sample in samples), samples, np.zeros(len(tokens), np.int64))


# 1 begins a document, 2 ends it
TWO = [[7, 8, 2, 1, 9, 2, 1], [1, 5, 5, 5, 2, 1, 6]]


def test_documents_are_segments_with_positions_of_their_own() -> None:
    batch = pack(windows(TWO, 4), document_mask=True)
    assert batch.tokens.tolist() == [7, 8, 2, 1, 9, 2, 1, 5, 5, 5, 2, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 11, 12]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 0]
    assert batch.labels.tolist() == [8, 2, -100, 9, 2, -100, 5, 5, 5, 2, -100, 6]
    assert (batch.num_targets, batch.max_seqlen) == (9, 5)
    assert batch.sample_ids.tolist() == [4] * 6 + [5] * 6
    assert batch.languages == ("l4", "l5")


def test_without_the_mask_a_segment_is_a_window() -> None:
    batch = pack(windows(TWO, 4), document_mask=False)
    assert batch.cu_seqlens.tolist() == [0, 6, 12]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert batch.labels.tolist() == [8, 2, 1, 9, 2, 1, 5, 5, 5, 2, 1, 6]
    assert batch.num_targets == 12


def test_types_are_what_the_model_takes() -> None:
    batch = pack(windows(TWO), document_mask=True).to("cpu")
    assert str(batch.cu_seqlens.dtype) == "torch.int32"
    assert {str(getattr(batch, name).dtype) for name in ("tokens", "labels", "positions", "sample_ids")} == {"torch.int64"}


@pytest.mark.parametrize("document_mask", [True, False])
def test_packing_leaves_the_windows_as_they_were(document_mask: bool) -> None:
    """A single window is one contiguous array, of which inputs and labels must not both be views."""
    one = windows([[1, 3, 2, 1, 4, 2, 5]])
    batch = pack(one, document_mask)
    assert one.tokens.tolist() == [[1, 3, 2, 1, 4, 2, 5]]
    assert batch.tokens.tolist() == [1, 3, 2, 1, 4, 2]
    assert batch.labels.tolist() == [3, 2, IGNORED if document_mask else 1, 4, 2, 5]


def test_no_label_is_the_first_token_of_another_document() -> None:
    rng = np.random.default_rng(1)
    batch = pack(windows(rng.integers(0, 3, (20, 33)).tolist()), document_mask=True)
    assert 1 not in batch.labels.tolist()
    begins = set(batch.cu_seqlens.tolist())
    assert all((i in begins) == (position == 0) for i, position in enumerate(batch.positions.tolist()))


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25),
    length=st.integers(1, 24),
    epochs=st.integers(1, 3),
    micro_batch=st.integers(1, 5),
    document_mask=st.booleans(),
)
def test_packing_wastes_nothing(
    tmp_path: Path, lengths: list[int], length: int, epochs: int, micro_batch: int, document_mask: bool
) -> None:
    """From files to labels: over whole epochs every token is a label as often as there were epochs, or is the first of its document."""
    ids = np.arange(sum(lengths))
    with TokenIndexWriter(tmp_path / "sw", 10_000) as writer:
        writer.add_many(ids, np.array(lengths))
    firsts = np.cumsum([0, *lengths])[:-1]
    order = Blend({"sw": [TokenIndex(tmp_path / "sw")]}, length, 1.0, 0)
    samples, labels = order.first_window("sw", epochs), []
    for first in range(0, samples, micro_batch):
        batch = pack(order.read(first, min(micro_batch, samples - first)), document_mask)
        follows = (batch.tokens + 1) % len(ids)
        kept = batch.labels != IGNORED
        assert (batch.labels[kept] == follows[kept]).all(), "every label is the token behind its input"
        assert int(kept.sum()) == batch.num_targets
        if document_mask:
            assert not set(batch.labels[kept].tolist()) & set(firsts.tolist()), "no document is predicted from the end of another"
        labels += batch.labels[kept].tolist()
    expected = np.full(len(ids), epochs)
    expected[0] -= 1
    np.add.at(expected, np.arange(samples * length - (epochs * len(ids) - 1)) % len(ids), 1)
    if document_mask:
        expected[firsts] = 0
    assert np.bincount(np.array(labels, np.int64), minlength=len(ids)).tolist() == expected.tolist()
