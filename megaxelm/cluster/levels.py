"""The tree above the clusters: the coarser divisions that rounds of training go down (`rounds` of the recipe).

Clusters are merged further by the method that made them, so the divisions are nested; where pairing (or plain agglomerative clustering)
gives them all, each is the one that a flat run with that k has. Clusters of languages are merged by the distances of their languages, those
of TF-IDF by the distances of their centres.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster.language_sets import cluster_name
from megaxelm.cluster.linkage import Balance, Linkage, Merge, agglomerate_languages, halvings, pair_languages
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.cluster.tfidf import TfidfPartitioner
from megaxelm.cluster.typology import TypologyPartitioner, language_distances
from megaxelm.errors import ClusterError
from megaxelm.recipe import TypologyConfig


@dataclass(frozen=True)
class Tree:
    """Divisions of the rounds before the last, coarsest first."""

    method: Literal["paired", "agglomerative"]
    levels: list[dict[str, list[str]]]
    """For each of these rounds: names of its experts to the clusters under them. Names begin with `round<number>-`."""
    merges: list[Merge]
    """What was merged above the clusters, in order: of languages, or of clusters of TF-IDF."""
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """For the clusters' report."""
        return {"method": self.method, "levels": self.levels, "merges": [asdict(merge) for merge in self.merges]}


@dataclass(frozen=True)
class _Items:
    """What is merged: names, the distances between them [items, items], the clusters as rows of it, the tokens where they are balanced."""

    names: list[str]
    distances: NDArray[np.float64]
    clusters: list[list[int]]
    linkage: Linkage = "average"
    tokens: list[int] | None = None


def build_tree(partitioner: Partitioner, counts: Sequence[int], config: TypologyConfig, tokens: Mapping[str, int]) -> Tree:
    """Merge the clusters of a fitted partitioner further, to the numbers of the rounds.

    Args:
        counts: `k` of every round, growing; the last is the number of clusters.
        config: of the recipe; clusters of languages are merged by it, whatever made them.
        tokens: tokens of each language, for `balance: tokens`.

    Raises:
        ClusterError: the last count is not the number of clusters, the method does not give a count, the partitioner's clusters cannot be
            put in a tree, or as `language_distances`.
    """
    if counts[-1] != len(partitioner.names):
        raise ClusterError(
            f"rounds: the last has k = {counts[-1]}, and the {partitioner.kind} partitioner makes {len(partitioner.names)} clusters: the "
            "last round's experts are those of the clusters, so make them agree"
        )
    inner = list(counts[:-1])
    items = _items(partitioner, config, tokens)
    method = _method(partitioner, inner, config, items)
    finer, merges = items.clusters, list[Merge]()
    levels: list[dict[str, list[str]]] = []
    notes = _note_on_method(partitioner, inner, method, items)
    place = {name: number for number, name in enumerate(items.names)}
    for number, count in reversed(list(enumerate(inner, 1))):
        groups, merged = _merge(items, finer, count, method, config)
        finer = [[place[name] for name in group] for group in groups]
        levels.insert(0, _named(partitioner, number, finer, items))
        merges += merged
        if not isinstance(partitioner, TfidfPartitioner):
            notes += [
                f"round {number}: {' + '.join(sorted(merge.left))} and {' + '.join(sorted(merge.right))} are left over, not relatives "
                f"(distance {merge.distance:.3f}), and share an expert in that round"
                for merge in merged
                if merge.forced
            ]
    return Tree(method, levels, merges, notes)


def _items(partitioner: Partitioner, config: TypologyConfig, tokens: Mapping[str, int]) -> _Items:
    if isinstance(partitioner, TfidfPartitioner):
        centres = partitioner.centres.astype(np.float64)
        distances = np.sqrt(np.square(centres[:, None] - centres[None]).sum(-1))
        return _Items(list(partitioner.names), distances, [[number] for number in range(len(centres))])
    groups = partitioner.languages()
    if groups is None:
        raise ClusterError(
            f"rounds: clusters of the {partitioner.kind} partitioner have no tree to go down; choose typology, tfidf, language or "
            "mapping, or leave out rounds"
        )
    codes = sorted(code for group in groups.values() for code in group)
    place = {code: number for number, code in enumerate(codes)}
    clusters = [[place[code] for code in group] for group in groups.values()]
    counts = [tokens[code] for code in codes] if config.balance == "tokens" else None
    return _Items(codes, language_distances(codes, config), clusters, config.linkage, counts)


def _method(partitioner: Partitioner, inner: Sequence[int], config: TypologyConfig, items: _Items) -> Literal["paired", "agglomerative"]:
    """The method that made the clusters where one did, else that of the recipe; `auto` pairs where that gives every count."""
    reached = halvings(len(items.clusters))
    if isinstance(partitioner, TypologyPartitioner) and partitioner.method == "agglomerative":
        return "agglomerative"
    if not isinstance(partitioner, TfidfPartitioner) and (config.method == "agglomerative" or items.tokens):
        return "agglomerative"
    missed = [count for count in inner if count not in reached]
    if missed and config.method == "paired" and not isinstance(partitioner, TfidfPartitioner):
        raise ClusterError(
            f"rounds: k = {missed[0]}: rounds of pairing lead from {len(items.clusters)} clusters to k = "
            f"{', '.join(map(str, reached))} only; choose of these, or clusters.typology.method: auto or agglomerative, which give any k"
        )
    return "agglomerative" if missed else "paired"


def _note_on_method(partitioner: Partitioner, inner: Sequence[int], method: Literal["paired", "agglomerative"], items: _Items) -> list[str]:
    if method == "paired" or getattr(partitioner, "method", "") == "agglomerative":
        return []
    reached = halvings(len(items.clusters))
    missed = [count for count in inner if count not in reached]
    if not missed:
        return []
    return [
        f"rounds: rounds of pairing lead from {len(items.clusters)} clusters to k = {', '.join(map(str, reached))}, not to "
        f"{', '.join(map(str, missed))}, so the tree above the clusters is made by agglomerative clustering with {items.linkage} linkage"
    ]


def _merge(
    items: _Items, finer: list[list[int]], count: int, method: Literal["paired", "agglomerative"], config: TypologyConfig
) -> tuple[list[list[str]], list[Merge]]:
    if method == "paired":
        return pair_languages(items.names, items.distances, count, start=finer)
    balance = None
    if items.tokens:
        balance = Balance(items.tokens, (1 + config.tolerance) * sum(items.tokens) / count)
    return agglomerate_languages(items.names, items.distances, count, items.linkage, balance, start=finer)


def _named(partitioner: Partitioner, number: int, groups: Sequence[Sequence[int]], items: _Items) -> dict[str, list[str]]:
    """Experts of one round: a name to the clusters under it, these in the order of their numbers."""
    level: dict[str, list[str]] = {}
    taken = {name.lower() for name in partitioner.names}
    for group in groups:
        members = set(group)
        clusters = [name for name, cluster in zip(partitioner.names, items.clusters, strict=True) if members >= set(cluster)]
        # Names that the user gave are better known than what they stand for.
        parts = clusters if partitioner.kind in ("mapping", "tfidf") else [items.names[index] for index in group]
        name = f"round{number}-{cluster_name(parts)}"
        if name.lower() in taken:
            raise ClusterError(f"rounds: an expert of round {number} would be named {name}, which is taken: rename the cluster or language")
        taken.add(name.lower())
        level[name] = clusters
    return dict(sorted(level.items()))
