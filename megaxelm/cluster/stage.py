"""The stage `clusters`: fits the recipe's partitioner on the sample of the corpus, saves it, and reports what came out.

Writes `partitioner.json` (and `.safetensors`) and `report.json`: names, languages of each cluster with the documents and bytes
they have in the sample, merges, and the distances and linkage of the languages for a dendrogram.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megaxelm.cluster import uriel
from megaxelm.cluster.analyzers import TextEncoder
from megaxelm.cluster.language import LanguagePartitioner
from megaxelm.cluster.partitioner import Partitioner
from megaxelm.cluster.tfidf import TfidfPartitioner
from megaxelm.cluster.typology import TypologyPartitioner, average_linkage
from megaxelm.errors import ClusterError
from megaxelm.recipe import ClustersConfig, Recipe

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document

REPORT_FILE = "report.json"
_BATCH_DOCUMENTS = 512


def build_clusters(recipe: Recipe, corpus_folder: Path, tokenizer: TextEncoder | None, out: Path) -> None:
    """Make the clusters of a recipe from `corpus_folder` (`manifest.json`, `sample/<language>.jsonl`) into the existing folder `out`.

    `tokenizer` is used by the TF-IDF partitioner over subwords, and by no other.

    Raises:
        ClusterError: if k is larger than the number of languages or documents, a language is empty, unknown or not in URIEL.
    """
    from megaxelm.corpus.prepare import load_manifest

    languages = sorted(load_manifest(corpus_folder)["languages"])
    if not languages:
        raise ClusterError(f"{corpus_folder}: the corpus has no language; give corpus.train text")
    partitioner = make_partitioner(recipe.clusters, tokenizer)
    partitioner.fit(document for code in languages for document in _sample(corpus_folder, code))
    clusters = _count(partitioner, corpus_folder, languages)
    report = _report(partitioner, recipe.clusters, languages, clusters)
    partitioner.save(out)
    (out / REPORT_FILE).write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    show_report(report)


def make_partitioner(config: ClustersConfig, tokenizer: TextEncoder | None) -> Partitioner:
    """The partitioner that a recipe asks for, not fitted yet."""
    if config.partitioner == "language":
        return LanguagePartitioner(config.k)
    if config.k is None:
        raise ClusterError(f"clusters.k is missing: give the number of clusters for the {config.partitioner} partitioner")
    if config.partitioner == "typology":
        return TypologyPartitioner(config.k, config.typology.features)
    return TfidfPartitioner(config.k, config.tfidf, config.seed, tokenizer)


def _sample(corpus_folder: Path, code: str) -> Iterator[Document]:
    from megaxelm.corpus.prepare import read_documents

    path = corpus_folder / "sample" / f"{code}.jsonl"
    if not path.is_file():
        raise ClusterError(f"{path}: no such file; make the corpus again: --from corpus")
    documents = read_documents(path)
    first = next(iter(documents), None)
    if first is None:
        raise ClusterError(f"language {code!r}: no document in the sample of the corpus; give it text or leave it out (corpus.languages)")
    yield first
    yield from documents


def _count(partitioner: Partitioner, corpus_folder: Path, languages: Sequence[str]) -> list[dict[str, dict[str, int]]]:
    """Documents and UTF-8 bytes in the sample, for each cluster by language."""
    from tqdm import tqdm

    clusters: list[dict[str, dict[str, int]]] = [{} for _ in partitioner.names]
    documents = (document for code in languages for document in _sample(corpus_folder, code))
    progress = tqdm(documents, desc="assigning the sample", unit=" documents", file=sys.stderr, mininterval=0.5, leave=False)
    stream = iter(progress)
    while batch := list(itertools.islice(stream, _BATCH_DOCUMENTS)):
        for document, cluster in zip(batch, partitioner.assign(batch), strict=True):
            counts = clusters[cluster].setdefault(document.language, {"documents": 0, "bytes": 0})
            counts["documents"] += 1
            counts["bytes"] += len(document.text.encode("utf-8"))
    return clusters


def _report(
    partitioner: Partitioner, config: ClustersConfig, languages: Sequence[str], clusters: list[dict[str, dict[str, int]]]
) -> dict[str, Any]:
    described = partitioner.describe()
    merges = described.pop("merges", [])
    groups = partitioner.languages() or {}
    forced = {
        name for name, codes in groups.items() for merge in merges if merge["forced"] and set(codes) >= {*merge["left"], *merge["right"]}
    }
    report: dict[str, Any] = {
        "partitioner": partitioner.kind,
        "k": len(partitioner.names),
        "names": partitioner.names,
        "method": described["method"],
        "clusters": [
            {"name": name, "languages": dict(sorted(counts.items())), "forced": name in forced}
            for name, counts in zip(partitioner.names, clusters, strict=True)
        ],
        "languages": list(languages),
        "language_distances": None,
        "linkage": None,
        "merges": merges,
        "description": described,
    }
    notes = partitioner.notes()
    try:
        distances = uriel.distances(languages, config.typology.features)
    except ClusterError as error:
        # Other partitioners do without URIEL; the report then has no dendrogram and says why.
        report["language_distances_reason"] = str(error)
        notes.append(f"no dendrogram of the languages: {error}")
    else:
        report["language_distances"] = np.round(distances, 6).tolist()
        report["linkage"] = np.round(average_linkage(distances), 6).tolist()
    for name, counts in zip(partitioner.names, clusters, strict=True):
        if not counts:
            notes.append(f"cluster {name}: no document of the sample is nearest to it; a smaller clusters.k may fit better")
    report["notes"] = notes
    return report


def show_report(report: dict[str, Any]) -> None:
    """A table of the clusters on the console, and the notes under it."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{report['k']} clusters, {report['partitioner']} ({report['method']})", title_justify="left")
    table.add_column("cluster")
    table.add_column("languages, by documents in the sample")
    table.add_column("documents", justify="right")
    table.add_column("MB", justify="right")
    for cluster in report["clusters"]:
        counts = cluster["languages"]
        total = sum(count["documents"] for count in counts.values())
        largest = sorted(counts, key=lambda code: (-counts[code]["documents"], code))
        # Strays below 1 % would hide what the cluster is.
        shown = [code for code in largest if counts[code]["documents"] >= 0.01 * total][:8]
        shares = ", ".join(code if len(counts) == 1 else f"{code} {counts[code]['documents'] / total:.0%}" for code in shown)
        more = f", {len(largest) - len(shown)} more" if len(largest) > len(shown) else ""
        size = sum(count["bytes"] for count in counts.values()) / 1e6
        table.add_row(cluster["name"], shares + more, f"{total:,}", f"{size:.2f}")
    console.print(table)
    for note in report["notes"]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
