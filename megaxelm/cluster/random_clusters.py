"""Documents at random: the control that other partitioners have to beat."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from megaxelm.cluster.analyzers import TextEncoder
from megaxelm.cluster.language_sets import numbered_names
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.cluster.state import entry
from megaxelm.errors import ClusterError

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document, TokenDocument


class RandomPartitioner(Partitioner):
    """Clusters `c00`, `c01`, ... by the hash of seed and text.

    Neither the order of documents, nor how they are divided among tasks, nor their language has a part in it, and equal texts stay
    together. Sizes are those of a fair draw: a cluster of n documents has n / k of them, give or take about sqrt(n / k).
    """

    kind: ClassVar[str] = "random"

    def __init__(self, k: int, seed: int) -> None:
        super().__init__()
        self.k = k
        self.seed = seed

    def fit(self, documents: Iterable[Document], tokens: Mapping[str, int] | None = None) -> None:
        """Nothing is learnt from the documents; there have to be k of them.

        Raises:
            ClusterError: if there are fewer documents than clusters.
        """
        found = sum(1 for _ in itertools.islice(documents, self.k))
        if found < self.k:
            raise ClusterError(f"clusters.k = {self.k}: more than the {found} documents of the sample; choose fewer, or give more text")
        self.names = numbered_names(self.k)

    def assign(self, documents: Sequence[Document | TokenDocument]) -> NDArray[np.int64]:
        """xxh3_64 of seed and text key, modulo k, [documents]."""
        hashes = (xxhash.xxh3_64_intdigest(struct.pack("<QQ", self.seed, document.key)) for document in documents)
        return np.fromiter((digest % self.k for digest in hashes), dtype=np.int64, count=len(documents))

    def languages(self) -> dict[str, list[str]] | None:
        """None: a document's language does not decide."""
        return None

    def describe(self) -> dict[str, Any]:
        """Method and seed."""
        return {"method": "random", "seed": self.seed}

    def notes(self) -> list[str]:
        """Says what such clusters are for."""
        return ["clusters.partitioner = random: the clusters have nothing in common but chance; they are the control for the others"]

    def _state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        return {"k": self.k, "seed": self.seed}, {}

    @classmethod
    def _from_state(cls, settings: dict[str, Any], arrays: dict[str, NDArray[Any]], tokenizer: TextEncoder | None) -> RandomPartitioner:
        k, seed = entry(settings, "k", int), entry(settings, "seed", int)
        if k != len(settings["names"]) or not 0 <= seed < 2**64:
            raise ValueError(f"k = {k} or seed = {seed} does not fit")
        return cls(k, seed)
