"""The Megatron token index: golden bytes, reading back, and damage of every kind."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaxelm.corpus.token_index import TokenIndex, TokenIndexWriter
from megaxelm.errors import TokenIndexError

DOCUMENTS = [[1, 2, 3], [4, 5], [6]]
GOLDEN = bytes.fromhex(
    "4d4d49444944580000010000000000000004030000000000000004000000000000000300000002000000010000000000000000"
    "0000000c0000000000000014000000000000000000000000000000010000000000000002000000000000000300000000000000"
)


def write(prefix: Path, documents: list[list[int]], vocab_size: int) -> Path:
    with TokenIndexWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return prefix


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return write(tmp_path / "en", DOCUMENTS, 256008)


def read_everything(prefix: Path) -> None:
    index = TokenIndex(prefix)
    index.verify()
    for i in range(index.num_documents):
        index.document(i)


def test_the_index_is_the_golden_one_byte_for_byte(golden: Path) -> None:
    assert golden.with_suffix(".idx").read_bytes() == GOLDEN
    assert golden.with_suffix(".bin").read_bytes() == np.array([1, 2, 3, 4, 5, 6], "<i4").tobytes()


def test_documents_and_tokens_come_back(golden: Path) -> None:
    index = TokenIndex(golden)
    index.verify(vocab_size=7)
    assert [index.document(i).tolist() for i in range(3)] == DOCUMENTS
    assert index.tokens(2, 3).tolist() == [3, 4, 5]
    assert index.document_starts.tolist() == [0, 3, 5, 6]
    assert (index.num_documents, index.num_tokens) == (3, 6)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32")])
def test_small_vocabularies_take_two_bytes_a_token(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    index = TokenIndex(write(tmp_path / "x", [[vocab_size - 1, 0]], vocab_size))
    assert index.dtype == np.dtype(dtype)
    assert index.document(0).tolist() == [vocab_size - 1, 0]


def test_an_index_without_documents_opens(tmp_path: Path) -> None:
    index = TokenIndex(write(tmp_path / "x", [], 100))
    index.verify()
    assert (index.num_documents, index.num_tokens, index.document_starts.tolist()) == (0, 0, [0])


def test_a_prefix_with_a_dot_keeps_its_name(tmp_path: Path) -> None:
    write(tmp_path / "zh.hans", [[1]], 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zh.hans.bin", "zh.hans.idx"]


@pytest.mark.parametrize("ids", [[5, 100], [-1], [], [70000]])
def test_ids_outside_of_the_vocabulary_are_refused(tmp_path: Path, ids: list[int]) -> None:
    with TokenIndexWriter(tmp_path / "x", 100) as writer, pytest.raises(TokenIndexError, match="document 0"):
        writer.add(ids)


def test_a_writer_that_died_leaves_nothing_that_opens(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1]], 10)
    with pytest.raises(RuntimeError), TokenIndexWriter(tmp_path / "x", 10) as writer:
        writer.add([1])
        raise RuntimeError
    with pytest.raises(TokenIndexError, match=r"x\.idx is missing"):
        TokenIndex(tmp_path / "x")


def test_more_than_one_flush_is_one_index(tmp_path: Path) -> None:
    documents = [np.arange(200_000) % 50_000 + i for i in range(8)]
    with TokenIndexWriter(tmp_path / "x", 60_000) as writer:
        for document in documents:
            writer.add(document)
    index = TokenIndex(tmp_path / "x")
    index.verify(60_000)
    assert all((index.document(i) == document).all() for i, document in enumerate(documents))


def test_an_idx_cut_at_any_byte_is_an_error(golden: Path) -> None:
    for size in range(len(GOLDEN)):
        golden.with_suffix(".idx").write_bytes(GOLDEN[:size])
        with pytest.raises(TokenIndexError):
            TokenIndex(golden)


def test_a_bin_cut_at_any_byte_is_an_error(golden: Path) -> None:
    data = golden.with_suffix(".bin").read_bytes()
    for size in range(len(data)):
        golden.with_suffix(".bin").write_bytes(data[:size])
        with pytest.raises(TokenIndexError, match="cut"):
            TokenIndex(golden)


@pytest.mark.parametrize("code", [0, 6, 7, 9, 255])
def test_unknown_and_float_types_are_refused(golden: Path, code: int) -> None:
    golden.with_suffix(".idx").write_bytes(GOLDEN[:17] + bytes([code]) + GOLDEN[18:])
    with pytest.raises(TokenIndexError, match=f"dtype code {code}"):
        TokenIndex(golden)


def test_pointers_that_overflowed_are_found(golden: Path) -> None:
    broken = np.frombuffer(GOLDEN[46:70], "<i8").copy()
    broken[1] = 8
    golden.with_suffix(".idx").write_bytes(GOLDEN[:46] + broken.tobytes() + GOLDEN[70:])
    with pytest.raises(TokenIndexError, match="sequence 1 begins at byte 8, the ones before it end at 12"):
        TokenIndex(golden).verify()


def test_verify_finds_ids_beyond_the_vocabulary_and_bytes_too_many(golden: Path) -> None:
    with pytest.raises(TokenIndexError, match="run from 1 to 6"):
        TokenIndex(golden).verify(vocab_size=6)
    golden.with_suffix(".bin").write_bytes(golden.with_suffix(".bin").read_bytes() + b"\0\0\0\0")
    with pytest.raises(TokenIndexError, match="has 28 bytes"):
        TokenIndex(golden).verify()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_gives_a_token_index_error_or_nothing(golden: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOLDEN)
    for place, value in changes:
        data[place] = value
    golden.with_suffix(".idx").write_bytes(bytes(data))
    try:
        read_everything(golden)
    except TokenIndexError:
        return
    # what passes verify() reads as something of the same tokens
    assert TokenIndex(golden).num_tokens <= 24


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.lists(st.integers(0, 65498), min_size=1, max_size=20), max_size=12))
def test_any_documents_come_back(tmp_path: Path, documents: list[list[int]]) -> None:
    index = TokenIndex(write(tmp_path / "x", documents, 65499))
    index.verify(65499)
    assert [index.document(i).tolist() for i in range(index.num_documents)] == documents


def test_an_index_pickles_as_its_path(golden: Path) -> None:
    data = pickle.dumps(TokenIndex(golden))
    assert len(data) < 1000
    assert pickle.loads(data).document(1).tolist() == [4, 5]


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 7), (6, 1)])
def test_tokens_that_do_not_exist_are_an_error(golden: Path, start: int, count: int) -> None:
    with pytest.raises(TokenIndexError, match="there are 6"):
        TokenIndex(golden).tokens(start, count)


def test_documents_of_several_sequences_are_whole(golden: Path) -> None:
    """Megatron allows a document to be several sequences: here [1, 2, 3, 4, 5] and [6]."""
    header = GOLDEN[:26] + np.array([3], "<u8").tobytes() + GOLDEN[34:70]
    golden.with_suffix(".idx").write_bytes(header + np.array([0, 2, 3], "<i8").tobytes())
    index = TokenIndex(golden)
    index.verify()
    assert [index.document(i).tolist() for i in range(2)] == [[1, 2, 3, 4, 5], [6]]
