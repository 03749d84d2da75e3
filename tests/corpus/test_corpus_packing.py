"""Packing: segments, positions, labels."""

from __future__ import annotations

import numpy as np

from megaxelm.corpus.packing import pack
from megaxelm.corpus.sampling import Window


def window(tokens: list[int], starts: list[int], sample: int = 0) -> Window:
    return Window(np.array(tokens), np.array(starts, dtype=np.int64), f"l{sample}", sample, 0)


# 1 begins a document, 2 ends it
FIRST = window([7, 8, 2, 1, 9, 2, 1], [3, 6], sample=4)
SECOND = window([1, 5, 5, 5, 2, 1, 6], [0, 5], sample=5)


def test_documents_are_segments_with_positions_of_their_own() -> None:
    batch = pack([FIRST, SECOND], document_mask=True)
    assert batch.tokens.tolist() == [7, 8, 2, 1, 9, 2, 1, 5, 5, 5, 2, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 11, 12]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 0]
    assert batch.labels.tolist() == [8, 2, -100, 9, 2, -100, 5, 5, 5, 2, -100, 6]
    assert (batch.num_targets, batch.max_seqlen) == (9, 5)
    assert batch.sample_ids.tolist() == [4] * 6 + [5] * 6
    assert batch.languages == ("l4", "l5")


def test_without_the_mask_a_segment_is_a_window() -> None:
    batch = pack([FIRST, SECOND], document_mask=False)
    assert batch.cu_seqlens.tolist() == [0, 6, 12]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert batch.labels.tolist() == [8, 2, 1, 9, 2, 1, 5, 5, 5, 2, 1, 6]
    assert batch.num_targets == 12


def test_types_are_what_the_model_takes() -> None:
    batch = pack([FIRST], document_mask=True).to("cpu")
    assert str(batch.cu_seqlens.dtype) == "torch.int32"
    assert {str(getattr(batch, name).dtype) for name in ("tokens", "labels", "positions", "sample_ids")} == {"torch.int64"}


def test_no_label_is_the_first_token_of_another_document() -> None:
    rng = np.random.default_rng(1)
    windows = []
    for sample in range(20):
        tokens = rng.integers(0, 3, 33)
        windows.append(window(tokens.tolist(), np.flatnonzero(tokens == 1).tolist(), sample))
    batch = pack(windows, document_mask=True)
    assert 1 not in batch.labels.tolist()
    begins = set(batch.cu_seqlens.tolist())
    assert all((i in begins) == (position == 0) for i, position in enumerate(batch.positions.tolist()))
