"""The stage `ensemble`: the run's experts, tokenizer and routers as one folder."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megaxelm.ensemble.folder import EnsembleSettings, save_ensemble
from megaxelm.ensemble.routers import FixedRouter, RouterData
from megaxelm.errors import RoutingError
from megaxelm.files import read_json
from megaxelm.recipe import Recipe

if TYPE_CHECKING:
    from megaxelm.cluster.partitioner import Partitioner
    from megaxelm.corpus.document import Document
    from megaxelm.corpus.tokenizer import Tokenizer


def build_ensemble(recipe: Recipe, run_folder: Path, out: Path) -> None:
    """Write the ensemble folder of a run into `out`.

    The vector space of the `tfidf` router is the partitioner's own where that is TF-IDF; else one is fitted on the sample of the corpus,
    and the centre of an expert is the normalised mean vector of its documents.

    Raises:
        RoutingError: an export is missing, `ensemble.*` names an expert that is not there, or an expert has no document in the sample.
    """
    from megaxelm.cluster.load import load_partitioner
    from megaxelm.corpus.tokenizer import Tokenizer

    tokenizer_folder = run_folder / "tokenizer"
    tokenizer = Tokenizer.load(tokenizer_folder)
    partitioner = load_partitioner(run_folder / "clusters", tokenizer)
    names = list(partitioner.names)
    if recipe.ensemble.fixed_weights:
        FixedRouter(names, recipe.ensemble.fixed_weights)  # an unknown name is an error now and not when somebody generates
    tokens = _tokens(run_folder, names)
    space, centres = _space(recipe, run_folder, partitioner, tokenizer)
    data = RouterData(
        experts=names,
        language_expert=language_experts(partitioner.languages(), tokens),
        fixed_weights=dict(recipe.ensemble.fixed_weights),
        temperature=recipe.ensemble.temperature,
        distance_power=recipe.ensemble.distance_power,
        space=space,
        centres=centres,
    )
    exports = {name: run_folder / "experts" / name / "export" for name in names}
    settings = EnsembleSettings(recipe.ensemble.router, recipe.ensemble.top_m)
    save_ensemble(out, exports, tokenizer_folder, data, settings, tokens)


def language_experts(groups: Mapping[str, list[str]] | None, tokens: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """Language -> expert: the cluster that holds it (`groups`), else the one with most of its training tokens; the first of equals."""
    if groups is not None:
        return {language: name for name, languages in groups.items() for language in languages}
    languages = sorted({language for found in tokens.values() for language in found})
    return {language: max(tokens, key=lambda name: tokens[name].get(language, 0)) for language in languages}


def _tokens(run_folder: Path, names: list[str]) -> dict[str, dict[str, int]]:
    path = run_folder / "index" / "manifest.json"
    clusters = read_json(path, clusters=dict)["clusters"]
    missing = [name for name in names if name not in clusters]
    if missing:
        raise RoutingError(
            f"{path}: no tokens of the clusters {', '.join(missing)}; make the index again (megaxelm run RECIPE --from index)"
        )
    return {name: {language: int(found["tokens"]) for language, found in clusters[name].items()} for name in names}


def _space(recipe: Recipe, run_folder: Path, partitioner: Partitioner, tokenizer: Tokenizer) -> tuple[Any, Tensor]:
    from megaxelm.cluster.space import TfidfSpace
    from megaxelm.cluster.tfidf import TfidfPartitioner

    if isinstance(partitioner, TfidfPartitioner):
        return partitioner.space, torch.from_numpy(np.asarray(partitioner.centres, dtype=np.float32))
    documents = sample_documents(run_folder / "corpus", recipe.clusters.tfidf.sample_documents)
    texts = [document.text for document in documents]
    space = TfidfSpace.fit(texts, recipe.clusters.tfidf, recipe.clusters.seed, tokenizer)
    vectors = space.transform(texts)
    return space, mean_centres(vectors, partitioner.assign(documents), partitioner.names)


def mean_centres(vectors: np.ndarray, assigned: np.ndarray, names: list[str]) -> Tensor:
    """Normalised mean vector [experts, dimensions] of the documents of each expert.

    Raises:
        RoutingError: an expert without a document, or whose documents have no known term.
    """
    centres = []
    for number, name in enumerate(names):
        mean = vectors[assigned == number].sum(0, dtype=np.float64)
        norm = float(np.linalg.norm(mean))
        if not norm > 0:
            raise RoutingError(
                f"router tfidf: expert {name} has no document with known terms in the sample; raise corpus.sample_bytes or "
                "clusters.tfidf.sample_documents"
            )
        centres.append(mean / norm)
    return torch.from_numpy(np.stack(centres).astype(np.float32))


def sample_documents(corpus_folder: Path, most: int) -> list[Document]:
    """At most `most` documents of the sample, equally many of each language as far as there are."""
    from megaxelm.corpus.prepare import read_documents

    paths = sorted((corpus_folder / "sample").glob("*.jsonl"))
    if not paths:
        raise RoutingError("router tfidf: corpus/sample holds no text; make the corpus again (megaxelm run RECIPE --from corpus)")
    found: list[Document] = []
    left = most
    # Small languages first, so that what they leave over goes to the others.
    for number, path in enumerate(sorted(paths, key=lambda path: path.stat().st_size)):
        documents = list(islice(read_documents(path), max(1, left // (len(paths) - number))))
        found += documents
        left -= len(documents)
    return found
