"""Megatron token index: `<prefix>.bin` holds raw tokens, `<prefix>.idx` lengths, byte pointers and documents (little endian).

Layout of `.idx`: magic (9 bytes), version uint64 = 1, dtype code uint8, S sequences uint64, D = documents + 1 uint64, then int32
[S] lengths in tokens, int64 [S] byte pointers into `.bin`, int64 [D] document index (first 0, last S). Other readers check
only magic and version; this one checks all that is cheap on opening and the rest in `verify()`.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from megaxelm.errors import TokenIndexError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_UINT16_VOCABULARY = 65500
_FLUSH_BYTES = 1 << 20
_WAY_OUT = "make the index again (megaxelm run --from index)"


def _paths(prefix: Path) -> tuple[Path, Path]:
    # with_suffix would cut a language code with a dot, so the ending is appended
    return prefix.parent / f"{prefix.name}.bin", prefix.parent / f"{prefix.name}.idx"


class TokenIndexWriter:
    """Writes one token index, a document at a time: uint16 for vocabularies below 65500, else int32.

    No file stays open between calls, so that hundreds of writers can live at once. `.idx` is written by `close()` only: a
    writer that died leaves no index that opens. As a context manager it closes on success alone.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self.num_tokens = 0
        self._dtype: type[np.generic] = np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32
        self._lengths = array("i")
        self._pending: list[np.ndarray] = []
        self._pending_bytes = 0
        bin_path, idx_path = _paths(self.prefix)
        idx_path.unlink(missing_ok=True)
        bin_path.write_bytes(b"")

    def __enter__(self) -> TokenIndexWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document.

        Raises:
            TokenIndexError: no tokens, or an id outside of the vocabulary.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        if tokens.ndim != 1 or not tokens.size:
            raise TokenIndexError(f"{self.prefix.name}: document {self.num_documents} has no tokens; every document needs at least one")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise TokenIndexError(
                f"{self.prefix.name}: document {self.num_documents} has token id {wrong}, outside of the vocabulary "
                f"0..{self.vocab_size - 1}: the tokenizer is not the one that the vocabulary size was taken from"
            )
        if tokens.size > np.iinfo(np.int32).max:
            raise TokenIndexError(
                f"{self.prefix.name}: document {self.num_documents} has {tokens.size} tokens, more than 2^31 - 1: split it"
            )
        data = tokens.astype(np.dtype(self._dtype).newbyteorder("<"))
        self._lengths.append(tokens.size)
        self.num_tokens += tokens.size
        self._pending.append(data)
        self._pending_bytes += data.nbytes
        if self._pending_bytes >= _FLUSH_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is pending, then `.idx`."""
        self._flush()
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        # cumsum in int64: the int32 overflow of pointers is the classic defect of this format
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= np.dtype(self._dtype).itemsize
        code = next(code for code, dtype in _DTYPES.items() if dtype is self._dtype)
        with open(_paths(self.prefix)[1], "wb") as file:
            file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
            file.write(lengths.astype("<i4").tobytes())
            file.write(pointers.astype("<i8").tobytes())
            file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())

    def _flush(self) -> None:
        if self._pending:
            with open(_paths(self.prefix)[0], "ab") as file:
                file.writelines(chunk.tobytes() for chunk in self._pending)
            self._pending, self._pending_bytes = [], 0


class TokenIndex:
    """Memory-mapped token index, opened with its cheap checks; pickles as its path.

    Raises:
        TokenIndexError: missing, truncated or inconsistent files; never another exception for what is in the files.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = Path(prefix)
        bin_path, idx_path = _paths(self.prefix)
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise TokenIndexError(f"token index {self.prefix}: {path.name} is missing; {_WAY_OUT}")
        idx_size, bin_size = idx_path.stat().st_size, bin_path.stat().st_size
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
        self._bin_size = bin_size
        raw = np.memmap(idx_path, dtype=np.uint8, mode="r")
        offset = _HEADER.size
        self._lengths = np.frombuffer(raw, "<i4", num_sequences, offset)
        self._pointers = np.frombuffer(raw, "<i8", num_sequences, offset + 4 * num_sequences)
        self._index = np.frombuffer(raw, "<i8", num_index, offset + 12 * num_sequences)
        if self._index[0] != 0 or self._index[-1] != num_sequences:
            raise self._damaged(f"the document index runs from {self._index[0]} to {self._index[-1]}, not from 0 to {num_sequences}")
        end = 0
        if num_sequences:
            first, last, length = int(self._pointers[0]), int(self._pointers[-1]), int(self._lengths[-1])
            if first != 0 or last < 0 or last % self.dtype.itemsize or length < 0:
                raise self._damaged(f"pointers run from {first} to {last} with a last length of {length}")
            end = last + length * self.dtype.itemsize
            if end > bin_size:
                raise self._damaged(
                    f"{bin_path.name} has {bin_size} bytes, the last sequence ends at {end}: it was cut, or is another file's"
                )
        self.num_tokens = end // self.dtype.itemsize
        self.num_documents = num_index - 1
        self._tokens: np.ndarray = (
            np.memmap(bin_path, dtype=self.dtype, mode="r", shape=(self.num_tokens,)) if end else np.empty(0, self.dtype)
        )

    def __reduce__(self) -> tuple[type[TokenIndex], tuple[Path]]:
        return TokenIndex, (self.prefix,)

    def __repr__(self) -> str:
        return f"TokenIndex({self.prefix.name}: {self.num_documents} documents, {self.num_tokens} tokens)"

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Token offset of every document and, last, `num_tokens`: int64 [documents + 1].

        Raises:
            TokenIndexError: if the documents do not lie one after the other.
        """
        index, num_sequences = self._index, len(self._lengths)
        if index.min() < 0 or index.max() > num_sequences:
            raise self._damaged("the document index points outside of the sequences")
        ends = np.append(self._pointers // self.dtype.itemsize, self.num_tokens)
        starts: np.ndarray = ends[index]
        if starts[0] != 0 or starts[-1] != self.num_tokens or (np.diff(starts) < 0).any():
            raise self._damaged("documents do not lie one after the other")
        return starts

    def document(self, i: int) -> np.ndarray:
        """Tokens of document `i`, without a copy."""
        if not 0 <= i < self.num_documents:
            raise TokenIndexError(f"token index {self.prefix.name}: document {i} does not exist; there are {self.num_documents}")
        starts = self.document_starts
        return self._tokens[starts[i] : starts[i + 1]]

    def tokens(self, start: int, count: int) -> np.ndarray:
        """`count` tokens from token offset `start` on, over the borders of documents, without a copy."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise TokenIndexError(
                f"token index {self.prefix.name}: tokens {start} to {start + count} do not exist; there are {self.num_tokens}"
            )
        return self._tokens[start : start + count]

    def verify(self, vocab_size: int | None = None) -> None:
        """Read everything: lengths against pointers, order of documents, size of `.bin`, and ids within the vocabulary if it is given.

        Raises:
            TokenIndexError: at the first thing that does not hold.
        """
        if (self._lengths < 0).any():
            raise self._damaged(f"sequence {int(np.argmax(self._lengths < 0))} has a negative length")
        ends = np.cumsum(self._lengths, dtype=np.int64) * self.dtype.itemsize
        wrong = np.flatnonzero(self._pointers[1:] != ends[:-1])
        if wrong.size:
            i = int(wrong[0]) + 1
            raise self._damaged(f"sequence {i} begins at byte {self._pointers[i]}, the ones before it end at {ends[i - 1]}")
        if self._bin_size != self.num_tokens * self.dtype.itemsize:
            raise self._damaged(f".bin has {self._bin_size} bytes, its sequences take {self.num_tokens * self.dtype.itemsize}")
        if (np.diff(self._index) < 0).any():
            raise self._damaged("the document index goes backwards")
        _ = self.document_starts
        chunk = 1 << 24
        for start in range(0, self.num_tokens, chunk):
            part = self._tokens[start : start + chunk]
            if int(part.min()) < 0 or (vocab_size is not None and int(part.max()) >= vocab_size):
                low, high = int(part.min()), int(part.max())
                limit = "" if vocab_size is None else f"..{vocab_size - 1}"
                raise self._damaged(f"token ids run from {low} to {high}, the vocabulary is 0{limit}")

    def _damaged(self, what: str) -> TokenIndexError:
        return TokenIndexError(f"token index {self.prefix}: {what}; {_WAY_OUT}")
