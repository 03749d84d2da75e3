"""The stage `evaluation`: every model and every mixture on the held-out text of every language.

Each model reads the held-out text once; what else there is follows from its token log-probabilities.

```
evaluation/
  results.json       the comparison: languages, models, experts, verdict, settings; statistics, forgetting, routers, texts
  documents.npz      nats of every model on every held-out document (documents.py)
  streams.npz        token log-probabilities of the experts, from which routers are fitted (streams.py)
  texts/<name>.npz   as documents.npz, of a further set of texts (`evaluation.texts`)
```
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaxelm.ensemble.folder import load_ensemble
from megaxelm.ensemble.windows import Windows
from megaxelm.evaluate.documents import DocumentScores, Score, document_scores, language_scores
from megaxelm.evaluate.fit_write import FIT_FILE, fitted_fields
from megaxelm.evaluate.forgetting import forgetting_results, run_matrix
from megaxelm.evaluate.mixtures import mix_held_out
from megaxelm.evaluate.perplexity import read_held_out, score_models
from megaxelm.evaluate.routing import OWN, RouterQuality, add_choices
from megaxelm.evaluate.run_forgetting import read_parents
from megaxelm.evaluate.statistics import Bootstrap
from megaxelm.evaluate.streams import save_streams
from megaxelm.evaluate.subjects import (
    BASELINES,
    LAPT,
    Mixture,
    grown_languages,
    held_out_folders,
    index_clusters,
    model_key,
    models_to_score,
    own_experts,
    plan_mixtures,
    scoring_device,
)
from megaxelm.evaluate.summary import statistics_results
from megaxelm.evaluate.texts import read_text_set, text_set_results
from megaxelm.files import read_json, write_json
from megaxelm.recipe import Recipe


def evaluate_run(recipe: Recipe, run_folder: Path, out: Path) -> None:
    """Score the run's models and mixtures, write `results.json` and the files beside it into `out`.

    Raises:
        StageError: a language without held-out text, a missing export. RoutingError: a router that the ensemble does not have.
    """
    from megaxelm.corpus.tokenizer import Tokenizer

    clusters = index_clusters(run_folder)
    ensemble = load_ensemble(run_folder / "ensemble")
    tokenizer = Tokenizer.load(run_folder / "tokenizer")
    max_tokens = recipe.evaluation.sequence_length or recipe.train.sequence_length
    held_out = read_held_out(held_out_folders(run_folder), tokenizer, recipe.evaluation.max_documents, max_tokens)
    further_texts = {name: read_text_set(name, patterns, tokenizer, list(held_out)) for name, patterns in recipe.evaluation.texts.items()}
    # What routers and models lack should be known before the models have read for minutes.
    mixtures = plan_mixtures(recipe, ensemble)
    for router in recipe.evaluation.routers:
        ensemble.router(router)
    models = models_to_score(recipe, run_folder, ensemble.trained)
    print(f"evaluation: {len(models)} models in float32 on {scoring_device()}", flush=True)
    streams = score_models(models, held_out, tokenizer.start_id)
    documents = document_scores(held_out, streams)
    own, grown = own_experts(clusters, documents.languages), grown_languages(run_folder)
    quality = RouterQuality(ensemble.experts, own)
    mixed = mix_held_out(ensemble, mixtures, held_out, streams, quality.hear)
    documents.nats |= document_scores(held_out, mixed).nats
    documents.save(out / "documents.npz")
    save_streams(out / "streams.npz", ensemble.experts, held_out, streams)

    bootstrap = Bootstrap(add_choices(documents, ensemble.experts, own), documents.num_bytes)
    baselines = [name for name in BASELINES if name in documents.nats]
    columns = {name: name for name in (*baselines, OWN)} | {mixture.column: mixture.key for mixture in mixtures}
    # Models beside seed, dense and experts have differences that are worth an interval too.
    columns |= {key: key for key in models if key not in BASELINES and not key.startswith("expert:")}
    labels = {key: key.replace("expert:", "expert ") for key in models} | {mixture.key: mixture.label for mixture in mixtures}
    texts = {}
    for name, further in further_texts.items():
        streams = score_models(models, further, tokenizer.start_id, windows=Windows(max_tokens), title=name)
        found = document_scores(further, streams)
        found.nats |= document_scores(further, mix_held_out(ensemble, mixtures, further, streams)).nats
        (out / "texts").mkdir(exist_ok=True)
        found.save(out / "texts" / f"{name}.npz")
        texts[name] = text_set_results(found, labels, {language: model_key(expert) for language, expert in own.items()})
    fitted = fitted_fields(recipe, run_folder)
    account = run_folder / "account.json"
    results = {
        "languages": [
            {"code": item.language, "own": own[item.language], "documents": len(item.ids), "bytes": item.bytes, "tokens": item.tokens}
            | ({"grown": True} if item.language in grown else {})
            for item in held_out.values()
        ],
        **comparison(documents, own, ensemble.trained, mixtures, grown),
        "statistics": statistics_results(bootstrap, columns, grown),
        "forgetting": forgetting_results(
            run_matrix(
                documents,
                {language: model_key(expert) for language, expert in own.items()},
                {mixture.key: mixture.label for mixture in mixtures},
                read_parents(run_folder),
                bootstrap,
                grown,
            )
        ),
        "routers": quality.results(bootstrap, baselines),
        **({"texts": texts} if texts else {}),
        "account": read_json(account) if account.is_file() else None,
        "settings": {
            "sequence_length": max_tokens,
            "max_documents": recipe.evaluation.max_documents,
            "top_m": recipe.ensemble.top_m,
            "temperature": recipe.ensemble.temperature,
            "distance_power": recipe.ensemble.distance_power,
            "dtype": "float32",
            "device": scoring_device(),
            "mean": "macro mean over languages" + (", those that were grown left out" if grown else ""),
            **({"fitted on half of this text": ", ".join(fitted) + f" (judged by the other half: {FIT_FILE})"} if fitted else {}),
        },
    }
    write_json(out / "results.json", results)


def comparison(
    documents: DocumentScores,
    own: Mapping[str, str],
    trained: Sequence[str],
    mixtures: Sequence[Mixture],
    grown: Collection[str] = (),
) -> dict[str, Any]:
    """`models` (a column each), `experts` (every one on every language) and `verdict` of `results.json`.

    Args:
        own: language -> its expert. trained: the experts, without the fallback. grown: languages that verdict and means leave out, since
            neither the seed nor the dense model has read them.
    """
    scores = {model: language_scores(documents, model) for model in documents.nats}
    experts = {name: scores[model_key(name)] for name in trained}
    columns: dict[str, tuple[str, dict[str, Score]]] = {"seed": ("seed", scores["seed"])}
    if "dense" in scores:
        columns["dense"] = ("dense", scores["dense"])
    columns["own"] = ("own expert", {language: experts[own[language]][language] for language in documents.languages})
    columns |= {mixture.column: (mixture.label, scores[mixture.key]) for mixture in mixtures}
    worst = {
        language: max((found[language] for found in experts.values()), key=lambda score: score.bits_per_byte)
        for language in documents.languages
    }
    columns["worst"] = ("worst expert", worst)
    columns |= {key: (key.replace(":", " ", 1), scores[key]) for key in documents.nats if key.startswith(f"{LAPT}:")}
    counted = [language for language in documents.languages if language not in grown]
    return {
        "models": {key: _column(label, found, counted or documents.languages) for key, (label, found) in columns.items()},
        "experts": {name: {language: score.bits_per_byte for language, score in found.items()} for name, found in experts.items()},
        "verdict": verdict({language: columns["own"][1][language] for language in counted}, scores.get("dense")),
    }


def verdict(own: Mapping[str, Score], dense: Mapping[str, Score] | None) -> dict[str, Any] | None:
    """Where a language's own expert beats the dense model, and by how many bits per byte it does not elsewhere; None without dense."""
    if dense is None:
        return None
    difference = {language: score.bits_per_byte - dense[language].bits_per_byte for language, score in own.items()}
    return {
        "beaten": [language for language, value in difference.items() if value < 0],
        "not_beaten": {language: value for language, value in difference.items() if value >= 0},
    }


def _column(label: str, scores: Mapping[str, Score], counted: Sequence[str]) -> dict[str, Any]:
    worst = max(counted, key=lambda language: scores[language].bits_per_byte)
    return {
        "label": label,
        "languages": {
            language: {"bits_per_byte": score.bits_per_byte, "perplexity": score.perplexity} for language, score in scores.items()
        },
        "mean_bits_per_byte": sum(scores[language].bits_per_byte for language in counted) / len(counted),
        "worst_language": worst,
        "worst_bits_per_byte": scores[worst].bits_per_byte,
    }
