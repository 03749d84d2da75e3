"""Writing on from prompts with the mixture of experts.

Each token: the router weighs the text so far, the m heaviest experts are kept, only these run (each with a KV cache of its own), their
next-token distributions are mixed, and one token is chosen. An expert that is chosen for the first time, or again after a pause, reads
what it has missed. A router that learns from the experts (`posterior`) has all of them read the prompt; those chosen at its end go on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.mixture import COMBINE, combine_logits, expert_logprobs
from megaxelm.ensemble.reading import ExpertReader
from megaxelm.ensemble.routers import NO_TOKEN, FixedRouter, Request, Router
from megaxelm.ensemble.streaming import TextStream
from megaxelm.ensemble.weights import Weights
from megaxelm.errors import RoutingError

OnToken = Callable[[int, int, str], None]
"""Called with (row, token id, new text) after every token; the text may be empty while a character is unfinished."""


@dataclass
class GenerationResult:
    """What was written after one prompt. `token_ids` ends with EOS where the text ended by itself; `text` does not show it."""

    experts: list[str]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)  # of each token under the mixture (nats), before temperature and top_p
    weights: list[list[float]] = field(default_factory=list)  # [steps][experts], sums to 1; 0 where the expert did not speak
    detected_language: str | None = None  # what the language router read off a prompt that came without

    def mean_weights(self) -> dict[str, float]:
        """Weight of each expert by name, averaged over the tokens; empty when nothing was written."""
        if not self.weights:
            return {}
        return dict(zip(self.experts, np.mean(self.weights, axis=0).tolist(), strict=True))


def generate(
    ensemble: Ensemble,
    prompts: Sequence[str],
    languages: Sequence[str | None] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    top_m: int | None = None,
    router: Router | str | None = None,
    expert: str | None = None,
    combine: str | None = None,
    stop_at_eos: bool = True,
    on_token: OnToken | None = None,
) -> list[GenerationResult]:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Args:
        temperature: 0 is greedy; else the mixture's log-probabilities are divided by it.
        top_p: draw from the smallest set of tokens that holds this probability.
        seed: the draws of a text follow from the seed and its prompt, not from its neighbours; a prompt given twice is drawn twice.
        top_m, router, combine: None takes the ensemble's own. expert: this one alone, instead of a router.

    Raises:
        RoutingError: a value out of range, an unknown expert, router or language, or a text longer than the experts' positions.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise RoutingError(
            f"max_new_tokens = {max_new_tokens}, temperature = {temperature}, top_p = {top_p}: choose at least 1, at least 0, and above 0 "
            "up to 1"
        )
    if languages is not None and len(languages) != len(prompts):
        raise RoutingError(f"{len(languages)} languages for {len(prompts)} prompts: give one a prompt, None where it is not known")
    combine = combine or ensemble.settings.combine
    if combine not in COMBINE:
        raise RoutingError(f"combine = {combine!r}: choose one of {', '.join(COMBINE)}")
    router, top_m = _router(ensemble, router, top_m, expert)
    if not prompts:
        return []
    prompt_ids = ensemble.tokenizer.encode(list(prompts))
    requests = [Request(ids, None if languages is None else languages[row]) for row, ids in enumerate(prompt_ids)]
    with torch.inference_mode():
        # A temperature of the experts is part of what they say; the mixture of it is drawn from as it is.
        of_experts = temperature if ensemble.settings.temperature_on == "experts" and temperature > 0 else None
        session = _Session(ensemble, router, requests, top_m, combine, max_new_tokens, of_experts)
        draws = [_draws(seed, ids, prompt_ids[:row].count(ids)) for row, ids in enumerate(prompt_ids)]
        return _write(session, ensemble, requests, draws, max_new_tokens, 1.0 if of_experts else temperature, top_p, stop_at_eos, on_token)


def _router(ensemble: Ensemble, router: Router | str | None, top_m: int | None, expert: str | None) -> tuple[Router, int]:
    num_experts = len(ensemble.trained)
    if expert is not None:
        if router is not None:
            raise RoutingError(f"expert = {expert!r} and a router were both given: leave one out")
        if expert not in ensemble.experts:
            raise RoutingError(f"expert = {expert!r}: this ensemble has {', '.join(ensemble.experts)}")
        return FixedRouter(ensemble.experts, {expert: 1.0}), 1
    if router is None or isinstance(router, str):
        router = ensemble.router(router)
    top_m = top_m if top_m is not None else ensemble.settings.top_m if ensemble.settings.top_m is not None else num_experts
    if not 1 <= top_m <= num_experts:
        raise RoutingError(f"ensemble.top_m = {top_m}: choose 1 to {num_experts}, the number of experts in this ensemble")
    return router, top_m


class _Session:
    """The texts of one batch, the router's state, and the experts' caches."""

    def __init__(
        self,
        ensemble: Ensemble,
        router: Router,
        requests: Sequence[Request],
        top_m: int,
        combine: str,
        max_new_tokens: int,
        temperature: float | None,
    ) -> None:
        self.ensemble, self.router, self.top_m, self.combine, self.temperature = ensemble, router, top_m, combine, temperature
        self.history = [[ensemble.tokenizer.start_id, *request.prompt_ids] for request in requests]
        self.max_length = max(map(len, self.history)) + max_new_tokens - 1
        self.readers: dict[int, ExpertReader] = {}
        self.state = router.start(requests)
        if router.needs_expert_logprobs:
            self._read_prompts()

    def _reader(self, expert: int) -> ExpertReader:
        if expert not in self.readers:
            self.readers[expert] = ExpertReader(self.ensemble.decoder(expert), self.ensemble.experts[expert], self.max_length)
        return self.readers[expert]

    def _read_prompts(self) -> None:
        """Every expert reads every prompt; the router is told how well each predicted it."""
        rows, longest = len(self.history), max(map(len, self.history)) - 1
        scores = torch.full((rows, longest, len(self.ensemble.experts)), -torch.inf, dtype=torch.float64)
        for expert in range(len(self.ensemble.experts)):
            for row, logprobs in self._reader(expert).read_scored(dict(enumerate(self.history))).items():
                scores[row, : len(logprobs), expert] = logprobs.to(scores)
        for position in range(longest):
            tokens = [ids[position + 1] if position + 1 < len(ids) else NO_TOKEN for ids in self.history]
            self.router.update(self.state, torch.tensor(tokens), scores[:, position])

    def next_logprobs(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Weights, Tensor]:
        """For the texts `rows`: mixture [rows, vocab], what is drawn from [rows, vocab], each expert's own [rows, m, vocab], the weights
        [rows, m], and which of the experts have run [rows, m] bool."""
        log_w = self.router.weights(self.state)[list(rows)]
        kept = self.router.keep(log_w, self.top_m)
        heard = kept.log_w > -torch.inf
        if self.router.reads_all:
            num_experts = self.router.num_experts
            kept, heard = Weights(kept.dense(num_experts), torch.arange(num_experts).expand(len(rows), -1)), log_w > -torch.inf
        elif self.router.needs_expert_logprobs:
            # An expert that misses a token cannot be believed again, so what it keeps of the text is of no more use.
            for expert, reader in self.readers.items():
                for row in (row for index, row in enumerate(rows) if expert not in kept.experts[index, heard[index]].tolist()):
                    reader.forget(row)
        stacked: Tensor | None = None
        for expert in kept.experts[heard].unique().tolist():
            where, slot = ((kept.experts == expert) & heard).nonzero(as_tuple=True)
            logits = self._reader(expert).read({rows[index]: self.history[rows[index]] for index in where.tolist()}).float().cpu()
            if stacked is None:
                stacked = logits.new_zeros(len(rows), kept.experts.shape[1], logits.shape[-1])
            stacked[where, slot] = logits
        assert stacked is not None  # top_m gives every row an expert
        mixed = combine_logits(stacked, kept.log_w, self.combine)
        drawn = mixed if self.temperature is None else combine_logits(stacked / self.temperature, kept.log_w, self.combine)
        return mixed, drawn, expert_logprobs(stacked), kept, heard

    def append(self, rows: Sequence[int], tokens: Sequence[int], own: Tensor, kept: Weights, heard: Tensor) -> None:
        """Put one token behind each text of `rows` and tell the router."""
        update = torch.full((len(self.history),), NO_TOKEN)
        given = torch.full((len(self.history), len(self.ensemble.experts)), -torch.inf, dtype=torch.float64)
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            self.history[row].append(token)
            update[row] = token
            given[row, kept.experts[index, heard[index]]] = own[index, heard[index], token].to(given)
        self.router.update(self.state, update, given if self.router.needs_expert_logprobs else None)

    def forget(self, row: int) -> None:
        """Free what the experts keep of a finished text."""
        for reader in self.readers.values():
            reader.forget(row)


def _write(
    session: _Session,
    ensemble: Ensemble,
    requests: Sequence[Request],
    draws: Sequence[Iterator[float]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_at_eos: bool,
    on_token: OnToken | None,
) -> list[GenerationResult]:
    languages = session.router.detected(session.state)
    results = [GenerationResult(list(ensemble.experts), detected_language=language) for language in languages]
    streams = [TextStream(ensemble.tokenizer.decode, request.prompt_ids) for request in requests]
    rows = list(range(len(requests)))
    for step in range(max_new_tokens):
        mixed, drawn, own, kept, heard = session.next_logprobs(rows)
        tokens = [_choose(drawn[index], temperature, top_p, draws[row]) for index, row in enumerate(rows)]
        session.append(rows, tokens, own, kept, heard)
        weights = kept.dense(len(ensemble.experts)).exp()
        going_on = []
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            result = results[row]
            result.token_ids.append(token)
            result.logprobs.append(float(mixed[index, token]))
            result.weights.append(weights[index].tolist())
            ended = stop_at_eos and token == ensemble.tokenizer.eos_id
            text = "" if ended else streams[row].push([token])
            if ended or step == max_new_tokens - 1:
                text += streams[row].flush()
                session.forget(row)
            else:
                going_on.append(row)
            result.text += text
            if on_token:
                on_token(row, token, text)
        rows = going_on
        if not rows:
            break
    return results


def _draws(seed: int, prompt_ids: Sequence[int], occurrence: int) -> Iterator[float]:
    """Uniform numbers in [0, 1) that depend on the seed, the prompt, and how often the prompt occurred before in the batch."""
    text = f"{seed}|{occurrence}|{','.join(map(str, prompt_ids))}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    while True:
        yield float(generator.random())


def _choose(logprobs: Tensor, temperature: float, top_p: float, draws: Iterator[float]) -> int:
    """One token id from log-probabilities [vocab]: the best at temperature 0, else drawn by inverting the cumulative distribution."""
    if temperature == 0:
        return int(logprobs.argmax())
    ordered, ids = (logprobs.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    cumulative = ordered.cumsum(-1)
    if top_p < 1:
        # The token that crosses top_p belongs to the set: those are kept before which less than top_p had been gathered.
        size = int((cumulative - ordered < top_p).sum())
        cumulative = cumulative[:size]
    position = int(torch.searchsorted(cumulative, next(draws) * cumulative[-1], right=True))
    return int(ids[min(position, len(cumulative) - 1)])
