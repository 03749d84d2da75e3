"""Megatron token index: `<prefix>.bin` holds raw tokens, `<prefix>.idx` lengths, byte pointers and documents (little endian).

Layout of `.idx`: magic (9 bytes), version uint64 = 1, dtype code uint8, S sequences uint64, D = documents + 1 uint64, then int32
[S] lengths in tokens, int64 [S] byte pointers into `.bin`, int64 [D] document index (first 0, last S). Other readers check
only magic and version. This one checks sizes and ends on opening, every look-up against its neighbours, and all the rest in `verify()`.

Opening and reading cost the same for any number of documents: nothing is built, the documents of a window are found by bisection in the
mapped file.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from megaxelm.errors import TokenIndexError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_UINT16_VOCABULARY = 65500
_FLUSH_BYTES = 1 << 20
_CHUNK = 1 << 20
_MAX_LENGTH = np.iinfo(np.int32).max
_WAY_OUT = "make the index again (megaxelm run --from index)"


def token_dtype(vocab_size: int) -> np.dtype:
    """How tokens of a vocabulary are stored, little endian: uint16 below 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32).newbyteorder("<")


def index_paths(prefix: Path) -> tuple[Path, Path]:
    """`.bin` and `.idx` of a prefix; with_suffix would cut a language code with a dot."""
    return prefix.parent / f"{prefix.name}.bin", prefix.parent / f"{prefix.name}.idx"


