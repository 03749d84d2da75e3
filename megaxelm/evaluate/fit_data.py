"""What a router is fitted on: one half of the held-out documents, all tokens in one table; and the other half, which judges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.routers import Request, Router
from megaxelm.ensemble.routers.tfidf import TfidfRouter
from megaxelm.errors import StageError
from megaxelm.evaluate.perplexity import HeldOut
from megaxelm.evaluate.streams import ExpertStreams, load_streams


@dataclass(frozen=True)
class Half:
    """Every second document of each language. `logprobs`: language -> documents of [experts, tokens]."""

    held_out: dict[str, HeldOut]
    logprobs: dict[str, list[Tensor]]

    def documents(self) -> list[tuple[str, list[int], Tensor]]:
        """Language, ids and log-probabilities of every document."""
        return [
            (language, ids, rows)
            for language, item in self.held_out.items()
            for ids, rows in zip(item.ids, self.logprobs[language], strict=True)
        ]


@dataclass(frozen=True)
class Table:
    """All tokens of a half. `logprobs` [tokens, experts] fp64; `share` [tokens]: what a nat of the token adds to the mean bits per byte."""

    logprobs: Tensor
    share: Tensor

    def bits(self, log_w: Tensor) -> float:
        """Macro mean over languages of the bits per byte of the mixture under log weights [tokens, experts]."""
        return -float((self.share * (self.logprobs + log_w).logsumexp(-1)).sum())


def read_halves(run_folder: Path, ensemble: Ensemble) -> tuple[Half, Half]:
    """The documents to fit on (the first, third, ... of each language) and those to judge by (the others).

    Raises:
        StageError: the run was evaluated with other experts, before streams were kept, or a language has one document alone.
    """
    path = run_folder / "evaluation" / "streams.npz"
    streams = load_streams(path)
    if streams.experts != ensemble.experts:
        raise StageError(
            f"{path}: of the experts {', '.join(streams.experts)}, but the ensemble has {', '.join(ensemble.experts)}; evaluate the run "
            f"again: megaxelm evaluate {run_folder}"
        )
    few = [language for language, item in streams.held_out.items() if len(item.ids) < 2]
    if few:
        raise StageError(
            f"router fit: {', '.join(few)} has a single held-out document, and one half is to judge what is fitted on the other; raise "
            "evaluation.max_documents or corpus.held_out.share"
        )
    return _half(streams, 0), _half(streams, 1)


def _half(streams: ExpertStreams, first: int) -> Half:
    held_out = {language: HeldOut(language, item.ids[first::2], item.num_bytes[first::2]) for language, item in streams.held_out.items()}
    return Half(held_out, {language: rows[first::2] for language, rows in streams.logprobs.items()})


def table_of(half: Half) -> Table:
    """The tokens of a half in one table; every language counts the same."""
    rows = torch.cat([rows.T.double() for _, _, rows in half.documents()])
    share = torch.cat(
        [
            torch.full((len(ids),), 1 / (math.log(2) * half.held_out[language].bytes * len(half.held_out)), dtype=torch.float64)
            for language, ids, _ in half.documents()
        ]
    )
    return Table(rows, share)


def asked_at(half: Half, refresh: str, refresh_tokens: int) -> Tensor:
    """Row of the table whose text the weights before each token are made of: its own, or an earlier one (`ensemble.refresh`)."""
    found, begin = [], 0
    for _, ids, _ in half.documents():
        place = torch.arange(len(ids))
        if refresh == "frozen":
            place = place.clamp_max(refresh_tokens)
        elif refresh == "chunk":
            place = place - place % refresh_tokens
        found.append(begin + place)
        begin += len(ids)
    return torch.cat(found)


def distances_of(half: Half, router: TfidfRouter) -> tuple[Tensor, Tensor]:
    """Squared distances [tokens, trained experts] before each token of a half, and whether anything is known of the text [tokens]."""
    found = []
    for _, ids, _ in half.documents():
        vectors = np.asarray(router.space.prefixes(router.start([Request()])[0], ids))
        found.append(router.distances(torch.from_numpy(vectors)))
    return torch.cat([distance for distance, _ in found]), torch.cat([known for _, known in found])


def evidence_of(half: Half, decay: float) -> Tensor:
    """What the text before each token says for each expert in nats [tokens, experts], the exponent of the posterior router."""
    from scipy.signal import lfilter

    found = []
    for _, _, rows in half.documents():
        given = rows.double().numpy()
        evidence = np.zeros_like(given)
        evidence[:, 1:] = lfilter([1.0], [1.0, -decay], given[:, :-1], axis=1)
        found.append(torch.from_numpy(evidence.T.copy()))
    return torch.cat(found)


def mixture_nats(half: Half, router: Router, top_m: int | None) -> dict[str, np.ndarray]:
    """Nats of the mixture by language, [documents], by the router as it is used."""
    from megaxelm.ensemble.scoring import mixture_logprob

    found: dict[str, list[float]] = {language: [] for language in half.held_out}
    for language, ids, rows in half.documents():
        found[language].append(-float(mixture_logprob(rows, router, ids, Request((), language), top_m).sum()))
    return {language: np.array(nats) for language, nats in found.items()}


def best_of_document(half: Half) -> dict[str, np.ndarray]:
    """Nats of the expert that predicts each document best, by language."""
    return {language: np.array([-float(document.double().sum(1).max()) for document in rows]) for language, rows in half.logprobs.items()}


def document_bytes(half: Half) -> Mapping[str, list[int]]:
    """Bytes of each document, by language."""
    return {language: item.num_bytes for language, item in half.held_out.items()}
