"""Clusters that the user names: each is a list of languages in the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster.analyzers import TextEncoder
from megaxelm.cluster.language_sets import assign_by_language, check_name, language_groups, languages_of
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.errors import ClusterError

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document, TokenDocument


class MappingPartitioner(Partitioner):
    """Clusters as `clusters.mapping` of the recipe gives them, in its order; every document goes with its language."""

    kind: ClassVar[str] = "mapping"

    def __init__(self, mapping: Mapping[str, Sequence[str]]) -> None:
        """Cluster names to languages.

        Raises:
            ClusterError: if there is no cluster or an empty one, a name is not safe for a folder, taken or given twice, or a language is
                named twice.
        """
        super().__init__()
        if not mapping:
            raise ClusterError("clusters.mapping is empty: name clusters and their languages, e.g. {slavic: [bg, ru], rest: [en, de]}")
        self.groups = {name: list(codes) for name, codes in mapping.items()}
        seen: dict[str, str] = {}
        home: dict[str, str] = {}
        for name, codes in self.groups.items():
            check_name(name, "clusters.mapping: cluster")
            if name.lower() in seen:
                raise ClusterError(f"clusters.mapping: {name} and {seen[name.lower()]} differ in letter case only; choose another name")
            seen[name.lower()] = name
            if not codes:
                raise ClusterError(f"clusters.mapping.{name}: no language; name at least one, or leave the cluster out")
            for code in codes:
                if code in home:
                    where = f"twice in {name}" if home[code] == name else f"in {home[code]} and in {name}"
                    raise ClusterError(f"clusters.mapping: {code} is {where}; a language belongs to one cluster")
                home[code] = name

    def fit(self, documents: Iterable[Document], tokens: Mapping[str, int] | None = None) -> None:
        """Check that the clusters hold just the languages that occur.

        Raises:
            ClusterError: if a language of the corpus is in no cluster, or a cluster names one that the corpus lacks.
        """
        codes = languages_of(documents)
        named = {code for group in self.groups.values() for code in group}
        homeless = [code for code in codes if code not in named]
        if homeless:
            raise ClusterError(
                f"clusters.mapping: {', '.join(homeless)} of the corpus in no cluster; add them to one, or leave them out "
                "(corpus.languages)"
            )
        absent = sorted(named - set(codes))
        if absent:
            raise ClusterError(
                f"clusters.mapping: the corpus has no {', '.join(absent)}; its languages are {', '.join(codes)}, written as there. Take "
                "them out of the mapping, or add text"
            )
        self.names = list(self.groups)

    def assign(self, documents: Sequence[Document | TokenDocument]) -> NDArray[np.int64]:
        """Number of the cluster that holds each document's language, [documents]."""
        return assign_by_language(documents, self.groups)

    def languages(self) -> dict[str, list[str]] | None:
        """Languages of each cluster, as the recipe lists them."""
        return self.groups

    def describe(self) -> dict[str, Any]:
        """No more to tell than the method: the languages are the report's."""
        return {"method": "mapping"}

    def _state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        return {"languages": self.groups}, {}

    @classmethod
    def _from_state(cls, settings: dict[str, Any], arrays: dict[str, NDArray[Any]], tokenizer: TextEncoder | None) -> MappingPartitioner:
        try:
            return cls(language_groups(settings))
        except ClusterError as error:
            # What a recipe may not hold, a file that was written whole cannot hold either.
            raise ValueError(str(error)) from None
