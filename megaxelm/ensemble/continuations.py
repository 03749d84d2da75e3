"""Log-likelihood of continuations after contexts, and whether greedy decoding would have written them: what evaluation harnesses ask.

`[start] + context + continuation` is read once by each expert that has weight. The head reads only the rows of the continuation, and those
of the context where the router learns from the experts' predictions. The arg max of the mixture is taken side by side on these rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megaxelm.ensemble.packed import Job, batches, token_budget_of
from megaxelm.ensemble.routers import Request, Router
from megaxelm.ensemble.scoring import mix_streams, refuse_broken, weights_along
from megaxelm.ensemble.side_by_side import combine_rows, rows_hidden
from megaxelm.ensemble.windows import Window, Windows

if TYPE_CHECKING:
    from megaxelm.model.decoder import Decoder


class Pair(NamedTuple):
    """Token ids of a context and of what follows it; either may be empty. `language`: for routers that need it."""

    context: Sequence[int]
    continuation: Sequence[int]
    language: str | None = None


class ContinuationScore(NamedTuple):
    """`log_likelihood` in nats of the continuation; `is_greedy`: each of its tokens is the likeliest one, the lower id of equals."""

    log_likelihood: float
    is_greedy: bool


def score_continuations(
    decoders: Sequence[Callable[[], Decoder]],
    pairs: Sequence[Pair],
    start_id: int,
    router: Router,
    top_m: int | None = None,
    combine: str = "mixture",
    batch_size: int = 64,
    token_budget: int | None = None,
    windows: Windows | None = None,
    on_pairs: Callable[[int], object] | None = None,
) -> list[ContinuationScore]:
    """Score each continuation after its context; a context too long for the experts is cut on the left.

    Args:
        batch_size: pairs whose hidden states are held at one time, those of similar length together.
        windows: how a continuation is read that is longer than the experts' positions; the router sees the whole context.
        on_pairs: called with the number of pairs that have been scored.

    Raises:
        RoutingError: as the router, and if `top_m`, `combine` or `windows` do not fit.
    """
    found: list[ContinuationScore | None] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index].context) - len(pairs[index].continuation))
    for begin in range(0, len(order), batch_size):
        group = order[begin : begin + batch_size]
        scores = _score_group(
            decoders, [pairs[index] for index in group], start_id, router, top_m, combine, token_budget, windows or Windows()
        )
        for index, score in zip(group, scores, strict=True):
            found[index] = score
        if on_pairs:
            on_pairs(len(group))
    return [score for score in found if score is not None]


def _score_group(
    decoders: Sequence[Callable[[], Decoder]],
    pairs: Sequence[Pair],
    start_id: int,
    router: Router,
    top_m: int | None,
    combine: str,
    token_budget: int | None,
    windows: Windows,
) -> Iterator[ContinuationScore]:
    documents = [[*pair.context, *pair.continuation] for pair in pairs]
    firsts = [len(pair.context) for pair in pairs]
    requests = [Request((), pair.language) for pair in pairs]
    learns = router.needs_expert_logprobs
    weights = None
    if not learns:
        weights = [_weights(router, requests[n], documents[n], firsts[n], top_m) for n in range(len(pairs))]
    streams = [torch.full((len(decoders), len(ids)), torch.nan) for ids in documents]
    hidden = [
        _read(decoder, expert, documents, firsts, start_id, learns, weights, streams, token_budget, windows)
        for expert, decoder in enumerate(decoders)
    ]
    if weights is None:
        weights = [_weights(router, requests[n], documents[n], firsts[n], top_m, streams[n]) for n in range(len(pairs))]
    labels = torch.tensor([token for pair in pairs for token in pair.continuation], dtype=torch.int64)
    rows = combine_rows(decoders, hidden, torch.cat(weights), labels, combine)
    counts = [len(pair.continuation) for pair in pairs]
    greedy = (rows.best == labels).split(counts)
    logprobs = rows.logprob.split(counts)
    for number, first in enumerate(firsts):
        # With the mixture, exactly the numbers of `score_documents`: of each expert one stream, added up in fp64.
        logprob = mix_streams(streams[number][:, first:], weights[number]) if combine == "mixture" else logprobs[number]
        yield ContinuationScore(float(logprob.sum()), bool(greedy[number].all()))


def _weights(router: Router, request: Request, ids: Sequence[int], first: int, top_m: int | None, stream: Tensor | None = None) -> Tensor:
    """Log weights [continuation, experts] before each token of the continuation, which follows `first` tokens of context."""
    return weights_along(router, request, ids if first < len(ids) else [], top_m, stream)[first:]


def _read(
    load: Callable[[], Decoder],
    expert: int,
    documents: Sequence[Sequence[int]],
    firsts: Sequence[int],
    start_id: int,
    learns: bool,
    weights: Sequence[Tensor] | None,
    streams: Sequence[Tensor],
    token_budget: int | None,
    windows: Windows,
) -> Tensor | None:
    """Let one expert read the documents where it has weight: fills its row of `streams`, gives the hidden states of all continuations."""
    heard = [
        len(ids) > first and (weights is None or bool((weights[number][:, expert] > -torch.inf).any()))
        for number, (ids, first) in enumerate(zip(documents, firsts, strict=True))
    ]
    if not any(heard):
        return None
    decoder = load()
    positions = decoder.config.max_positions
    starts = [0]
    for ids, first in zip(documents, firsts, strict=True):
        starts.append(starts[-1] + len(ids) - first)
    states = torch.zeros(starts[-1], decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.device)
    jobs = [
        Job(number, window)
        for number, (ids, first) in enumerate(zip(documents, firsts, strict=True))
        if heard[number]
        for window in _cut(len(ids), first, learns, windows, positions)
    ]
    for batch in batches([job.window.length for job in jobs], token_budget_of(token_budget, decoder.device)):
        now = [jobs[index] for index in batch]
        rows = rows_hidden(decoder, documents, now, start_id)
        labels = torch.tensor([token for number, window in now for token in documents[number][window.first : window.end]])
        logprobs = decoder.score_hidden(rows, labels.to(decoder.device)).target_logprob.cpu()
        refuse_broken(logprobs, expert)
        counts = [window.end - window.first for _, window in now]
        for (number, window), row, logprob in zip(now, rows.split(counts), logprobs.split(counts), strict=True):
            streams[number][expert, window.first : window.end] = logprob
            skipped = max(0, firsts[number] - window.first)  # of the context
            place = starts[number] + window.first + skipped - firsts[number]
            states[place : place + len(row[skipped:])] = row[skipped:]
    return states


def _cut(length: int, first: int, learns: bool, windows: Windows, positions: int) -> list[Window]:
    if not learns:
        return windows.cut(length, positions, first)
    if length <= windows.resolve(positions)[0]:
        return windows.cut(length, positions)
    # The continuation is read as it would be without the router's need of the context.
    return [*windows.cut(first, positions), *windows.cut(length, positions, first)]
