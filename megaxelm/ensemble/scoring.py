"""Scoring of given text: token log-probabilities of each expert, and of their mixture.

A document of ids x_1..x_T is read as `[start] x_1 .. x_{T-1}` and scored on x_1..x_T: the start token is given, all T ids are scored.
Of each expert only one number a token is kept, target logit minus log-sum-exp of the logits; full logits exist for some rows at a time.
`expert_streams` runs experts, `mixture_logprob` only does arithmetic, so many routers can share one pass of the experts.
`score_documents` runs no expert that gets no weight anywhere in a document. With `combine = logit_mean` two streams do not suffice: the
normaliser is that of the averaged logits (`side_by_side`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from megaxelm.ensemble.packed import batches, document_jobs, pack, token_budget_of
from megaxelm.ensemble.routers import Request, Router
from megaxelm.ensemble.side_by_side import combined_documents
from megaxelm.ensemble.windows import Windows
from megaxelm.errors import RoutingError

if TYPE_CHECKING:
    from megaxelm.model.decoder import Decoder


class DocumentScore(NamedTuple):
    """`logprob` [tokens] fp64, nats, of each token under the mixture; `log_w` [tokens, experts]: the weights before it, -inf: not kept."""

    logprob: Tensor
    log_w: Tensor


def document_streams(
    decoder: Decoder,
    documents_ids: Sequence[Sequence[int]],
    start_id: int,
    token_budget: int | None = None,
    rows_per_chunk: int | None = None,
    on_batch: Callable[[int], object] | None = None,
    windows: Windows | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """Log-probability of each id of each document under one model: a list of [tokens] fp32, in the order of the documents.

    Documents are packed, similar lengths together, into batches of at most `token_budget` tokens (a longer document goes alone); they
    do not see each other.

    Args:
        token_budget: None: what suits the device.
        windows: how documents are read that are longer than the model's positions; None: that is an error.
        on_batch, on_tokens: called after each batch with the documents that are finished, and with the tokens that were scored.
    """
    device = decoder.device
    streams = [torch.empty(len(ids)) for ids in documents_ids]
    jobs = document_jobs(documents_ids, windows, decoder.config.max_positions if windows else 0)
    left = Counter(job.document for job in jobs)
    with torch.inference_mode():
        for batch in batches([job.window.length for job in jobs], token_budget_of(token_budget, device)):
            packed = pack(documents_ids, [jobs[index] for index in batch], start_id).to(device)
            scores = decoder.score(*packed[:4], rows_per_chunk, attention="auto", rows=packed.rows)
            for index, part in zip(batch, scores.target_logprob.float().cpu().split(packed.counts), strict=True):
                job = jobs[index]
                streams[job.document][job.window.first : job.window.end] = part
                left[job.document] -= 1
            if on_batch:
                on_batch(len({jobs[index].document for index in batch if not left[jobs[index].document]}))
            if on_tokens:
                on_tokens(sum(packed.counts))
    return streams


def expert_streams(
    decoders: Sequence[Callable[[], Decoder]],
    documents_ids: Sequence[Sequence[int]],
    start_id: int,
    experts_of: Sequence[Sequence[int]] | None = None,
    token_budget: int | None = None,
    on_batch: Callable[[int], object] | None = None,
    windows: Windows | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> list[Tensor]:
    """Token log-probabilities [experts, tokens] fp32 of each document, expert by expert.

    Args:
        decoders: one a expert, called when its turn comes, and only if it reads something: so one model at a time can be in memory.
        experts_of: for each document the experts that read it; None: all. The rows of the others are NaN.
        windows, on_batch, on_tokens: as in `document_streams`.
    """
    streams = [torch.full((len(decoders), len(ids)), torch.nan) for ids in documents_ids]
    for expert, decoder in enumerate(decoders):
        chosen = [index for index in range(len(documents_ids)) if experts_of is None or expert in experts_of[index]]
        chosen = [index for index in chosen if len(documents_ids[index])]
        if not chosen:
            continue
        texts = [documents_ids[index] for index in chosen]
        found = document_streams(decoder(), texts, start_id, token_budget, on_batch=on_batch, windows=windows, on_tokens=on_tokens)
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
    return mix_streams(stream, weights_along(router, request or Request(), tokens, top_m, given))


def weights_along(
    router: Router, request: Request, tokens: Sequence[int], top_m: int | None = None, stream: Tensor | None = None
) -> Tensor:
    """Log weights [tokens, experts] before each token after `top_m`; `stream` [experts, tokens] for a router that learns from them."""
    if not len(tokens):
        return torch.empty(0, router.num_experts, dtype=torch.float64)
    return router.keep(router.along(request, tokens, stream), top_m).dense(router.num_experts)


def score_documents(
    decoders: Sequence[Callable[[], Decoder]],
    documents_ids: Sequence[Sequence[int]],
    start_id: int,
    router: Router,
    languages: Sequence[str | None] | None = None,
    top_m: int | None = None,
    token_budget: int | None = None,
    windows: Windows | None = None,
    combine: str = "mixture",
) -> list[Tensor]:
    """Mixture log-probability [tokens] fp64 of each document, running only experts that have weight at some token of it.

    A router that learns from the experts' predictions needs all of them; `top_m` then only bounds the mixture.

    Raises:
        RoutingError: as the router, and if `top_m` does not fit.
    """
    found = weighted_scores(decoders, documents_ids, start_id, router, languages, top_m, token_budget, windows, combine)
    return [score.logprob for score in found]


def weighted_scores(
    decoders: Sequence[Callable[[], Decoder]],
    documents_ids: Sequence[Sequence[int]],
    start_id: int,
    router: Router,
    languages: Sequence[str | None] | None = None,
    top_m: int | None = None,
    token_budget: int | None = None,
    windows: Windows | None = None,
    combine: str = "mixture",
    progress: bool = False,
) -> list[DocumentScore]:
    """`score_documents` with the weights along each document; `progress`: a bar on stderr that counts scored tokens of all experts.

    With windows the router reads the whole text before a token, also what has left the window.
    """
    requests = [Request((), None if languages is None else languages[index]) for index in range(len(documents_ids))]
    asked = list(zip(requests, documents_ids, strict=True))
    weights = None if router.needs_expert_logprobs else [weights_along(router, request, ids, top_m) for request, ids in asked]
    experts_of = None if weights is None else [(log_w > -torch.inf).any(0).nonzero().flatten().tolist() for log_w in weights]
    readers = [len(decoders)] * len(asked) if experts_of is None else [len(experts) for experts in experts_of]
    passes = 1 if combine == "mixture" or weights is not None else 2
    total = sum(count * len(ids) for count, ids in zip(readers, documents_ids, strict=True)) * passes
    with tqdm(total=total, desc="score", unit="tok", unit_scale=True, file=sys.stderr, mininterval=0.5, disable=not progress) as bar:
        streams = None
        if combine == "mixture" or weights is None:
            streams = expert_streams(decoders, documents_ids, start_id, experts_of, token_budget, windows=windows, on_tokens=bar.update)
            for stream, experts in zip(streams, experts_of or [list(range(len(decoders)))] * len(streams), strict=True):
                for expert in experts:
                    refuse_broken(stream[expert], expert)
        if weights is None:
            assert streams is not None
            weights = [weights_along(router, *each, top_m, stream) for each, stream in zip(asked, streams, strict=True)]
        if combine == "mixture":
            assert streams is not None
            found = [mix_streams(stream, log_w) for stream, log_w in zip(streams, weights, strict=True)]
        else:
            found = combined_documents(decoders, documents_ids, weights, start_id, combine, token_budget, windows, bar.update)
    return [DocumentScore(logprob, log_w) for logprob, log_w in zip(found, weights, strict=True)]


def refuse_broken(logprobs: Tensor, expert: int) -> None:
    """Raises RoutingError where an expert that was run gives NaN, which otherwise means that it was not run."""
    if bool(logprobs.isnan().any()):
        raise RoutingError(f"expert number {expert} gives log-probabilities that are not numbers; it is broken, train it again")
