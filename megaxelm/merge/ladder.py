"""The merge ladder: seed, dense, own experts, mixtures and merged models on the same held-out documents.

Rungs from dear to cheap: the mixture runs k experts, the mixture-of-experts model k feed-forward parts of which few read a token, the
averages and the distilled model one dense model. Every model reads the documents once; mixtures are arithmetic on what the experts gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megaxelm.ensemble.folder import Ensemble, load_ensemble
from megaxelm.ensemble.routers import Request, Router
from megaxelm.ensemble.scoring import mixture_logprob
from megaxelm.errors import RoutingError
from megaxelm.evaluate.documents import document_scores, language_scores
from megaxelm.evaluate.perplexity import HeldOut, read_held_out, score_models
from megaxelm.evaluate.subjects import held_out_folders
from megaxelm.files import write_json
from megaxelm.merge.rungs import MERGED, read_rung, rung_folder, rung_names
from megaxelm.merge.speed import mixture_speed, model_speed, some_documents
from megaxelm.model.config import active_parameters, num_parameters
from megaxelm.model.decoder import Decoder
from megaxelm.model.hub import load_config, load_pretrained
from megaxelm.model.lora import lora_parameters
from megaxelm.model.source import WeightSource
from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder

Streams = Mapping[str, Sequence[Tensor]]
"""Language -> documents of [tokens]."""
RESULTS = "ladder.json"
DOCUMENTS = "ladder-documents.npz"


@dataclass(frozen=True)
class LadderOptions:
    """`routers`: of the mixtures shown; None: `evaluation.routers`. `top_ms`: experts kept, None: all. `max_documents` a language."""

    routers: Sequence[str] | None = None
    top_ms: Sequence[int | None] = (None,)
    max_documents: int | None = None
    speed: bool = True


@dataclass
class _Row:
    """A model of the ladder: its name in the results, what it is, the log-probabilities of its documents, and what it costs."""

    key: str
    label: str
    kind: str
    streams: Streams
    parameters: int
    active_parameters: int
    speed: float | None


def climb(run: RunFolder, recipe: Recipe, options: LadderOptions | None = None) -> dict[str, Any]:
    """Score every rung; write `merged/ladder.json` and the nats of every document beside it.

    Raises:
        StageError: no held-out text. RoutingError: a router that the ensemble does not have.
    """
    options = options or LadderOptions()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ensemble = load_ensemble(run.folder("ensemble"), device=device)
    routers = {name: ensemble.router(name) for name in options.routers or recipe.evaluation.routers}
    for m in options.top_ms:
        if m is not None and not 1 <= m <= len(ensemble.trained):
            raise RoutingError(f"--top-m {m}: choose 1 to {len(ensemble.trained)}, the number of experts in this ensemble")
    own = _own_experts(ensemble)
    length = recipe.evaluation.sequence_length or recipe.train.sequence_length
    most = options.max_documents or recipe.evaluation.max_documents
    tokenizer = ensemble.tokenizer
    folders_of_text = {language: folder for language, folder in held_out_folders(run.path).items() if language in own}
    held_out = read_held_out(folders_of_text, tokenizer, most, length)
    languages = list(held_out)
    timed = some_documents([(language, ids) for language, item in held_out.items() for ids in item.ids]) if options.speed else []

    folders = {name: run.expert(name) / "export" for name in ("seed", "dense")}
    folders = {name: folder for name, folder in folders.items() if (folder / "config.json").is_file()}
    rungs = {name: rung_folder(run, name) for name in rung_names(run)}
    speeds: dict[str, float] = {}

    def timing(name: str, load: Callable[[], Decoder]) -> Callable[[], Decoder]:
        def loaded() -> Decoder:
            decoder = load()
            if timed:
                speeds[name] = model_speed(decoder, [ids for _, ids in timed], tokenizer.start_id)
            return decoder

        return loaded

    loaders = {name: timing(name, _loader(folder, device)) for name, folder in {**folders, **_merged(rungs)}.items()}
    experts = {
        f"expert:{name}": timing(f"expert:{name}", load) for name, load in zip(ensemble.experts, ensemble.passing_decoders, strict=True)
    }
    streams = score_models({**loaders, **experts}, held_out, tokenizer.start_id)

    rows = [_row(name, name, name, streams[name], folder, speeds.get(name)) for name, folder in folders.items()]
    assert ensemble.sources is not None  # an ensemble of a folder has them
    total, each = expert_parameters([source() for source in ensemble.sources])
    own_streams = {language: streams[f"expert:{own[language]}"][language] for language in languages}
    own_speed = [speeds[f"expert:{name}"] for name in ensemble.trained if f"expert:{name}" in speeds]
    rows.append(_Row("own", "own expert", "own", own_streams, total, each, float(np.median(own_speed)) if own_speed else None))
    by_expert = {name: streams[f"expert:{name}"] for name in ensemble.experts}
    decoders = [ensemble.decoder(number) for number in range(len(ensemble.experts))] if timed and routers else []
    for name, router in routers.items():
        for m in _differing(options.top_ms, len(ensemble.trained), name):
            key = f"mixture:{name}" + (f"@{m}" if m else "")
            mixed = _mixed(ensemble, router, held_out, by_expert, m)
            heard = 1 if name == "language" else (m or len(ensemble.trained)) + (ensemble.fallback is not None)
            speed = None
            if decoders:
                codes, ids = [code for code, _ in timed], [found for _, found in timed]
                speed = mixture_speed(decoders, ids, codes, tokenizer.start_id, router, m)
            label = f"{name} mixture" + (f", top {m}" if m else "")
            rows.append(_Row(key, label, "mixture", mixed, total, heard * each, speed))
    for name, folder in rungs.items():
        record = read_rung(run, name) or {}
        key = f"merged:{name}"
        rows.append(_row(key, name, record.get("kind", "merged"), streams[key], folder, speeds.get(key)))

    scores = document_scores(held_out, {row.key: row.streams for row in rows})
    results = {
        "languages": _language_rows(held_out, own),
        "models": {row.key: _model(row, language_scores(scores, row.key)) for row in rows},
    }
    results["settings"] = {
        "sequence_length": length,
        "max_documents": most,
        "device": device,
        "dtype": "float32",
        "experts": ensemble.experts,
        "threads": torch.get_num_threads(),
        "timed_tokens": sum(len(ids) for _, ids in timed),
        "mean": "macro mean over languages",
        "active_parameters": "of all that is computed to predict one token, embedding included; of a mixture: the experts that are kept",
    }
    out = run.path / MERGED
    out.mkdir(exist_ok=True)
    scores.save(out / DOCUMENTS)
    write_json(out / RESULTS, results)
    return results


def expert_parameters(sources: Sequence[WeightSource]) -> tuple[int, int]:
    """Parameters of all experts together, and those that predict a token where one expert does.

    Experts that are low-rank deltas hold their base once between them, and each runs it: base and delta count as at work.
    """
    deltas = [lora_parameters(source.config, source.adapter.lora) if source.adapter else 0 for source in sources]
    shared = {source.adapter.folder.resolve(): source.config for source in sources if source.adapter}
    whole = [source.config for source in sources if not source.adapter] + list(shared.values())
    at_work = max(num_parameters(source.config) + delta for source, delta in zip(sources, deltas, strict=True))
    return sum(map(num_parameters, whole)) + sum(deltas), at_work


def _own_experts(ensemble: Ensemble) -> dict[str, str]:
    """Language -> the expert that was trained on most of its tokens; the first of equals."""
    tokens = {name: ensemble.languages.get(name, {}) for name in ensemble.trained}
    languages = sorted({language for found in tokens.values() for language in found})
    return {language: max(tokens, key=lambda name: tokens[name].get(language, 0)) for language in languages}


def _mixed(
    ensemble: Ensemble, router: Router, held_out: Mapping[str, HeldOut], streams: Mapping[str, Streams], top_m: int | None
) -> dict[str, list[Tensor]]:
    """Token log-probabilities of the mixture from the experts' own: language -> documents of [tokens]."""
    found: dict[str, list[Tensor]] = {}
    for language, item in held_out.items():
        stacked = [torch.stack([streams[name][language][number] for name in ensemble.experts]) for number in range(len(item.ids))]
        request = Request((), language)
        found[language] = [mixture_logprob(stream, router, ids, request, top_m) for stream, ids in zip(stacked, item.ids, strict=True)]
    return found