class TokenIndexWriter:
    """Writes one token index: uint16 for vocabularies below 65500, else int32.

    No file stays open between calls and memory does not grow with the documents, so that hundreds of writers can live at once: the lengths
    wait in `<prefix>.lengths`. `.idx` is written by `close()` only: a writer that died leaves no index that opens. As a context
    manager it closes on success alone.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.num_tokens = 0
        self.num_documents = 0
        self._dtype = token_dtype(vocab_size)
        self._bin, self._idx = index_paths(self.prefix)
        self._spill = self.prefix.parent / f"{self.prefix.name}.lengths"
        self._tokens = bytearray()
        self._lengths = bytearray()
        self._hash = xxhash.xxh3_128()
        self._idx.unlink(missing_ok=True)
        self._bin.write_bytes(b"")
        self._spill.write_bytes(b"")

    def __enter__(self) -> TokenIndexWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._spill.unlink(missing_ok=True)

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document.

        Raises:
            TokenIndexError: no tokens, or an id outside of the vocabulary.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        self.add_many(tokens, np.array([len(tokens)]))

    def add_many(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents that lie one after the other.

        Args:
            tokens: ids of all of them, integers [sum of lengths].
            lengths: tokens of each, integers [documents].

        Raises:
            TokenIndexError: a document without tokens, or an id outside of the vocabulary; nothing of this call is written then.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(lengths, dtype=np.int64)
        assert tokens.ndim == lengths.ndim == 1 and int(lengths.sum()) == len(tokens), "lengths add up to the tokens"
        if not len(lengths):
            return
        name = self.prefix.name
        if lengths.min() < 1 or lengths.max() > _MAX_LENGTH:
            i = int(np.argmax((lengths < 1) | (lengths > _MAX_LENGTH)))
            raise TokenIndexError(
                f"{name}: document {self.num_documents + i} has {lengths[i]} tokens; every document needs one, and at most 2^31 - 1"
            )
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            place = int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
            i = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
            raise TokenIndexError(
                f"{name}: document {self.num_documents + i} has token id {tokens[place]}, outside of the vocabulary "
                f"0..{self.vocab_size - 1}: the tokenizer is not the one that the vocabulary size was taken from"
            )
        self._tokens += tokens.astype(self._dtype).tobytes()
        self._lengths += lengths.astype("<i4").tobytes()
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)
        if len(self._tokens) + len(self._lengths) >= _FLUSH_BYTES:
            self._flush()

    def close(self) -> dict[str, str]:
        """Write what is pending, then `.idx`. Returns the xxh3_128 of both, {"bin": hex, "idx": hex}, taken while they were written."""
        self._flush()
        index = (np.arange(first, min(first + _CHUNK, self.num_documents + 1)) for first in range(0, self.num_documents + 1, _CHUNK))
        idx_hash = write_idx(self._idx, self._dtype, self.num_documents, self.num_documents + 1, self._read_spill, index)
        self._spill.unlink()
        return {"bin": self._hash.hexdigest(), "idx": idx_hash}

    def _flush(self) -> None:
        for path, data in ((self._bin, self._tokens), (self._spill, self._lengths)):
            with open(path, "ab") as file:
                file.write(data)
        self._hash.update(self._tokens)
        self._tokens.clear()
        self._lengths.clear()

    def _read_spill(self) -> Iterator[np.ndarray]:
        with open(self._spill, "rb") as file:
            while data := file.read(4 * _CHUNK):
                yield np.frombuffer(data, "<i4")


def write_idx(
    path: Path,
    dtype: np.dtype,
    num_sequences: int,
    num_index: int,
    lengths: Callable[[], Iterable[np.ndarray]],
    document_index: Iterable[np.ndarray],
) -> str:
    """Write an `.idx` in pieces and return its xxh3_128; `lengths` is called twice, as the pointers follow from them."""
    code = next(code for code, kind in _DTYPES.items() if np.dtype(kind).newbyteorder("<") == dtype)
    digest = xxhash.xxh3_128()
    with open(path, "wb") as file:

        def put(data: bytes) -> None:
            file.write(data)
            digest.update(data)

        put(_HEADER.pack(_MAGIC, 1, code, num_sequences, num_index))
        for part in lengths():
            put(part.astype("<i4").tobytes())
        end = 0
        for part in lengths():
            # int64 before the sum: the int32 overflow of pointers is the classic defect of this format
            ends = end + np.cumsum(part, dtype=np.int64) * dtype.itemsize
            put((ends - part.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
            end = int(ends[-1])
        for part in document_index:
            put(part.astype("<i8").tobytes())
    return digest.hexdigest()


class TokenIndex:
    """Memory-mapped token index, opened with the checks that cost the same for any size; pickles as its path.

    `sequence_lengths` (tokens, int32 [sequences]) and `document_index` (int64 [documents + 1]: the first sequence of each) are the file's.

    Raises:
        TokenIndexError: missing, truncated or inconsistent files; never another exception for what is in the files.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        bin_path, idx_path = index_paths(self.prefix)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise TokenIndexError(f"token index {self.prefix}: {path.name} is missing; {_WAY_OUT}")
        idx_size, self._bin_size = idx_path.stat().st_size, bin_path.stat().st_size
        with open(idx_path, "rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise self._damaged(f"{idx_path.name} has {len(header)} bytes, its header needs {_HEADER.size}")
        magic, version, code, num_sequences, num_index = _HEADER.unpack(header)
        if magic != _MAGIC:
            raise self._damaged(f"{idx_path.name} does not begin with the magic of a Megatron index")
        if version != 1:
            raise self._damaged(f"{idx_path.name} has version {version}, only 1 is known")
        if code in (6, 7):
            raise self._damaged(f"{idx_path.name} has dtype code {code}, a float that programs disagree about; tokens must be integers")
        if code not in _DTYPES:
            raise self._damaged(f"{idx_path.name} has dtype code {code}; known are {sorted(_DTYPES)}")
        expected = _HEADER.size + 12 * num_sequences + 8 * num_index
        if idx_size != expected:
            raise self._damaged(f"{idx_path.name} has {idx_size} bytes, its header says {expected}")
        if num_index < 1:
            raise self._damaged(f"{idx_path.name} has an empty document index")
        self.dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
        self._map(idx_path, num_sequences, num_index)
        if self.document_index[0] != 0 or self.document_index[-1] != num_sequences:
            raise self._damaged(
                f"the document index runs from {self.document_index[0]} to {self.document_index[-1]}, not from 0 to {num_sequences}"
            )
        self._end = self._checked_end(bin_path)
        self.num_tokens = self._end // self.dtype.itemsize
        self.num_documents = num_index - 1
        # A plain array over the map: slices of a np.memmap cost three times as much.
        raw = np.memmap(bin_path, dtype=self.dtype, mode="r", shape=(self.num_tokens,)) if self._end else np.empty(0, self.dtype)
        self._tokens: np.ndarray = raw.view(np.ndarray)

    def _map(self, idx_path: Path, num_sequences: int, num_index: int) -> None:
        raw = np.memmap(idx_path, dtype=np.uint8, mode="r").view(np.ndarray)
        pointers, index = _HEADER.size + 4 * num_sequences, _HEADER.size + 12 * num_sequences
        self.sequence_lengths = np.frombuffer(raw, "<i4", num_sequences, _HEADER.size)
        self._pointers = np.frombuffer(raw, "<i8", num_sequences, pointers)
        self.document_index = np.frombuffer(raw, "<i8", num_index, index)
        # For bisection. np.searchsorted would copy the whole array, because int64 from byte 34 on are not aligned.
        self._pointer_view = raw[pointers:index].data.cast("q") if num_sequences else ()
        self._index_view = raw[index:].data.cast("q")

    def _checked_end(self, bin_path: Path) -> int:
        """Byte at which the last sequence ends."""
        if not len(self.sequence_lengths):
            return 0
        first, last, length = int(self._pointers[0]), int(self._pointers[-1]), int(self.sequence_lengths[-1])
        if first != 0 or last < 0 or last % self.dtype.itemsize or length < 0:
            raise self._damaged(f"pointers run from {first} to {last} with a last length of {length}")
        end = last + length * self.dtype.itemsize
        if end > self._bin_size:
            raise self._damaged(
                f"{bin_path.name} has {self._bin_size} bytes, the last sequence ends at {end}: it was cut, or is another file's"
            )
        return end

    def __reduce__(self) -> tuple[type[TokenIndex], tuple[Path]]:
        return TokenIndex, (self.prefix,)

    def __repr__(self) -> str:
        return f"TokenIndex({self.prefix.name}: {self.num_documents} documents, {self.num_tokens} tokens)"

    def document(self, i: int) -> np.ndarray:
        """Tokens of document `i`, without a copy.

        Raises:
            TokenIndexError: no such document, or its entries do not lie one after the other within `.bin`.
        """
        if not 0 <= i < self.num_documents:
            raise TokenIndexError(f"token index {self.prefix.name}: document {i} does not exist; there are {self.num_documents}")
        first, last = int(self.document_index[i]), int(self.document_index[i + 1])
        if not 0 <= first <= last <= len(self.sequence_lengths):
            raise self._damaged(f"document {i} runs from sequence {first} to {last} of {len(self.sequence_lengths)}")
        if first == last:
            return self._tokens[:0]
        itemsize = self.dtype.itemsize
        lengths = self.sequence_lengths[first:last].astype(np.int64)
        start = int(self._pointers[first])
        ends = start + np.cumsum(lengths) * itemsize
        within = 0 <= start <= ends[-1] <= self._end and lengths.min() >= 0 and not start % itemsize
        if not within or (self._pointers[first + 1 : last] != ends[:-1]).any():
            raise self._damaged(f"document {i} does not lie in one piece within .bin")
        return self._tokens[start // itemsize : int(ends[-1]) // itemsize]

    def document_lengths(self, first: int, count: int) -> np.ndarray:
        """Tokens of the documents `first` to `first + count`: int64 [at most count]. For statistics over all, in parts."""
        index = self.document_index[first : min(first + count, self.num_documents) + 1]
        if index.min() < 0 or index.max() > len(self.sequence_lengths):
            raise self._damaged("the document index points outside of the sequences")
        inside = index < len(self.sequence_lengths)
        starts = np.full(len(index), self._end)
        starts[inside] = self._pointers[index[inside]]
        lengths: np.ndarray = np.diff(starts) // self.dtype.itemsize
        if starts.min() < 0 or starts.max() > self._end or (len(lengths) and lengths.min() < 0):
            raise self._damaged("documents do not lie one after the other")
        return lengths

    def tokens(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from token offset `start` on, over the borders of documents, without a copy."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise self._beyond(start, count)
        return self._tokens[start : start + count]

    def read(self, places: np.ndarray, out: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copy windows of equal length, and find the documents that begin in them.

        Args:
            places: token offset at which each window begins, int64 [windows], one at least.
            out: where the tokens go, int64 [any number, length].
            rows: the row of `out` for each window, int64 [windows].

        Returns:
            For each beginning of a document, ascending in each window: its row and its position in the window, int64 [beginnings] both.

        Raises:
            TokenIndexError: tokens that do not exist, or documents that do not lie one after the other.
        """
        size = out.shape[1]
        if places.min() < 0 or places.max() + size > self.num_tokens:
            wrong = int(places.min()) if places.min() < 0 else int(places.max())
            raise self._beyond(wrong, size)
        tokens, pointers, itemsize = self._tokens, self._pointer_view, self.dtype.itemsize
        lows = []
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            out[row] = tokens[place : place + size]
            lows.append(bisect_left(pointers, place * itemsize))
        windows, begins = self._beginnings(places, np.array(lows), size)
        return rows[windows], begins // itemsize - places[windows]

    def _beginnings(self, places: np.ndarray, lows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents that begin in windows of `size` tokens, of which `lows` are the first sequences that begin there.

        Sequences and their neighbours must lie one behind the other, from one that begins before the window to one behind it, which proves
        that none is missing wherever else the index may be damaged.

        Returns:
            Number of the window and byte pointer of each, int64 [beginnings] both.
        """
        num_sequences, itemsize = len(self.sequence_lengths), self.dtype.itemsize
        ends = (places[:, None] + size) * itemsize
        # Sequences of each window, by a guess from their mean length that doubles until it reaches beyond every window.
        guess = 4 + 2 * size * num_sequences // max(1, self.num_tokens)
        while True:
            sequences = lows[:, None] + np.arange(-1, guess)
            exist = (sequences >= 0) & (sequences < num_sequences)
            known = np.clip(sequences, 0, num_sequences - 1)
            pointers, lengths = self._pointers[known], self.sequence_lengths[known].astype(np.int64)
            inside = exist & (pointers < ends)
            inside[:, 0] = False
            if not inside[:, -1].any():
                break
            guess *= 2
        apart = (pointers[:, 1:] != pointers[:, :-1] + lengths[:, :-1] * itemsize) & exist[:, 1:] & exist[:, :-1]
        # Bisection has looked at the sequence before `low`, which begins before the window, and at `low` itself, in any index.
        if apart.any() or lengths.min() < 0 or (pointers % itemsize).any():
            raise self._damaged("sequences do not lie one after the other")
        windows = np.nonzero(inside)[0]
        sequences, begins = sequences[inside], pointers[inside]
        if self.num_documents == num_sequences and (self.document_index[sequences] == sequences).all():
            return windows, begins
        # Some document is of several sequences, or of none.
        first = np.array([bisect_left(self._index_view, sequence) for sequence in sequences.tolist()], np.int64)
        near = self.document_index[np.clip(first[:, None] + np.arange(-2, 2), 0, self.num_documents)]
        if (np.diff(near) < 0).any() or (near < 0).any() or (near > num_sequences).any():
            raise self._damaged("the document index goes backwards")
        opens = self.document_index[first] == sequences
        return windows[opens], begins[opens]

    def verify(self, vocab_size: int | None = None) -> None:
        """Read everything: lengths against pointers, order of documents, size of `.bin`, and ids within the vocabulary if it is given.

        Memory does not grow with the index.

        Raises:
            TokenIndexError: at the first thing that does not hold.
        """
        itemsize, end = self.dtype.itemsize, 0
        for start in range(0, len(self.sequence_lengths), _CHUNK):
            lengths = self.sequence_lengths[start : start + _CHUNK].astype(np.int64)
            if (lengths < 0).any():
                raise self._damaged(f"sequence {start + int(np.argmax(lengths < 0))} has a negative length")
            ends = end + np.cumsum(lengths) * itemsize
            begins = self._pointers[start : start + _CHUNK]
            wrong = np.flatnonzero(begins != ends - lengths * itemsize)
            if wrong.size:
                i = int(wrong[0])
                raise self._damaged(
                    f"sequence {start + i} begins at byte {begins[i]}, the ones before it end at {ends[i] - lengths[i] * itemsize}"
                )
            end = int(ends[-1])
        if self._bin_size != end:
            raise self._damaged(f".bin has {self._bin_size} bytes, its sequences take {end}")
        for start in range(0, self.num_documents, _CHUNK):
            if (np.diff(self.document_index[start : start + _CHUNK + 1]) < 0).any():
                raise self._damaged("the document index goes backwards")
        for start in range(0, self.num_tokens, _CHUNK):
            part = self._tokens[start : start + _CHUNK]
            low, high = int(part.min()), int(part.max())
            if low < 0 or (vocab_size is not None and high >= vocab_size):
                limit = "" if vocab_size is None else f"..{vocab_size - 1}"
                raise self._damaged(f"token ids run from {low} to {high}, the vocabulary is 0{limit}")

    def _beyond(self, start: int, count: int) -> TokenIndexError:
        return TokenIndexError(
            f"token index {self.prefix.name}: tokens {start} to {start + count} do not exist; there are {self.num_tokens}"
        )

    def _damaged(self, what: str) -> TokenIndexError:
        return TokenIndexError(f"token index {self.prefix}: {what}; {_WAY_OUT}")
