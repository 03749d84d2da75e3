"""The unit of text, as text or as tokens, and the key by which equal texts are recognised."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Document:
    """One document. `id` is stable and never a path of the machine; `language` is kept as the user wrote it."""

    text: str
    id: str
    language: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode("utf-8"))

    @property
    def key(self) -> int:
        """`text_key` of the text."""
        return text_key(self.text)


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """A document of which only the tokens are at hand: what a partitioner that does not read text assigns."""

    language: str
    key: int
    """`text_key` of the text."""
    tokens: NDArray[np.integer]
    """Token ids without special tokens, [tokens]."""


def text_key(text: str) -> int:
    """xxh3_64 of the UTF-8 bytes of the NFC-normalised text: equal for texts that differ only in their normal form."""
    return xxhash.xxh3_64_intdigest(unicodedata.normalize("NFC", text).encode("utf-8"))
