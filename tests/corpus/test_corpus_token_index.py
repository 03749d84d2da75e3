"""The Megatron token index: golden bytes, reading back, and damage of every kind."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megaxelm.corpus import token_index
from megaxelm.corpus.index_merge import merge_indexes
from megaxelm.corpus.token_index import TokenIndex, TokenIndexWriter, write_idx
from megaxelm.errors import TokenIndexError
from megaxelm.files import hash_file

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


def window(index: TokenIndex, place: int, size: int) -> tuple[list[int], list[int]]:
    """Tokens of one window, and the positions in it where documents begin."""
    out = np.full((3, size), -1, np.int64)
    rows, columns = index.read(np.array([place]), out, np.array([1]))
    assert set(rows.tolist()) <= {1} and (out[[0, 2]] == -1).all()
    return out[1].tolist(), columns.tolist()


def test_the_index_is_the_golden_one_byte_for_byte(golden: Path) -> None:
    assert golden.with_suffix(".idx").read_bytes() == GOLDEN
    assert golden.with_suffix(".bin").read_bytes() == np.array([1, 2, 3, 4, 5, 6], "<i4").tobytes()


def test_documents_and_tokens_come_back(golden: Path) -> None:
    index = TokenIndex(golden)
    index.verify(vocab_size=7)
    assert [index.document(i).tolist() for i in range(3)] == DOCUMENTS
    assert index.tokens(2, 3).tolist() == [3, 4, 5]
    assert index.document_lengths(0, 3).tolist() == [3, 2, 1]
    assert index.document_lengths(1, 100).tolist() == [2, 1]
    assert (index.num_documents, index.num_tokens) == (3, 6)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, "uint16"), (65500, "int32")])
def test_small_vocabularies_take_two_bytes_a_token(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    index = TokenIndex(write(tmp_path / "x", [[vocab_size - 1, 0]], vocab_size))
    assert index.dtype == np.dtype(dtype)
    assert index.document(0).tolist() == [vocab_size - 1, 0]


def test_an_index_without_documents_opens(tmp_path: Path) -> None:
    index = TokenIndex(write(tmp_path / "x", [], 100))
    index.verify()
    assert (index.num_documents, index.num_tokens, index.document_lengths(0, 5).tolist()) == (0, 0, [])


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


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (46, np.int64(4), "pointers run from 4 to 20 with a last length of 1"),
        (62, np.int64(-(2**63)), "pointers run from 0 to -9223372036854775808"),
        (62, np.int64(18), "pointers run from 0 to 18"),
        (42, np.int32(-1), "with a last length of -1"),
        (62, np.int64(2**62), "the last sequence ends at 4611686018427387908"),
        (70, np.int64(1), "document index runs from 1 to 3, not from 0 to 3"),
        (94, np.int64(4), "document index runs from 0 to 4, not from 0 to 3"),
    ],
)
def test_ends_that_cannot_be_are_found_on_opening(golden: Path, place: int, value: np.generic, words: str) -> None:
    data = value.tobytes()
    golden.with_suffix(".idx").write_bytes(GOLDEN[:place] + data + GOLDEN[place + len(data) :])
    with pytest.raises(TokenIndexError, match=words):
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


def attempt(call: Callable[[], Any]) -> Any:
    """The result, or None where a TokenIndexError says that there is none; any other exception fails the test."""
    try:
        return call()
    except TokenIndexError:
        return None


def true_documents(prefix: Path, index: TokenIndex) -> list[list[int] | None]:
    """Every document as its sequences say, worked out in plain Python; None where they are not in one piece within `.bin`."""
    raw, data = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    sequences, entries = struct.unpack_from("<QQ", raw, 18)
    lengths = struct.unpack_from(f"<{sequences}i", raw, 34)
    pointers = struct.unpack_from(f"<{sequences}q", raw, 34 + 4 * sequences)
    borders = struct.unpack_from(f"<{entries}q", raw, 34 + 12 * sequences)
    itemsize, documents = index.dtype.itemsize, []
    for first, last in zip(borders, borders[1:], strict=False):
        proper = 0 <= first <= last <= sequences
        inside = range(first, last) if proper else ()
        ends = [pointers[i] + lengths[i] * itemsize for i in inside]
        proper = proper and all(pointers[i] >= 0 and pointers[i] % itemsize == 0 and lengths[i] >= 0 for i in inside)
        proper = proper and all(end <= index.num_tokens * itemsize for end in ends) and [pointers[i] for i in inside][1:] == ends[:-1]
        part = data[pointers[first] : ends[-1]] if proper and ends else b""
        documents.append(np.frombuffer(part, index.dtype).astype(np.int64).tolist() if proper else None)
    return documents


def use_everything(prefix: Path) -> None:
    """Whatever the files hold: a TokenIndexError, or what they say."""
    index = attempt(lambda: TokenIndex(prefix))
    if index is None:
        return
    data = np.frombuffer(prefix.with_suffix(".bin").read_bytes()[: index.num_tokens * index.dtype.itemsize], index.dtype)
    assert len(data) == index.num_tokens
    truth = true_documents(prefix, index)
    assert [attempt(lambda i=i: index.document(i).tolist()) for i in range(index.num_documents)] == truth
    lengths = attempt(lambda: index.document_lengths(0, index.num_documents))
    assert lengths is None or ((lengths >= 0).all() and lengths.sum() <= index.num_tokens)
    sound = bool(attempt(lambda: index.verify() or True))
    whole = [token for document in truth for token in document or ()]
    assert not sound or whole == data.astype(np.int64).tolist(), "what passes verify() is every token once, in order"
    starts = {sum(map(len, truth[:i])) for i, document in enumerate(truth) if document} if sound else set()
    for place in range(min(index.num_tokens, 8)):
        for size in {1, min(3, index.num_tokens - place), index.num_tokens - place}:
            found = attempt(lambda place=place, size=size: window(index, place, size))
            assert found is not None or not sound
            if found is not None:
                assert found[0] == data[place : place + size].astype(np.int64).tolist()
                assert found[1] == sorted(found[1]) and all(0 <= column < size for column in found[1])
                assert not sound or {place + column for column in found[1]} == {start for start in starts if place <= start < place + size}


# Values that mean something where they stand: small numbers, ends of ranges, and near misses of pointers.
NUMBERS = st.one_of(st.integers(-3, 30), st.sampled_from([2**31, 2**32 - 1, 2**62, 2**63 - 1, -(2**63), 2**63 - 4]))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_gives_a_token_index_error_or_nothing(golden: Path, data: st.DataObject) -> None:
    idx = bytearray(GOLDEN)
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            idx[data.draw(st.integers(0, len(idx) - 1))] = data.draw(st.integers(0, 255))
        else:
            field = data.draw(st.sampled_from([18, 26, *range(46, 102, 8)]))
            idx[field : field + 8] = (data.draw(NUMBERS) % 2**64).to_bytes(8, "little")
    idx = idx[: data.draw(st.sampled_from([len(idx)] * 9 + [len(idx) - 8]))]
    golden.with_suffix(".idx").write_bytes(bytes(idx))
    golden.with_suffix(".bin").write_bytes(bytes(range(data.draw(st.sampled_from([24] * 6 + [0, 23, 25, 28, 48])))))
    use_everything(golden)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    code=st.integers(0, 9),
    sequences=st.integers(0, 5),
    documents=st.integers(0, 5),
    body=st.lists(NUMBERS, min_size=12, max_size=12),
    bin_size=st.integers(0, 40),
)
def test_any_entries_behind_a_proper_header_do_no_harm(
    tmp_path: Path, code: int, sequences: int, documents: int, body: list[int], bin_size: int
) -> None:
    header = GOLDEN[:17] + bytes([code]) + sequences.to_bytes(8, "little") + documents.to_bytes(8, "little")
    filling = b"".join((value % 2**64).to_bytes(8, "little") for value in body) * 2
    (tmp_path / "x.idx").write_bytes(header + filling[: 12 * sequences + 8 * documents])
    (tmp_path / "x.bin").write_bytes(bytes(range(bin_size)))
    use_everything(tmp_path / "x")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(idx=st.binary(max_size=200), content=st.binary(max_size=40), proper=st.booleans())
def test_random_bytes_do_no_harm(tmp_path: Path, idx: bytes, content: bytes, proper: bool) -> None:
    (tmp_path / "x.idx").write_bytes(GOLDEN[:17] * proper + idx)
    (tmp_path / "x.bin").write_bytes(content)
    use_everything(tmp_path / "x")


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
    assert index.document_lengths(0, 2).tolist() == [5, 1]
    assert window(index, 0, 6) == ([1, 2, 3, 4, 5, 6], [0, 5])
    assert window(index, 1, 4) == ([2, 3, 4, 5], [])
    assert window(index, 3, 3) == ([4, 5, 6], [2])


def test_a_document_in_two_places_is_an_error(tmp_path: Path) -> None:
    index = write_raw(tmp_path / "x", [[[1], [2]], [[3]], [[4]]])
    path = index.with_suffix(".idx")
    data = bytearray(path.read_bytes())
    data[34 + 4 * 4 + 8] = 4  # the second sequence of the first document begins where the second document does
    path.write_bytes(bytes(data))
    with pytest.raises(TokenIndexError, match="document 0 does not lie in one piece"):
        TokenIndex(index).document(0)
    assert TokenIndex(index).document(2).tolist() == [4]


def test_a_negative_length_that_its_neighbours_agree_with_is_an_error(golden: Path) -> None:
    lengths, pointers = np.array([3, -1, 4], "<i4"), np.array([0, 12, 8], "<i8")
    golden.with_suffix(".idx").write_bytes(GOLDEN[:34] + lengths.tobytes() + pointers.tobytes() + GOLDEN[70:])
    index = TokenIndex(golden)
    for call in (lambda: window(index, 0, 6), index.verify, lambda: index.document(1)):
        with pytest.raises(TokenIndexError):
            call()


def test_pointers_between_two_tokens_are_an_error(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x", [[[i] * 10] for i in range(100)]).with_suffix(".idx")
    data = bytearray(path.read_bytes())
    np.frombuffer(data, "<i8", 40, 34 + 4 * 100 + 8 * 50)[:] += 1
    path.write_bytes(bytes(data))
    index = TokenIndex(tmp_path / "x")
    assert window(index, 150, 30)[1] == [0, 10, 20]
    with pytest.raises(TokenIndexError, match="sequences do not lie one after the other"):
        window(index, 700, 30)


def test_as_many_documents_as_sequences_need_not_be_one_each(tmp_path: Path) -> None:
    index = TokenIndex(write_raw(tmp_path / "x", [[[1], [2]], [], [[3]]]))
    index.verify()
    assert window(index, 0, 3) == ([1, 2, 3], [0, 2])


@pytest.mark.parametrize(
    ("place", "value"), [(54, -8), (54, 4), (54, 8), (54, 16), (54, 2**62), (34, 2), (38, 3), (42, 0), (78, -8), (78, 4), (86, -3), (86, 9)]
)
def test_a_window_over_damage_is_an_error(golden: Path, place: int, value: int) -> None:
    """Without `verify()`: a pointer, a length or an entry of the document index that is wrong in the middle of the file."""
    data = value.to_bytes(4 if place < 46 else 8, "little", signed=True)
    golden.with_suffix(".idx").write_bytes(GOLDEN[:place] + data + GOLDEN[place + len(data) :])
    with pytest.raises(TokenIndexError):
        window(TokenIndex(golden), 0, 6)


def random_documents(rng: np.random.Generator, count: int, empty: bool = False) -> list[list[list[int]]]:
    """Documents of one or several sequences; with `empty`, some sequences and some documents have nothing in them."""
    low = 0 if empty else 1
    return [
        [rng.integers(0, 900, rng.integers(low, 9)).tolist() for _ in range(rng.integers(low, 4) if rng.random() < 0.5 else 1)]
        for _ in range(count)
    ]


def write_megatron(prefix: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> Path:
    """The index that megatron-core's own builder writes."""
    torch = pytest.importorskip("torch")
    builder = pytest.importorskip("megatron.core.datasets.indexed_dataset").IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.uint8])
