"""Log-likelihood of continuations after contexts, and whether greedy decoding would have written them: what evaluation harnesses ask.

`[start] + context + continuation` is read once by each expert that has weight. The head reads only the rows of the continuation, and those
of the context where the router learns from the experts' predictions. The arg max of the mixture is taken side by side on these rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
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
        read = _Group([pairs[index] for index in group], start_id, router, top_m, token_budget, windows or Windows())
        for index, score in zip(group, read.scores(decoders, combine), strict=True):
            found[index] = score
        if on_pairs:
            on_pairs(len(group))
    return [score for score in found if score is not None]


class _Group:
    """Pairs that are scored together: their texts, and what the experts make of them."""

    def __init__(
        self, pairs: Sequence[Pair], start_id: int, router: Router, top_m: int | None, token_budget: int | None, windows: Windows
    ) -> None:
        self.start_id, self.router, self.top_m, self.token_budget, self.windows = start_id, router, top_m, token_budget, windows
        self.documents = [[*pair.context, *pair.continuation] for pair in pairs]
        self.firsts = [len(pair.context) for pair in pairs]
        self.languages = [pair.language for pair in pairs]

    def scores(self, decoders: Sequence[Callable[[], Decoder]], combine: str) -> Iterator[ContinuationScore]:
        """Let the experts read, one after the other, and score the pairs in their order."""
        streams = [torch.full((len(decoders), len(ids)), torch.nan) for ids in self.documents]
        weights = None if self.router.needs_expert_logprobs else self._weights([None] * len(streams))
        hidden = [self._read(decoder, expert, weights, streams) for expert, decoder in enumerate(decoders)]
        weights = weights or self._weights(streams)
        tails = [ids[first:] for ids, first in zip(self.documents, self.firsts, strict=True)]
        labels = torch.tensor([token for tail in tails for token in tail], dtype=torch.int64)
        counts = [len(tail) for tail in tails]
        rows = combine_rows(decoders, hidden, torch.cat(weights), labels, combine)
        greedy, logprobs = (rows.best == labels).split(counts), rows.logprob.split(counts)
        for number, first in enumerate(self.firsts):
            # With the mixture, exactly the numbers of `score_documents`: of each expert one stream, added up in fp64.
            logprob = mix_streams(streams[number][:, first:], weights[number]) if combine == "mixture" else logprobs[number]
            yield ContinuationScore(float(logprob.sum()), bool(greedy[number].all()))

    def _weights(self, streams: Sequence[Tensor | None]) -> list[Tensor]:
        """Log weights [continuation, experts] of each pair before each token of its continuation."""
        found = []
        for language, ids, first, stream in zip(self.languages, self.documents, self.firsts, streams, strict=True):
            if stream is None or first == len(ids):
                found.append(weights_along(self.router, Request(ids[:first], language), ids[first:], self.top_m))
            else:
                found.append(weights_along(self.router, Request((), language), ids, self.top_m, stream)[first:])
        return found

    def _read(self, load: Callable[[], Decoder], expert: int, weights: Sequence[Tensor] | None, streams: Sequence[Tensor]) -> Tensor | None:
        """Let one expert read the pairs where it has weight: fills its row of `streams`, gives hidden states of all continuations."""
        heard = [
            len(ids) > first and (weights is None or bool((weights[number][:, expert] > -torch.inf).any()))
            for number, (ids, first) in enumerate(zip(self.documents, self.firsts, strict=True))
        ]
        if not any(heard):
            return None
        decoder = load()
        lengths = [len(ids) - first for ids, first in zip(self.documents, self.firsts, strict=True)]
        starts = [0, *accumulate(lengths)]
        states = torch.zeros(starts[-1], decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.device)
        positions = decoder.config.max_positions
        jobs = [Job(number, window) for number, is_heard in enumerate(heard) if is_heard for window in self._cut(number, positions)]
        for batch in batches([job.window.length for job in jobs], token_budget_of(self.token_budget, decoder.device)):
            now = [jobs[index] for index in batch]
            rows = rows_hidden(decoder, self.documents, now, self.start_id)
            labels = torch.tensor([token for number, window in now for token in self.documents[number][window.first : window.end]])
            logprobs = decoder.score_hidden(rows, labels.to(decoder.device)).target_logprob.cpu()
            refuse_broken(logprobs, expert)
            counts = [window.end - window.first for _, window in now]
            for (number, window), row, logprob in zip(now, rows.split(counts), logprobs.split(counts), strict=True):
                streams[number][expert, window.first : window.end] = logprob
                tail = row[max(0, self.firsts[number] - window.first) :]  # without the rows of the context
                place = starts[number] + max(window.first, self.firsts[number]) - self.firsts[number]
                states[place : place + len(tail)] = tail
        return states

    def _cut(self, number: int, positions: int) -> list[Window]:
        length, first = len(self.documents[number]), self.firsts[number]
        if not self.router.needs_expert_logprobs:
            return self.windows.cut(length, positions, first)
        if length <= self.windows.resolve(positions)[0]:
            return self.windows.cut(length, positions)
        # The continuation is read as it would be without the router's need of the context.
        return [*self.windows.cut(first, positions), *self.windows.cut(length, positions, first)]
