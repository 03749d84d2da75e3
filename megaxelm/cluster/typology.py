"""Languages grouped by typological relatedness (paper, section 3.1), and the donors of languages that no expert knows.

The published merging goes in rounds of greedy pairing, so it gives k = n / 2^r only; for other k, true agglomerative
clustering with average linkage is used, and `describe()` and `notes()` say so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster import uriel
from megaxelm.cluster.analyzers import TextEncoder
from megaxelm.cluster.language_sets import assign_by_language, language_groups, languages_of, unique_names
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.cluster.state import entry
from megaxelm.errors import ClusterError

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document


@dataclass(frozen=True)
class Merge:
    """Two clusters that became one."""

    left: list[str]
    """Languages of the one."""
    right: list[str]
    """Languages of the other."""
    distance: float
    """Smallest distance over the member pairs (paired), or the mean over them (agglomerative)."""
    round: int
    """Round of pairing, from 1; 0 for agglomerative merges."""
    forced: bool
    """A left-over pair: see `is_forced`."""


def is_forced(distance: float, left: Sequence[int], right: Sequence[int], distances: NDArray[np.float64]) -> bool:
    """Whether a merge joins clusters that nothing but the wanted number of clusters puts together.

    Two conditions: its `distance` is above the median over all pairs of languages, so the two are no closer than languages drawn at
    random; and no language of one has its nearest neighbour among all languages in the other. `left` and `right` are rows of
    `distances` [languages, languages]. For the 16 published languages at k = 8 this holds for tr-zh and sw-vi alone.
    """
    languages = len(distances)
    if distance <= np.median(distances[np.triu_indices(languages, 1)]):
        return False
    others = np.where(np.eye(languages, dtype=bool), np.inf, distances)
    nearest = others.min(axis=1)
    between = distances[np.ix_(left, right)]
    return not bool((between <= nearest[left][:, None]).any() or (between <= nearest[right][None, :]).any())


def pair_languages(languages: Sequence[str], distances: NDArray[np.float64], k: int) -> tuple[list[list[str]], list[Merge]]:
    """The published rounds: sort all pairs of clusters by their smallest member distance, merge the closest two, set them aside, and
    so on until all are paired; then the next round, until k clusters are left.

    Raises:
        ClusterError: if no number of rounds leads from the number of languages to k.
    """
    if k not in halvings(len(languages)):
        reached = ", ".join(str(count) for count in halvings(len(languages)))
        raise ClusterError(f"clusters.k = {k}: rounds of pairing lead from {len(languages)} languages to {reached} only")
    clusters = [[index] for index in range(len(languages))]
    merges: list[Merge] = []
    rounds = 0
    while len(clusters) > k:
        rounds += 1
        pairs = sorted(
            (float(distances[np.ix_(clusters[a], clusters[b])].min()), a, b) for a, b in itertools.combinations(range(len(clusters)), 2)
        )
        paired: set[int] = set()
        merged: list[list[int]] = []
        for distance, a, b in pairs:
            if a in paired or b in paired:
                continue
            paired |= {a, b}
            merged.append(clusters[a] + clusters[b])
            merges.append(_merge(languages, clusters[a], clusters[b], distance, rounds, distances))
        clusters = merged
    return [[languages[index] for index in cluster] for cluster in clusters], merges


def agglomerate_languages(languages: Sequence[str], distances: NDArray[np.float64], k: int) -> tuple[list[list[str]], list[Merge]]:
    """Agglomerative clustering with average linkage, cut where exactly k clusters are left.

    Raises:
        ClusterError: if k is not in 1..number of languages.
    """
    if not 1 <= k <= len(languages):
        raise ClusterError(f"clusters.k = {k}: there are {len(languages)} languages; choose 1 to {len(languages)}")
    clusters = {index: [index] for index in range(len(languages))}
    merges: list[Merge] = []
    for step, (a, b, height, _) in enumerate(average_linkage(distances)[: len(languages) - k]):
        left, right = clusters.pop(int(a)), clusters.pop(int(b))
        merges.append(_merge(languages, left, right, float(height), 0, distances))
        clusters[len(languages) + step] = left + right
    return [[languages[index] for index in cluster] for cluster in clusters.values()], merges


def halvings(count: int) -> list[int]:
    """Numbers of clusters that rounds of pairing reach from `count`: 16 -> 16, 8, 4, 2, 1; 6 -> 6, 3."""
    reached = [count]
    while reached[-1] > 1 and reached[-1] % 2 == 0:
        reached.append(reached[-1] // 2)
    return reached


def average_linkage(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """scipy's linkage rows [n - 1, 4] of a square distance matrix; no rows for one language."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    if len(distances) < 2:
        return np.zeros((0, 4))
    return np.asarray(linkage(squareform(distances, checks=False), method="average"), dtype=np.float64)


def language_linkage(languages: Sequence[str], features: str = "syntax_average") -> NDArray[np.float64]:
    """Average linkage of the languages for `scipy.cluster.hierarchy.dendrogram`, [languages - 1, 4].

    Raises:
        ClusterError: as `uriel.distances`.
    """
    return average_linkage(uriel.distances(languages, features))


