"""Several token indexes made one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from megaxelm.corpus.token_index import TokenIndex, index_paths, write_idx
from megaxelm.errors import TokenIndexError

_CHUNK = 1 << 20


def merge_indexes(prefixes: Sequence[Path], out: Path, vocab_size: int | None = None) -> dict[str, str]:
    """Write the documents of several indexes, one index after the other, as the index `out`; sequences stay as they are.

    Every index is verified first, so that a merge hides no damage. Memory does not grow with the indexes.

    Args:
        vocab_size: every id must be below it, where it is given.

    Returns:
        The xxh3_128 of the files, {"bin": hex, "idx": hex}.

    Raises:
        TokenIndexError: an index that is not sound, types that differ, an id outside of the vocabulary, or `out` exists.
    """
    out = Path(out)
    bin_path, idx_path = index_paths(out)
    for path in (bin_path, idx_path):
        if path.exists():
            raise TokenIndexError(f"{path} exists: choose another name for the merged index, or remove it")
    if not out.parent.is_dir():
        raise TokenIndexError(f"{out.parent}: no such folder; make it before the merged index")
    indexes = [TokenIndex(prefix) for prefix in prefixes]
    if not indexes:
        raise TokenIndexError(f"{out}: nothing to merge; name at least one index")
    first = indexes[0]
    for index in indexes:
        if index.dtype != first.dtype:
            raise TokenIndexError(
                f"token index {index.prefix} holds {index.dtype} and {first.prefix} {first.dtype}, so their vocabularies differ: merge "
                "indexes of one tokenizer"
            )
        index.verify(vocab_size)
    digest = xxhash.xxh3_128()
    with open(bin_path, "xb") as file:
        for index in indexes:
            for start in range(0, index.num_tokens, _CHUNK):
                data = index.tokens(start, min(_CHUNK, index.num_tokens - start)).tobytes()
                file.write(data)
                digest.update(data)
    num_sequences = sum(len(index.sequence_lengths) for index in indexes)
    num_index = 1 + sum(index.num_documents for index in indexes)
    idx_hash = write_idx(idx_path, first.dtype, num_sequences, num_index, lambda: _lengths(indexes), _document_index(indexes))
    return {"bin": digest.hexdigest(), "idx": idx_hash}


def _lengths(indexes: Sequence[TokenIndex]) -> Iterator[np.ndarray]:
    for index in indexes:
        for start in range(0, len(index.sequence_lengths), _CHUNK):
            yield index.sequence_lengths[start : start + _CHUNK]


def _document_index(indexes: Sequence[TokenIndex]) -> Iterator[np.ndarray]:
    yield np.zeros(1, np.int64)
    sequences = 0
    for index in indexes:
        for start in range(1, len(index.document_index), _CHUNK):
            yield index.document_index[start : start + _CHUNK] + sequences
        sequences += len(index.sequence_lengths)
