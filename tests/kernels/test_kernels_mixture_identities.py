"""Identities of a mixture: one expert alone, equal experts, any order, any batch, parts elsewhere; and draws of an expert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mixtures import DEVICE, NONE, WAYS, chi_square, poison_memory, problem, sampling, usual

from megaxelm_kernels import mixture
from megaxelm_kernels.gumbel import expert_noise, vocabulary_noise
from megaxelm_kernels.mixture import Sampling, draw_expert_then_token, mixture_logprobs, mixture_next_token, partial_mixture
from megaxelm_kernels.row_groups import RowGroups

pytest.importorskip("triton", reason="triton is not installed")
from megaxelm_kernels import mixture_triton  # noqa: E402

BOTH = pytest.mark.parametrize("kernels", ["torch", "triton"])
COMBINE = pytest.mark.parametrize("combine", mixture.COMBINE)
# The interpreter's numpy tells of the rows of NaN, which are meant, and of the logarithm of what lies beyond the vocabulary.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


@BOTH
@COMBINE
def test_one_expert_alone_to_the_bit(kernels: str, combine: str) -> None:
    """All weight on one of three, the others run or dropped: the same as that one alone."""
    given = usual()
    for slot, way in ((0, "greedy"), (2, "cool"))[: 2 if kernels == "torch" else 1]:
        drawn = sampling(5, **WAYS[way])
        options = {"vocab_size": given.vocab, "combine": combine, "kernels": kernels}
        one_hot = torch.full_like(given.log_w, NONE)
        one_hot[:, slot] = 0.0
        among = mixture_next_token(given.hidden, given.heads, given.groups, given.rows, one_hot, drawn, **options)
        alone = mixture_next_token(given.hidden, given.heads, given.groups, given.rows[:, [slot]], one_hot[:, [slot]], drawn, **options)
        assert torch.equal(among.token, alone.token) and torch.equal(among.logprob, alone.logprob)
        assert torch.equal(among.expert_logprob[:, slot], alone.expert_logprob[:, 0])
        logprobs = [
            mixture_logprobs(given.hidden, given.heads, given.groups, rows, w, **options)[0]
            for rows, w in ((given.rows, one_hot), (given.rows[:, [slot]], one_hot[:, [slot]]))
        ]
        assert torch.equal(*logprobs)


@BOTH
def test_identical_experts_are_one_expert_whatever_the_weights(kernels: str) -> None:
    given = usual()
    given.hidden[:] = given.hidden[:1]
    given.heads[:] = given.heads[:1]
    found, _ = mixture_logprobs(*given, vocab_size=given.vocab, kernels=kernels)
    one = (given.heads[0, : given.vocab].double() @ given.hidden[0].double()).log_softmax(-1)
    torch.testing.assert_close(found.double(), one.expand(5, -1), rtol=1e-5, atol=1e-5)


@BOTH
def test_the_order_of_the_experts_changes_nothing(kernels: str) -> None:
    given, drawn = usual(), sampling(5, 0.9)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    first = mixture_next_token(*given, drawn, vocab_size=given.vocab, kernels=kernels)
    # The slots of a sequence, and then the experts themselves with their rows.
    given.rows, given.log_w = given.rows[:, order], given.log_w[:, order]
    experts, moved = [3, 2, 0, 1], []
    for expert in experts:
        moved += list(range(*given.groups.offsets[expert : expert + 2]))
    given.hidden, given.heads = given.hidden[moved], given.heads[experts]
    given.groups = RowGroups.from_counts([given.groups.counts[expert] for expert in experts], DEVICE)
    given.rows = torch.tensor(moved, device=DEVICE).argsort()[given.rows]
    second = mixture_next_token(*given, drawn, vocab_size=given.vocab, kernels=kernels)
    assert torch.equal(first.token, second.token)
    torch.testing.assert_close(first.logprob, second.logprob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first.expert_logprob[:, order], second.expert_logprob, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kernels", "way"),
    [(kernels, way) for kernels in ("torch", "triton") for way in ("greedy", "drawn")]
    + [("torch", "hot and filtered"), pytest.param("triton", "hot and filtered", marks=pytest.mark.slow)],
)
def test_a_sequence_alone_and_in_the_batch(way: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, drawn = usual(600), sampling(5, **WAYS[way])
    together = mixture_next_token(*given, drawn, vocab_size=given.vocab, kernels=kernels)
    monkeypatch.setattr(mixture_triton, "MIX_TILES", 2)
    monkeypatch.setattr(mixture_triton, "SCAN", 2)
    monkeypatch.setattr(mixture, "_BLOCK", 1)
    for sequence in (1, 4) if kernels == "torch" else (4,):
        names = ("temperature", "top_k", "top_p", "min_p", "key", "position")
        one = Sampling(*(getattr(drawn, name)[[sequence]] for name in names), drawn.greedy, drawn.filtered)
        at = given.rows[sequence].clone()
        at[given.log_w[sequence] == NONE] = at[0]
        states, place = at.unique(return_inverse=True)
        counts = given.groups.group_of_row[states].bincount(minlength=4).tolist()
        alone = mixture_next_token(
            given.hidden[states], given.heads, RowGroups.from_counts(counts, DEVICE), place[None], given.log_w[[sequence]], one,
            vocab_size=given.vocab, kernels=kernels,
        )  # fmt: skip
        assert alone.token.tolist() == [int(together.token[sequence])]
        torch.testing.assert_close(alone.logprob, together.logprob[[sequence]], rtol=1e-6, atol=2e-6)


@BOTH
@COMBINE
def test_parts_of_experts_that_are_elsewhere(kernels: str, combine: str) -> None:
    given = usual()
    options = {"vocab_size": given.vocab, "combine": combine, "kernels": kernels}
    parts = []
    for slots in ([0], [1, 2]):
        parts.append(partial_mixture(*[*given][:3], given.rows[:, slots], given.log_w[:, slots], **options))
    none = partial_mixture(*[*given][:3], given.rows, torch.full_like(given.log_w, NONE), **options)
    nothing_here = partial_mixture(*[*given][:3], given.rows[:, [1]], given.log_w[:, [1]], **options)
    if combine == "mixture":
        whole = torch.stack(parts).logsumexp(0)
        assert none.eq(NONE).all() and nothing_here[2].eq(NONE).all() and nothing_here[0].isfinite().all()
    else:
        whole = sum(parts).log_softmax(-1)  # type: ignore[union-attr]
        assert none.eq(0).all() and nothing_here[2].eq(0).all()
    torch.testing.assert_close(whole.double(), given.logprobs(combine), rtol=1e-5, atol=1e-5)


@BOTH
def test_one_head_for_all_experts(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, drawn = usual(), sampling(5, 0.8)
    shared = given.heads[:1].expand(4, -1, -1)
    products: list[int] = []
    product = mixture._product
    monkeypatch.setattr(mixture, "_product", lambda h, *rest: (products.append(len(h)), product(h, *rest)))
    options: dict[str, Any] = {"vocab_size": given.vocab, "kernels": kernels}
    given.heads = shared
    found = mixture_next_token(*given, drawn, **options)
    assert products == ([14] if kernels == "torch" else [])
    given.heads = shared.contiguous()
    copied = mixture_next_token(*given, drawn, **options)
    assert torch.equal(found.token, copied.token)
    torch.testing.assert_close(found.logprob, copied.logprob, rtol=1e-6, atol=1e-6)
    given.heads = shared
    torch.testing.assert_close(mixture_logprobs(*given, **options)[0].double(), given.logprobs(), rtol=1e-5, atol=1e-5)


@BOTH
@pytest.mark.parametrize("shared", [False, True])
def test_an_expert_and_then_a_token_from_it(kernels: str, shared: bool) -> None:
    given, drawn = usual(300), sampling(5, seed=4)
    if shared:
        given.heads = given.heads[:1].expand(4, -1, -1)
    keys = torch.tensor([[11, 22, 33], [11, 22, 44], [33, 22, 11], [5, 6, 7], [5, 6, 7]], device=DEVICE)
    out = draw_expert_then_token(*given, keys, drawn, vocab_size=300, kernels=kernels)
    slot = (given.log_w + expert_noise(drawn.key, drawn.position, keys)).argmax(-1)
    assert torch.equal(out.slot, slot) and slot.unique().numel() > 1
    logits = given.logits()[given.rows.gather(1, slot[:, None])[:, 0]]
    scores = logits + vocabulary_noise(drawn.key, drawn.position, 300)
    assert torch.equal(out.token, scores.argmax(-1))
    torch.testing.assert_close(
        out.expert_logprob.double(), logits.log_softmax(-1).gather(1, out.token[:, None])[:, 0], rtol=1e-5, atol=1e-5
    )
    order = torch.tensor([1, 2, 0], device=DEVICE)
    given.rows, given.log_w = given.rows[:, order], given.log_w[:, order]
    turned = draw_expert_then_token(*given, keys[:, order], drawn, vocab_size=300, kernels=kernels)
    assert torch.equal(turned.token, out.token) and torch.equal(order[turned.slot], slot)


@pytest.mark.parametrize("how", ["mixture", "expert, then token"])
def test_samples_have_the_distribution_of_the_mixture(how: str) -> None:
    """20,000 sequences that share the rows of three experts."""
    given = problem([1, 1, 1], [[0, 1, 2]], 40, hidden=4)
    exact, many = given.logprobs()[0].exp(), 20000
    given.rows, given.log_w = given.rows.expand(many, -1), given.log_w.expand(many, -1).contiguous()
    drawn = sampling(many, seed=9)
    if how == "mixture":
        token = mixture_next_token(*given, drawn, vocab_size=40).token
    else:
        keys = torch.tensor([7, 8, 9], device=DEVICE).expand(many, -1)
        out = draw_expert_then_token(*given, keys, drawn, vocab_size=40)
        token = out.token
        assert chi_square(out.slot.bincount(minlength=3).cpu(), given.log_w[0].exp().cpu()) > 1e-4
    counts = token.bincount(minlength=40).cpu()
    assert chi_square(counts, exact.cpu()) > 1e-4
    # What a wrong mixture would give: the weights moved by a tenth, or the experts' logits averaged.
    moved = replace(given, log_w=(given.log_w[:1] + torch.tensor([0.3, 0.0, 0.0], device=DEVICE)).log_softmax(-1), rows=given.rows[:1])
    assert chi_square(counts, moved.logprobs()[0].exp().cpu()) < 1e-4
    assert chi_square(counts, moved.logprobs("logit_mean")[0].exp().cpu()) < 1e-4


def test_draws_from_one_expert_refuse_filters() -> None:
    given = usual()
    for drawn in (sampling(5, 0.0), sampling(5, top_k=3)):
        with pytest.raises(ValueError, match="draws at temperature 1 from all tokens"):
            draw_expert_then_token(*given, given.rows, drawn, vocab_size=250)
    with pytest.raises(ValueError, match="expert_keys torch.float32"):
        draw_expert_then_token(*given, given.log_w, sampling(5), vocab_size=250)
