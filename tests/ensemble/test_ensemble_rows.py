"""Texts that join and leave a batch: a row goes on as it would alone, whatever becomes of its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from megaxelm.cluster.space import TfidfSpace
from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.routers import NO_TOKEN, Request, Router, RouterData, make_router
from megaxelm.ensemble.streaming import TextStream
from megaxelm.recipe import TfidfConfig

TEXTS = ["the cat sat on the mat", "кот сидел на ковре", "猫が敷物に座った。", "देवनागरी में लिखा"]
ROUTERS: dict[str, dict[str, Any]] = {
    "language": {},
    "uniform": {},
    "fixed": {},
    "tfidf": {},
    "posterior": {},
    "posterior one-step": {"posterior_decay": 0.0},
    "tfidf chunk": {"refresh": "chunk", "refresh_tokens": 3},
    "posterior chunk": {"refresh": "chunk", "refresh_tokens": 3},
    "posterior frozen": {"refresh": "frozen", "refresh_tokens": 6},
}


class Bytes:
    """Token ids are bytes, so that most characters are spelt by several tokens."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


def made(name: str, make_ensemble: Callable[..., Ensemble], decoders: list) -> Router:
    return make_ensemble(decoders).router(name.split()[0], **ROUTERS[name])


def text_router() -> Router:
    """A tfidf router that reads text, over bytes: its rows hold back unfinished characters."""
    space = TfidfSpace.fit(TEXTS, TfidfConfig(analyzer="char", dimensions=3), 0)
    data = RouterData(["a", "b"], space=space, centres=torch.from_numpy(space.transform(TEXTS[:2])), decode=Bytes().decode)
    return make_router("tfidf", data)


class Texts:
    """Texts of one router that are stepped alone, as what rows of a batch must agree with."""

    def __init__(self, router: Router) -> None:
        self.router, self.states = router, []  # type: ignore[var-annotated]

    def add(self, request: Request) -> int:
        self.states.append(self.router.start([request]))
        return len(self.states) - 1

    def step(self, state: Any, rows: list[int], tokens: list[int], generator: torch.Generator) -> None:
        logprobs = -4 * torch.rand(len(rows), self.router.num_experts, generator=generator, dtype=torch.float64)
        given = logprobs if self.router.needs_expert_logprobs else None
        self.router.update(state, torch.tensor(tokens), given)
        for index, row in enumerate(rows):
            if tokens[index] != NO_TOKEN:
                self.router.update(
                    self.states[row], torch.tensor(tokens[index : index + 1]), None if given is None else given[index : index + 1]
                )

    def check(self, state: Any, rows: list[int]) -> None:
        assert len(state) == len(rows)
        weights, settled = self.router.weights(state), self.router.settled(state)
        for index, row in enumerate(rows):
            assert torch.equal(weights[index], self.router.weights(self.states[row])[0])
            assert bool(settled[index]) == bool(self.router.settled(self.states[row])[0])


@pytest.mark.parametrize("name", [*ROUTERS, "tfidf text"])
def test_rows_join_and_leave(name: str, make_ensemble: Callable[..., Ensemble], decoders: list) -> None:
    router = text_router() if name == "tfidf text" else made(name, make_ensemble, decoders)
    generator, texts = torch.Generator().manual_seed(1), Texts(router)
    requests = [Request([72, 208, 186][: number % 4], f"l{number % 4}") for number in range(6)]
    rows: list[int] = []
    state: Any = router.start([])
    texts.check(state, rows)
    for round_ in range(6):
        request = requests[round_]
        state = router.join(state, router.start([request]))
        rows.append(texts.add(request))
        texts.check(state, rows)
        for step in range(3):
            tokens = torch.randint(4, 250, (len(rows),), generator=generator).tolist()
            tokens[(step + round_) % len(rows)] = NO_TOKEN
            texts.step(state, rows, tokens, generator)
            texts.check(state, rows)
        if round_ in (2, 4):
            keep = [2, 0] if round_ == 2 else [1]
            state, rows = router.select(state, keep), [rows[index] for index in keep]
            texts.check(state, rows)
    state = router.join(router.start([requests[0]]), state)
    texts.check(state, [texts.add(requests[0]), *rows])


@pytest.mark.parametrize("name", [*ROUTERS, "tfidf text"])
def test_states_that_were_joined_selected_or_copied_go_on_apart(name: str, make_ensemble: Callable[..., Ensemble], decoders: list) -> None:
    """A proposal that is thrown away leaves nothing behind, and a row that is named twice becomes two."""
    router = text_router() if name == "tfidf text" else made(name, make_ensemble, decoders)
    state = router.start([Request([72, 105], "l0"), Request([208], "l1")])
    router.update(state, torch.tensor([99, 186]), torch.full((2, router.num_experts), -1.0) if router.needs_expert_logprobs else None)
    before = router.weights(state).clone()
    for made_of in (router.copy(state), router.select(state, [0, 1]), router.join(state, router.start([Request([72], "l1")]))):
        for token in (120, 121, 122, 123):
            # Experts disagree, so that weights would move.
            logprobs = torch.arange(len(made_of) * router.num_experts).view(len(made_of), -1).double()
            router.update(made_of, torch.full((len(made_of),), token), -logprobs if router.needs_expert_logprobs else None)
            router.weights(made_of)
        assert torch.equal(router.weights(state), before)
    twice = router.select(state, [1, 1])
    given = torch.tensor([[-1.0] * router.num_experts, [-float(index) for index in range(router.num_experts)]])
    router.update(twice, torch.tensor([NO_TOKEN, 187]), given if router.needs_expert_logprobs else None)
    assert torch.equal(router.weights(twice)[0], before[1])


def test_a_copied_text_stream_goes_on_by_itself() -> None:
    stream = TextStream(Bytes().decode, list("кот ".encode()))
    first, last = "ж".encode()
    assert stream.push([first]) == ""
    other = stream.copy()
    assert other.push([last]) == "ж" and stream.flush() == "\ufffd"
    assert other.push(list(b" x")) == " x"


def test_weights_of_no_text_are_no_rows() -> None:
    router = text_router()
    assert router.weights(router.start([])).shape == (0, 2)
    assert np.array_equal(router.settled(router.start([])).numpy(), np.zeros(0, dtype=bool))
