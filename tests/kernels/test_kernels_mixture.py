"""The next token of a mixture, by torch and by Triton (its interpreter without a GPU): against fp64, and what must not matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from mixtures import DEVICE, NONE, WAYS, Problem, poison_memory, problem, sampling, usual
from torch import Tensor

from megaxelm_kernels import mixture
from megaxelm_kernels.gumbel import gumbel_noise, stream_keys, vocabulary_noise
from megaxelm_kernels.mixture import Sampling, choose_tokens, mixture_logprobs, mixture_next_token
from megaxelm_kernels.row_groups import RowGroups
from megaxelm_kernels.token_choice import allowed_tokens

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from megaxelm_kernels import mixture_triton  # noqa: E402
from megaxelm_kernels.mixture_head_triton import stream_key, token_noise  # noqa: E402

BOTH = pytest.mark.parametrize("kernels", ["torch", "triton"])
COMBINE = pytest.mark.parametrize("combine", mixture.COMBINE)
# The interpreter's numpy tells of the rows of NaN, which are meant, and of the logarithm of what lies beyond the vocabulary.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
# The interpreter cuts fp32 off to bf16 where a GPU rounds; logits stay in fp32, so bf16 is then closer than torch.
FACTOR = 3.0


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_memory(monkeypatch)


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
@pytest.mark.parametrize("vocab", [1, 63, 127, pytest.param(2049, marks=pytest.mark.slow)])
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


@pytest.mark.parametrize("kernels", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
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


ASKED = [(way, "mixture", combine) for way in WAYS for combine in mixture.COMBINE] + [
    ("greedy", "experts", "mixture"),
    ("cool", "experts", "mixture"),
    ("cool", "experts", "logit_mean"),
    ("hot and filtered", "experts", "mixture"),
]


def cases() -> list[Any]:
    """Each way by torch and Triton; filters take the interpreter seconds."""
    slow = {(way, *rest) for way, *rest in ASKED if way == "hot and filtered"} - {("hot and filtered", "mixture", "mixture")}
    found = [pytest.param(*asked, "torch") for asked in ASKED]
    return found + [pytest.param(*asked, "triton", marks=[pytest.mark.slow] if asked in slow else []) for asked in ASKED]


@pytest.mark.parametrize(("way", "temperature_on", "combine", "kernels"), cases())
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


@pytest.mark.parametrize(
    ("kernels", "filtered"), [("torch", False), ("torch", True), ("triton", False), pytest.param("triton", True, marks=pytest.mark.slow)]
)
def test_sequences_of_one_batch_are_chosen_each_in_its_own_way(filtered: bool, kernels: str) -> None:
    given, ways = usual(), [{"temperature": 0.0}, {}, {"temperature": 0.4}, {"temperature": 9.0}, {"temperature": 0.0}]
    if filtered:
        ways[3]["top_k"], ways[2]["top_p"] = 3, 0.5
    alone = [sampling(5, **way) for way in ways]  # type: ignore[arg-type]
    names = ("temperature", "top_k", "top_p", "min_p")
    mixed = {name: torch.stack([getattr(one, name)[row] for row, one in enumerate(alone)]) for name in names}
    out = mixture_next_token(*given, replace(sampling(5), **mixed, filtered=filtered), vocab_size=given.vocab, kernels=kernels)
    logprobs, _ = mixture_logprobs(*given, vocab_size=given.vocab)
    assert out.token.tolist() == [int(choose_tokens(logprobs, one)[row]) for row, one in enumerate(alone)]


def mixture_allowed(scores: Tensor, drawn: Sampling) -> Tensor:
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
@pytest.mark.parametrize("way", ["greedy", "drawn"])
def test_equal_tokens_greedy_takes_the_lower_id_and_noise_tells_them_apart(way: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture_triton, "MIX_TILES", 2)
    monkeypatch.setattr(mixture_triton, "SCAN", 2)
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
def test_views_and_an_empty_batch(kernels: str) -> None:
    given, drawn = usual(), sampling(5)
    options: dict[str, Any] = {"vocab_size": given.vocab, "kernels": kernels}
    plain = mixture_next_token(*given, drawn, **options)
    given.heads.requires_grad_()  # weights as they come from a model
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