def test_an_index_that_megatron_wrote_is_read(tmp_path: Path, dtype: type) -> None:
    documents = [[[7, 8], [9]], [[1]], [[2, 3, 4], [5], [6]]]
    index = TokenIndex(write_megatron(tmp_path / "x", documents, dtype))
    index.verify()
    assert [index.document(i).tolist() for i in range(3)] == [[7, 8, 9], [1], [2, 3, 4, 5, 6]]
    assert window(index, 2, 6) == ([9, 1, 2, 3, 4, 5], [1, 2])


def test_megatron_reads_what_is_written_here(tmp_path: Path) -> None:
    documents = [[list(range(i, 2 * i + 1))] for i in range(40)]
    with TokenIndexWriter(tmp_path / "x", 100) as writer:
        for document in documents:
            writer.add(document[0])
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset").IndexedDataset(str(tmp_path / "x"), mmap=True)
    assert [theirs[i].tolist() for i in range(len(theirs))] == [document[0] for document in documents]
    assert theirs.document_indices.tolist() == list(range(41))
    write_megatron(tmp_path / "y", documents)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"x.{ending}").read_bytes() == (tmp_path / f"y.{ending}").read_bytes()


def test_several_documents_at_once_are_the_documents_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 900, rng.integers(1, 30)).tolist() for _ in range(300)]
    with TokenIndexWriter(tmp_path / "many", 1000) as writer:
        for part in (documents[:120], [], documents[120:121], documents[121:]):
            writer.add_many(np.array(sum(part, []), np.uint16), np.array([len(document) for document in part], np.int64))
        assert (writer.num_documents, writer.num_tokens) == (300, sum(map(len, documents)))
    write(tmp_path / "one", documents, 1000)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"many.{ending}").read_bytes() == (tmp_path / f"one.{ending}").read_bytes()


