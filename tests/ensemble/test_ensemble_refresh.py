"""How often weights are made anew: by token, by chunk after the prompt, or until the text has r tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from megaxelm.ensemble.folder import Ensemble
from megaxelm.ensemble.routers import NO_TOKEN, BaseRouter, PosteriorRouter, RefreshRouter, Request, Router
from megaxelm.errors import RoutingError


class Lengths(BaseRouter):
    """Weights that tell how many tokens the router knows of: expert 0 has the log weight -tokens. `asked` counts."""

    name, num_experts, asked = "lengths", 2, 0

    def __init__(self, learns: bool = False) -> None:
        self.needs_expert_logprobs = learns

    def start(self, batch: Sequence[Request]) -> torch.Tensor:
        return torch.tensor([0.0 if self.needs_expert_logprobs else len(request.prompt_ids) for request in batch], dtype=torch.float64)

    def weights(self, state: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        return torch.stack([-state, (-torch.expm1(-state.clamp_min(1e-9))).log()], -1)

    def update(self, state: torch.Tensor, tokens: torch.Tensor, expert_logprobs: torch.Tensor | None = None) -> None:
        state += tokens != NO_TOKEN


def lengths_seen(router: Router, prompts: Sequence[int], steps: int, told_of_prompt: bool = False) -> list[list[int]]:
    """For each text, the length that the weights of each new token were made of."""
    state = router.start([Request([7] * length) for length in prompts])
    if told_of_prompt:
        for position in range(max(prompts)):
            router.update(state, torch.tensor([5 if position < length else NO_TOKEN for length in prompts]), torch.zeros(len(prompts), 2))
    seen: list[list[int]] = []
    for _ in range(steps):
        seen.append([round(-float(value)) for value in router.weights(state)[:, 0]])
        router.update(state, torch.full((len(prompts),), 5), torch.zeros(len(prompts), 2))
    return [list(row) for row in zip(*seen, strict=True)]


@pytest.mark.parametrize("learns", [False, True])
def test_a_chunk_begins_behind_the_prompt_and_keeps_the_weights_of_its_beginning(learns: bool) -> None:
    router = RefreshRouter(Lengths(learns), "chunk", 3)
    assert lengths_seen(router, [0, 4], 8, learns) == [[0, 0, 0, 3, 3, 3, 6, 6], [4, 4, 4, 7, 7, 7, 10, 10]]


@pytest.mark.parametrize("learns", [False, True])
def test_frozen_weights_are_those_of_the_first_tokens_prompt_counted(learns: bool) -> None:
    router = RefreshRouter(Lengths(learns), "frozen", 3)
    assert lengths_seen(router, [0, 2, 5], 5, learns) == [[0, 1, 2, 3, 3], [2, 3, 3, 3, 3], [3, 3, 3, 3, 3]]


def test_the_router_within_is_asked_once_a_chunk_and_not_told_when_frozen() -> None:
    inner = Lengths()
    lengths_seen(RefreshRouter(inner, "chunk", 5), [0], 20)
    assert inner.asked == 4
    frozen = RefreshRouter(Lengths(), "frozen", 2)
    state = frozen.start([Request([1])])
    told = []
    for _ in range(5):
        told.append(int(state.inner[0]))
        frozen.update(state, torch.tensor([5]))
    assert told == [1, 2, 2, 2, 2]


def test_constant_from_and_settled_tell_when_the_weights_stay() -> None:
    frozen = RefreshRouter(Lengths(), "frozen", 3)
    assert frozen.constant_from == 3 and RefreshRouter(Lengths(), "chunk", 3).constant_from is None
    state = frozen.start([Request([1] * 2), Request([1] * 9)])
    assert frozen.settled(state).tolist() == [False, True]
    frozen.update(state, torch.tensor([4, 4]))
    assert frozen.settled(state).tolist() == [True, True]
    chunk = RefreshRouter(Lengths(), "chunk", 1)
    assert chunk.settled(chunk.start([Request()])).tolist() == [False]


@pytest.mark.parametrize("refresh", ["chunk", "frozen"])
@pytest.mark.parametrize("tokens", [1, 3, 100])
@pytest.mark.parametrize("name", ["tfidf", "posterior"])
def test_along_equals_stepping(name: str, tokens: int, refresh: str, make_ensemble: Callable[..., Ensemble], decoders: list) -> None:
    router = make_ensemble(decoders).router(name, refresh=refresh, refresh_tokens=tokens)
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(4, 260, (14,), generator=generator).tolist()
    stream = -5 * torch.rand(4, len(text), generator=generator) if router.needs_expert_logprobs else None
    for prompt in ([], [10, 20], [9] * 7):
        request = Request(prompt)
        state, stepped = router.start([request]), []
        for position, token in enumerate(text):
            if position % 4 != 1:  # weights that nobody asks for at the beginning of a chunk are made all the same
                stepped.append((position, router.weights(state)[0]))
            router.update(state, torch.tensor([token]), None if stream is None else stream[:, position].unsqueeze(0))
        along = router.along(request, text, stream)
        assert along.shape == (14, 4)
        for position, weights in stepped:
            assert torch.allclose(along[position], weights, atol=1e-9), (prompt, position)


def test_rows_that_skip_or_are_frozen_do_not_move_the_others() -> None:
    router = RefreshRouter(Lengths(), "chunk", 2)
    state = router.start([Request(), Request()])
    for tokens in ([1, NO_TOKEN], [1, 1], [1, NO_TOKEN]):
        router.update(state, torch.tensor(tokens))
    assert [round(-float(value)) for value in router.weights(state)[:, 0]] == [2, 0]


def test_a_frozen_posterior_needs_no_more_of_the_experts() -> None:
    router = RefreshRouter(PosteriorRouter(2), "frozen", 1)
    state = router.start([Request()])
    router.update(state, torch.tensor([3]), torch.tensor([[-1.0, -3.0]]))
    weights = router.weights(state)
    router.update(state, torch.tensor([3]), torch.tensor([[-9.0, -math.inf]]))
    router.update(state, torch.tensor([3]))
    assert torch.equal(router.weights(state), weights)
    assert torch.allclose(weights, torch.tensor([[-1.0, -3.0]], dtype=torch.float64).log_softmax(-1))


def test_constant_routers_are_left_as_they_are(make_ensemble: Callable[..., Ensemble], decoders: list) -> None:
    assert make_ensemble(decoders).router("uniform", refresh="chunk").constant_from == 0


@pytest.mark.parametrize(
    ("changes", "text"), [({"refresh": "often"}, "token, chunk, frozen"), ({"refresh": "chunk", "refresh_tokens": 0}, "refresh_tokens = 0")]
)
def test_bad_values_name_the_field(changes: dict, text: str, make_ensemble: Callable[..., Ensemble], decoders: list) -> None:
    with pytest.raises(RoutingError, match=text):
        make_ensemble(decoders).router("tfidf", **changes)
