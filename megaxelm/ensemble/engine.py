"""Writing on from many texts at once with a mixture of experts: continuous batching.

engine = Engine(ensemble)
engine.add(GenerationRequest("Bonjour", sampling=SamplingParams(max_new_tokens=20)))
while engine.has_work:
    for event in engine.step():
        print(event.text, end="")

Each step writes one token of every text: the router weighs the text so far, the m heaviest experts are kept, only these run, each behind a
KV cache of its own, and their mixture gives the token. Texts join and leave between steps. An expert that is chosen for the first time,
or again after a pause, reads what it has missed. A router that learns from the experts (`posterior`) has all of them read the prompt;
an expert that then misses a token is not heard again.

The engine is not safe for threads: one owns it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megaxelm.ensemble.choice import choose_combine, choose_router
from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.graphed import GraphedSteps
from megaxelm.ensemble.mixture_head import LogitRows, MixtureSettings, NextTokens, fused, sampling_of
from megaxelm.ensemble.routers import FixedRouter, Request, Router
from megaxelm.ensemble.running import RunningText, running_text
from megaxelm.ensemble.sampling import GenerationRequest, TokenEvent
from megaxelm.ensemble.shards import Shards
from megaxelm.ensemble.speculative import DraftCount, speculative_step
from megaxelm.ensemble.weights import Weights
from megaxelm.errors import RoutingError
from megaxelm.model.stacked import Piece, Read
from megaxelm_kernels.linear_cross_entropy import target_logprobs
from megaxelm_kernels.mixture import TEMPERATURE_ON, MixtureToken

PREFILL_TOKENS = 8192


class Engine:
    """Texts that are written on together.

    Args:
        router, top_m, combine, temperature_on: None takes the ensemble's own.
        expert: this one alone, instead of a router.
        max_batch: texts that are written on at one time; the others wait.
        max_tokens: places of the KV cache in all (a text takes one a token and kept expert); None: no bound.
        resident: experts that are on the device at one time; None: all.
        shards: ranks that share the experts; None: all are here.
        draft: an expert that proposes `draft_tokens` tokens at a time, which the mixture verifies; the texts are the same.
        graphs: a token step runs as a CUDA graph; None: on CUDA, where the kernels are Triton's. On a CPU the same without a graph.
        prefill_tokens: tokens of prompts, of all experts together, that join in one step at most; a single prompt always may.

    Raises:
        RoutingError: a value out of range, an unknown expert or router. ModelError: an expert that does not load.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        *,
        router: Router | str | None = None,
        top_m: int | None = None,
        combine: str | None = None,
        temperature_on: str | None = None,
        expert: str | None = None,
        max_batch: int = 32,
        max_tokens: int | None = None,
        resident: int | None = None,
        kernels: str = "auto",
        shards: Shards | None = None,
        draft: str | None = None,
        draft_tokens: int = 4,
        graphs: bool | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        temperature_on = temperature_on or ensemble.settings.temperature_on
        if temperature_on not in TEMPERATURE_ON:
            raise RoutingError(f"temperature_on = {temperature_on!r}: choose one of {', '.join(TEMPERATURE_ON)}")
        if max_batch < 1:
            raise RoutingError(f"max_batch = {max_batch}: choose at least 1")
        self.ensemble, self.max_batch, self.prefill_tokens = ensemble, max_batch, prefill_tokens
        self.settings = MixtureSettings(choose_combine(ensemble, combine), temperature_on)
        self.router, self.top_m = choose_router(ensemble, router, top_m, expert)
        self.shards = shards
        self.draft = None if draft is None else _draft(ensemble, draft, draft_tokens, shards)
        self.draft_tokens, self.drafted = draft_tokens, DraftCount()
        # The experts that may have weight, and of these the ones of this rank: only these are read.
        self._experts = [number for number in _candidates(self.router) if shards is None or number in shards.experts]
        if self.draft is not None and self.draft not in self._experts:
            self._experts = sorted([*self._experts, self.draft])
        if not self._experts:
            raise RoutingError(f"ensemble.devices: no expert of rank {shards.rank if shards else 0} has weight; take fewer devices")
        self.stack = ensemble.stack(self._experts, None if resident is None else min(resident, len(self._experts)), kernels)
        self.cache = self.stack.new_cache(max_tokens)
        on_cuda = self.stack.device.type == "cuda"
        routed = self.stack.config.num_experts > 0  # which experts of a layer run follows from the text, a graph has fixed launches
        graphs = on_cuda and self.stack.kernels == "triton" and not routed if graphs is None else graphs
        if graphs and routed:
            raise RoutingError("graphs = True: a model with experts in its layers cannot run as a graph; leave graphs out")
        if graphs and self.stack.kernels != "triton":
            raise RoutingError(f"graphs = True: a step by {self.stack.kernels} cannot be one; choose kernels = triton, or leave graphs out")
        self._graphs = GraphedSteps(self.stack, self.cache, self.settings, capture=on_cuda) if graphs else None
        self._waiting: deque[RunningText] = deque()
        self._running: list[RunningText] = []
        self._state: Any = None
        self._next_id = 0

    @property
    def has_work(self) -> bool:
        """Whether a text is running or waits."""
        return bool(self._running or self._waiting)

    @property
    def draft_place(self) -> int:
        """Number of the drafting expert in the stack."""
        assert self.draft is not None
        return self._experts.index(self.draft)

    @property
    def num_running(self) -> int:
        """Texts that are written on."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Texts that wait for a place."""
        return len(self._waiting)

    def add(self, request: GenerationRequest) -> int:
        """Have a text written on; its number in the events.

        Raises:
            RoutingError: it does not fit the experts' positions or the cache, or the router cannot weigh it.
        """
        tokenizer = self.ensemble.tokenizer
        ids = tokenizer.encode([request.prompt])[0] if isinstance(request.prompt, str) else list(request.prompt)
        bad = [token for token in ids if not 0 <= token < tokenizer.vocab_size]
        if bad:
            raise RoutingError(f"prompt: token id {bad[0]} is not in the vocabulary of {tokenizer.vocab_size} pieces")
        text = running_text(self._next_id, request, ids, tokenizer.start_id, tokenizer.decode)
        positions = self.stack.config.max_positions
        if text.bound > positions:
            raise RoutingError(
                f"prompt and max_new_tokens together make {text.bound} tokens, the experts have {positions} positions: "
                "shorten the prompt or lower max_new_tokens"
            )
        needed, limit = self._rows_of(text) * self.cache.capacity(text.bound), self.cache.max_tokens
        if limit is not None and needed > limit:
            raise RoutingError(
                f"max_tokens = {limit}: this text alone takes {needed} places of the cache; raise it, or lower max_new_tokens or top_m"
            )
        self.router.start([Request(ids, request.language)])  # what the router cannot weigh is an error now and not among others
        self._next_id += 1
        self._waiting.append(text)
        return text.request_id

    def prompt_tokens(self, request_id: int) -> int:
        """Tokens of the prompt of a text that runs or waits."""
        return next(len(text.prompt_ids) for text in (*self._running, *self._waiting) if text.request_id == request_id)

    def cancel(self, request_id: int) -> None:
        """Stop a text; one that is not known any more is no mistake."""
        self._waiting = deque(text for text in self._waiting if text.request_id != request_id)
        self._leave({request_id})

    def step(self) -> list[TokenEvent]:
        """One more token of every text that runs; texts that wait join first, where there is room. [] when there is nothing to do."""
        self._join()
        if not self._running:
            return []
        with torch.inference_mode():
            events = self._step()
        self._leave({event.request_id for event in events if event.finish_reason is not None})
        return events

    def _rows_of(self, text: RunningText) -> int:
        """Rows of the cache that must be at hand for a text."""
        kept = self.top_m + (self.router.fallback is not None)
        return (len(self.ensemble.experts) if self.router.needs_expert_logprobs else kept) + (self.draft is not None)

    def _join(self) -> None:
        fresh: list[RunningText] = []
        reserved = sum(self._rows_of(text) * self.cache.capacity(text.bound) for text in self._running)
        budget = self.prefill_tokens
        while self._waiting and len(self._running) + len(fresh) < self.max_batch:
            text = self._waiting[0]
            reserved += self._rows_of(text) * self.cache.capacity(text.bound)
            budget -= self._rows_of(text) * len(text.history)
            if (self.cache.max_tokens is not None and reserved > self.cache.max_tokens) or (budget < 0 and fresh):
                break
            fresh.append(self._waiting.popleft())
        if not fresh:
            return
        state = self.router.start([Request(text.prompt_ids, text.language) for text in fresh])
        for text, language in zip(fresh, self.router.detected(state), strict=True):
            text.detected = language
        if self.router.needs_expert_logprobs:
            with torch.inference_mode():
                self._read_prompts(fresh, state)
        self._state = state if not self._running else self.router.join(self._state, state)
        self._running += fresh

    def _leave(self, request_ids: set[int]) -> None:
        going_on = [index for index, text in enumerate(self._running) if text.request_id not in request_ids]
        if len(going_on) == len(self._running):
            return
        for text in self._running:
            if text.request_id in request_ids:
                for row in (*text.rows.values(), *([text.draft_row] if text.draft_row else [])):
                    self.cache.free(row)
        self._running = [self._running[index] for index in going_on]
        self._state = self.router.select(self._state, going_on) if going_on else None

    def _step(self) -> list[TokenEvent]:
        texts = self._running
        if self.draft is not None:
            return speculative_step(self, texts)
        kept, run = self.keep()
        self.drop_unheard(texts, run)
        found = self._next_tokens(texts, kept, run)
        self.tell_router(torch.tensor(found.tokens), range(len(texts)), run, found.own)
        return self.take(texts, kept, found)

    def keep(self) -> tuple[Weights, Weights]:
        """For each running text the experts kept for the mixture, and those that are run: the same, or all that have weight."""
        log_w = self.router.weights(self._state)
        kept = self.router.keep(log_w, self.top_m)
        return kept, self.router.keep(log_w, None) if self.router.reads_all else kept

    def tell_router(self, tokens: Tensor, texts: Sequence[int], run: Weights, own: Tensor) -> None:
        """Move the router on by `tokens`, one a running text or `NO_TOKEN`; `run` and `own` are those of the texts number `texts`."""
        if not self.router.needs_expert_logprobs:
            self.router.update(self._state, tokens, None)
            return
        given = torch.full((len(tokens), len(self.ensemble.experts)), -torch.inf, dtype=torch.float64)
        heard = torch.where(run.log_w > -torch.inf, own.double().cpu(), -torch.inf)
        given[list(texts)] = given[list(texts)].scatter(1, run.experts, heard)
        self.router.update(self._state, tokens, given)

    def take(self, texts: Sequence[RunningText], kept: Weights, found: NextTokens) -> list[TokenEvent]:
        """Put a token behind each of some texts."""
        weights = kept.dense(len(self.ensemble.experts)).exp().tolist()
        events = []
        for text, token, logprob, row, top in zip(texts, found.tokens, found.logprobs, weights, found.top, strict=True):
            shown, reason = text.take(token, self.ensemble.tokenizer.eos_id)
            events.append(TokenEvent(text.request_id, token, shown, logprob, row, top, reason, text.detected))
        return events

    def _next_tokens(self, texts: Sequence[RunningText], kept: Weights, run: Weights) -> NextTokens:
        pieces, names = self.pieces(texts, run)
        turns = self.stack.batches([piece.expert for piece in pieces])
        if len(turns) == 1 and run is kept and self.shards is None and not any(text.sampling.logprobs for text in texts):
            if self._graphs is not None and self._graphs.fits(pieces):
                return _as_tokens(self._graphs.run(pieces, names, kept, sampling_of(texts, self.stack.device)))
            read = self.stack.read(pieces, self.cache)
            rows = _row_table(kept, names, read)
            found = fused(self.stack, read, rows, kept.log_w, sampling_of(texts, self.stack.device), self.settings)
            return _as_tokens(found)
        logits = LogitRows(self.stack, self.settings, self.shards)
        for turn in turns:
            part = [index for index, piece in enumerate(pieces) if piece.expert in turn]
            read = self.stack.read([pieces[index] for index in part], self.cache)
            places = zip(part, read.first_row, strict=True)
            logits.add(read, [((names[index][0], 0, int(run.experts[names[index]])), row) for index, row in places])
        return logits.next_tokens(range(len(texts)), 0, kept, run, texts)

    def pieces(
        self, texts: Sequence[RunningText], run: Weights, drafts: Sequence[Sequence[int]] | None = None
    ) -> tuple[list[Piece], list[tuple[int, int]]]:
        """What the experts that are run have to read, the draft of each text behind it, and (text, slot of its weights) of each."""
        log_w, experts = run.log_w.tolist(), run.experts.tolist()
        here = [
            (index, slot, expert, local)
            for index in range(len(texts))
            for slot, expert in enumerate(experts[index])
            if log_w[index][slot] > -torch.inf and (local := self._local(expert)) is not None
        ]
        missing = [(index, expert) for index, _, expert, _ in here if expert not in texts[index].rows]
        self._make_room(texts, {(index, expert) for index, _, expert, _ in here}, missing)
        for index, expert in missing:
            texts[index].rows[expert] = self.cache.new_row(texts[index].bound)
        pieces = [
            Piece(local, texts[index].rows[expert], [*texts[index].unread(expert), *(drafts[index] if drafts else ())])
            for index, _, expert, local in here
        ]
        return pieces, [(index, slot) for index, slot, _, _ in here]

    def _make_room(self, texts: Sequence[RunningText], in_use: set[tuple[int, int]], missing: Sequence[tuple[int, int]]) -> None:
        """Where the cache is full, experts that pause lose what they keep of a text: they read it again when they are wanted."""
        limit = self.cache.max_tokens
        needed = sum(self.cache.capacity(texts[index].bound) for index, _ in missing)
        if limit is None or self.cache.num_tokens + needed <= limit:
            return
        for index, text in enumerate(texts):
            for expert in [number for number in text.rows if (index, number) not in in_use]:
                self.cache.free(text.rows.pop(expert))

    def drop_unheard(self, texts: Sequence[RunningText], run: Weights) -> None:
        """An expert that misses a token cannot be believed again by a router that learns from it: what it keeps is of no more use."""
        if not self.router.needs_expert_logprobs:
            return
        for index, text in enumerate(texts):
            heard = set(run.experts[index, run.log_w[index] > -torch.inf].tolist())
            for expert in [number for number in text.rows if number not in heard]:
                self.cache.free(text.rows.pop(expert))

    def _read_prompts(self, texts: Sequence[RunningText], state: Any) -> None:
        """Every expert reads every prompt but its last token; the router is told how well each predicted it."""
        experts = len(self.ensemble.experts)
        longest = max(len(text.history) for text in texts) - 1
        scores = torch.full((len(texts), longest, experts), -torch.inf, dtype=torch.float64)
        jobs = []
        for index, text in enumerate(texts):
            for expert in range(experts):
                local = self._local(expert)
                if local is not None and len(text.history) > 1:
                    text.rows[expert] = self.cache.new_row(text.bound)
                    jobs.append((index, expert, Piece(local, text.rows[expert], text.history[:-1])))
        for turn in self.stack.batches([piece.expert for _, _, piece in jobs]):
            part = [job for job in jobs if job[2].expert in turn]
            read = self.stack.read([piece for _, _, piece in part], self.cache, all_positions=True)
            for (index, expert, piece), row in zip(part, read.first_row, strict=True):
                hidden = read.hidden[row : row + len(piece.tokens)]
                labels = torch.tensor(texts[index].history[1:], device=self.stack.device)
                head = self.stack.heads[self.stack.slot(piece.expert)]
                found = target_logprobs(hidden, head, labels, vocab_size=self.stack.config.vocab_size, kernels=self.stack.kernels)
                scores[index, : len(piece.tokens), expert] = found.double().cpu()
        if self.shards is not None:
            scores = self.shards.maximum(scores)
        for position in range(longest):
            tokens = [text.history[position + 1] if position + 1 < len(text.history) else -1 for text in texts]
            self.router.update(state, torch.tensor(tokens), scores[:, position])

    def _local(self, expert: int) -> int | None:
        """Number of an expert in the stack; None where another rank has it."""
        return self._experts.index(expert) if expert in self._experts else None


