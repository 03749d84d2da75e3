"""The stage `evaluation`: every model and every mixture on the held-out text of every language, in `results.json`.

Each model reads the held-out text once. The mixtures are arithmetic on the experts' token log-probabilities.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from megaxelm.ensemble.folder import Ensemble, load_ensemble
from megaxelm.ensemble.routers import Request
from megaxelm.ensemble.scoring import mixture_logprob
from megaxelm.errors import StageError
from megaxelm.evaluate.perplexity import HeldOut, Score, read_held_out, score_models, score_streams
from megaxelm.files import read_json, write_json
from megaxelm.grow.record import export_folder, held_clusters, held_out_folders, read_growth
from megaxelm.recipe import Recipe

if TYPE_CHECKING:
    from megaxelm.model.decoder import Decoder

Streams = Mapping[str, Sequence[Tensor]]  # language -> documents of [tokens]


def evaluate_run(recipe: Recipe, run_folder: Path, out: Path) -> None:
    """Score the run's models and mixtures, write `out/results.json`.

    Raises:
        StageError: a language without held-out text, a missing export. RoutingError: a router that the ensemble does not have.
    """
    from megaxelm.corpus.tokenizer import Tokenizer

    growth = read_growth(run_folder)
    clusters = held_clusters(run_folder, growth)
    ensemble = load_ensemble(run_folder / "ensemble")
    tokenizer = Tokenizer.load(run_folder / "tokenizer")
    folders = held_out_folders(run_folder, growth)
    languages = list(folders)
    max_tokens = recipe.evaluation.sequence_length or recipe.train.sequence_length
    held_out = {
        code: read_held_out(folder.parent, [code], tokenizer, recipe.evaluation.max_documents, max_tokens)[code]
        for code, folder in folders.items()
    }
    # Routers are made first: what they lack should be known before the models have read for minutes.
    routers = {name: ensemble.router(name) for name in recipe.evaluation.routers}
    members = ["seed", *(["dense"] if recipe.experts.dense else []), *ensemble.trained, *(item.name for item in growth.comparisons)]
    print(f"evaluation: {len(members)} models in float32 on {_device()}", flush=True)
    streams = score_models({name: _loader(export_folder(run_folder, name, growth), name) for name in members}, held_out, tokenizer.start_id)
    own = own_experts(clusters, languages)

    scores = {name: _scores(held_out, found) for name, found in streams.items()}
    experts = {name: scores[name] for name in ensemble.trained}
    columns: dict[str, tuple[str, dict[str, Score]]] = {"seed": ("seed", scores["seed"])}
    if "dense" in scores:
        columns["dense"] = ("dense", scores["dense"])
    columns["own"] = ("own expert", {language: experts[own[language]][language] for language in languages})
    top_m = recipe.ensemble.top_m
    for name in routers:
        label = f"{name} mixture" + (f", top {top_m}" if top_m else "")
        columns[f"mixture-{name}"] = (label, _scores(held_out, mix_held_out(ensemble, name, held_out, streams, top_m)))
    worst = {
        language: max((found[language] for found in experts.values()), key=lambda score: score.bits_per_byte) for language in languages
    }
    columns["worst"] = ("worst expert", worst)
    for item in growth.comparisons:
        columns[f"lapt-{item.name}"] = (f"LAPT of {item.donor} on {' '.join(item.languages)}", scores[item.name])
    # A language that was grown has no equal: the dense model never saw it. Its comparison is LAPT.
    grown = {code for item in growth.experts for code in item.languages}
    equal = {code: score for code, score in columns["own"][1].items() if code not in grown}

    account = run_folder / "account.json"
    results = {
        "languages": [
            {"code": item.language, "own": own[item.language], "documents": len(item.ids), "bytes": item.bytes, "tokens": item.tokens}
            for item in held_out.values()
        ],
        "models": {key: _column(label, found) for key, (label, found) in columns.items()},
        "experts": {name: {language: score.bits_per_byte for language, score in found.items()} for name, found in experts.items()},
        "account": read_json(account) if account.is_file() else None,
        "verdict": verdict(equal, scores.get("dense")),
        "settings": {
            "sequence_length": max_tokens,
            "max_documents": recipe.evaluation.max_documents,
            "top_m": top_m,
            "temperature": recipe.ensemble.temperature,
            "distance_power": recipe.ensemble.distance_power,
            "dtype": "float32",
            "device": _device(),
            "mean": "macro mean over languages",
        },
    }
    write_json(out / "results.json", results)


def own_experts(clusters: Mapping[str, Mapping[str, Mapping[str, int]]], languages: Sequence[str]) -> dict[str, str]:
    """Language -> the cluster with most of its training tokens; the first of equals."""
    return {
        language: max((name for name in clusters if language in clusters[name]), key=lambda name: clusters[name][language]["tokens"])
        for language in languages
    }


def mix_held_out(
    ensemble: Ensemble, router: str, held_out: Mapping[str, HeldOut], streams: Mapping[str, Streams], top_m: int | None
) -> dict[str, list[Tensor]]:
    """Token log-probabilities of the mixture under one router, from the experts' own: language -> documents of [tokens]."""
    made = ensemble.router(router)
    found: dict[str, list[Tensor]] = {}
    total = sum(len(item.ids) for item in held_out.values())
    with tqdm(total=total, desc=f"mixture {router}", unit="doc", file=sys.stderr, mininterval=0.5) as bar:
        for language, item in held_out.items():
            request = Request((), language)
            found[language] = []
            for number, ids in enumerate(item.ids):
                stream = torch.stack([streams[name][language][number] for name in ensemble.experts])
                found[language].append(mixture_logprob(stream, made, ids, request, top_m))
                bar.update()
    return found


def verdict(own: Mapping[str, Score], dense: Mapping[str, Score] | None) -> dict[str, Any] | None:
    """Where a language's own expert beats the dense model, and by how many bits per byte it does not elsewhere; None without dense."""
    if dense is None:
        return None
    difference = {language: score.bits_per_byte - dense[language].bits_per_byte for language, score in own.items()}
    return {
        "beaten": [language for language, value in difference.items() if value < 0],
        "not_beaten": {language: value for language, value in difference.items() if value >= 0},
    }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _loader(folder: Path, name: str) -> Callable[[], Decoder]:
    if not (folder / "config.json").is_file():
        raise StageError(f"evaluation: `{name}` has no export in {folder}; make it: megaxelm run RECIPE --until experts")

    def load() -> Decoder:
        from megaxelm.model.hub import load_pretrained

        return load_pretrained(folder, dtype=torch.float32).to(_device())

    return load


def _scores(held_out: Mapping[str, HeldOut], streams: Streams) -> dict[str, Score]:
    return {language: score_streams(item, streams[language]) for language, item in held_out.items()}


def _column(label: str, scores: Mapping[str, Score]) -> dict[str, Any]:
    worst = max(scores, key=lambda language: scores[language].bits_per_byte)
    return {
        "label": label,
        "languages": {
            language: {"bits_per_byte": score.bits_per_byte, "perplexity": score.perplexity} for language, score in scores.items()
        },
        "mean_bits_per_byte": sum(score.bits_per_byte for score in scores.values()) / len(scores),
        "worst_language": worst,
        "worst_bits_per_byte": scores[worst].bits_per_byte,
    }
