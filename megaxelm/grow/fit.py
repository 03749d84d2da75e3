"""How well the run's tokenizer fits a language that it was not made for.

A tokenizer that never saw a language cuts its words to pieces or spells them in bytes: texts get longer, contexts shorter, and tokens
dearer. Growing cannot mend that, since all experts share one tokenizer, so it is measured and told before training.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megaxelm.errors import GrowError

UNKNOWN_SHARE = 0.01
BYTE_SHARE = 0.1
FERTILITY_RATIO = 2.0
_LONG_WORD = 15.0
"""Characters between spaces, in the mean, from which a language counts as written without spaces."""
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Encoder(Protocol):
    """What is needed of `megaxelm.corpus.tokenizer.Tokenizer`."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    @property
    def hf(self) -> Any: ...


@dataclass(frozen=True)
class TokenizerFit:
    """What a tokenizer makes of a sample of one language."""

    language: str
    documents: int
    bytes: int
    characters: int
    words: int
    """Parts between white space."""
    tokens: int
    byte_tokens: int
    """Tokens that are less than a character."""
    unknown_tokens: int

    @property
    def tokens_per_word(self) -> float:
        """Fertility. It says little of languages that are written without spaces."""
        return self.tokens / self.words

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of a token."""
        return self.bytes / self.tokens

    @property
    def byte_share(self) -> float:
        """Share of the tokens that are less than a character."""
        return self.byte_tokens / self.tokens

    @property
    def unknown_share(self) -> float:
        """Share of the tokens that are the unknown piece."""
        return self.unknown_tokens / self.tokens

    @property
    def spaced(self) -> bool:
        """Whether words are written apart."""
        return self.characters / self.words < _LONG_WORD

    def to_json(self) -> dict[str, float | int]:
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "words": self.words,
            "tokens": self.tokens,
            "tokens_per_word": self.tokens_per_word,
            "bytes_per_token": self.bytes_per_token,
            "byte_share": self.byte_share,
            "unknown_share": self.unknown_share,
        }


def measure_fit(tokenizer: Encoder, language: str, texts: Sequence[str]) -> TokenizerFit:
    """Measure a tokenizer on texts of one language.

    Raises:
        GrowError: the texts have no token.
    """
    counts = Counter(token for ids in tokenizer.encode(texts) for token in ids)
    words = sum(len(text.split()) for text in texts)
    if not counts or not words:
        raise GrowError(f"language {language}: the sample of its text is empty, so nothing can be measured; give other text by --corpus")
    unknown_id = tokenizer.hf.unk_token_id
    kinds = list(counts)
    pieces = tokenizer.hf.convert_ids_to_tokens(kinds)
    # `<0xE2>` of SentencePiece; or, in a byte-level BPE, a piece that is no whole character when it stands alone.
    in_bytes = {
        token
        for token, piece in zip(kinds, pieces, strict=True)
        if token != unknown_id and (_BYTE_PIECE.fullmatch(str(piece)) or _REPLACEMENT in tokenizer.decode([token]))
    }
    return TokenizerFit(
        language,
        len(texts),
        sum(len(text.encode("utf-8")) for text in texts),
        sum(len(text) for text in texts),
        words,
        counts.total(),
        sum(counts[token] for token in in_bytes),
        counts[unknown_id] if unknown_id is not None else 0,
    )


def poor_fit(fit: TokenizerFit, known: Sequence[TokenizerFit]) -> list[str]:
    """Why the fit is poor, in words; empty where it is not. `known`: the languages that the tokenizer was made for."""
    found = []
    if fit.unknown_share > UNKNOWN_SHARE:
        found.append(f"{fit.unknown_share:.1%} of the tokens are unknown pieces: that text cannot be told apart")
    if fit.byte_share > BYTE_SHARE:
        found.append(f"{fit.byte_share:.0%} of the tokens are single bytes: its letters are not in the vocabulary")
    peers = [item for item in known if item.spaced]
    if fit.spaced and peers:
        usual = statistics.median(item.tokens_per_word for item in peers)
        if fit.tokens_per_word > FERTILITY_RATIO * usual:
            found.append(f"{fit.tokens_per_word:.1f} tokens a word, while the run's languages have {usual:.1f} (median)")
    elif known:
        usual = statistics.median(item.bytes_per_token for item in known)
        if fit.bytes_per_token < usual / FERTILITY_RATIO:
            found.append(f"{fit.bytes_per_token:.1f} bytes a token, while the run's languages have {usual:.1f} (median)")
    return found
