"""Repeated training documents: the first in order of reading stays.

`exact` goes by the text key alone, sorted in parts that fit into memory. `minhash` is datatrove's: signatures while the corpus is scanned,
then buckets of equal signatures, then clusters of documents that are connected by them (Lee et al., ACL 2022, section 4.2).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datatrove.data import Document as DatatroveDocument
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig as DatatroveConfig
from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from loguru import logger
from numpy.typing import NDArray

from megaxelm.corpus.executor import Progress, UnitsStep
from megaxelm.files import remove
from megaxelm.recipe import MinhashConfig

_KEYS_AT_A_TIME = 50_000_000
# its steps tell each of their own, which would tear the bar
logger.disable("datatrove.pipeline.dedup")
# Scripts without spaces are compared by character: Thai to Lao, Burmese, Khmer, kana, Han.
_WORDS = re.compile(
    r"[\u0E00-\u0EFF\u1000-\u109F\u1780-\u17FF\u3040-\u30FF\u3400-\u9FFF\uF900-\uFAFF]|[^\W\u0E00-\u9FFF\uF900-\uFAFF]+|[\uAC00-\uD7AF]+"
)


def repeated(
    inputs: Sequence[tuple[NDArray[np.uint64], NDArray[np.bool_]]], keys_at_a_time: int = _KEYS_AT_A_TIME
) -> list[NDArray[np.int64]]:
    """Documents of each input whose text came before, by number.

    Args:
        inputs: keys [documents] and which documents count [documents], an input each, in order.
        keys_at_a_time: about so many keys are in memory at a time.
    """
    total = sum(len(keys) for keys, _ in inputs)
    parts = max(1, -(-total // keys_at_a_time))
    # exact in float64: the borders of the parts need not be even
    borders = [round(part * 2.0**64 / parts) for part in range(parts + 1)]
    found: list[list[NDArray[np.int64]]] = [[] for _ in inputs]
    for low, high in zip(borders[:-1], borders[1:], strict=True):
        keys, places, owners = [], [], []
        for number, (all_keys, counts) in enumerate(inputs):
            inside = np.flatnonzero(counts & (all_keys >= np.uint64(low)) & (all_keys <= np.uint64(high - 1)))
            keys.append(np.asarray(all_keys)[inside])
            places.append(inside)
            owners.append(np.full(len(inside), number, np.int32))
        joined, place, owner = np.concatenate(keys), np.concatenate(places), np.concatenate(owners)
        order = np.argsort(joined, kind="stable")
        again = np.zeros(len(order), bool)
        again[order[1:]] = joined[order[1:]] == joined[order[:-1]]
        for number in np.unique(owner[again]).tolist():
            found[number].append(place[again & (owner == number)])
    return [np.sort(np.concatenate(items)) if items else np.zeros(0, np.int64) for items in found]


def _hash(text: str) -> int:
    # datatrove's own hands text to xxhash, which newer versions refuse
    return xxhash.xxh64_intdigest(text.encode("utf-8", "surrogatepass"))


class _Words:
    """Words of any language, without a model of it."""

    def word_tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text)


class Signatures(MinhashDedupSignature):
    """datatrove's first step, for text in any language: its own asks for a word tokenizer by language that has to be downloaded."""

    def __init__(self, folder: Path, settings: MinhashConfig) -> None:
        PipelineStep.__init__(self)
        from datatrove.io import get_datafolder

        self.output_folder = get_datafolder(str(folder))
        self.config = datatrove_config(settings)
        self.num_hashes = self.config.num_buckets * self.config.hashes_per_bucket
        self._parameters = None
        self._hash_func = _hash
        self.word_tokenizer = _Words()
        self.skip_existing_sigs = False
        self._numbers: list[int] = []

    def write(self, documents: Iterable[tuple[int, str]]) -> None:
        """Signatures of (number, text), and the numbers, into the folder."""
        folder = Path(self.output_folder.path)
        folder.mkdir(parents=True)
        self.run(self._documents(documents), 0, 1)
        np.save(folder / "numbers.npy", np.array(self._numbers, np.int64))

    def _documents(self, documents: Iterable[tuple[int, str]]) -> Iterator[DatatroveDocument]:
        for number, text in documents:
            self._numbers.append(number)
            yield DatatroveDocument(text=text, id=str(number))


def datatrove_config(settings: MinhashConfig) -> Any:
    """A recipe's settings in datatrove's form."""
    return DatatroveConfig(n_grams=settings.n_grams, num_buckets=settings.buckets, hashes_per_bucket=settings.hashes_per_bucket)


class BucketsStep(UnitsStep):
    """Pairs of documents with equal signatures, a bucket a unit.

    Args:
        folders: `minhash/` folder of each input, in order.
        work: where pairs go.
    """

    name = "minhash buckets"

    def __init__(self, folders: Sequence[Path], settings: MinhashConfig, work: Path, reports: Path) -> None:
        super().__init__(settings.buckets, reports)
        self.settings = settings
        self.folders = list(folders)
        self.work = work
        self.signatures = work / "signatures"
        for bucket in range(settings.buckets):
            (self.signatures / f"bucket_{bucket:03d}").mkdir(parents=True, exist_ok=True)
            for number, folder in enumerate(folders):
                # datatrove takes the number of an input from the name of its file
                link = self.signatures / f"bucket_{bucket:03d}" / f"{number:05d}.minhash.sig"
                remove(link)
                os.symlink(os.path.abspath(folder / f"bucket_{bucket:03d}" / "00000.minhash.sig"), link)

    def size(self, unit: int) -> int:
        return os.path.getsize(self.folders[0] / f"bucket_{unit:03d}" / "00000.minhash.sig") * len(self.folders) if self.folders else 0

    def is_done(self, unit: int) -> bool:
        return (self.work / f"bucket-{unit}.done").exists()

    def do(self, unit: int, progress: Progress) -> None:
        step = MinhashDedupBuckets(str(self.signatures), str(self.work / "pairs"), config=datatrove_config(self.settings))
        step.run(None, unit, self.settings.buckets)
        (self.work / f"bucket-{unit}.done").touch()


def near_repeated(folders: Sequence[Path], settings: MinhashConfig, work: Path) -> list[NDArray[np.int64]]:
    """Documents of each input that are near-duplicates of an earlier one, by number, from the pairs that `BucketsStep` left in `work`."""
    out = work / "clusters"
    remove(out)
    MinhashDedupCluster(str(work / "pairs"), str(out), config=datatrove_config(settings), save_cluster_id=True).run(None, 0, 1)
    first: set[int] = set()
    found = []
    # Numbers of inputs, then of documents, ascend: the first of a cluster to be met is the first in order of reading.
    for number, folder in enumerate(folders):
        path = out / f"{number:06d}.clusters"
        rows = np.fromfile(path, "<u4").reshape(-1, 2) if path.exists() else np.zeros((0, 2), np.uint32)
        later = []
        for document, cluster in rows[np.argsort(rows[:, 0], kind="stable")].tolist():
            if cluster in first:
                later.append(document)
            first.add(cluster)
        numbers = np.load(folder / "numbers.npy")
        found.append(numbers[np.array(later, np.int64)])
    return found
