"""Similar documents share an expert: TF-IDF space and balanced k-means (paper, section 3.1)."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster.analyzers import TextEncoder, reads_text
from megaxelm.cluster.kmeans import balanced_assignment, balanced_kmeans, squared_distances
from megaxelm.cluster.language_sets import numbered_names
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.cluster.space import TfidfSpace
from megaxelm.cluster.state import entry
from megaxelm.corpus.document import Document, TokenDocument
from megaxelm.errors import ClusterError
from megaxelm.recipe import TfidfConfig

_BATCH_DOCUMENTS = 256


class TfidfPartitioner(Partitioner):
    """Clusters of documents, named `c00`, `c01`, ...

    Fitted on a sample with clusters of equal size, in documents or tokens. Afterwards every document goes to its nearest centre, without
    balancing (paper), or is divided with the other documents of its block so that the block's clusters are balanced too.
    """

    kind: ClassVar[str] = "tfidf"

    def __init__(self, k: int, config: TfidfConfig, seed: int, tokenizer: TextEncoder | None = None) -> None:
        """The tokenizer is needed for texts where terms are subwords, or clusters are balanced by tokens."""
        super().__init__()
        self.k = k
        self.config = config
        self.seed = seed
        self.tokenizer = tokenizer
        self.fitted_on: dict[str, int] = {}
        """Documents the space was fitted on, by language."""
        self._space: TfidfSpace | None = None
        self._centres: NDArray[np.float32] | None = None

    @property
    def reads_text(self) -> bool:
        """Whether the terms are made of text; subwords are not."""
        return reads_text(self.config.analyzer)

    @property
    def space(self) -> TfidfSpace:
        """The vector space, for a router that uses the same."""
        if self._space is None:
            raise ClusterError("tfidf partitioner: not fitted yet; call fit or load_partitioner")
        return self._space

    @property
    def centres(self) -> NDArray[np.float32]:
        """Means of the clusters in the space, [k, dimensions]; not of length 1."""
        if self._centres is None:
            raise ClusterError("tfidf partitioner: not fitted yet; call fit or load_partitioner")
        return self._centres

    def fit(self, documents: Iterable[Document], tokens: Mapping[str, int] | None = None) -> None:
        """Fit space and centres on a sample with equal shares of the languages, as far as each has documents.

        `tokens` has no part in it: `balance: tokens` goes by the tokens of the sampled documents.

        Raises:
            ClusterError: if k is larger than the number of documents in the sample, there is too little text, or a tokenizer is needed and
                not there.
        """
        sample = stratified_sample(documents, self.config.sample_documents, self.seed)
        if self.k > len(sample):
            raise ClusterError(
                f"clusters.k = {self.k}: more than the {len(sample)} documents to fit on; choose at most {len(sample)}, give more text, "
                f"or raise clusters.tfidf.sample_documents = {self.config.sample_documents} and corpus.sample_bytes"
            )
        self.fitted_on = dict(sorted(Counter(document.language for document in sample).items()))
        texts = [document.text for document in sample]
        self._space, vectors = TfidfSpace.fit_transform(texts, self.config, self.seed, self.tokenizer)
        self._centres, _ = balanced_kmeans(
            vectors,
            self.k,
            self.seed,
            self.config.iterations,
            weights=self._weights(sample),
            tolerance=self.config.tolerance,
            starts=self.config.starts,
        )
        self.names = numbered_names(self.k)

    def assign(self, documents: Sequence[Document | TokenDocument]) -> NDArray[np.int64]:
        """Number of the cluster of each document, [documents]; with `assign: balanced` the documents of one call are one block.

        A document without a known term has the zero vector. Its nearest centre is the shortest one, that of the cluster whose documents
        are least alike; the first among equals.

        Raises:
            ClusterError: for tokens without text where terms are made of text, or a text where the tokenizer is needed and not there.
        """
        if not documents:
            return np.zeros(0, dtype=np.int64)
        costs = squared_distances(self.vectors(documents), self.centres)
        if self.config.assign == "nearest":
            return costs.argmin(axis=1).astype(np.int64)
        return balanced_assignment(costs, weights=self._weights(documents), tolerance=self.config.tolerance)[0]

    def vectors(self, documents: Sequence[Document | TokenDocument]) -> NDArray[np.float32]:
        """Vectors of documents in `space`, [documents, dimensions]: of length 1, or 0 for a document without a known term."""
        found = np.zeros((len(documents), self.space.dimensions), dtype=np.float32)
        tokens = {number: document.tokens for number, document in enumerate(documents) if isinstance(document, TokenDocument)}
        texts = {number: document.text for number, document in enumerate(documents) if isinstance(document, Document)}
        if tokens:
            found[list(tokens)] = self.space.transform_tokens(list(tokens.values()))
        if texts:
            found[list(texts)] = self.space.transform(list(texts.values()))
        return found

    def _weights(self, documents: Sequence[Document | TokenDocument]) -> NDArray[np.float64] | None:
        """Tokens of each document, at least 1, [documents]; None where documents count alike."""
        if self.config.balance == "documents":
            return None
        if self.tokenizer is None and any(isinstance(document, Document) for document in documents):
            raise ClusterError("clusters.tfidf.balance = tokens: texts need the run's tokenizer to be counted; pass it to load_partitioner")
        counts = np.zeros(len(documents))
        for start in range(0, len(documents), _BATCH_DOCUMENTS):
            batch = documents[start : start + _BATCH_DOCUMENTS]
            texts = [document.text for document in batch if isinstance(document, Document)]
            encoded = iter(self.tokenizer.encode(texts) if self.tokenizer and texts else ())
            for number, document in enumerate(batch, start):
                counts[number] = len(document.tokens if isinstance(document, TokenDocument) else next(encoded))
        return np.maximum(counts, 1.0)

    def languages(self) -> dict[str, list[str]] | None:
        """None: a document's language does not decide."""
        return None

    def describe(self) -> dict[str, Any]:
        """Method, analyzer, what is balanced, size of the space and of the sample it was fitted on."""
        return {
            "method": "tfidf",
            "analyzer": self.config.analyzer,
            "balance": self.config.balance,
            "assign": self.config.assign,
            "dimensions": self.space.dimensions,
            "terms": len(self.space.codes),
            "fitted_on": self.fitted_on,
        }

    def notes(self) -> list[str]:
        """Says where the space has fewer dimensions than asked for, and what balancing by blocks and the word pattern bring with them."""
        found = []
        if self.space.dimensions != self.config.dimensions:
            found.append(
                f"clusters.tfidf.dimensions = {self.config.dimensions}: the sample of {sum(self.fitted_on.values())} documents with "
                f"{len(self.space.codes)} terms gives {self.space.dimensions}, which is used"
            )
        if self.config.assign == "balanced":
            found.append(
                "clusters.tfidf.assign = balanced: every block of the corpus is divided equally, so a file of one language or topic is "
                "spread over all clusters; it suits files whose documents are mixed"
            )
        if self.config.analyzer == "word":
            found.append(
                "clusters.tfidf.analyzer = word: the published pattern cuts scripts with vowel signs (Hindi, Thai) to pieces and takes a "
                "clause of Chinese or Japanese for one word; subword and char do not"
            )
        return found

    def _state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        settings, arrays = self.space.state()
        state = {"k": self.k, "seed": self.seed, "config": self.config.model_dump(), "fitted_on": self.fitted_on, "space": settings}
        return state, {"centres": self.centres, **{f"space.{name}": array for name, array in arrays.items()}}

    @classmethod
    def _from_state(cls, settings: dict[str, Any], arrays: dict[str, NDArray[Any]], tokenizer: TextEncoder | None) -> TfidfPartitioner:
        config = TfidfConfig.model_validate(settings["config"])
        partitioner = cls(entry(settings, "k", int), config, entry(settings, "seed", int), tokenizer)
        partitioner.fitted_on = {str(code): int(count) for code, count in entry(settings, "fitted_on", dict).items()}
        inner = {name.removeprefix("space."): array for name, array in arrays.items() if name.startswith("space.")}
        partitioner._space = TfidfSpace.from_state(settings["space"], inner, tokenizer)
        centres = arrays["centres"]
        if centres.shape != (len(settings["names"]), partitioner._space.dimensions) or not np.isfinite(centres).all():
            raise ValueError(f"centres of shape {centres.shape} do not fit the names and the space, or hold NaN")
        partitioner._centres = centres
        return partitioner


def stratified_sample(documents: Iterable[Document], size: int, seed: int) -> list[Document]:
    """At most `size` documents, equally many of each language as far as each has them, drawn at random by `seed`.

    The order is by language, then as they came.
    """
    from tqdm import tqdm

    groups: dict[str, list[Document]] = {}
    for document in tqdm(documents, desc="reading the sample", unit=" documents", file=sys.stderr, mininterval=0.5, leave=False):
        groups.setdefault(document.language, []).append(document)
    shares = equal_shares({code: len(group) for code, group in groups.items()}, size)
    rng = np.random.default_rng(seed)
    sample = []
    for code in sorted(groups):
        chosen = np.sort(rng.permutation(len(groups[code]))[: shares[code]])
        sample += [groups[code][index] for index in chosen]
    return sample


def equal_shares(available: dict[str, int], size: int) -> dict[str, int]:
    """`size` divided equally, where nobody gets more than is available and the rest goes to the others."""
    shares: dict[str, int] = {}
    left = size
    for position, code in enumerate(sorted(available, key=lambda name: (available[name], name))):
        shares[code] = min(available[code], left // (len(available) - position))
        left -= shares[code]
    return shares
