"""Documents as vectors: TF-IDF, truncated SVD, L2 norm (paper, section 3.1), in a form that can be updated token by token.

Term frequency is linear, so the vector of a text is the direction of the sum over its terms of idf * component: a new token adds
the rows of its terms and nothing is computed again (`start`, `push`, `vector`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster.analyzers import PAIR_SHIFT, Analyzer, SubwordAnalyzer, TermState, TextEncoder, make_analyzer
from megaxelm.cluster.state import damaged_is_an_error, read_state, write_state
from megaxelm.errors import ClusterError
from megaxelm.recipe import TfidfConfig

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_CHUNK_TERMS = 4_000_000
_BATCH_TEXTS = 256
_FEW_ROWS = 3
"""Rows that are added sooner one by one than gathered first."""


@dataclass
class SpaceState:
    """The text so far, as a sum that more text adds to."""

    total: NDArray[np.float64]
    """Sum of idf * component over the settled terms, [dimensions]."""
    terms: TermState = field(default_factory=TermState)

    def copy(self) -> SpaceState:
        """A state of its own with the same text so far."""
        return SpaceState(self.total.copy(), replace(self.terms))


class TfidfSpace:
    """A fitted vector space of documents. Made by `fit` or `load`."""

    def __init__(
        self,
        analyzer: Analyzer,
        codes: NDArray[np.uint64],
        idf: NDArray[np.float32],
        components: NDArray[np.float32],
        tokenizer_fingerprint: str | None = None,
    ) -> None:
        """`codes` [terms] sorted, `idf` [terms], `components` [dimensions, terms]."""
        if not (codes.ndim == idf.ndim == 1 and components.ndim == 2 and len(codes) == len(idf) == components.shape[1]):
            raise ValueError(f"shapes of codes {codes.shape}, idf {idf.shape} and components {components.shape} do not fit together")
        if len(codes) == 0 or (codes[1:] <= codes[:-1]).any():
            raise ValueError("codes of terms are not sorted")
        if not (np.isfinite(idf).all() and np.isfinite(components).all()):
            raise ValueError("idf or components hold NaN or infinity")
        self.analyzer = analyzer
        self.codes = codes
        self.idf = idf
        self.components = components
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self._rows = idf.astype(np.float64)[:, None] * components.T.astype(np.float64)
        self._row_of: dict[int, int] | None = None

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return int(self.components.shape[0])

    @property
    def reads_text(self) -> bool:
        """Whether texts are needed; else token ids do."""
        return self.analyzer.reads_text

    @classmethod
    def fit(cls, texts: Iterable[str], config: TfidfConfig, seed: int, tokenizer: TextEncoder | None = None) -> TfidfSpace:
        """Find terms, their idf and the main directions of `texts`. A `subword` space needs the tokenizer.

        There are `config.dimensions` dimensions, fewer where there are fewer texts or terms.

        Raises:
            ClusterError: if there is no text with at least two terms, or no tokenizer for subwords.
        """
        return cls.fit_transform(texts, config, seed, tokenizer)[0]

    @classmethod
    def fit_transform(
        cls, texts: Iterable[str], config: TfidfConfig, seed: int, tokenizer: TextEncoder | None = None
    ) -> tuple[TfidfSpace, NDArray[np.float32]]:
        """`fit`, and the vectors of the same texts without reading them again."""
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfTransformer
        from tqdm import tqdm

        analyzer = make_analyzer(config.analyzer, tokenizer)
        symbols: list[NDArray[np.integer]] = []
        for batch in _batches(tqdm(texts, desc="TF-IDF terms", unit=" documents", file=sys.stderr, mininterval=0.5, leave=False)):
            symbols += analyzer.symbols(batch)
        codes = _most_frequent(analyzer, symbols, config.max_features)
        if len(codes) < 2:
            raise ClusterError(f"clusters.tfidf: {len(symbols)} documents hold {len(codes)} terms, too little to fit on; give more text")
        weighted = _count_terms(analyzer, symbols, codes)
        del symbols
        weighting = TfidfTransformer().fit(weighted)
        weighted = weighting.transform(weighted, copy=False)
        dimensions = min(config.dimensions, *weighted.shape)
        svd = TruncatedSVD(n_components=dimensions, random_state=seed).fit(weighted)
        fingerprint = getattr(tokenizer, "fingerprint", None) if isinstance(analyzer, SubwordAnalyzer) else None
        space = cls(analyzer, codes, weighting.idf_.astype(np.float32), svd.components_.astype(np.float32), fingerprint)
        return space, _normalised(np.asarray(weighted @ space.components.T.astype(np.float64)))

    def transform(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of texts, [texts, dimensions], of length 1, or 0 for a text without a known term.

        Raises:
            ClusterError: if this is a subword space without tokenizer.
        """
        parts = [self._project(self.analyzer.symbols(batch)) for batch in _batches(texts)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dimensions), dtype=np.float32)

    def transform_tokens(self, token_ids: Sequence[Sequence[int] | NDArray[np.integer]]) -> NDArray[np.float32]:
        """As `transform`, of token ids (without special tokens); for a subword space."""
        if not isinstance(self.analyzer, SubwordAnalyzer):
            raise ClusterError(f"clusters.tfidf.analyzer = {self.analyzer.name}: this space reads text and not token ids; use transform")
        return self._project([np.asarray(ids, dtype=np.int64) for ids in token_ids])

    def start(self) -> SpaceState:
        """The state of the empty text."""
        return SpaceState(np.zeros(self.dimensions))

    def push(self, state: SpaceState, piece: int | Sequence[int] | str) -> None:
        """Add one token id or several (subword), or newly finished text (char, word). The cost does not depend on what was before, but for
        a word that has not ended yet.

        Raises:
            TypeError: for text in a subword space or ids in one that reads text.
        """
        self._add(state.total, self.analyzer.push(state.terms, piece))

    def vector(self, state: SpaceState) -> NDArray[np.float32]:
        """Vector of the text so far, [dimensions]: that of `transform`; zero before any known term."""
        total = state.total
        pending = self.analyzer.pending(state.terms)
        if pending:
            total = total.copy()
            self._add(total, pending)
        # As `_normalised` of one row, whose cost here would be mostly that of calling numpy.
        length = math.sqrt(total.dot(total))
        return (total / length if length > 0 else total).astype(np.float32)

    def prefixes(self, state: SpaceState, pieces: Sequence[Any]) -> NDArray[np.float32]:
        """Vectors before each of the pieces that follow, [pieces, dimensions], as `vector` and `push` in turn give them.

        `pieces` are token ids (subword), done all at once, or texts (char, word). `state` stays as it is.
        """
        if not len(pieces):
            return np.zeros((0, self.dimensions), dtype=np.float32)
        if self.reads_text:
            state, found = state.copy(), []
            for piece in pieces:
                found.append(self.vector(state))
                self.push(state, piece)
            return np.stack(found)
        # Terms that end in a token: itself and the pair with the one before.
        ids = np.asarray(pieces[:-1], dtype=np.int64).astype(np.uint64) + np.uint64(1)
        before = np.concatenate([np.array(state.terms.context[:1], np.uint64), ids])[:-1]
        pairs = before << np.uint64(PAIR_SHIFT) | ids[len(ids) - len(before) :]
        totals = np.zeros((len(pieces), self.dimensions))
        totals[0] = state.total
        for first, codes in ((1, ids), (1 + len(ids) - len(pairs), pairs)):
            columns = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
            known = np.flatnonzero(self.codes[columns] == codes)
            totals[first + known] += self._rows[columns[known]]
        return _normalised(np.cumsum(totals, axis=0, out=totals))

    def save(self, folder: Path, name: str = "space") -> None:
        """Write `<name>.json` and `<name>.safetensors`."""
        settings, arrays = self.state()
        write_state(folder / f"{name}.json", folder / f"{name}.safetensors", settings, arrays)

    @classmethod
    def load(cls, folder: Path, name: str = "space", tokenizer: TextEncoder | None = None) -> TfidfSpace:
        """What `save` wrote. A subword space without tokenizer takes token ids only.

        Raises:
            ClusterError: if files are missing or damaged, or the tokenizer is another one.
        """
        path = folder / f"{name}.json"
        settings, arrays = read_state(path, folder / f"{name}.safetensors")
        with damaged_is_an_error(path):
            return cls.from_state(settings, arrays, tokenizer)

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Plain values and arrays that `from_state` takes."""
        settings = {"analyzer": self.analyzer.name, "dimensions": self.dimensions, "tokenizer_fingerprint": self.tokenizer_fingerprint}
        return settings, {"codes": self.codes, "idf": self.idf, "components": self.components}

    @classmethod
    def from_state(cls, settings: dict[str, Any], arrays: dict[str, NDArray[Any]], tokenizer: TextEncoder | None) -> TfidfSpace:
        """The inverse of `state`. Raises KeyError or ValueError where the state is damaged, ClusterError for another tokenizer."""
        fingerprint = settings["tokenizer_fingerprint"]
        given = getattr(tokenizer, "fingerprint", None)
        if fingerprint and given and fingerprint != given:
            raise ClusterError(
                f"tokenizer: its fingerprint is {given}, but the TF-IDF space was fitted with {fingerprint}; use that tokenizer, "
                "or make the stage `clusters` again"
            )
        return cls(make_analyzer(settings["analyzer"], tokenizer), arrays["codes"], arrays["idf"], arrays["components"], fingerprint)

    def _project(self, symbols: Sequence[NDArray[np.integer]]) -> NDArray[np.float32]:
        return _normalised(np.asarray(_count_terms(self.analyzer, symbols, self.codes) @ self._rows))

    def _add(self, total: NDArray[np.float64], codes: Sequence[int]) -> None:
        if self._row_of is None:
            self._row_of = {known: row for row, known in enumerate(self.codes.tolist())}
        rows = [row for code in codes if (row := self._row_of.get(code)) is not None]
        if len(rows) > _FEW_ROWS:
            total += self._rows[rows].sum(axis=0)
        else:
            for row in rows:
                total += self._rows[row]


def _normalised(vectors: NDArray[np.float64]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0).astype(np.float32)


def _most_frequent(analyzer: Analyzer, symbols: Sequence[NDArray[Any]], limit: int) -> NDArray[np.uint64]:
    """Sorted codes of the `limit` terms that occur most often; the smaller code first among equals."""
    from tqdm import tqdm

    merged: tuple[NDArray[np.uint64], NDArray[np.int64]] = (np.zeros(0, np.uint64), np.zeros(0, np.int64))
    piles: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
    progress = tqdm(total=len(symbols), desc="TF-IDF vocabulary", unit=" documents", file=sys.stderr, mininterval=0.5, leave=False)
    for documents, codes, _ in _chunks(analyzer, symbols):
        piles.append(np.unique(codes, return_counts=True))
        progress.update(documents)
        if sum(len(pile[0]) for pile in piles) > max(2 * _CHUNK_TERMS, len(merged[0])):
            merged, piles = _add_counts([merged, *piles]), []
    progress.close()
    codes, counts = _add_counts([merged, *piles])
    kept = np.lexsort((codes, -counts))[:limit]
    return np.sort(codes[kept])


def _add_counts(piles: Sequence[tuple[NDArray[np.uint64], NDArray[np.int64]]]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    codes = np.concatenate([pile[0] for pile in piles])
    counts = np.concatenate([pile[1] for pile in piles])
    order = np.argsort(codes, kind="stable")
    codes, counts = codes[order], counts[order]
    starts = np.flatnonzero(np.append(True, codes[1:] != codes[:-1])) if len(codes) else np.zeros(0, np.int64)
    return codes[starts], np.add.reduceat(counts, starts) if len(codes) else counts


def _count_terms(analyzer: Analyzer, symbols: Sequence[NDArray[Any]], vocabulary: NDArray[np.uint64]) -> csr_matrix:
    """How often each document has each term, [documents, terms]."""
    from scipy.sparse import csr_matrix, vstack

    parts = []
    for documents, codes, rows in _chunks(analyzer, symbols):
        columns = np.searchsorted(vocabulary, codes)
        columns[columns == len(vocabulary)] = 0
        known = vocabulary[columns] == codes
        ones = np.ones(int(known.sum()), dtype=np.float32)
        # The constructor adds up entries of the same place. Counts below 2^24 are exact, in half the memory.
        parts.append(csr_matrix((ones, (rows[known], columns[known])), shape=(documents, len(vocabulary))))
    return vstack(parts, format="csr") if parts else csr_matrix((0, len(vocabulary)))


def _chunks(analyzer: Analyzer, symbols: Sequence[NDArray[Any]]) -> Iterator[tuple[int, NDArray[np.uint64], NDArray[np.int64]]]:
    """Documents in bounded portions: their number, the codes of all their terms, and the document of each, from 0."""
    found: list[NDArray[np.uint64]] = []
    size = 0
    for item in symbols:
        found.append(analyzer.codes(item))
        size += len(found[-1])
        if size >= _CHUNK_TERMS:
            yield len(found), np.concatenate(found), np.repeat(np.arange(len(found)), [len(codes) for codes in found])
            found, size = [], 0
    if found:
        yield len(found), np.concatenate(found), np.repeat(np.arange(len(found)), [len(codes) for codes in found])


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH_TEXTS:
            yield batch
            batch = []
    if batch:
        yield batch
