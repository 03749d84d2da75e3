"""The stage `ensemble`: the run's experts, tokenizer and routers as one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megaxelm.ensemble.folder import EnsembleSettings, save_ensemble
from megaxelm.ensemble.routers import FixedRouter, RouterData
from megaxelm.errors import RoutingError
from megaxelm.growth import Growth, export_folder, grown_folder, index_clusters, language_owners, read_growth
from megaxelm.recipe import Recipe

if TYPE_CHECKING:
    from megaxelm.cluster.partitioner import Partitioner
    from megaxelm.corpus.document import Document
    from megaxelm.corpus.tokenizer import Tokenizer

_TRUST_CHARACTERS = 200


def build_ensemble(recipe: Recipe, run_folder: Path, out: Path) -> None:
    """Write the ensemble folder of a run into `out`. A fallback expert (`ensemble.fallback`) stands behind the trained ones.

    The vector space of the `tfidf` router is the partitioner's own where that is TF-IDF; else one is fitted on the sample of the corpus,
    and the centre of an expert is the normalised mean vector of its documents. Grown experts stand behind the clusters' own, dropped ones
    are left out; space, centres and the fallback's distances are those of the clusters whatever was grown or dropped.

    Raises:
        RoutingError: an export is missing, `ensemble.*` names an expert that is not there, or an expert has no document in the sample.
    """
    from megaxelm.cluster.load import load_partitioner
    from megaxelm.corpus.tokenizer import Tokenizer

    tokenizer_folder = run_folder / "tokenizer"
    tokenizer = Tokenizer.load(tokenizer_folder)
    partitioner = load_partitioner(run_folder / "clusters", tokenizer)
    growth = read_growth(run_folder)
    kept = growth.kept(partitioner.names)
    names = [*kept, *(item.name for item in growth.experts)]
    wanted = recipe.ensemble
    if wanted.fixed_weights:
        FixedRouter(names, wanted.fixed_weights)  # an unknown name is an error now and not when somebody generates
    tokens = _tokens(run_folder, partitioner.names, growth)
    prior = posterior_prior(wanted.posterior_prior, tokens)
    space, of_clusters = _space(recipe, run_folder, partitioner, tokenizer)
    centres = of_clusters[[partitioner.names.index(name) for name in kept]]
    if growth.experts:
        centres = torch.cat([centres, grown_centres(space, run_folder, growth, recipe.clusters.tfidf.sample_documents)])
    groups = partitioner.languages()
    owners = language_experts(groups and {name: groups[name] for name in kept}, {name: tokens[name] for name in kept})
    experts = [*names, wanted.fallback] if wanted.fallback else names
    data = RouterData(
        experts=experts,
        language_expert=language_owners(owners, growth),
        detect_language=wanted.detect_language,
        fixed_weights=dict(wanted.fixed_weights),
        temperature=wanted.temperature,
        distance_power=wanted.distance_power,
        posterior_prior=prior,
        posterior_decay=wanted.posterior_decay,
        posterior_reads=wanted.posterior_reads,
        refresh=wanted.refresh,
        refresh_tokens=wanted.refresh_tokens,
        fallback=wanted.fallback,
        fallback_weight=wanted.fallback_weight,
        space=space,
        centres=centres,
    )
    if wanted.fallback:
        documents = sample_documents(run_folder / "corpus", recipe.clusters.tfidf.sample_documents)
        data.fallback_distance = nearest_distances(space, of_clusters, [document.text for document in documents], wanted.fallback_quantile)
    exports = {name: export_folder(run_folder, name, growth) for name in experts}
    settings = EnsembleSettings(wanted.router, wanted.top_m, wanted.combine, wanted.temperature_on, wanted.devices)
    languages = {
        name: {code: count for code, count in found.items() if code not in growth.dropped_languages} for name, found in tokens.items()
    }
    save_ensemble(out, exports, tokenizer_folder, data, settings, languages)


def language_experts(groups: Mapping[str, list[str]] | None, tokens: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """Language -> expert: the cluster that holds it (`groups`), else the one with most of its training tokens; the first of equals."""
    if groups is not None:
        return {language: name for name, languages in groups.items() for language in languages}
    languages = sorted({language for found in tokens.values() for language in found})
    return {language: max(tokens, key=lambda name: tokens[name].get(language, 0)) for language in languages}


def posterior_prior(wanted: str | Mapping[str, float], tokens: Mapping[str, Mapping[str, int]]) -> list[float] | None:
    """Prior weights in the order of `tokens` (expert -> language -> training tokens); None: uniform.

    Raises:
        RoutingError: a name that is no expert.
    """
    if wanted == "uniform":
        return None
    if isinstance(wanted, str):
        return [float(sum(found.values())) for found in tokens.values()]
    unknown = [name for name in wanted if name not in tokens]
    if unknown:
        raise RoutingError(f"ensemble.posterior_prior: no expert {', '.join(unknown)}; the experts are {', '.join(tokens)}")
    return [float(wanted.get(name, 0.0)) for name in tokens]


def nearest_distances(space: Any, centres: Tensor, texts: Sequence[str], quantile: float) -> list[float]:
    """Median and `quantile` of the squared distance of texts to the centre nearest to each: what the fallback of `tfidf` is heard by.

    Only the first 200 characters count: decoding begins with little text, which is further from every centre than a whole document, and
    has to be trusted all the same.

    Raises:
        RoutingError: no text has a known term.
    """
    vectors = space.transform([text[:_TRUST_CHARACTERS] for text in texts])
    vectors = vectors[np.abs(vectors).max(-1) > 0].astype(np.float64)
    if not len(vectors):
        raise RoutingError("ensemble.fallback: no document of the sample has a known term; raise corpus.sample_bytes, or set it to null")
    distance = torch.cdist(torch.from_numpy(vectors), centres.to(torch.float64), compute_mode="donot_use_mm_for_euclid_dist").square()
    return np.quantile(distance.amin(-1).numpy(), [0.5, quantile]).tolist()


def grown_centres(space: Any, run_folder: Path, growth: Growth, most: int) -> Tensor:
    """Normalised mean vector [grown experts, dimensions] of the sample documents of the languages that each was grown for.

    Raises:
        RoutingError: the documents of one have no term that the space knows.
    """
    centres = []
    for item in growth.experts:
        texts = [document.text for document in sample_documents(grown_folder(run_folder, item.name) / "corpus", most, item.languages)]
        centres.append(mean_centres(space.transform(texts), np.zeros(len(texts), np.int64), [item.name]))
    return torch.cat(centres)


def _tokens(run_folder: Path, clusters: list[str], growth: Growth) -> dict[str, dict[str, int]]:
    """Expert -> language -> training tokens: clusters that are kept with all of theirs, grown experts with the languages they are for."""
    found = index_clusters(run_folder)
    missing = [name for name in clusters if name not in found]
    if missing:
        raise RoutingError(
            f"{run_folder / 'index' / 'manifest.json'}: no tokens of the clusters {', '.join(missing)}; make the index again (megaxelm run "
            "RECIPE --from index)"
        )
    text = {name: found[name] for name in growth.kept(clusters)}
    for item in growth.experts:
        of_child = index_clusters(grown_folder(run_folder, item.name))[item.name]
        text[item.name] = {code: of_child[code] for code in item.languages}
    return {name: {language: int(counts["tokens"]) for language, counts in of_one.items()} for name, of_one in text.items()}


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


def sample_documents(corpus_folder: Path, most: int, languages: Sequence[str] | None = None) -> list[Document]:
    """At most `most` documents of the sample, of some languages or of all, equally many of each as far as there are."""
    from megaxelm.corpus.prepare import read_documents

    paths = sorted((corpus_folder / "sample").glob("*.jsonl"))
    if languages is not None:
        paths = [path for path in paths if path.stem in languages]
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
