"""Temperature, filters and noise: against a plain implementation in fp64, and the warpers of transformers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mixtures import chi_square
from torch import Tensor

from megaxelm_kernels import token_choice
from megaxelm_kernels.gumbel import gumbel_noise
from megaxelm_kernels.token_choice import Sampling, allowed_tokens, choose_tokens


def sampling(batch: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0) -> Sampling:
    def fill(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((batch,), value, dtype=dtype)

    return Sampling(
        fill(temperature, torch.float32), fill(top_k, torch.int64), fill(top_p, torch.float32), fill(min_p, torch.float32),
        torch.arange(batch) + 1000 * seed, fill(3, torch.int64), temperature == 0, bool(top_k or top_p < 1 or min_p),
    )  # fmt: skip


def logprobs(batch: int, vocab: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return (torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * spread).log_softmax(-1)


def plain(scores: Tensor, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that one sequence may draw, one after the other."""
    p = scores.double().softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda token: (-float(scores[token]), token))
    left = [token for token in order if p[token] >= min_p * p[order[0]]]
    if top_k:
        left = left[:top_k]
    whole, mass, kept = sum(p[token] for token in left), 0.0, []
    for token in left:
        if kept and top_p < 1 and mass >= top_p * whole:
            break
        kept.append(token)
        mass += p[token]
    return set(kept)


FILTERS = [
    (0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (5000, 1.0, 0.0), (0, 0.3, 0.0), (0, 0.9, 0.0), (0, 1e-6, 0.0), (0, 1.0, 0.1),
    (0, 1.0, 1e-4), (40, 0.8, 0.02), (3, 0.999, 0.0), (0, 0.5, 0.05), (30, 1.0, 0.2), (1500, 0.95, 0.0), (0, 0.98, 1e-3),
]  # fmt: skip


@pytest.mark.parametrize("vocab", [1, 63, 3001])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_filters_against_a_plain_implementation(vocab: int, spread: float) -> None:
    """All kinds side by side in one batch, so that one sequence's filter cannot be another's."""
    scores = logprobs(len(FILTERS), vocab, spread=spread)
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*FILTERS, strict=True))
    found = allowed_tokens(scores, top_k, top_p, min_p)
    for row, (k, p, least) in enumerate(FILTERS):
        assert set(found[row].nonzero().flatten().tolist()) == plain(scores[row], k, p, least), (k, p, least)


@pytest.mark.parametrize("vocab", [100, 3001])
def test_equal_tokens_are_kept_by_their_id(vocab: int) -> None:
    scores = torch.full((4, vocab), -5.0)
    scores[:, [90, 50, 70]] = -1.0
    top_k, top_p = torch.tensor([2, 5, 0, 0]), torch.tensor([1.0, 1.0, 0.01, 0.999])
    found = allowed_tokens(scores, top_k, top_p, torch.zeros(4))
    assert found[0].nonzero().flatten().tolist() == [50, 70]
    assert found[1].nonzero().flatten().tolist() == [0, 1, 50, 70, 90]
    for row, kept in ((2, {50}), (3, plain(scores[3], 0, 0.999, 0.0))):
        assert set(found[row].nonzero().flatten().tolist()) == kept


