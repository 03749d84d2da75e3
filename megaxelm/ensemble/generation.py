"""Writing on from a list of prompts with the mixture of experts: `generate`, over `engine`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megaxelm.ensemble.engine import Engine
from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.routers import Router
from megaxelm.ensemble.sampling import GenerationRequest, SamplingParams, TokenEvent
from megaxelm.errors import RoutingError

OnToken = Callable[[int, int, str], None]
"""Called with (row, token id, new text) after every token; the text may be empty while a character is unfinished."""


@dataclass
class GenerationResult:
    """What was written after one prompt. `token_ids` ends with EOS where the text ended by itself; `text` does not show it."""

    experts: list[str]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)  # of each token under the mixture (nats), before temperature and filters
    weights: list[list[float]] = field(default_factory=list)  # [steps][experts], sums to 1; 0 where the expert did not speak
    finish_reason: str | None = None  # `stop` or `length`
    detected_language: str | None = None  # what the language router read off a prompt that came without

    def take(self, event: TokenEvent) -> None:
        """Put the next token behind the text."""
        self.token_ids.append(event.token_id)
        self.logprobs.append(event.logprob)
        self.weights.append(event.weights)
        self.text += event.text
        self.finish_reason, self.detected_language = event.finish_reason, event.detected_language

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
    *,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    max_batch: int = 32,
    draft: str | None = None,
    draft_tokens: int = 4,
) -> list[GenerationResult]:
    """Continue each prompt by up to `max_new_tokens` tokens.

    Args:
        temperature: 0 is greedy; else the mixture's log-probabilities are divided by it.
        top_p, top_k, min_p: which tokens are drawn from (`SamplingParams`). stop: strings before which a text ends.
        seed: the draws of a text follow from the seed and its prompt, not from its neighbours; a prompt given twice is drawn twice.
        top_m, router, combine: None takes the ensemble's own. expert: this one alone, instead of a router.
        draft: an expert that proposes `draft_tokens` tokens at a time, which the mixture verifies; the texts are the same.

    Raises:
        RoutingError: a value out of range, an unknown expert, router or language, or a text longer than the experts' positions.
    """
    sampling = SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p, seed, tuple(stop), stop_at_eos)
    if languages is not None and len(languages) != len(prompts):
        raise RoutingError(f"{len(languages)} languages for {len(prompts)} prompts: give one a prompt, None where it is not known")
    engine = Engine(
        ensemble, router=router, top_m=top_m, combine=combine, expert=expert, max_batch=max_batch, draft=draft, draft_tokens=draft_tokens
    )
    results = [GenerationResult(list(ensemble.experts)) for _ in prompts]
    number_of = {}
    for number, prompt in enumerate(prompts):
        language = None if languages is None else languages[number]
        occurrence = list(prompts[:number]).count(prompt)
        number_of[engine.add(GenerationRequest(prompt, language, sampling, occurrence))] = number
    while engine.has_work:
        for event in engine.step():
            number = number_of[event.request_id]
            results[number].take(event)
            if on_token:
                on_token(number, event.token_id, event.text)
    return results
