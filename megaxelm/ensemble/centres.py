"""Centres of the router `tfidf`: where the text of each expert lies in the vector space, as one point or as one for each language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megaxelm.errors import RoutingError
from megaxelm.growth import Grown, grown_folder
from megaxelm.recipe import Recipe

if TYPE_CHECKING:
    from megaxelm.cluster.partitioner import Partitioner
    from megaxelm.cluster.space import TfidfSpace
    from megaxelm.corpus.document import Document
    from megaxelm.corpus.tokenizer import Tokenizer

_LEAST_SHARE = 0.05
"""A language has a centre in a cluster that holds this share of its sample: a handful of strays would be a centre for themselves."""
_TRUST_CHARACTERS = 200


@dataclass(frozen=True)
class Centres:
    """Centres [centres, dimensions], and the expert that each belongs to."""

    vectors: Tensor
    experts: list[str]

    def of(self, names: Sequence[str]) -> Centres:
        """Those of some experts, in the order of `names`."""
        rows = [number for name in names for number, expert in enumerate(self.experts) if expert == name]
        return Centres(self.vectors[rows], [self.experts[number] for number in rows])

    def __add__(self, other: Centres) -> Centres:
        return Centres(torch.cat([self.vectors, other.vectors]), self.experts + other.experts)


def cluster_centres(recipe: Recipe, run_folder: Path, partitioner: Partitioner, tokenizer: Tokenizer) -> tuple[TfidfSpace, Centres]:
    """The vector space, and the centres of the clusters in it.

    The space is the partitioner's own where that is TF-IDF; else one is fitted on the sample of the corpus. One centre a cluster is that of
    k-means, or else the normalised mean vector of its documents. With `ensemble.centres: language` a cluster has one for each language of
    which it holds 5 % of the documents or more; a cluster that holds no such language (random ones, of many) keeps its one.

    Raises:
        RoutingError: a cluster has no document with a known term in the sample.
    """
    from megaxelm.cluster.space import TfidfSpace
    from megaxelm.cluster.tfidf import TfidfPartitioner

    by_language = recipe.ensemble.centres == "language"
    if isinstance(partitioner, TfidfPartitioner):
        space, names = partitioner.space, list(partitioner.names)
        one_each = Centres(torch.from_numpy(np.asarray(partitioner.centres, dtype=np.float32)), names)
        if not by_language:
            return space, one_each
        documents = sample_documents(run_folder / "corpus", recipe.clusters.tfidf.sample_documents)
        vectors = space.transform([document.text for document in documents])
        return space, language_centres(one_each, vectors, partitioner.assign(documents), documents)
    documents = sample_documents(run_folder / "corpus", recipe.clusters.tfidf.sample_documents)
    texts = [document.text for document in documents]
    space = TfidfSpace.fit(texts, recipe.clusters.tfidf, recipe.clusters.seed, tokenizer)
    vectors, assigned = space.transform(texts), partitioner.assign(documents)
    one_each = Centres(mean_centres(vectors, assigned, partitioner.names), list(partitioner.names))
    return space, language_centres(one_each, vectors, assigned, documents) if by_language else one_each


def language_centres(one_each: Centres, vectors: np.ndarray, assigned: np.ndarray, documents: Sequence[Document]) -> Centres:
    """A centre for each language that a cluster holds enough of; the cluster's own of `one_each` where there is none.

    Args:
        one_each: one centre a cluster. vectors [documents, dimensions]; assigned [documents]: number of the cluster.
    """
    codes = np.array([document.language for document in documents])
    known = np.abs(vectors).max(-1) > 0
    found, experts = [], []
    for number, name in enumerate(one_each.experts):
        held = []
        for code in sorted(set(codes)):
            mine = known & (assigned == number) & (codes == code)
            if mine.sum() >= _LEAST_SHARE * (codes == code).sum() and mine.any():
                held.append(mean_centres(vectors[mine], np.zeros(mine.sum(), np.int64), [name]))
        found += held or [one_each.vectors[number : number + 1]]
        experts += [name] * max(1, len(held))
    return Centres(torch.cat(found), experts)


def grown_centres(space: TfidfSpace, run_folder: Path, grown: Sequence[Grown], most: int, by_language: bool) -> Centres:
    """Normalised mean vector of the sample documents of the languages that each was grown for: of all together, or of each.

    Raises:
        RoutingError: the documents of one have no term that the space knows.
    """
    found, experts = [], []
    for item in grown:
        for codes in [[code] for code in item.languages] if by_language else [item.languages]:
            texts = [document.text for document in sample_documents(grown_folder(run_folder, item.name) / "corpus", most, codes)]
            found.append(mean_centres(space.transform(texts), np.zeros(len(texts), np.int64), [item.name]))
            experts.append(item.name)
    return Centres(torch.cat(found), experts)


def mean_centres(vectors: np.ndarray, assigned: np.ndarray, names: list[str]) -> Tensor:
    """Normalised mean vector [experts, dimensions] of the documents of each expert.

    Raises:
        RoutingError: an expert without a document, or whose documents have no known term.
    """
    centres = []
    for number, name in enumerate(names):
        mean = vectors[assigned == number].sum(0, dtype=np.float64)
        norm = float(np.linalg.norm(mean))
        if not norm > 0:
            raise RoutingError(
                f"router tfidf: expert {name} has no document with known terms in the sample; raise corpus.sample_bytes or "
                "clusters.tfidf.sample_documents"
            )
        centres.append(mean / norm)
    return torch.from_numpy(np.stack(centres).astype(np.float32))


def nearest_distances(space: Any, centres: Tensor, texts: Sequence[str], quantile: float) -> list[float]:
    """Median and `quantile` of the squared distance of texts to the centre nearest to each: what the fallback of `tfidf` is heard by.

    Only the first 200 characters count: decoding begins with little text, which is further from every centre than a whole document, and
    has to be trusted all the same.

    Raises:
        RoutingError: no text has a known term.
    """
    vectors = space.transform([text[:_TRUST_CHARACTERS] for text in texts])
    vectors = vectors[np.abs(vectors).max(-1) > 0].astype(np.float64)
    if not len(vectors):
        raise RoutingError("ensemble.fallback: no document of the sample has a known term; raise corpus.sample_bytes, or set it to null")
    distance = torch.cdist(torch.from_numpy(vectors), centres.to(torch.float64), compute_mode="donot_use_mm_for_euclid_dist").square()
    return np.quantile(distance.amin(-1).numpy(), [0.5, quantile]).tolist()


def sample_documents(corpus_folder: Path, most: int, languages: Sequence[str] | None = None) -> list[Document]:
    """At most `most` documents of the sample, of some languages or of all, equally many of each as far as there are."""
    from megaxelm.corpus.prepare import read_documents

    paths = sorted((corpus_folder / "sample").glob("*.jsonl"))
    if languages is not None:
        paths = [path for path in paths if path.stem in languages]
    if not paths:
        raise RoutingError("router tfidf: corpus/sample holds no text; make the corpus again (megaxelm run RECIPE --from corpus)")
    found: list[Document] = []
    left = most
    # Small languages first, so that what they leave over goes to the others.
    for number, path in enumerate(sorted(paths, key=lambda path: path.stat().st_size)):
        documents = list(islice(read_documents(path), max(1, left // (len(paths) - number))))
        found += documents
        left -= len(documents)
    return found
