"""Scoring of given text: token log-probabilities of each expert, and of their mixture.

A document of ids x_1..x_T is read as `[start] x_1 .. x_{T-1}` and scored on x_1..x_T: the start token is given, all T ids are scored.
`expert_streams` runs experts, `mixture_logprob` only does arithmetic, so many routers can share one pass of the experts.
`score_documents` runs no expert that gets no weight anywhere in a document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megaxelm.ensemble.routers import Request, Router
from megaxelm.ensemble.weights import top_m as keep_top_m
from megaxelm.errors import RoutingError

if TYPE_CHECKING:
    from megaxelm.model.decoder import Decoder

TOKEN_BUDGET = 1024
"""Tokens an expert reads in one packed batch. On a CPU this was 20 % faster than 4096: the logits stay in reused memory."""


def document_streams(
    decoder: Decoder,
    documents_ids: Sequence[Sequence[int]],
    start_id: int,
    token_budget: int = TOKEN_BUDGET,
    rows_per_chunk: int | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """Log-probability of each id of each document under one model: a list of [tokens] fp32, in the order of the documents.

    Documents are packed, similar lengths together, into batches of at most `token_budget` tokens (a longer document goes alone); they
    do not see each other. `on_batch(documents)` is called after each batch, for progress.
    """
    device = decoder.device
    streams = [torch.empty(0)] * len(documents_ids)
    with torch.inference_mode():
        for batch in _batches(documents_ids, token_budget):
            lengths = [len(documents_ids[index]) for index in batch]
            tokens = torch.tensor([token for index in batch for token in (start_id, *documents_ids[index][:-1])], dtype=torch.int64)
            labels = torch.tensor([token for index in batch for token in documents_ids[index]], dtype=torch.int64)
            positions = torch.cat([torch.arange(length) for length in lengths])
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            scores = decoder.score(tokens.to(device), positions.to(device), bounds.to(device), labels.to(device), rows_per_chunk)
            parts = scores.target_logprob.float().cpu().split(lengths)
            for index, part in zip(batch, parts, strict=True):
                streams[index] = part.clone()
            if on_batch:
                on_batch(len(batch))
    return streams


def _batches(documents_ids: Sequence[Sequence[int]], token_budget: int) -> Iterator[list[int]]:
    """Indexes of the documents that are not empty, longest first, in groups under the budget."""
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(documents_ids)), key=lambda index: -len(documents_ids[index])):
        length = len(documents_ids[index])
        if not length:
            break
        if batch and total + length > token_budget:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += length
    if batch:
        yield batch


def expert_streams(
    decoders: Sequence[Callable[[], Decoder]],
    documents_ids: Sequence[Sequence[int]],
    start_id: int,
    experts_of: Sequence[Sequence[int]] | None = None,
    token_budget: int = TOKEN_BUDGET,
    on_batch: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """Token log-probabilities [experts, tokens] fp32 of each document, expert by expert.

    Args:
        decoders: one a expert, called when its turn comes, and only if it reads something: so one model at a time can be in memory.
        experts_of: for each document the experts that read it; None: all. The rows of the others are NaN.
    """
    streams = [torch.full((len(decoders), len(ids)), torch.nan) for ids in documents_ids]
    for expert, decoder in enumerate(decoders):
        chosen = [index for index in range(len(documents_ids)) if experts_of is None or expert in experts_of[index]]
        chosen = [index for index in chosen if len(documents_ids[index])]
        if not chosen:
            continue
        found = document_streams(decoder(), [documents_ids[index] for index in chosen], start_id, token_budget, on_batch=on_batch)
        for index, stream in zip(chosen, found, strict=True):
            streams[index][expert] = stream
    return streams


def mix_streams(stream: Tensor, log_w: Tensor) -> Tensor:
    """Mixture of token log-probabilities `stream` [experts, tokens] under `log_w` [tokens, experts]: [tokens] fp64.

    Raises:
        RoutingError: if an expert with weight has not been run (its row is NaN).
    """
    terms = torch.where(log_w > -torch.inf, stream.T.to(torch.float64) + log_w.to(torch.float64), -torch.inf)
    if bool(terms.isnan().any()):
        raise RoutingError("mixture: an expert has weight but was not run on this text; score with all experts, or with a smaller top_m")
    return terms.logsumexp(-1)


def mixture_logprob(
    stream: Tensor, router: Router, tokens: Sequence[int], request: Request | None = None, top_m: int | None = None
) -> Tensor:
    """Log-probability [tokens] fp64 of each token under the mixture; token t is weighted by the request's prompt and the tokens before t.

    Args:
        stream: [experts, tokens] log-probabilities of `tokens` under each expert.
        top_m: experts kept at each token; None: all.
    """
    given = stream if router.needs_expert_logprobs else None
    log_w = router.along(request or Request(), tokens, given)
    return mix_streams(stream, keep_top_m(log_w, top_m).dense(stream.shape[0])) if len(tokens) else stream.new_empty(0, dtype=torch.float64)


def score_documents(
    decoders: Sequence[Callable[[], Decoder]],
    documents_ids: Sequence[Sequence[int]],
    start_id: int,
    router: Router,
    languages: Sequence[str | None] | None = None,
    top_m: int | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> list[Tensor]:
    """Mixture log-probability [tokens] fp64 of each document, running only experts that have weight at some token of it.

    A router that learns from the experts' predictions needs all of them; `top_m` then only bounds the mixture.

    Raises:
        RoutingError: as the router, and if `top_m` does not fit.
    """
    requests = [Request((), None if languages is None else languages[index]) for index in range(len(documents_ids))]
    if router.needs_expert_logprobs:
        streams = expert_streams(decoders, documents_ids, start_id, token_budget=token_budget)
        return [
            mixture_logprob(stream, router, ids, request, top_m)
            for stream, ids, request in zip(streams, documents_ids, requests, strict=True)
        ]
    weights = [
        keep_top_m(router.along(request, ids), top_m).dense(router.num_experts) if len(ids) else torch.empty(0, router.num_experts)
        for request, ids in zip(requests, documents_ids, strict=True)
    ]
    experts_of = [(log_w > -torch.inf).any(0).nonzero().flatten().tolist() for log_w in weights]
    streams = expert_streams(decoders, documents_ids, start_id, experts_of, token_budget)
    return [mix_streams(stream, log_w) for stream, log_w in zip(streams, weights, strict=True)]
