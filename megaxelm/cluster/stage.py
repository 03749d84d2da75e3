"""The stage `clusters`: fits the recipe's partitioner on the sample, assigns every document of the corpus, and reports what came out.

partitioner.json (+ .safetensors)    what `load_partitioner` reads
assignment/<shard>.npy               the cluster of every document of every token shard
report.json                          clusters with their languages, merges, distances and linkage of the languages, diagnostics; with
                                     rounds the tree that they go down
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megaxelm.cluster.assign import AssignStep, Counts
from megaxelm.cluster.diagnostics import diagnose
from megaxelm.cluster.levels import Tree, build_tree
from megaxelm.cluster.linkage import linkage_tree
from megaxelm.cluster.make import make_partitioner
from megaxelm.cluster.partitioner import ARRAYS_FILE, SETTINGS_FILE, Partitioner
from megaxelm.cluster.space import TfidfSpace
from megaxelm.cluster.tfidf import TfidfPartitioner, stratified_sample
from megaxelm.cluster.typology import language_distances
from megaxelm.corpus.executor import run_units
from megaxelm.corpus.prepare import load_manifest, read_documents
from megaxelm.corpus.tokenizer import Tokenizer
from megaxelm.corpus.tokens import Blocks, load_tokens
from megaxelm.errors import ClusterError
from megaxelm.files import hash_file, hash_value, remove, write_json
from megaxelm.recipe import ClustersConfig, Recipe

if TYPE_CHECKING:
    from megaxelm.corpus.document import Document

REPORT_FILE = "report.json"
_REPORT_DOCUMENTS = 4000
_STABILITY_DOCUMENTS = 20_000


def build_clusters(recipe: Recipe, corpus_folder: Path, tokens_folder: Path, tokenizer_folder: Path, shards: Path, out: Path) -> None:
    """Make the clusters of a recipe into the existing folder `out`.

    Raises:
        ClusterError: if k is larger than the number of languages or documents, a language is empty, unknown or not in URIEL.
    """
    tokens = load_tokens(tokens_folder)
    languages = sorted(load_manifest(corpus_folder)["languages"])
    tokenizer = Tokenizer.load(tokenizer_folder)
    partitioner = make_partitioner(recipe.clusters, tokenizer)
    of_language = {code: counts["tokens"] for code, counts in tokens["languages"].items()}
    partitioner.fit(_sample(corpus_folder, languages), of_language)
    tree = None
    if len(recipe.rounds) > 1:
        tree = build_tree(partitioner, [item.k for item in recipe.rounds], recipe.clusters.typology, of_language)
    partitioner.save(out)
    fitted = hash_value([hash_file(out / name) for name in (SETTINGS_FILE, ARRAYS_FILE) if (out / name).exists()])
    step = AssignStep(
        Blocks(recipe, corpus_folder, shards, tokens["block_bytes"]),
        [shards / "tokens" / key for key in tokens["shards"]],
        tokens["begin"],
        out,
        tokenizer_folder,
        recipe.clusters.partitioner == "tfidf" and recipe.clusters.tfidf.assign == "balanced",
        shards / "assign" / fitted,
        shards / "reports" / "assign",
    )
    step.store.mkdir(parents=True, exist_ok=True)
    run_units(step, recipe.executor, "clusters: assigning")
    counts = step.counts(partitioner.names)
    os.rename(step.store, out / "assignment")
    remove(step.store.parent)
    report = _report(partitioner, recipe.clusters, languages, counts, tree)
    report |= _diagnostics(recipe, partitioner, corpus_folder, languages, tokenizer, counts)
    write_json(out / REPORT_FILE, report)


def _sample(corpus_folder: Path, languages: Sequence[str]) -> Iterator[Document]:
    for code in languages:
        path = corpus_folder / "sample" / f"{code}.jsonl"
        if not path.is_file():
            raise ClusterError(f"{path}: no such file; make the corpus again: --from corpus")
        empty = True
        for document in read_documents(path):
            empty = False
            yield document
        if empty:
            raise ClusterError(
                f"language {code!r}: no document in the sample of the corpus; give it text or leave it out (corpus.languages)"
            )


def _diagnostics(
    recipe: Recipe, partitioner: Partitioner, corpus_folder: Path, languages: Sequence[str], tokenizer: Tokenizer, counts: Counts
) -> dict[str, Any]:
    """What the page shows of a part of the sample, and how stable the clusters are under other seeds."""
    config = recipe.clusters
    sample = stratified_sample(_sample(corpus_folder, languages), _REPORT_DOCUMENTS, config.seed)
    vectors: NDArray[np.float32] | None
    refit: Callable[[int], NDArray[np.int64]] | None = None
    if isinstance(partitioner, TfidfPartitioner):
        vectors = partitioner.vectors(sample)

        def refit(seed: int) -> NDArray[np.int64]:
            tfidf = config.tfidf.model_copy(update={"sample_documents": min(config.tfidf.sample_documents, _STABILITY_DOCUMENTS)})
            other = make_partitioner(config.model_copy(update={"seed": seed, "tfidf": tfidf}), tokenizer)
            other.fit(_sample(corpus_folder, languages))
            return other.assign(sample)

    else:
        try:
            vectors = TfidfSpace.fit_transform([document.text for document in sample], config.tfidf, config.seed, tokenizer)[1]
        except ClusterError:
            vectors = None  # too little text for a picture, which the page says
    return diagnose(
        partitioner,
        sample,
        partitioner.assign(sample),
        counts,
        vectors=vectors,
        domain_field=recipe.corpus.fields.domain,
        refit=refit,
        seed=config.seed,
    )


def _report(
    partitioner: Partitioner, config: ClustersConfig, languages: Sequence[str], counts: Counts, tree: Tree | None
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
            {"name": name, "languages": dict(sorted(counts[name].items())), "forced": name in forced} for name in partitioner.names
        ],
        "languages": list(languages),
        "language_distances": None,
        "linkage": None,
        "merges": merges,
        "description": described,
    }
    notes = partitioner.notes()
    if tree is not None:
        report["rounds"] = tree.to_json()
        notes += tree.notes
    try:
        distances = language_distances(languages, config.typology)
    except ClusterError as error:
        # Other partitioners do without URIEL; the report then has no dendrogram and says why.
        report["language_distances_reason"] = str(error)
        notes.append(f"no dendrogram of the languages: {error}")
    else:
        report["language_distances"] = np.round(distances, 6).tolist()
        report["linkage"] = np.round(linkage_tree(distances, config.typology.linkage), 6).tolist()
    notes += [f"cluster {name} got no document; a smaller clusters.k may fit better" for name in partitioner.names if not counts[name]]
    report["notes"] = notes
    return report


def show_report(report: dict[str, Any]) -> None:
    """A table of the clusters on the console, and the notes under it."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{report['k']} clusters, {report['partitioner']} ({report['method']})", title_justify="left")
    table.add_column("cluster")
    table.add_column("languages, by documents")
    table.add_column("documents", justify="right")
    table.add_column("MB", justify="right")
    table.add_column("tokens", justify="right")
    for cluster in report["clusters"]:
        counts = cluster["languages"]
        total = sum(count["documents"] for count in counts.values())
        largest = sorted(counts, key=lambda code: (-counts[code]["documents"], code))
        # Strays below 1 % would hide what the cluster is.
        shown = [code for code in largest if counts[code]["documents"] >= 0.01 * total][:8]
        shares = ", ".join(code if len(counts) == 1 else f"{code} {counts[code]['documents'] / total:.0%}" for code in shown)
        more = f", {len(largest) - len(shown)} more" if len(largest) > len(shown) else ""
        size, tokens = (sum(count[unit] for count in counts.values()) for unit in ("bytes", "tokens"))
        table.add_row(cluster["name"], shares + more, f"{total:,}", f"{size / 1e6:.2f}", f"{tokens:,}")
    console.print(table)
    for number, level in enumerate(report.get("rounds", {}).get("levels", []), 1):
        experts = "; ".join(f"{name.removeprefix(f'round{number}-')} ({len(clusters)} clusters)" for name, clusters in level.items())
        console.print(f"round {number}, {len(level)} experts: {experts}", markup=False, highlight=False, soft_wrap=True)
    for note in report["notes"]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
