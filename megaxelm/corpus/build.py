"""Stage `index`: the second pass over the text, assigned to clusters and tokenised: one token index for each cluster and language."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megaxelm.corpus.document import Document
from megaxelm.corpus.prepare import load_manifest, training_documents
from megaxelm.corpus.token_index import TokenIndex, TokenIndexWriter
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.errors import ClusterError, CorpusError, StageError, TokenIndexError
from megaxelm.files import hash_file, read_json
from megaxelm.recipe import Recipe

_BATCH_DOCUMENTS = 1024
_BATCH_BYTES = 4 << 20
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

Assign = Callable[[Sequence[Document]], np.ndarray]


def build_index(
    recipe: Recipe,
    corpus_folder: Path,
    tokenizer_folder: Path,
    cluster_names: Sequence[str],
    assign: Assign,
    out: Path,
) -> None:
    """Write `<cluster>/<language>.{bin,idx}` and `manifest.json` into `out`.

    Args:
        cluster_names: names of the clusters, which name folders.
        assign: documents -> cluster numbers [documents].

    Raises:
        ClusterError: a cluster without documents, or a number outside of the clusters.
        CorpusError: the source has changed since the corpus stage read it.
    """
    for name in cluster_names:
        if not _SAFE_NAME.fullmatch(name):
            raise ClusterError(f"cluster {name!r} cannot name a folder: letters, digits, and - _ . + only")
    tokenizer = Tokenizer.load(tokenizer_folder)
    corpus_manifest = load_manifest(corpus_folder)
    expected = {code: counts["train_documents"] for code, counts in corpus_manifest["languages"].items()}
    writers: dict[tuple[str, str], TokenIndexWriter] = {}
    num_bytes: Counter[tuple[str, str]] = Counter()
    progress = tqdm(total=sum(expected.values()), desc="index: tokens", unit=" documents", file=sys.stderr, mininterval=0.5)
    with progress:
        for batch in _batches(training_documents(recipe, corpus_folder)):
            numbers = _assigned(batch, assign, len(cluster_names))
            for document, number, ids in zip(batch, numbers, tokenizer.encode([document.text for document in batch]), strict=True):
                key = cluster_names[number], document.language
                if key not in writers:
                    (out / key[0]).mkdir(exist_ok=True)
                    writers[key] = TokenIndexWriter(out / key[0] / key[1], tokenizer.vocab_size)
                writers[key].add(tokenizer.document(ids))
                num_bytes[key] += document.num_bytes
            progress.update(len(batch))
    _check_complete(writers, cluster_names, expected, corpus_manifest)
    clusters: dict[str, dict[str, Any]] = {name: {} for name in cluster_names}
    for (cluster, language), writer in sorted(writers.items()):
        writer.close()
        clusters[cluster][language] = {
            "documents": writer.num_documents,
            "tokens": writer.num_tokens,
            "bytes": num_bytes[cluster, language],
            "xxh3": {ending: hash_file(out / cluster / f"{language}.{ending}") for ending in ("bin", "idx")},
        }
    manifest = {"tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "clusters": clusters}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_index_manifest(folder: Path) -> dict[str, Any]:
    """`manifest.json` of the index stage: `tokenizer` (fingerprint), `vocab_size`, `clusters` {cluster: {language: counts and hashes}}."""
    try:
        manifest = read_json(folder / "manifest.json", tokenizer=str, vocab_size=int, clusters=dict)
    except StageError as error:
        raise TokenIndexError(f"{error} (--from index)") from None
    if not manifest["clusters"]:
        raise TokenIndexError(f"{folder / 'manifest.json'}: names no cluster; make the index again (--from index)")
    return manifest


def open_streams(index_folder: Path, clusters: Iterable[str] | None = None) -> dict[str, list[TokenIndex]]:
    """The token indexes of some clusters, or of all, by language; sizes are checked against the manifest.

    Raises:
        ClusterError: a cluster that the index does not have.
        TokenIndexError: a damaged index, or one that is not the manifest's.
    """
    known = load_index_manifest(index_folder)["clusters"]
    streams: dict[str, list[TokenIndex]] = {}
    for cluster in sorted(known) if clusters is None else clusters:
        if cluster not in known:
            raise ClusterError(f"the index has no cluster {cluster}; it has {', '.join(sorted(known))}")
        for language, counts in sorted(known[cluster].items()):
            index = TokenIndex(index_folder / cluster / language)
            if (index.num_documents, index.num_tokens) != (counts["documents"], counts["tokens"]):
                raise TokenIndexError(
                    f"token index {cluster}/{language} has {index.num_documents} documents and {index.num_tokens} tokens, its manifest "
                    f"says {counts['documents']} and {counts['tokens']}: files were mixed up; make the index again (--from index)"
                )
            streams.setdefault(language, []).append(index)
    return dict(sorted(streams.items()))


def verify_index(index_folder: Path) -> Iterator[str]:
    """Read every index through: contents against the hashes of the manifest, order, lengths, ids. Yields a line for each that is sound.

    Raises:
        TokenIndexError: the first that is not.
    """
    manifest = load_index_manifest(index_folder)
    open_streams(index_folder)
    for cluster, languages in sorted(manifest["clusters"].items()):
        for language, counts in sorted(languages.items()):
            prefix = index_folder / cluster / language
            for ending, wanted in counts["xxh3"].items():
                path = prefix.with_name(f"{language}.{ending}")
                if hash_file(path) != wanted:
                    raise TokenIndexError(f"{path}: changed since it was written; make the index again (--from index)")
            TokenIndex(prefix).verify(manifest["vocab_size"])
            yield f"{cluster}/{language}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, sound"


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _assigned(batch: Sequence[Document], assign: Assign, num_clusters: int) -> np.ndarray:
    numbers = np.asarray(assign(batch))
    assert numbers.shape == (len(batch),)
    if numbers.min() < 0 or numbers.max() >= num_clusters:
        i = int(np.argmax((numbers < 0) | (numbers >= num_clusters)))
        raise ClusterError(
            f"document {batch[i].id} was assigned to cluster {numbers[i]}; there are 0..{num_clusters - 1}: make the clusters again"
        )
    return numbers


def _check_complete(
    writers: dict[tuple[str, str], TokenIndexWriter],
    cluster_names: Sequence[str],
    expected: dict[str, int],
    corpus_manifest: dict[str, Any],
) -> None:
    found: Counter[str] = Counter()
    for (_, language), writer in writers.items():
        found[language] += writer.num_documents
    # a text held out by the smallest-key rule of one language is also left out of the others, which only this pass sees
    tolerant = bool(corpus_manifest["held_out_by_smallest_key"])
    for language, count in expected.items():
        if found[language] > count or (found[language] < count and not tolerant):
            raise CorpusError(
                f"corpus.train gave {found[language]} documents in {language}, the corpus stage counted {count}: the source has changed "
                "since; start again with --from corpus"
            )
    empty = sorted(set(cluster_names) - {cluster for cluster, _ in writers})
    if empty:
        raise ClusterError(
            f"no document was assigned to cluster {', '.join(empty)}, so its expert would have nothing to learn: lower clusters.k, or give "
            "more text"
        )
