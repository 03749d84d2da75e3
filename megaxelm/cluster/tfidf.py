"""Similar documents share an expert: TF-IDF space and balanced k-means (paper, section 3.1)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster.analyzers import TextEncoder
from megaxelm.cluster.kmeans import balanced_kmeans, squared_distances
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.cluster.space import TfidfSpace
from megaxelm.cluster.state import entry
from megaxelm.errors import ClusterError
from megaxelm.recipe import TfidfConfig

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document


class TfidfPartitioner(Partitioner):
    """Clusters of documents, named `c00`, `c01`, ...

    Fitted on a sample with clusters of equal size; afterwards every document goes to the nearest centre, without balancing.
    """

    kind: ClassVar[str] = "tfidf"

    def __init__(self, k: int, config: TfidfConfig, seed: int, tokenizer: TextEncoder | None = None) -> None:
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

    def fit(self, documents: Iterable[Document]) -> None:
        """Fit space and centres on a sample with equal shares of the languages, as far as each has documents.

        Raises:
            ClusterError: if k is larger than the number of documents in the sample, or there is too little text.
        """
        sample = stratified_sample(documents, self.config.sample_documents, self.seed)
        if self.k > len(sample):
            raise ClusterError(
                f"clusters.k = {self.k}: more than the {len(sample)} documents to fit on; choose at most {len(sample)}, give more text, "
                f"or raise clusters.tfidf.sample_documents = {self.config.sample_documents} and corpus.sample_bytes"
            )
        languages = sorted({document.language for document in sample})
        self.fitted_on = {code: sum(document.language == code for document in sample) for code in languages}
        texts = [document.text for document in sample]
        self._space, vectors = TfidfSpace.fit_transform(texts, self.config, self.seed, self.tokenizer)
        self._centres, _ = balanced_kmeans(vectors, self.k, self.seed, self.config.iterations)
        self.names = [f"c{number:0{max(2, len(str(self.k - 1)))}d}" for number in range(self.k)]

    def assign(self, documents: Sequence[Document]) -> NDArray[np.int64]:
        """Number of the nearest centre of each document, [documents]."""
        vectors = self.space.transform([document.text for document in documents])
        return squared_distances(vectors, self.centres).argmin(axis=1).astype(np.int64)

    def languages(self) -> dict[str, list[str]] | None:
        """None: a document's language does not decide."""
        return None

    def describe(self) -> dict[str, Any]:
        """Method, analyzer, size of the space and of the sample it was fitted on."""
        return {
            "method": "tfidf",
            "analyzer": self.config.analyzer,
            "dimensions": self.space.dimensions,
            "terms": len(self.space.codes),
            "fitted_on": self.fitted_on,
        }

    def notes(self) -> list[str]:
        """Says where the space has fewer dimensions than asked for."""
        if self.space.dimensions == self.config.dimensions:
            return []
        return [
            f"clusters.tfidf.dimensions = {self.config.dimensions}: the sample of {sum(self.fitted_on.values())} documents with "
            f"{len(self.space.codes)} terms gives {self.space.dimensions}, which is used"
        ]

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