def donors(unseen: Sequence[str], known: Sequence[str], features: str = "syntax_average") -> list[tuple[str, list[tuple[str, float]]]]:
    """For each unseen language the known ones with their distance, nearest first: the first one's expert is the donor.

    Distances are taken over all these languages together, since features that are constant over them are dropped.

    Raises:
        ClusterError: if a list is empty, a language is in both, or as `uriel.distances`.
    """
    if not known:
        raise ClusterError("donors: no known language given; the languages of the existing experts are needed")
    both = sorted(set(unseen) & set(known))
    if both:
        raise ClusterError(f"donors: {', '.join(both)} given both as unseen and as known; a language that has an expert needs no donor")
    table = uriel.distances([*unseen, *known], features)[: len(unseen), len(unseen) :]
    ranked = [sorted(zip(known, (float(value) for value in row), strict=True), key=lambda pair: (pair[1], pair[0])) for row in table]
    return list(zip(unseen, ranked, strict=True))


class TypologyPartitioner(Partitioner):
    """Clusters of related languages; every document goes with its language."""

    kind: ClassVar[str] = "typology"

    def __init__(self, k: int, features: str = "syntax_average") -> None:
        super().__init__()
        self.k = k
        self.features = features
        self.groups: dict[str, list[str]] = {}
        self.method = ""
        self.merges: list[Merge] = []
        self.median_distance = 0.0
        """Median distance over all pairs of languages."""

    def fit(self, documents: Iterable[Document]) -> None:
        """Group the languages that occur.

        Raises:
            ClusterError: if k is larger than the number of languages, or URIEL lacks one of them.
        """
        codes = languages_of(documents)
        if self.k > len(codes):
            raise ClusterError(
                f"clusters.k = {self.k}: more than the {len(codes)} languages of the corpus ({', '.join(codes)}); choose 1 to "
                f"{len(codes)}, or clusters.partitioner: tfidf, which also divides languages"
            )
        distances = uriel.distances(codes, self.features)
        self.median_distance = float(np.median(distances[np.triu_indices(len(codes), 1)])) if len(codes) > 1 else 0.0
        self.method = "paired" if self.k in halvings(len(codes)) else "agglomerative"
        merge = pair_languages if self.method == "paired" else agglomerate_languages
        groups, self.merges = merge(codes, distances, self.k)
        groups = sorted(sorted(group) for group in groups)
        self.names = unique_names(groups)
        self.groups = dict(zip(self.names, groups, strict=True))

    def assign(self, documents: Sequence[Document]) -> NDArray[np.int64]:
        """Number of the cluster that holds each document's language, [documents]."""
        return assign_by_language(documents, self.groups)

    def languages(self) -> dict[str, list[str]] | None:
        """Languages of each cluster, sorted."""
        return self.groups

    def describe(self) -> dict[str, Any]:
        """Method, feature set, and every merge with its distance and whether it was forced."""
        merges = [asdict(merge) for merge in self.merges]
        return {"method": self.method, "features": self.features, "median_distance": self.median_distance, "merges": merges}

    def notes(self) -> list[str]:
        """Says that merging was agglomerative, where it was, and names the left-over pairs."""
        found = []
        if self.method == "agglomerative":
            count = sum(len(group) for group in self.groups.values())
            reached = ", ".join(str(k) for k in halvings(count))
            found.append(
                f"clusters.k = {self.k} of {count} languages: rounds of pairing give k = {reached} only, so the clusters are made by "
                "agglomerative clustering with average linkage"
            )
        for merge in self.merges:
            if merge.forced:
                single = len(merge.left) == len(merge.right) == 1
                sides = [" + ".join(sorted(side)) for side in (merge.left, merge.right)]
                found.append(
                    f"{sides[0]} and {sides[1]} are {'a left-over pair' if single else 'left over'}, not relatives: distance "
                    f"{merge.distance:.3f}, while half of all pairs of these languages are within {self.median_distance:.3f}"
                )
        return found

    def _state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        return {"k": self.k, "languages": self.groups, **self.describe()}, {}

    @classmethod
    def _from_state(cls, settings: dict[str, Any], arrays: dict[str, NDArray[Any]], tokenizer: TextEncoder | None) -> TypologyPartitioner:
        partitioner = cls(entry(settings, "k", int), entry(settings, "features", str))
        partitioner.groups = language_groups(settings)
        partitioner.method = entry(settings, "method", str)
        partitioner.median_distance = float(entry(settings, "median_distance", float, int))
        partitioner.merges = [Merge(**merge) for merge in entry(settings, "merges", list)]
        return partitioner


def _merge(
    languages: Sequence[str], left: list[int], right: list[int], distance: float, rounds: int, distances: NDArray[np.float64]
) -> Merge:
    names = [[languages[index] for index in side] for side in (left, right)]
    return Merge(names[0], names[1], distance, rounds, is_forced(distance, left, right, distances))
