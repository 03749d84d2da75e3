"""The stage `ensemble`: the run's experts, tokenizer and routers as one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megaxelm.ensemble.centres import cluster_centres, grown_centres, nearest_distances, sample_documents
from megaxelm.ensemble.folder import EnsembleSettings, save_ensemble
from megaxelm.ensemble.routers import FixedRouter, RouterData
from megaxelm.errors import RoutingError
from megaxelm.growth import Growth, export_folder, grown_folder, index_clusters, language_owners, read_growth
from megaxelm.recipe import Recipe


def build_ensemble(recipe: Recipe, run_folder: Path, out: Path) -> None:
    """Write the ensemble folder of a run into `out`. A fallback expert (`ensemble.fallback`) stands behind the trained ones.

    Grown experts stand behind the clusters' own, dropped ones are left out; the space of the `tfidf` router, its old centres and the
    fallback's distances are those of the clusters whatever was grown or dropped.

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
    space, of_clusters = cluster_centres(recipe, run_folder, partitioner, tokenizer)
    centres = of_clusters.of(kept)
    if growth.experts:
        most, by_language = recipe.clusters.tfidf.sample_documents, wanted.centres == "language"
        centres += grown_centres(space, run_folder, growth.experts, most, by_language)
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
        centres=centres.vectors,
        centre_experts=None if wanted.centres == "cluster" else [names.index(name) for name in centres.experts],
    )
    if wanted.fallback:
        documents = sample_documents(run_folder / "corpus", recipe.clusters.tfidf.sample_documents)
        data.fallback_distance = nearest_distances(
            space, of_clusters.vectors, [document.text for document in documents], wanted.fallback_quantile
        )
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
