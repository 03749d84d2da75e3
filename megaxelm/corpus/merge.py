"""Stage `index`: the token shards, merged into one token index for each cluster and language.

The order within an index is that of the corpus, whoever merges. A finished index lies in `shards/merge` until all are there, so a killed
run merges only what is missing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megaxelm.corpus.executor import Progress, UnitsStep, run_units
from megaxelm.corpus.index_folder import write_manifest
from megaxelm.corpus.shards import TokenShard
from megaxelm.corpus.token_index import TokenIndex, TokenIndexWriter
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.corpus.tokens import load_tokens
from megaxelm.errors import ClusterError, TokenIndexError
from megaxelm.files import hash_value, read_json, remove, write_json
from megaxelm.recipe import Recipe

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

Counts = Mapping[str, Mapping[str, Mapping[str, int]]]


class MergeStep(UnitsStep):
    """Merges and verifies indexes, one a unit."""

    name = "merge"

    def __init__(
        self, shards: Sequence[Path], assignment: Path, names: Sequence[str], counts: Counts, vocab_size: int, store: Path, reports: Path
    ) -> None:
        self.outputs = [(name, language) for name in names for language in sorted(counts[name])]
        super().__init__(len(self.outputs), reports)
        self.shards, self.assignment, self.names, self.counts = list(shards), assignment, list(names), counts
        self.vocab_size = vocab_size
        self.store = store

    def size(self, unit: int) -> int:
        cluster, language = self.outputs[unit]
        return 4 * self.counts[cluster][language]["tokens"]

    def marker(self, unit: int) -> Path:
        """Written last: counts and hashes of a finished index."""
        cluster, language = self.outputs[unit]
        return self.store / cluster / f"{language}.json"

    def is_done(self, unit: int) -> bool:
        return all(self.marker(unit).with_name(f"{self.outputs[unit][1]}.{ending}").exists() for ending in ("json", "bin", "idx"))

    def do(self, unit: int, progress: Progress) -> None:
        """Merge one index from all shards, and read it through."""
        cluster, language = self.outputs[unit]
        folder = self.store / cluster
        folder.mkdir(parents=True, exist_ok=True)
        # a name of its own, for a job that was started twice
        prefix = folder / f".{language}.{os.uname().nodename}.{os.getpid()}"
        writer = TokenIndexWriter(prefix, self.vocab_size)
        number = self.names.index(cluster)
        num_bytes = 0
        for path in self.shards:
            num_bytes += self._add(TokenShard(path), language, number, writer, progress)
        hashes = writer.close()
        TokenIndex(prefix).verify(self.vocab_size)
        expected = self.counts[cluster][language]
        found = {"documents": writer.num_documents, "tokens": writer.num_tokens, "bytes": num_bytes}
        if found != dict(expected):
            raise TokenIndexError(
                f"{cluster}/{language}: the shards gave {found}, the clusters counted {dict(expected)}: make the clusters again "
                "(--from clusters)"
            )
        for ending in ("bin", "idx"):
            os.replace(f"{prefix}.{ending}", folder / f"{language}.{ending}")
        write_json(self.marker(unit), found | {"xxh3": hashes})

    def _add(self, shard: TokenShard, language: str, number: int, writer: TokenIndexWriter, progress: Progress) -> int:
        section = shard.section(language)
        if section is None:
            return 0
        part = slice(section.first, section.first + section.documents)
        path = self.assignment / f"{shard.folder.name}.npy"
        try:
            assigned = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise TokenIndexError(f"{path}: missing or damaged ({error}); make the clusters again (--from clusters)") from None
        if assigned.shape != (shard.num_documents,):
            raise TokenIndexError(
                f"{self.assignment}: does not fit the shard {shard.folder.name}; make the clusters again (--from clusters)"
            )
        mine = np.asarray(assigned[part]) == number
        if not mine.any():
            return 0
        tokens, lengths = shard.tokens(section), np.asarray(shard.lengths[part])
        if not mine.all():
            tokens = tokens[np.repeat(mine, lengths)]
        writer.add_many(tokens, lengths[mine])
        size = int(np.asarray(shard.sizes[part])[mine].sum(dtype=np.int64))
        progress.add(documents=int(mine.sum()), bytes=size, tokens=len(tokens))
        return size


def build_index(
    recipe: Recipe, tokens_folder: Path, tokenizer_folder: Path, clusters_folder: Path, clusters_fingerprint: str, shards: Path, out: Path
) -> None:
    """Write `<cluster>/<language>.{bin,idx}` and `manifest.json` into the existing folder `out`.

    `clusters_folder` holds `report.json` (`names`, `clusters` with their counts) and `assignment/<shard>.npy`.

    Raises:
        ClusterError: a cluster without documents.
    """
    report = read_json(clusters_folder / "report.json", names=list, clusters=list)
    counts = {item["name"]: item["languages"] for item in report["clusters"]}
    for name in report["names"]:
        if not _SAFE_NAME.fullmatch(name):
            raise ClusterError(f"cluster {name!r} cannot name a folder: letters, digits, and - _ . + only")
    empty = sorted(name for name, languages in counts.items() if not languages)
    if empty:
        raise ClusterError(
            f"no document was assigned to cluster {', '.join(empty)}, so its expert would have nothing to learn: lower clusters.k, or give "
            "more text"
        )
    tokens = load_tokens(tokens_folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    folders = [shards / "tokens" / key for key in tokens["shards"]]
    store = shards / "merge" / hash_value([clusters_fingerprint, tokens["shards"], tokenizer.fingerprint])
    step = MergeStep(
        folders, clusters_folder / "assignment", report["names"], counts, tokens["vocab_size"], store, shards / "reports" / "merge"
    )
    run_units(step, recipe.executor, "index")
    clusters: dict[str, dict[str, Any]] = {name: {} for name in report["names"]}
    for unit, (cluster, language) in enumerate(step.outputs):
        clusters[cluster][language] = read_json(step.marker(unit))
    for cluster, language in step.outputs:
        (out / cluster).mkdir(exist_ok=True)
        for ending in ("bin", "idx"):
            os.rename(store / cluster / f"{language}.{ending}", out / cluster / f"{language}.{ending}")
    write_manifest(out, tokenizer, clusters_fingerprint, clusters)
    remove(shards / "merge")