def test_many_documents_with_one_wrong_are_refused_whole(tmp_path: Path) -> None:
    with TokenIndexWriter(tmp_path / "x", 100) as writer:
        writer.add([1, 2])
        with pytest.raises(TokenIndexError, match="document 3 has token id 100, outside of the vocabulary 0..99"):
            writer.add_many(np.array([1, 2, 3, 100, 5]), np.array([1, 2, 2]))
        with pytest.raises(TokenIndexError, match="document 2 has 0 tokens"):
            writer.add_many(np.array([1, 2]), np.array([1, 0, 1]))
    index = TokenIndex(tmp_path / "x")
    index.verify(100)
    assert index.num_documents == 1


def test_the_hashes_of_the_writer_are_those_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_index, "_FLUSH_BYTES", 500)
    monkeypatch.setattr(token_index, "_CHUNK", 7)
    writer = TokenIndexWriter(tmp_path / "x", 70_000)
    documents = [[*range(i % 13 + 1)] for i in range(100)]
    for document in documents:
        writer.add(document)
    assert writer.close() == {ending: hash_file(tmp_path / f"x.{ending}") for ending in ("bin", "idx")}
    index = TokenIndex(tmp_path / "x")
    index.verify(70_000)
    assert [index.document(i).tolist() for i in range(100)] == documents
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_a_writer_keeps_nothing_of_its_documents_in_memory(tmp_path: Path) -> None:
    tokens, lengths = np.ones(400_000, np.uint16), np.ones(400_000, np.int64)
    with TokenIndexWriter(tmp_path / "x", 10) as writer:
        tracemalloc.start()
        for _ in range(3):
            writer.add_many(tokens, lengths)
        del tokens, lengths
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert kept < 100_000, "less than a byte for a dozen documents"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), empty=st.booleans(), multiple=st.booleans())
def test_windows_know_where_documents_begin(tmp_path: Path, seed: int, empty: bool, multiple: bool) -> None:
    rng = np.random.default_rng(seed)
    documents = random_documents(rng, 25, empty)
    if not multiple:
        documents = [[sum(document, [])] for document in documents]
    index = TokenIndex(write_raw(tmp_path / "x", documents))
    index.verify()
    whole = [sum(document, []) for document in documents]
    tokens, begins = sum(whole, []), np.cumsum([0, *map(len, whole)])[:-1]
    assert [index.document(i).tolist() for i in range(len(whole))] == whole
    size = int(rng.integers(1, 20))
    if index.num_tokens < size:
        return
    places = rng.integers(0, index.num_tokens - size + 1, 6)
    out = np.empty((6, size), np.int64)
    rows, columns = index.read(places, out, np.arange(6))
    for row, place in enumerate(places.tolist()):
        assert out[row].tolist() == tokens[place : place + size]
        expected = {int(begin) - place for begin in begins if place <= begin < place + size}
        assert set(columns[rows == row].tolist()) == expected


