"""Languages merged into clusters by their distances: the published rounds of pairing, and agglomerative clustering.

The rounds give k = n / 2^r only. Agglomerative clustering gives every k, with single, average or complete linkage, and can keep clusters
from growing far beyond an equal share of the corpus' tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megaxelm.errors import ClusterError

Linkage = Literal["single", "average", "complete"]
"""Distance of two clusters: the smallest, mean or largest over the pairs of their languages."""


@dataclass(frozen=True)
class Merge:
    """Two clusters that became one."""

    left: list[str]
    """Languages of the one."""
    right: list[str]
    """Languages of the other."""
    distance: float
    """Smallest distance over the member pairs (paired), or that of the linkage (agglomerative)."""
    round: int
    """Round of pairing, from 1; 0 for agglomerative merges."""
    forced: bool
    """A left-over pair: see `is_forced`."""


@dataclass(frozen=True)
class Balance:
    """What clusters of languages should stay below."""

    tokens: Sequence[int]
    """Tokens of each language in the whole corpus."""
    bound: float
    """Most tokens that two clusters may have together to be merged, as long as any two stay within it."""


def pair_languages(
    languages: Sequence[str], distances: NDArray[np.float64], k: int, start: Sequence[Sequence[int]] | None = None
) -> tuple[list[list[str]], list[Merge]]:
    """The published rounds: sort all pairs of clusters by their smallest member distance, merge the closest two, set them aside, and
    so on until all are paired; then the next round, until k clusters are left.

    Args:
        start: clusters to go on from, as rows of `distances`; None: each language alone.

    Raises:
        ClusterError: if no number of rounds leads from the number of languages to k.
    """
    clusters = [[index] for index in range(len(languages))] if start is None else [list(cluster) for cluster in start]
    if k not in halvings(len(clusters)):
        reached = ", ".join(str(count) for count in halvings(len(clusters)))
        what = "languages" if start is None else "clusters"
        raise ClusterError(
            f"clusters.k = {k}: rounds of pairing lead from {len(clusters)} {what} to k = {reached} only; choose one of these, or "
            "clusters.typology.method: agglomerative, which gives any k"
        )
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


def agglomerate_languages(
    languages: Sequence[str],
    distances: NDArray[np.float64],
    k: int,
    linkage: Linkage = "average",
    balance: Balance | None = None,
    start: Sequence[Sequence[int]] | None = None,
) -> tuple[list[list[str]], list[Merge]]:
    """Merge the two nearest clusters until exactly k are left; the first two in the order of `languages` among equally near ones.

    With `balance` the nearest two are taken among those that stay within the bound together. Where no two do, the two that are smallest
    together are merged, so that the bound is exceeded by as little as this step allows.

    Args:
        start: clusters to go on from, as rows of `distances`; None: each language alone.

    Raises:
        ClusterError: if k is not in 1..number of languages.
    """
    clusters = [[index] for index in range(len(languages))] if start is None else [list(cluster) for cluster in start]
    count = len(clusters)
    if not 1 <= k <= count:
        raise ClusterError(f"clusters.k = {k}: there are {count} {'languages' if start is None else 'clusters'}; choose 1 to {count}")
    between = np.array(distances, dtype=np.float64) if start is None else _between(clusters, distances, linkage)
    of_language = np.array(balance.tokens if balance else np.zeros(len(languages)), dtype=np.float64)
    tokens = np.array([of_language[cluster].sum() for cluster in clusters])
    merges: list[Merge] = []
    while len(clusters) > k:
        upper = np.triu(np.ones_like(between, dtype=bool), 1)
        joint = tokens[:, None] + tokens[None, :]
        fits = upper & (joint <= balance.bound) if balance else upper
        ranked = np.where(fits, between, np.inf) if fits.any() else np.where(upper, joint, np.inf)
        a, b = (int(index) for index in np.unravel_index(int(ranked.argmin()), ranked.shape))
        merges.append(_merge(languages, clusters[a], clusters[b], float(between[a, b]), 0, distances))
        between = _joined(between, a, b, (len(clusters[a]), len(clusters[b])), linkage)
        tokens[a] += tokens[b]
        tokens = np.delete(tokens, b)
        clusters[a] = clusters[a] + clusters.pop(b)
    return [[languages[index] for index in cluster] for cluster in clusters], merges


def _between(clusters: Sequence[Sequence[int]], distances: NDArray[np.float64], linkage: Linkage) -> NDArray[np.float64]:
    """Distances of clusters [clusters, clusters] from those of their languages."""
    table = np.zeros((len(clusters), len(clusters)))
    for a, b in itertools.combinations(range(len(clusters)), 2):
        pairs = distances[np.ix_(clusters[a], clusters[b])]
        table[a, b] = table[b, a] = {"single": pairs.min(), "average": pairs.mean(), "complete": pairs.max()}[linkage]
    return table


def _joined(between: NDArray[np.float64], a: int, b: int, sizes: tuple[int, int], linkage: Linkage) -> NDArray[np.float64]:
    """Distances of clusters after b has been joined to a (Lance and Williams, 1967)."""
    if linkage == "single":
        row = np.minimum(between[a], between[b])
    elif linkage == "complete":
        row = np.maximum(between[a], between[b])
    else:
        row = (sizes[0] * between[a] + sizes[1] * between[b]) / sum(sizes)
    joined = between.copy()
    joined[a, :] = joined[:, a] = row
    joined[a, a] = 0.0
    return np.delete(np.delete(joined, b, axis=0), b, axis=1)


def halvings(count: int) -> list[int]:
    """Numbers of clusters that rounds of pairing reach from `count`: 16 -> 16, 8, 4, 2, 1; 6 -> 6, 3."""
    reached = [count]
    while reached[-1] > 1 and reached[-1] % 2 == 0:
        reached.append(reached[-1] // 2)
    return reached


def median_distance(distances: NDArray[np.float64]) -> float:
    """Median over all pairs of languages; 0 for one language."""
    return float(np.median(distances[np.triu_indices(len(distances), 1)])) if len(distances) > 1 else 0.0


def is_forced(distance: float, left: Sequence[int], right: Sequence[int], distances: NDArray[np.float64]) -> bool:
    """Whether a merge joins clusters that nothing but the wanted number of clusters puts together.

    Two conditions: its `distance` is above the median over all pairs of languages, so the two are no closer than languages drawn at
    random; and no language of one has its nearest neighbour among all languages in the other. `left` and `right` are rows of
    `distances` [languages, languages]. For the 16 published languages at k = 8 this holds for tr-zh and sw-vi alone.
    """
    if distance <= median_distance(distances):
        return False
    others = np.where(np.eye(len(distances), dtype=bool), np.inf, distances)
    nearest = others.min(axis=1)
    between = distances[np.ix_(left, right)]
    return not bool((between <= nearest[left][:, None]).any() or (between <= nearest[right][None, :]).any())


def linkage_tree(distances: NDArray[np.float64], linkage: Linkage = "average") -> NDArray[np.float64]:
    """The whole tree of merges for `scipy.cluster.hierarchy.dendrogram`, [languages - 1, 4]; no rows for one language."""
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    if len(distances) < 2:
        return np.zeros((0, 4))
    return np.asarray(hierarchy.linkage(squareform(distances, checks=False), method=linkage), dtype=np.float64)


def _merge(
    languages: Sequence[str], left: list[int], right: list[int], distance: float, rounds: int, distances: NDArray[np.float64]
) -> Merge:
    names = [[languages[index] for index in side] for side in (left, right)]
    return Merge(names[0], names[1], distance, rounds, is_forced(distance, left, right, distances))
