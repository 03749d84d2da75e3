"""Languages grouped by typological relatedness (paper, section 3.1), and the donors of languages that no expert knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster import uriel
from megaxelm.cluster.analyzers import TextEncoder
from megaxelm.cluster.distance_table import read_distances
from megaxelm.cluster.language_sets import assign_by_language, language_groups, languages_of, unique_names
from megaxelm.cluster.linkage import Balance, Merge, agglomerate_languages, halvings, median_distance, pair_languages
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.cluster.state import entry
from megaxelm.errors import ClusterError
from megaxelm.recipe import TypologyConfig

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document, TokenDocument


def language_distances(languages: Sequence[str], config: TypologyConfig) -> NDArray[np.float64]:
    """Distances of languages as the recipe wants them, [languages, languages]: the user's own, else by URIEL features.

    Raises:
        ClusterError: as `read_distances` and `uriel.distances`.
    """
    if config.distances is not None:
        return read_distances(config.distances, languages)
    return uriel.distances(languages, config.features)


def donors(unseen: Sequence[str], known: Sequence[str], config: TypologyConfig | None = None) -> list[tuple[str, list[tuple[str, float]]]]:
    """For each unseen language the known ones with their distance, nearest first: the first one's expert is the donor.

    Distances are taken over the one unseen language and the known ones, since features that are constant over the languages at hand
    are dropped: what else is asked for does not change an answer.

    Raises:
        ClusterError: if a list is empty or names a language twice, a language is in both, or as `language_distances`.
    """
    config = config or TypologyConfig()
    for name, codes in (("unseen", unseen), ("known", known)):
        if not codes:
            raise ClusterError(f"donors: no {name} language given; give languages without an expert, and those that have one")
        twice = sorted({code for code in codes if codes.count(code) > 1})
        if twice:
            raise ClusterError(f"donors: {', '.join(twice)} given twice as {name}; name each language once")
    both = sorted(set(unseen) & set(known))
    if both:
        raise ClusterError(f"donors: {', '.join(both)} given both as unseen and as known; a language that has an expert needs no donor")
    found = []
    for code in unseen:
        row = language_distances([code, *known], config)[0, 1:]
        ranked = zip(known, (float(value) for value in row), strict=True)
        found.append((code, sorted(ranked, key=lambda pair: (pair[1], pair[0]))))
    return found


class TypologyPartitioner(Partitioner):
    """Clusters of related languages; every document goes with its language."""

    kind: ClassVar[str] = "typology"

    def __init__(self, k: int, config: TypologyConfig | None = None) -> None:
        super().__init__()
        self.k = k
        self.config = config or TypologyConfig()
        self.groups: dict[str, list[str]] = {}
        self.method = ""
        """`paired` or `agglomerative`: what `config.method` came to."""
        self.merges: list[Merge] = []
        self.median_distance = 0.0
        """Median distance over all pairs of languages."""
        self.tokens: dict[str, int] = {}
        """Tokens of each cluster in the whole corpus, where they are balanced."""

    def fit(self, documents: Iterable[Document], tokens: Mapping[str, int] | None = None) -> None:
        """Group the languages that occur.

        Raises:
            ClusterError: if k is larger than the number of languages, the method cannot give k or the balance, tokens are to be balanced
                but not known, or as `language_distances`.
        """
        codes = languages_of(documents)
        if self.k > len(codes):
            raise ClusterError(
                f"clusters.k = {self.k}: more than the {len(codes)} languages of the corpus ({', '.join(codes)}); choose 1 to "
                f"{len(codes)}, or clusters.partitioner: tfidf, which also divides languages"
            )
        balance = self._balance(codes, tokens)
        distances = language_distances(codes, self.config)
        self.median_distance = median_distance(distances)
        self.method = self.config.method
        if self.method == "auto":
            self.method = "paired" if self.k in halvings(len(codes)) and balance is None else "agglomerative"
        if self.method == "paired":
            groups, self.merges = pair_languages(codes, distances, self.k)
        else:
            groups, self.merges = agglomerate_languages(codes, distances, self.k, self.config.linkage, balance)
        groups = sorted(sorted(group) for group in groups)
        self.names = unique_names(groups)
        self.groups = dict(zip(self.names, groups, strict=True))
        of_language = dict(zip(codes, balance.tokens, strict=True)) if balance else {}
        self.tokens = {name: sum(of_language[code] for code in group) for name, group in self.groups.items()} if balance else {}

    def assign(self, documents: Sequence[Document | TokenDocument]) -> NDArray[np.int64]:
        """Number of the cluster that holds each document's language, [documents]."""
        return assign_by_language(documents, self.groups)

    def languages(self) -> dict[str, list[str]] | None:
        """Languages of each cluster, sorted."""
        return self.groups

    def describe(self) -> dict[str, Any]:
        """Method, linkage (agglomerative), what the distances are of, every merge with its distance and whether it was forced, and the
        tokens of each cluster where they are balanced."""
        found: dict[str, Any] = {"method": self.method}
        if self.method == "agglomerative":
            found["linkage"] = self.config.linkage
        found |= {"distances": self.config.distances} if self.config.distances else {"features": self.config.features}
        found |= {"median_distance": self.median_distance, "merges": [asdict(merge) for merge in self.merges]}
        return found | ({"tokens": self.tokens, "tokens_bound": self._bound(sum(self.tokens.values()))} if self.tokens else {})

    def notes(self) -> list[str]:
        """Says what `auto` chose in place of pairing, what had no part in the clusters, which of them are beyond the bound on tokens, and
        names the left-over pairs."""
        return [*self._notes_on_method(), *self._notes_on_balance(), *(self._note_on(merge) for merge in self.merges if merge.forced)]

    def _balance(self, codes: Sequence[str], tokens: Mapping[str, int] | None) -> Balance | None:
        if self.config.balance == "none":
            return None
        if self.config.method == "paired":
            raise ClusterError(
                "clusters.typology.method = paired with balance = tokens: rounds of pairing cannot be balanced; choose method: "
                "agglomerative (or auto), or balance: none"
            )
        unknown = [code for code in codes if code not in (tokens or {})]
        if tokens is None or unknown:
            raise ClusterError(
                f"clusters.typology.balance = tokens: the number of tokens is not known of {', '.join(unknown)}; fit with the tokens of "
                "every language of the corpus, or choose balance: none"
            )
        counts = [tokens[code] for code in codes]
        return Balance(counts, self._bound(sum(counts)))

    def _bound(self, total: int) -> float:
        return (1 + self.config.tolerance) * total / self.k

    def _notes_on_method(self) -> list[str]:
        if self.method == "paired":
            if self.config.linkage == "average":
                return []
            return [
                f"clusters.typology.linkage = {self.config.linkage} has no part in these clusters: rounds of pairing reach k = {self.k}; "
                "method: agglomerative uses it"
            ]
        if self.config.method != "auto" or not self.merges:
            return []
        count = sum(len(group) for group in self.groups.values())
        reached = ", ".join(str(k) for k in halvings(count))
        why = (
            "rounds of pairing cannot be balanced by tokens" if self.k in halvings(count) else f"rounds of pairing give k = {reached} only"
        )
        return [
            f"clusters.k = {self.k} of {count} languages: {why}, so the clusters are made by agglomerative clustering with "
            f"{self.config.linkage} linkage"
        ]

    def _notes_on_balance(self) -> list[str]:
        bound = self._bound(sum(self.tokens.values()))
        return [
            f"cluster {name}: {tokens:,} tokens, {tokens / bound - 1:.0%} beyond the bound of {bound:,.0f} (clusters.typology.tolerance = "
            f"{self.config.tolerance:g}): no two clusters were within it together when it was made; a larger tolerance or another k may "
            "do better"
            for name, tokens in self.tokens.items()
            if tokens > bound and len(self.groups[name]) > 1
        ]

    def _note_on(self, merge: Merge) -> str:
        single = len(merge.left) == len(merge.right) == 1
        sides = [" + ".join(sorted(side)) for side in (merge.left, merge.right)]
        return (
            f"{sides[0]} and {sides[1]} are {'a left-over pair' if single else 'left over'}, not relatives: distance "
            f"{merge.distance:.3f}, while half of all pairs of these languages are within {self.median_distance:.3f}"
        )

    def _state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        state = {
            "k": self.k,
            "config": self.config.model_dump(),
            "languages": self.groups,
            "method": self.method,
            "median_distance": self.median_distance,
            "merges": [asdict(merge) for merge in self.merges],
            "tokens": self.tokens,
        }
        return state, {}

    @classmethod
    def _from_state(cls, settings: dict[str, Any], arrays: dict[str, NDArray[Any]], tokenizer: TextEncoder | None) -> TypologyPartitioner:
        partitioner = cls(entry(settings, "k", int), TypologyConfig.model_validate(entry(settings, "config", dict)))
        partitioner.groups = language_groups(settings)
        partitioner.method = entry(settings, "method", str)
        if partitioner.method not in ("paired", "agglomerative"):
            raise ValueError(f"method = {partitioner.method!r} is neither paired nor agglomerative")
        partitioner.median_distance = float(entry(settings, "median_distance", float, int))
        partitioner.merges = [Merge(**merge) for merge in entry(settings, "merges", list)]
        partitioner.tokens = {str(name): int(count) for name, count in entry(settings, "tokens", dict).items()}
        if partitioner.tokens and list(partitioner.tokens) != list(partitioner.groups):
            raise ValueError("tokens and languages do not agree")
        return partitioner
