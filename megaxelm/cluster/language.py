"""One cluster, so one expert, for each language."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster.analyzers import TextEncoder
from megaxelm.cluster.language_sets import assign_by_language, language_groups, languages_of, unique_names
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.errors import ClusterError

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document, TokenDocument


class LanguagePartitioner(Partitioner):
    """Each language is a cluster of its own (16 clusters in the published runs with k = 16)."""

    kind: ClassVar[str] = "language"

    def __init__(self, k: int | None = None) -> None:
        super().__init__()
        self.k = k
        self.groups: dict[str, list[str]] = {}

    def fit(self, documents: Iterable[Document], tokens: Mapping[str, int] | None = None) -> None:
        """Take the languages that occur.

        Raises:
            ClusterError: if `k` was given and is not their number.
        """
        codes = languages_of(documents)
        if self.k is not None and self.k != len(codes):
            raise ClusterError(
                f"clusters.k = {self.k}: the `language` partitioner makes one cluster for each of the {len(codes)} languages "
                f"({', '.join(codes)}); leave k out, or use partitioner: typology"
            )
        self.names = unique_names([[code] for code in codes])
        self.groups = {name: [code] for name, code in zip(self.names, codes, strict=True)}

    def assign(self, documents: Sequence[Document | TokenDocument]) -> NDArray[np.int64]:
        """Number of the language of each document, [documents]."""
        return assign_by_language(documents, self.groups)

    def languages(self) -> dict[str, list[str]] | None:
        """The one language of each cluster."""
        return self.groups

    def describe(self) -> dict[str, Any]:
        """No more to tell than the method."""
        return {"method": "language"}

    def _state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        return {"languages": self.groups}, {}

    @classmethod
    def _from_state(cls, settings: dict[str, Any], arrays: dict[str, NDArray[Any]], tokenizer: TextEncoder | None) -> LanguagePartitioner:
        partitioner = cls()
        partitioner.groups = language_groups(settings)
        return partitioner