def test_sorting_some_candidates_first_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.round(logprobs(len(FILTERS), 3001) * 4) / 4  # many equal values
    options = [torch.tensor(column) for column in zip(*FILTERS, strict=True)]
    some = allowed_tokens(scores, *options)
    monkeypatch.setattr(token_choice, "_CANDIDATES", 4000)
    assert torch.equal(allowed_tokens(scores, *options), some)


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS[1:])
def test_filters_are_those_of_transformers_in_this_order(top_k: int, top_p: float, min_p: float) -> None:
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = logprobs(3, 3001, seed=1)
    expected = MinPLogitsWarper(min_p)(None, scores.double())
    if top_k:
        expected = TopKLogitsWarper(min(top_k, 3001))(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = allowed_tokens(scores, torch.full((3,), top_k), torch.full((3,), top_p), torch.full((3,), min_p))
    assert torch.equal(found, expected > -torch.inf)


def test_a_token_is_the_arg_max_of_tempered_scores_and_noise_over_what_is_left() -> None:
    given = sampling(40, 0.7, 50, 0.9)
    found = choose_tokens(logp := logprobs(40, 3001), given)
    noise = gumbel_noise(given.key, given.position, torch.arange(3001)).double()
    for row in range(40):
        kept = sorted(plain(logp[row] / 0.7, 50, 0.9, 0.0))
        assert int(found[row]) == kept[int((logp[row, kept].double() / 0.7 + noise[row, kept]).argmax())]


def test_a_batch_mixes_greedy_drawn_and_filtered_sequences() -> None:
    logp = logprobs(4, 500, spread=0.3)
    alone = [sampling(4, 0.0), sampling(4), sampling(4, 1.3, 20), sampling(4, 0.5, 0, 0.6, 0.01)]
    names = ("temperature", "top_k", "top_p", "min_p")
    mixed = {name: torch.stack([getattr(one, name)[row] for row, one in enumerate(alone)]) for name in names}
    found = choose_tokens(logp, replace(alone[3], **mixed, greedy=False, filtered=True))
    assert found.tolist() == [int(choose_tokens(logp, one)[row]) for row, one in enumerate(alone)]
    assert int(found[0]) == int(logp[0].argmax())


def test_greedy_takes_the_lower_id_of_equals_and_the_inputs_stay() -> None:
    logp = torch.full((2, 700), -9.0)
    logp[:, [300, 20, 600]] = -1.0
    before = logp.clone()
    assert choose_tokens(logp, sampling(2, 0.0)).tolist() == [20, 20]
    choose_tokens(logp, sampling(2, 0.8, 5, 0.9, 0.1))
    assert torch.equal(logp, before)


def test_a_sample_does_not_depend_on_the_batch_and_does_on_key_and_position() -> None:
    logp, given = logprobs(1, 2000).expand(30, -1).contiguous(), sampling(30)
    together = choose_tokens(logp, given)
    names = ("temperature", "top_k", "top_p", "min_p", "key", "position")
    for row in (0, 13, 29):
        one = Sampling(**{name: getattr(given, name)[row : row + 1] for name in names}, greedy=False, filtered=False)
        assert choose_tokens(logp[row : row + 1], one).tolist() == [int(together[row])]
    assert together.unique().numel() > 15
    assert not torch.equal(choose_tokens(logp, replace(given, position=given.position + 1)), together)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.5, 12, 1.0), (1.0, 0, 0.7)])
def test_samples_have_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    logp = logprobs(1, 65, spread=1.0)
    drawn = choose_tokens(logp.expand(20000, -1), sampling(20000, temperature, top_k, top_p, seed=7))
    counts = drawn.bincount(minlength=65)
    kept = sorted(plain(logp[0] / temperature, top_k, top_p, 0.0))
    exact = torch.zeros(65, dtype=torch.float64)
    exact[kept] = (logp[0, kept].double() / temperature).softmax(-1)
    assert counts[exact == 0].sum() == 0
    assert chi_square(counts, exact) > 1e-4
    # The same test sees tokens of even ids drawn an eighth too often.
    biased = exact * torch.where(torch.arange(65) % 2 == 0, 1.25, 1.0)
    assert chi_square(counts, biased / biased.sum()) < 1e-4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"temperature": torch.ones(2)}, r"sampling.temperature torch.float32 \(2,\).*expected torch.float32 \[3\]"),
        ({"top_k": torch.ones(3)}, "sampling.top_k torch.float32"),
        ({"key": torch.ones(3, dtype=torch.int32)}, "sampling.key torch.int32"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        choose_tokens(logprobs(3, 10), replace(sampling(3), **change))
    with pytest.raises(ValueError, match=r"logprobs torch.float32 \(10,\)"):
        choose_tokens(logprobs(3, 10)[0], sampling(3))


def test_very_hot_and_very_cold() -> None:
    logp = logprobs(50, 300)
    assert torch.equal(choose_tokens(logp, sampling(50, 1e-4)), logp.argmax(-1))
    hot = choose_tokens(logp, sampling(50, 1e4))
    assert hot.unique().numel() > 40 and math.isfinite(float(logp.gather(1, hot[:, None]).sum()))
