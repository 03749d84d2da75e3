"""The next token of a mixture, by torch and by Triton (its interpreter without a GPU): against fp64, identities, what must not matter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megaxelm_kernels import mixture
from megaxelm_kernels.gumbel import expert_noise, gumbel_noise, stream_keys, vocabulary_noise
from megaxelm_kernels.mixture import (
    Sampling,
    choose_tokens,
    draw_expert_then_token,
    mixture_logprobs,
    mixture_next_token,
    partial_mixture,
)
from megaxelm_kernels.row_groups import RowGroups

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from megaxelm_kernels import mixture_triton  # noqa: E402
from megaxelm_kernels.mixture_head_triton import stream_key, token_noise  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("kernels", ["torch", "triton"])
COMBINE = pytest.mark.parametrize("combine", mixture.COMBINE)
NONE = -torch.inf
# The interpreter cuts fp32 off to bf16 where a GPU rounds; logits stay in fp32, so bf16 is then closer than torch.
FACTOR = 3.0


@dataclass
class Problem:
    hidden: Tensor
    heads: Tensor
    groups: RowGroups
    rows: Tensor
    log_w: Tensor
    vocab: int

    def __iter__(self) -> Any:
        return iter((self.hidden, self.heads, self.groups, self.rows, self.log_w))

    def logits(self) -> Tensor:
        """Of all rows in fp64."""
        heads = self.heads[self.groups.group_of_row, : self.vocab].double()
        return (heads @ self.hidden.double()[..., None])[..., 0]

    def logprobs(self, combine: str = "mixture", temperature: float = 1.0) -> Tensor:
        """The formula in fp64, a sequence after the other; logits divided by `temperature` first."""
        logits, mixed = self.logits() / temperature, []
        for row, log_w in zip(self.rows.tolist(), self.log_w.double(), strict=True):
            there = [slot for slot, weight in enumerate(log_w.tolist()) if weight > NONE]
            z, w = logits[[row[slot] for slot in there]], log_w[there, None]
            mixed.append((w + z.log_softmax(-1)).logsumexp(0) if combine == "mixture" else (w.exp() * z).sum(0).log_softmax(-1))
        return torch.stack(mixed)


def problem(counts: list[int], rows: list[list[int]], vocab: int, hidden: int = 24, seed: int = 0, padding: int = 5) -> Problem:
    """Random heads a group, padded; weights of each sequence normalised, those of a row below 0 dropped (row -1 - r, full of NaN)."""
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(sum(counts), hidden, generator=g)
    heads = torch.randn(len(counts), vocab + padding, hidden, generator=g) * 0.6
    at = torch.tensor(rows)
    log_w = torch.randn(at.shape, generator=g).masked_fill(at < 0, NONE).log_softmax(-1)
    at = torch.where(at < 0, -1 - at, at)
    unused = sorted(set(range(sum(counts))) - set(at[log_w > NONE].tolist()))
    states[unused] = torch.nan
    return Problem(states.to(DEVICE), heads.to(DEVICE), RowGroups.from_counts(counts, DEVICE), at.to(DEVICE), log_w.to(DEVICE), vocab)


def usual(vocab: int = 250, **options: Any) -> Problem:
    """5 sequences of 3 experts out of 4: uneven groups, one empty; 2 dropped, of which one points at another sequence's row."""
    rows = [[0, 5, 9], [1, 6, 10], [2, -8, 11], [3, 8, 12], [4, -1, 13]]
    return problem([5, 0, 4, 5], rows, vocab, **options)


