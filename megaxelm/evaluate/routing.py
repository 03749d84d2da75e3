"""How good a router is: does it find the right expert, how soon, what do its mistakes cost, and can its weights be believed.

Two experts count as right: the *own* expert of the document's language, and the *best* expert of the document, which predicts the whole of
it best. A token counts as right where the heaviest weight before it is on that expert. Shares are means over the tokens of a document, then
over the documents of a language, then over languages, so that long documents and large languages do not decide.

Calibration: the tokens are put into bins by their heaviest weight; in a bin, the mean of that weight is compared with how often the expert
is the best one of its document. ECE is the mean distance of the two, weighted by the bins' tokens (Guo et al., On Calibration of Modern
Neural Networks, 2017, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megaxelm.evaluate.documents import DocumentScores
from megaxelm.evaluate.statistics import Bootstrap
from megaxelm.evaluate.subjects import Mixture, model_key

BANDS = (0, 16, 64, 256)
"""Places in the text at which the bands of `by_position` begin; the last has no end."""
NUM_BINS = 10

BEST_OF_DOCUMENT, BEST_OF_LANGUAGE, OWN = "best-of-document", "best-of-language", "own"
"""Names of choices of an expert, as models beside the real ones."""

_RIGHT = ("own", "best")


def add_choices(documents: DocumentScores, experts: Sequence[str], own: Mapping[str, str]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Nats of all models, and of three choices of an expert: `own`, the best of each language, the best of each document.

    Args:
        experts: those that a router can choose, the fallback among them. own: language -> its expert.
    """
    nats = dict(documents.nats)
    nats[OWN], nats[BEST_OF_LANGUAGE], nats[BEST_OF_DOCUMENT] = {}, {}, {}
    for language in documents.languages:
        rows = np.stack([documents.nats[model_key(name)][language] for name in experts])
        nats[OWN][language] = documents.nats[model_key(own[language])][language]
        nats[BEST_OF_LANGUAGE][language] = rows[rows.sum(1).argmin()]
        nats[BEST_OF_DOCUMENT][language] = rows.min(0)
    return nats


class RouterQuality:
    """Gathers the weights of every mixture while they are made, document by document, and keeps a few numbers a token of them.

    Args:
        experts: in the order of the weights. own: language -> its expert.
    """

    def __init__(self, experts: Sequence[str], own: Mapping[str, str]) -> None:
        self.experts = list(experts)
        self.own = {language: self.experts.index(name) for language, name in own.items()}
        self._heard: dict[Mixture, dict[str, list[_Document]]] = {}

    def hear(self, mixture: Mixture, language: str, number: int, weights: Tensor, stream: Tensor, mixed: Tensor) -> None:
        """One document: weights [tokens, experts], log-probabilities of the experts [experts, tokens] and of the mixture [tokens]."""
        found = _Document(weights.double().numpy(), stream.double().numpy(), mixed.double().numpy(), self.own[language])
        self._heard.setdefault(mixture, {}).setdefault(language, []).append(found)

    def results(self, bootstrap: Bootstrap, baselines: Sequence[str]) -> dict[str, Any]:
        """`routers` of `results.json`: column of the mixture -> its figures.

        Args:
            bootstrap: over the nats of `add_choices`. baselines: models that regret is told against, besides the choices.
        """
        return {mixture.column: self._entry(mixture, found, bootstrap, baselines) for mixture, found in self._heard.items()}

    def _entry(
        self, mixture: Mixture, heard: Mapping[str, list[_Document]], bootstrap: Bootstrap, baselines: Sequence[str]
    ) -> dict[str, Any]:
        against = (BEST_OF_DOCUMENT, BEST_OF_LANGUAGE, OWN, *baselines)
        languages: dict[str, dict[str, Any]] = {
            language: {
                **{f"accuracy_{right}": _mean([item.hits[right].mean() for item in items]) for right in _RIGHT},
                **{f"weight_on_{right}": _mean([item.weight[right].mean() for item in items]) for right in _RIGHT},
                "regret": {base: bootstrap.language(mixture.key, language, base).to_json() for base in against},
            }
            for language, items in heard.items()
        }
        return {
            "label": mixture.label,
            "router": mixture.router,
            "top_m": mixture.top_m,
            **{
                name: _mean([found[name] for found in languages.values()])
                for name in ("accuracy_own", "accuracy_best", "weight_on_own", "weight_on_best")
            },
            "regret": {base: bootstrap.mean(mixture.key, base).to_json() for base in against},
            "calibration": calibration(heard),
            "by_position": [_band(heard, *pair) for pair in zip(BANDS, (*BANDS[1:], None), strict=True)],
            "languages": languages,
        }