def write_raw(prefix: Path, documents: list[list[list[int]]]) -> Path:
    """An index with documents of any number of sequences, written by numpy alone."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = np.array([len(sequence) for sequence in sequences], "<i4")
    pointers = 2 * (np.cumsum(lengths) - lengths).astype("<i8")
    ends = np.cumsum([0, *map(len, documents)]).astype("<i8")
    header = GOLDEN[:17] + bytes([8]) + np.array([len(sequences), len(ends)], "<u8").tobytes()
    prefix.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + ends.tobytes())
    prefix.with_suffix(".bin").write_bytes(np.array(sum(sequences, []), "<u2").tobytes())
    return prefix


def test_a_window_of_nothing_but_short_documents_finds_them_all(tmp_path: Path) -> None:
    """Long documents in front make the mean useless as a guess of how many begin in a window."""
    documents = [[[1] * 50_000], *[[[2]]] * 300, *[[[]]] * 400, [[3]]]
    index = TokenIndex(write_raw(tmp_path / "x", documents))
    tokens, columns = window(index, 49_900, 401)
    assert tokens == [1] * 100 + [2] * 300 + [3]
    assert set(columns) == set(range(100, 401))


def test_pointers_do_not_overflow(tmp_path: Path) -> None:
    lengths = np.full(6, 2**30, np.int32)
    write_idx(tmp_path / "x.idx", np.dtype("<u2"), 6, 7, lambda: [lengths[:4], lengths[4:]], [np.arange(7)])
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(6 * 2**31)
    index = TokenIndex(tmp_path / "x")
    assert index.num_tokens == 6 * 2**30
    assert index.document_lengths(0, 6).tolist() == [2**30] * 6


def test_opening_and_sampling_touch_few_pages(tmp_path: Path) -> None:
    """The cost does not grow with the documents: of a large index only some pages are ever read."""
    documents, tokens = 3_000_000, 300_000_000
    lengths = np.full(documents, 100)
    write_idx(tmp_path / "x.idx", np.dtype("<u2"), documents, documents + 1, lambda: [lengths], [np.arange(documents + 1)])
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(2 * tokens)
    tracemalloc.start()
    index = TokenIndex(tmp_path / "x")
    _, columns = window(index, 123_456_789, 300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert columns == [11, 111, 211]
    assert peak < 200_000, "nothing is built or copied: an array over the documents would take 24 MB"


def test_merged_indexes_are_one_behind_the_other(tmp_path: Path) -> None:
    parts = [[[[1, 2], [3]], [[4]]], [[[5]]], [[[6], [7, 8, 9]]]]
    prefixes = [write_raw(tmp_path / f"part{i}", part) for i, part in enumerate(parts)]
    hashes = merge_indexes(prefixes, tmp_path / "all")
    assert hashes == {ending: hash_file(tmp_path / f"all.{ending}") for ending in ("bin", "idx")}
    expected = write_raw(tmp_path / "expected", sum(parts, []))
    for ending in (".bin", ".idx"):
        assert (tmp_path / "all").with_suffix(ending).read_bytes() == expected.with_suffix(ending).read_bytes()


def test_what_does_not_fit_is_not_merged(tmp_path: Path, golden: Path) -> None:
    small = write(tmp_path / "small", [[1, 2]], 100)
    with pytest.raises(TokenIndexError, match="holds uint16 and .*en int32"):
        merge_indexes([golden, small], tmp_path / "all")
    with pytest.raises(TokenIndexError, match="token ids run from 1 to 2, the vocabulary is 0..1"):
        merge_indexes([small, small], tmp_path / "all", vocab_size=2)
    with pytest.raises(TokenIndexError, match=r"small\.bin exists"):
        merge_indexes([small], small)
    with pytest.raises(TokenIndexError, match="nothing to merge"):
        merge_indexes([], tmp_path / "all")
    with pytest.raises(TokenIndexError, match="no such folder"):
        merge_indexes([small], tmp_path / "nowhere" / "all")
    small.with_suffix(".bin").write_bytes(b"\1\0\2\0\0")
    with pytest.raises(TokenIndexError, match="has 5 bytes"):
        merge_indexes([small], tmp_path / "all")
    assert not (tmp_path / "all.bin").exists()
