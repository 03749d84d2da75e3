"""Tokens a second of scoring, measured: the same documents again and again, the median counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from megaxelm.ensemble.routers import Router
from megaxelm.ensemble.scoring import document_streams, score_documents
from megaxelm.model.decoder import Decoder

REPEATS = 5
BATCH_TOKENS = 4096
"""Tokens of the documents that are timed, about."""


def median_speed(score: Callable[[], object], tokens: int, repeats: int = REPEATS) -> float:
    """Tokens a second of `score`, which reads `tokens` tokens: the median of some runs, after one that is not counted."""
    score()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        score()
        seconds.append(time.perf_counter() - began)
    return tokens / statistics.median(seconds)


def model_speed(decoder: Decoder, documents: Sequence[Sequence[int]], start_id: int) -> float:
    """Tokens a second of one model. Scores are brought to the CPU, so a device has finished when they are there."""
    return median_speed(lambda: document_streams(decoder, documents, start_id), sum(map(len, documents)))


def mixture_speed(
    decoders: Sequence[Decoder],
    documents: Sequence[Sequence[int]],
    languages: Sequence[str],
    start_id: int,
    router: Router,
    top_m: int | None,
) -> float:
    """Tokens a second of a mixture whose experts are all in memory: the experts that are heard, the router, and the mixing."""
    loaders = [lambda decoder=decoder: decoder for decoder in decoders]
    return median_speed(
        lambda: score_documents(loaders, documents, start_id, router, list(languages), top_m),
        sum(map(len, documents)),
    )


def some_documents(documents: Sequence[tuple[str, list[int]]], most: int = BATCH_TOKENS) -> list[tuple[str, list[int]]]:
    """Documents of about `most` tokens, spread evenly over those given."""
    total = sum(len(ids) for _, ids in documents)
    every = max(1, round(total / most))
    return list(documents[::every])