def sampling(batch: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0) -> Sampling:
    def fill(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((batch,), value, dtype=dtype, device=DEVICE)

    return Sampling(
        fill(temperature), fill(top_k, torch.int64), fill(top_p), fill(min_p), torch.arange(batch, device=DEVICE) + 1000 * seed,
        fill(5, torch.int64), temperature == 0, bool(top_k or top_p < 1 or min_p),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not written is NaN, or a token that is none."""

    def poison(original: Any) -> Any:
        def poisoned(*given: Any, **options: Any) -> Tensor:
            out = original(*given, **options)
            return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(1 << 29)

        return poisoned

    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def as_torch_does(given: Problem, dtype: torch.dtype, combine: str) -> Tensor:
    """Plain operations of torch in the type of the model, mixed in fp32."""
    heads = given.heads[given.groups.group_of_row, : given.vocab].to(dtype)
    logits = (heads @ given.hidden.to(dtype)[..., None])[..., 0].float()
    parts, weights = logits[given.rows], given.log_w[..., None]
    parts = parts.masked_fill(weights == NONE, 0.0)
    return (parts.log_softmax(-1) + weights).logsumexp(1) if combine == "mixture" else (parts * weights.exp()).sum(1).log_softmax(-1)


@BOTH
@COMBINE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 63, 127, 1100])
def test_log_probabilities_against_fp64(vocab: int, dtype: torch.dtype, combine: str, kernels: str) -> None:
    given = usual(vocab)
    given.hidden, given.heads = given.hidden.to(dtype), given.heads.to(dtype)
    found, lse = mixture_logprobs(*given, vocab_size=vocab, combine=combine, kernels=kernels)
    exact, theirs = given.logprobs(combine), as_torch_does(given, dtype, combine)
    assert found.shape == (5, vocab) and found.dtype == lse.dtype == torch.float32
    assert (found - exact).norm() <= FACTOR * (theirs - exact).norm() + 1e-6 * exact.norm() + 1e-7
    rows = ~given.hidden.isnan().any(-1)
    torch.testing.assert_close(
        lse[rows].double(), given.logits()[rows].logsumexp(-1), rtol=2e-6 if dtype == torch.float32 else 2e-2, atol=1e-5
    )


@BOTH
def test_the_whole_vocabulary_of_xglm(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(mixture_triton, "BLOCK_V", 32768)  # the interpreter takes a millisecond a program
    given = problem([2, 1], [[0, 2], [1, -3]], 256008, hidden=8, padding=120)
    given.heads[0, 256007] = given.hidden[1] * 4  # the last token is the likeliest of the second sequence
    found, _ = mixture_logprobs(*given, vocab_size=256008, kernels=kernels)
    torch.testing.assert_close(found.double(), exact := given.logprobs(), rtol=2e-6, atol=2e-6)
    out = mixture_next_token(*given, sampling(2, 0.0), vocab_size=256008, kernels=kernels)
    assert out.token.tolist() == exact.argmax(-1).tolist() and int(out.token[1]) == 256007


@pytest.mark.parametrize("rows", [1, 2, 12, 13, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_head_by_torch_whatever_the_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    given = problem([rows, 0, 3], [[0, rows]], 50, padding=3)
    given.hidden = torch.randn_like(given.hidden).to(dtype)
    given.heads = given.heads.to(dtype)
    found = mixture.head_logits(given.hidden, given.heads, given.groups, 50)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(found.double(), given.logits(), rtol=tolerance, atol=10 * tolerance)


def test_groups_of_several_tiles_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem([37, 3], [[row, 37 + row % 3] for row in range(37)], 140, hidden=70)
    monkeypatch.setattr(mixture_triton, "head_launch", lambda *_: mixture_triton.HeadLaunch(16, 32, 4, 2))
    found, _ = mixture_logprobs(*given, vocab_size=140, kernels="triton")
    torch.testing.assert_close(found.double(), given.logprobs(), rtol=1e-5, atol=1e-5)


WAYS = {
    "greedy": {"temperature": 0.0},
    "drawn": {},
    "cool": {"temperature": 0.6},
    "hot and filtered": {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
}


@BOTH
@pytest.mark.parametrize(
    ("way", "temperature_on", "combine"),
    [(way, "mixture", combine) for way in WAYS for combine in mixture.COMBINE]
    + [("greedy", "experts", "mixture"), ("cool", "experts", "mixture"), ("hot and filtered", "experts", "mixture")]
    + [("cool", "experts", "logit_mean")],
)
def test_the_token_and_its_log_probabilities(way: str, temperature_on: str, combine: str, kernels: str) -> None:
    """The token is the arg max of the formula in fp64; a difference is a draw between two within 1e-4."""
    given, drawn = usual(seed=3), sampling(5, **WAYS[way], seed=11)
    options = {"vocab_size": given.vocab, "combine": combine, "kernels": kernels}
    out = mixture_next_token(*given, drawn, temperature_on=temperature_on, **options)
    exact = given.logprobs(combine)
    if way == "greedy":
        scores = exact
    else:
        warm = float(drawn.temperature[0])
        on_experts = temperature_on == "experts" and combine == "mixture"
        scores = given.logprobs(combine, warm) if on_experts else exact / warm
        if drawn.filtered:
            scores = scores.masked_fill(~mixture_allowed(scores, drawn), NONE)
        scores = scores + gumbel_noise(drawn.key, drawn.position, torch.arange(given.vocab, device=DEVICE)).double()
    best = scores.max(-1).values
    assert (scores.gather(1, out.token[:, None])[:, 0] >= best - 1e-4).all() and out.token.dtype == torch.int64
    torch.testing.assert_close(out.logprob.double(), exact.gather(1, out.token[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    alone = given.logits().log_softmax(-1)[given.rows, out.token[:, None]].masked_fill(given.log_w == NONE, NONE)
    torch.testing.assert_close(out.expert_logprob.double(), alone, rtol=1e-5, atol=1e-5)
    assert out.logprob.dtype == out.expert_logprob.dtype == torch.float32
    if temperature_on == "mixture":
        logprobs, _ = mixture_logprobs(*given, **options)
        assert torch.equal(choose_tokens(logprobs, drawn), out.token)


def mixture_allowed(scores: Tensor, drawn: Sampling) -> Tensor:
    from megaxelm_kernels.token_choice import allowed_tokens

    return allowed_tokens(scores, drawn.top_k, drawn.top_p.double(), drawn.min_p.double())


@BOTH
def test_tokens_that_are_too_rare_for_a_probability_in_fp32(kernels: str) -> None:
    given = usual()
    given.heads *= 40
    exact = given.logprobs()
    assert exact.min() < -300
    found, _ = mixture_logprobs(*given, vocab_size=given.vocab, kernels=kernels)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    hot = mixture_next_token(*given, sampling(5, 100.0), vocab_size=given.vocab, kernels=kernels)
    assert hot.logprob.isfinite().all() and hot.logprob.min() < -100


@BOTH
@COMBINE
def test_one_expert_alone_to_the_bit(kernels: str, combine: str) -> None:
    """All weight on one of three, the others run or dropped: the same as that one alone."""
    given = usual()
    for slot, way in ((0, "greedy"), (2, "cool")):
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


@BOTH
@pytest.mark.parametrize("way", ["greedy", "drawn", "hot and filtered"])
def test_a_sequence_alone_and_in_the_batch(way: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, drawn = usual(1100), sampling(5, **WAYS[way])
    together = mixture_next_token(*given, drawn, vocab_size=given.vocab, kernels=kernels)
    monkeypatch.setattr(mixture_triton, "MIX_TILES", 2)
    monkeypatch.setattr(mixture_triton, "SCAN", 2)
    monkeypatch.setattr(mixture, "_BLOCK", 1)
    for sequence in (1, 4):
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
@pytest.mark.parametrize("way", ["greedy", "drawn"])
def test_equal_tokens_greedy_takes_the_lower_id_and_noise_tells_them_apart(way: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_triton, "MIX_TILES", 2)
    given = usual(700)
    given.heads *= 0.1
    given.heads[:, [650, 130, 131, 300]] = 3 * given.hidden[[0, 0, 5, 9], None]
    given.hidden[:] = given.hidden[:1].nan_to_num()
    drawn = sampling(5, **WAYS[way])
    out = mixture_next_token(*given, drawn, vocab_size=700, kernels=kernels)
    if way == "greedy":
        assert out.token.tolist() == [130] * 5
    else:
        assert set(out.token.tolist()) > {130} or 130 not in out.token.tolist()


def test_greedy_leaves_out_tiles_and_only_those_that_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one tile an expert has its likeliest token; in another two of them agree on one that is likelier in all: it must be looked at."""
    monkeypatch.setattr(mixture_triton, "MIX_TILES", 1)
    vocab, hidden = 640, 8
    given = problem([1, 1], [[0, 1]], vocab, hidden=hidden, padding=0)
    given.hidden[:] = torch.eye(2, hidden, device=DEVICE)
    given.log_w[:] = torch.tensor([0.5, 0.5]).log()
    given.heads[:] = 0.0
    given.heads[0, 10, 0] = given.heads[1, 300, 1] = 8.0
    given.heads[0, 550, 0] = given.heads[1, 550, 1] = 7.8
    assert int(given.logprobs().argmax()) == 550
    seen: list[Tensor] = []
    finish = mixture_triton.finish

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            return lambda best, *rest, **options: (seen.append(best.clone()), finish[grid](best, *rest, **options))

    monkeypatch.setattr(mixture_triton, "finish", Spy())
    out = mixture_next_token(*given, sampling(1, 0.0), vocab_size=vocab, kernels="triton")
    assert out.token.tolist() == [550]
    assert (seen[0][0] == NONE).tolist() == [False, True, False, True, False]


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
def test_views_and_an_empty_batch(kernels: str) -> None:
    given, drawn = usual(), sampling(5)
    options: dict[str, Any] = {"vocab_size": given.vocab, "kernels": kernels}
    plain = mixture_next_token(*given, drawn, **options)
    given.hidden = given.hidden.T.contiguous().T
    given.rows, given.log_w = given.rows.T.contiguous().T, given.log_w.T.contiguous().T
    given.heads = torch.cat([given.heads, given.heads], -1)[..., :24]
    strided = mixture_next_token(*given, drawn, **options)
    assert torch.equal(plain.token, strided.token)
    torch.testing.assert_close(plain.logprob, strided.logprob, rtol=1e-6, atol=1e-6)
    nobody = problem([0, 0], [[0, 0]], 10)
    nobody.rows, nobody.log_w = nobody.rows[:0], nobody.log_w[:0]
    out = mixture_next_token(*nobody, sampling(0), vocab_size=10, kernels=kernels)
    assert out.token.shape == (0,) and out.expert_logprob.shape == (0, 2)


def test_a_broken_row_harms_its_own_sequence_alone() -> None:
    given = usual()
    clean, _ = mixture_logprobs(*given, vocab_size=given.vocab)
    given.hidden[0] = torch.inf
    broken, _ = mixture_logprobs(*given, vocab_size=given.vocab)
    assert torch.equal(clean[1:], broken[1:]) and broken[0].isnan().any()


def test_no_tensor_of_batch_experts_and_vocabulary_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), options: Any = None) -> Any:
            out = function(*given, **(options or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    memory = tensor.untyped_storage()
                    if tensor.shape == (12, 1000):
                        known.add(memory.data_ptr())  # the logits
                    self.most = max(self.most, 0 if memory.data_ptr() in known else memory.nbytes() // 4)
            return out

    monkeypatch.setattr(mixture, "_BLOCK", 3000)
    given = problem([5, 3, 4], [[s, 4 + s, 8 + s] for s in range(4)], 1000, hidden=4)
    known = {given.heads.untyped_storage().data_ptr()}
    for drawn in (sampling(4, 0.0), sampling(4), sampling(4, 0.7, 5)):
        for combine in mixture.COMBINE:
            with Largest() as seen:
                mixture_next_token(*given, drawn, vocab_size=1000, combine=combine)
            # int64 of the noise: twice [B, vocab] of half the numbers.
            assert seen.most <= 2 * 4 * 1000, (combine, drawn.greedy)


# Draw an expert, then a token


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


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """p value of counts under probabilities; what is expected fewer than 5 times is taken together."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    wanted = torch.cat([expected[~rare], expected[rare].sum().clamp_min(1e-9)[None]])
    seen = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64), statistic / 2))


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


@triton.jit
def _noise_kernel(keys, positions, streams, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row, token = tl.program_id(0), tl.arange(0, BLOCK).to(tl.int64)
    stream = stream_key(tl.load(keys + row), tl.load(positions + row))
    tl.store(streams + row, stream)
    tl.store(out + row * count + token, token_noise(stream, token), mask=token < count)


def test_triton_and_torch_have_the_same_noise() -> None:
    keys = torch.tensor([3, -9, 1 << 62, -(1 << 63)], device=DEVICE)
    positions = torch.tensor([0, 5, 70000, 1 << 40], device=DEVICE)
    streams, out = torch.zeros_like(keys), torch.zeros(4, 5001, device=DEVICE)
    _noise_kernel[(4,)](keys, positions, streams, out, 5001, BLOCK=8192)
    assert torch.equal(streams, stream_keys(keys, positions))
    torch.testing.assert_close(out, vocabulary_noise(keys, positions, 5001), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        ({"hidden": torch.ones(14, 23)}, {}, r"hidden \(14, 23\) and heads"),
        ({"hidden": torch.ones(14, 24).half()}, {}, "hidden is torch.float16"),
        ({"groups": RowGroups.from_counts([14])}, {}, "groups: 1 of 14 rows; expected 4"),
        ({"groups": RowGroups.from_counts([5, 0, 4, 4])}, {}, "of 14 rows"),
        ({"rows": torch.zeros(5, 3)}, {}, "rows torch.float32"),
        ({"log_w": torch.zeros(5, 2)}, {}, r"log_w torch.float32 \(5, 2\)"),
        ({}, {"vocab_size": 400}, "vocab_size = 400: choose 1 to 255"),
        ({}, {"combine": "mean"}, "combine = 'mean': choose mixture or logit_mean"),
        ({}, {"temperature_on": "logits"}, "temperature_on = 'logits': choose mixture or experts"),
        ({}, {"kernels": "cuda"}, "kernels = 'cuda': choose torch or triton"),
        ({"hidden": torch.ones(14, 24).double(), "heads": torch.ones(4, 255, 24).double()}, {"kernels": "triton"}, "choose torch"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], options: dict[str, Any], text: str) -> None:
    given = replace(usual(), **{key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in change.items()})
    with pytest.raises(ValueError, match=text):
        mixture_next_token(*given, sampling(5), **({"vocab_size": 250} | options))


def test_draws_from_one_expert_refuse_filters() -> None:
    given = usual()
    for drawn in (sampling(5, 0.0), sampling(5, top_k=3)):
        with pytest.raises(ValueError, match="draws at temperature 1 from all tokens"):
            draw_expert_then_token(*given, given.rows, drawn, vocab_size=250)
    with pytest.raises(ValueError, match="expert_keys torch.float32"):
        draw_expert_then_token(*given, given.log_w, sampling(5), vocab_size=250)
