"""Assignment of the whole corpus: every document of every token shard finds its cluster, a shard a unit of work.

`<shard>.npy` int32 [documents]: the number of the cluster of each document, in the order of the shard.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster.load import load_partitioner
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.corpus.executor import Progress, UnitsStep
from megaxelm.corpus.shards import TokenShard, document_order
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.corpus.tokens import Blocks
from megaxelm.errors import ClusterError

_DOCUMENTS = 4096

Counts = dict[str, dict[str, dict[str, int]]]
"""Documents, bytes and tokens by cluster and language."""


class AssignStep(UnitsStep):
    """Assigns the documents of shards.

    Args:
        blocks: the blocks that the shards were made from, in the same order; their text is read again where the partitioner reads text.
        whole_blocks: give the partitioner all documents of a shard at once, as a balanced assignment needs.
    """

    name = "assign"
    size_is_text = True

    def __init__(
        self,
        blocks: Blocks,
        shards: Sequence[Path],
        begin: int,
        clusters_folder: Path,
        tokenizer_folder: Path,
        whole_blocks: bool,
        store: Path,
        reports: Path,
    ) -> None:
        super().__init__(len(shards), reports)
        self.blocks = blocks
        self.shards = list(shards)
        self.begin = begin
        self.clusters_folder, self.tokenizer_folder = clusters_folder, tokenizer_folder
        self.whole_blocks = whole_blocks
        self.store = store
        self._partitioner: Partitioner | None = None

    def size(self, unit: int) -> int:
        return self.blocks.blocks[unit].num_bytes

    def path(self, unit: int) -> Path:
        """File of a shard's assignment."""
        return self.store / f"{self.shards[unit].name}.npy"

    def is_done(self, unit: int) -> bool:
        return self.path(unit).exists()

    def do(self, unit: int, progress: Progress) -> None:
        """Assign the documents of one shard."""
        if self._partitioner is None:
            self._partitioner = load_partitioner(self.clusters_folder, Tokenizer.load(self.tokenizer_folder))
        numbers = self._assign(self._partitioner, unit, progress)
        aside = self.path(unit).with_name(f".{self.shards[unit].name}.{os.uname().nodename}.{os.getpid()}")
        with open(aside, "wb") as file:
            np.save(file, numbers.astype(np.int32))
        os.replace(aside, self.path(unit))

    def _assign(self, partitioner: Partitioner, unit: int, progress: Progress) -> NDArray[np.int64]:
        shard = TokenShard(self.shards[unit])
        documents: list[Any]
        if partitioner.reads_text:
            texts = list(self.blocks.documents(self.blocks.blocks[unit]))
            documents = [texts[i] for i in document_order([document.language for document in texts])]
        else:
            documents = shard.documents(self.begin, 1)
        assert len(documents) == shard.num_documents
        found = []
        step = max(1, len(documents)) if self.whole_blocks else _DOCUMENTS
        for start in range(0, len(documents), step):
            part = partitioner.assign(documents[start : start + step])
            progress.add(documents=len(part), bytes=int(shard.sizes[start : start + step].sum(dtype=np.int64)))
            found.append(_checked(part, documents[start : start + step], len(partitioner.names)))
        return np.concatenate(found)

    def counts(self, names: Sequence[str]) -> Counts:
        """Documents, bytes and tokens by cluster and language, of all shards."""
        counts: Counts = {name: {} for name in names}
        for unit, folder in enumerate(self.shards):
            shard = TokenShard(folder)
            numbers = np.load(self.path(unit))
            for section in shard.sections:
                part = slice(section.first, section.first + section.documents)
                totals = [
                    np.bincount(numbers[part], weights=weights, minlength=len(names))
                    for weights in (None, shard.sizes[part], shard.lengths[part])
                ]
                for number in np.flatnonzero(totals[0]).tolist():
                    of = counts[names[number]].setdefault(section.language, {"documents": 0, "bytes": 0, "tokens": 0})
                    for unit_name, total in zip(("documents", "bytes", "tokens"), totals, strict=True):
                        of[unit_name] += int(total[number])
        return counts


def _checked(numbers: NDArray[np.int64], documents: Sequence[Any], num_clusters: int) -> NDArray[np.int64]:
    assert numbers.shape == (len(documents),)
    wrong = (numbers < 0) | (numbers >= num_clusters)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ClusterError(
            f"a document in {documents[i].language} was assigned to cluster {numbers[i]}; there are 0..{num_clusters - 1}: make the "
            "clusters again (--from clusters)"
        )
    return numbers