def _candidates(router: Router) -> list[int]:
    if isinstance(router, FixedRouter):
        return (router.log_w > -torch.inf).nonzero().flatten().tolist()
    return list(range(router.num_experts))


def _draft(ensemble: Ensemble, draft: str, draft_tokens: int, shards: Shards | None) -> int:
    if draft not in ensemble.experts:
        raise RoutingError(f"draft = {draft!r}: this ensemble has {', '.join(ensemble.experts)}")
    if draft_tokens < 1:
        raise RoutingError(f"draft_tokens = {draft_tokens}: choose at least 1")
    if shards is not None:
        raise RoutingError(f"draft = {draft!r}: not together with experts spread over devices; leave one out")
    return ensemble.experts.index(draft)


def _as_tokens(found: MixtureToken) -> NextTokens:
    tokens = found.token.tolist()
    return NextTokens(tokens, found.logprob.tolist(), found.expert_logprob, [[] for _ in tokens])


def _row_table(kept: Weights, names: Sequence[tuple[int, int]], read: Read) -> Tensor:
    """Row of `read.hidden` of each kept expert [texts, m]; 0 where an expert has no weight."""
    rows = [[0] * kept.experts.shape[1] for _ in range(kept.experts.shape[0])]
    for (text, slot), row in zip(names, read.first_row, strict=True):
        rows[text][slot] = row
    return torch.tensor(rows, device=read.hidden.device)