class _Document:
    """What is kept of the weights along one document: a few numbers a token."""

    def __init__(self, weights: NDArray[np.float64], stream: NDArray[np.float64], mixed: NDArray[np.float64], own: int) -> None:
        best = int(stream.sum(1).argmax())
        # Experts of the same weight share the choice, so that uniform weights are right once in k.
        heaviest = weights == weights.max(1, keepdims=True)
        chosen = (heaviest / heaviest.sum(1, keepdims=True)).astype(np.float32)
        self.hits = {"own": chosen[:, own], "best": chosen[:, best]}
        self.weight = {name: weights[:, place].astype(np.float32) for name, place in (("own", own), ("best", best))}
        self.confidence = weights.max(1).astype(np.float32)
        self.regret = ((stream[best] - mixed) / math.log(2)).astype(np.float32)  # [tokens], bits more than the best expert

    def __len__(self) -> int:
        return len(self.confidence)


def calibration(heard: Mapping[str, Sequence[_Document]]) -> dict[str, Any]:
    """ECE and the bins of the reliability diagram; every document of a language counts the same, and every language."""
    shares, confidence, hits = np.zeros(NUM_BINS), np.zeros(NUM_BINS), np.zeros(NUM_BINS)
    for items in heard.values():
        for item in items:
            # A weight of exactly 1 belongs to the last bin.
            bins = np.minimum((item.confidence * NUM_BINS).astype(int), NUM_BINS - 1)
            share = 1 / (len(item) * len(items) * len(heard))
            shares += share * np.bincount(bins, minlength=NUM_BINS)
            confidence += share * np.bincount(bins, item.confidence, minlength=NUM_BINS)
            hits += share * np.bincount(bins, item.hits["best"], minlength=NUM_BINS)
    rows = [
        {
            "from": number / NUM_BINS,
            "to": (number + 1) / NUM_BINS,
            "share": float(shares[number]),
            "weight": float(confidence[number] / shares[number]) if shares[number] else None,
            "frequency": float(hits[number] / shares[number]) if shares[number] else None,
        }
        for number in range(NUM_BINS)
    ]
    return {"ece": float(np.abs(confidence - hits).sum()), "bins": rows}


def _band(heard: Mapping[str, Sequence[_Document]], begin: int, end: int | None) -> dict[str, Any]:
    """Figures over the tokens `begin` to `end` of the documents that reach so far."""
    part = slice(begin, end)
    found: dict[str, list[float]] = {name: [] for name in ("accuracy_own", "accuracy_best", "weight_on_best", "regret_bits_per_token")}
    tokens = 0
    for items in heard.values():
        reach = [item for item in items if len(item) > begin]
        tokens += sum(len(item.confidence[part]) for item in reach)
        if reach:
            for right in _RIGHT:
                found[f"accuracy_{right}"].append(_mean([item.hits[right][part].mean() for item in reach]))
            found["weight_on_best"].append(_mean([item.weight["best"][part].mean() for item in reach]))
            found["regret_bits_per_token"].append(_mean([item.regret[part].mean() for item in reach]))
    figures = {name: _mean(values) if values else None for name, values in found.items()}
    return {"from": begin, "to": end, "tokens": tokens, **figures}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(map(float, values)) / len(values)
