"""What a partitioner is, and how one is written to disk.

A partitioner divides documents into named clusters, one expert each. It is kept as `partitioner.json`, and
`partitioner.safetensors` where it has arrays; never as a pickle. `load.py` reads it back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster.analyzers import TextEncoder
from megaxelm.cluster.state import write_state

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document, TokenDocument

SETTINGS_FILE = "partitioner.json"
ARRAYS_FILE = "partitioner.safetensors"


class Partitioner(ABC):
    """Divides documents into named clusters."""

    kind: ClassVar[str]
    """Name of the class of partitioner in recipes and in `partitioner.json`."""
    names: list[str]
    """Names of the clusters in the order of their numbers; safe as file names. Empty before `fit`."""

    def __init__(self) -> None:
        self.names = []

    @property
    def reads_text(self) -> bool:
        """Whether `assign` needs the text of a document, not only its language, key and tokens."""
        return False

    @abstractmethod
    def fit(self, documents: Iterable[Document], tokens: Mapping[str, int] | None = None) -> None:
        """Find the clusters from a sample of the corpus.

        Args:
            tokens: tokens of each language in the whole corpus, for clusters that are balanced by them; None where unknown.

        Raises:
            ClusterError: if the documents cannot be divided as asked.
        """

    @abstractmethod
    def assign(self, documents: Sequence[Document | TokenDocument]) -> NDArray[np.int64]:
        """Number of the cluster of each document, [documents], an index into `names`.

        Documents without their text will do unless `reads_text`.

        Raises:
            ClusterError: if a document belongs to no cluster.
        """

    @abstractmethod
    def languages(self) -> dict[str, list[str]] | None:
        """Languages of each cluster by its name, or None where clusters are not sets of languages."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """How the clusters came about, as plain values that go into JSON. Always has `method`."""

    def notes(self) -> list[str]:
        """Sentences that the user should read: what was chosen for them, and what is weaker than it looks."""
        return []

    def save(self, folder: Path) -> None:
        """Write `partitioner.json`, and `partitioner.safetensors` where there are arrays, into an existing folder."""
        settings, arrays = self._state()
        write_state(folder / SETTINGS_FILE, folder / ARRAYS_FILE, {"kind": self.kind, "names": self.names, **settings}, arrays)

    @abstractmethod
    def _state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """What `save` keeps besides kind and names: plain values, and arrays by name."""

    @classmethod
    @abstractmethod
    def _from_state(cls, settings: dict[str, Any], arrays: dict[str, NDArray[Any]], tokenizer: TextEncoder | None) -> Partitioner:
        """The inverse of `_state`. May raise KeyError, TypeError or ValueError where the state is damaged."""
