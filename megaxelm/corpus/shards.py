"""Token shards: a block of the corpus, tokenised once, its documents grouped by language in their order.

shard.json      languages with documents, tokens, bytes and the hash of their tokens, hashes of the other files; written last
tokens.bin      raw token ids, uint16 or int32 as in the index, every document with its special tokens
lengths.npy     int32 [documents], tokens of each
keys.npy        uint64 [documents], text keys
sizes.npy       uint32 [documents], UTF-8 bytes of their texts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megaxelm.corpus.document import TokenDocument
from megaxelm.corpus.sealed import read_sealed, write_sealed
from megaxelm.corpus.token_index import token_dtype
from megaxelm.errors import StageError, TokenIndexError

SHARD_FILE = "shard.json"
_WAY_OUT = "remove it and start again (--from tokens): only what is missing is tokenised"


@dataclass(frozen=True)
class Section:
    """The documents of one language in a shard."""

    language: str
    first: int
    """Documents of the shard before them."""
    documents: int
    start: int
    """Tokens of the shard before them."""
    tokens: int
    num_bytes: int
    """UTF-8 bytes of their texts."""
    xxh3: str
    """Of their tokens."""


class TokenShard:
    """A finished shard, opened.

    Raises:
        TokenIndexError: a file of it is missing, cut or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            found = read_sealed(folder, SHARD_FILE)
            self.vocab_size: int = found["vocab_size"]
            self.sections = [Section(**item) for item in found["languages"]]
            self.lengths: NDArray[np.int32] = np.load(folder / "lengths.npy", mmap_mode="r", allow_pickle=False)
            self.keys: NDArray[np.uint64] = np.load(folder / "keys.npy", mmap_mode="r", allow_pickle=False)
            self.sizes: NDArray[np.uint32] = np.load(folder / "sizes.npy", mmap_mode="r", allow_pickle=False)
            self._tokens = np.memmap(folder / "tokens.bin", dtype=token_dtype(self.vocab_size), mode="r")
        except (OSError, ValueError, TypeError, EOFError, StageError) as error:
            raise TokenIndexError(f"token shard {folder}: damaged ({error}); {_WAY_OUT}") from None
        self.num_documents = sum(section.documents for section in self.sections)
        if not len(self.lengths) == len(self.keys) == len(self.sizes) == self.num_documents:
            raise TokenIndexError(f"token shard {folder}: lists {len(self.lengths)} documents of {self.num_documents}; {_WAY_OUT}")
        if len(self._tokens) != sum(section.tokens for section in self.sections) or self.starts[-1] != len(self._tokens):
            raise TokenIndexError(f"token shard {folder}: tokens.bin has {len(self._tokens)} tokens, not {self.starts[-1]}; {_WAY_OUT}")

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First token of each document and, last, the number of tokens, [documents + 1]."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths, dtype=np.int64)])

    def section(self, language: str) -> Section | None:
        """The documents of a language, or None if there are none."""
        return next((section for section in self.sections if section.language == language), None)

    def tokens(self, section: Section) -> NDArray[Any]:
        """All tokens of a section, checked against their hash.

        Raises:
            TokenIndexError: they have changed.
        """
        found = self._tokens[section.start : section.start + section.tokens]
        if xxhash.xxh3_128_hexdigest(np.ascontiguousarray(found).data) != section.xxh3:
            raise TokenIndexError(f"token shard {self.folder}: the tokens of {section.language} have changed; {_WAY_OUT}")
        return found

    def documents(self, begin: int, end: int) -> list[TokenDocument]:
        """All documents in the order of the shard, without their first `begin` and last `end` special tokens."""
        return [
            TokenDocument(section.language, int(self.keys[i]), self._tokens[self.starts[i] + begin : self.starts[i + 1] - end])
            for section in self.sections
            for i in range(section.first, section.first + section.documents)
        ]


def write_shard(
    folder: Path,
    vocab_size: int,
    languages: Sequence[str],
    tokens: Sequence[NDArray[np.int32]],
    keys: NDArray[np.uint64],
    sizes: NDArray[np.uint32],
) -> None:
    """Write a shard into an existing folder; all that is given is [documents], in the order of the block.

    Raises:
        TokenIndexError: an id outside of the vocabulary.
    """
    dtype = token_dtype(vocab_size)
    sections: list[Section] = []
    start = 0
    order = document_order(languages)
    with open(folder / "tokens.bin", "wb") as file:
        for language, group in groupby(order, key=lambda i: languages[i]):
            mine = list(group)
            joined = np.concatenate([tokens[i] for i in mine])
            low, high = int(joined.min()), int(joined.max())
            if low < 0 or high >= vocab_size:
                raise TokenIndexError(
                    f"token id {low if low < 0 else high} is outside of the vocabulary 0..{vocab_size - 1}: the tokenizer's files do not "
                    "belong together; make the tokenizer again (--from tokenizer)"
                )
            data = joined.astype(dtype).tobytes()
            file.write(data)
            first = sections[-1].first + sections[-1].documents if sections else 0
            size = int(sizes[mine].sum(dtype=np.int64))
            sections.append(Section(language, first, len(mine), start, len(joined), size, xxhash.xxh3_128_hexdigest(data)))
            start += len(joined)
    np.save(folder / "lengths.npy", np.array([len(tokens[i]) for i in order], np.int32))
    np.save(folder / "keys.npy", keys[order])
    np.save(folder / "sizes.npy", sizes[order])
    value = {"vocab_size": vocab_size, "languages": [asdict(section) for section in sections]}
    write_sealed(folder, SHARD_FILE, value, ("lengths.npy", "keys.npy", "sizes.npy"))


def document_order(languages: Sequence[str]) -> list[int]:
    """The order of a shard: positions in the block, grouped by language."""
    return sorted(range(len(languages)), key=lambda i: languages[i])