def _merged(rungs: Mapping[str, Path]) -> dict[str, Path]:
    return {f"merged:{name}": folder for name, folder in rungs.items()}


def _loader(folder: Path, device: str) -> Callable[[], Decoder]:
    return lambda: load_pretrained(folder, dtype=torch.float32).to(device)


def _row(key: str, label: str, kind: str, streams: Streams, folder: Path, speed: float | None) -> _Row:
    config = load_config(folder)
    return _Row(key, label, kind, streams, num_parameters(config), active_parameters(config), speed)


def _differing(top_ms: Sequence[int | None], experts: int, router: str) -> list[int | None]:
    """The numbers of experts that make a difference: all is said once, and the language router keeps one whatever is asked."""
    if router == "language":
        return [None]
    return list(dict.fromkeys(None if m == experts else m for m in top_ms))


def _model(row: _Row, scores: Mapping[str, Any]) -> dict[str, Any]:
    bits = {code: score.bits_per_byte for code, score in scores.items()}
    worst = max(bits, key=lambda code: bits[code])
    return {
        "label": row.label,
        "kind": row.kind,
        "bits_per_byte": bits,
        "mean_bits_per_byte": sum(bits.values()) / len(bits),
        "worst_language": worst,
        "worst_bits_per_byte": bits[worst],
        "parameters": row.parameters,
        "active_parameters": row.active_parameters,
        "tokens_per_second": row.speed,
    }


def _language_rows(held_out: Mapping[str, HeldOut], own: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {"code": code, "own": own[code], "documents": len(item.ids), "bytes": item.bytes, "tokens": item.tokens}
        for code, item in held_out.items()
    ]
