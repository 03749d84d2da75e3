"""The next token of a mixture at real sizes on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megaxelm_kernels.gumbel import gumbel_noise, vocabulary_noise
from megaxelm_kernels.mixture import (
    Sampling,
    choose_tokens,
    draw_expert_then_token,
    mixture_logprobs,
    mixture_next_token,
)
from megaxelm_kernels.row_groups import RowGroups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VOCAB, COLUMNS, HIDDEN, EXPERTS = 256008, 256128, 2048, 4
WAYS = ["greedy", "drawn", "filtered"]


def problem(batch: int, m: int = 4, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    """Sequences that keep `m` of 4 experts, with a dropped one each whose row is NaN."""
    g = torch.Generator(device="cuda").manual_seed(0)
    counts = [batch] * m + [0] * (EXPERTS - m)
    hidden = torch.randn(batch * m, HIDDEN, device="cuda", generator=g).to(dtype)
    heads = (torch.randn(EXPERTS, COLUMNS, HIDDEN, device="cuda", generator=g) * (3 * HIDDEN**-0.5)).to(dtype)
    rows = torch.arange(batch * m, device="cuda").view(m, batch).T.contiguous()
    log_w = torch.randn(batch, m, device="cuda", generator=g)
    if m > 1:
        log_w[::2, 1] = -torch.inf
        hidden[rows[::2, 1]] = torch.nan
    return hidden, heads, RowGroups.from_counts(counts, "cuda"), rows, log_w.log_softmax(-1)


def sampling(batch: int, way: str) -> Sampling:
    def fill(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((batch,), value, dtype=dtype, device="cuda")

    heat, on = (0.0 if way == "greedy" else 0.8), way == "filtered"
    return Sampling(
        fill(heat), fill(500 if on else 0, torch.int64), fill(0.9 if on else 1.0), fill(1e-4 if on else 0.0),
        torch.arange(batch, device="cuda"), fill(3, torch.int64), way == "greedy", on,
    )  # fmt: skip


def exact_logprobs(given: tuple[Any, ...], sequence: int) -> Tensor:
    hidden, heads, groups, rows, log_w = given
    parts = [
        log_w[sequence, slot].double() + (heads[groups.group_of_row[row], :VOCAB].double() @ hidden[row].double()).log_softmax(-1)
        for slot, row in enumerate(rows[sequence])
        if log_w[sequence, slot] > -torch.inf
    ]
    return torch.stack(parts).logsumexp(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_error_against_fp64(batch: int, dtype: torch.dtype) -> None:
    given = problem(batch, dtype=dtype)
    found, _ = mixture_logprobs(*given, vocab_size=VOCAB, kernels="triton")
    for sequence in {0, batch - 1}:
        exact = exact_logprobs(given, sequence)
        # Products of bf16 are added in fp32, so the weights' type does not show.
        torch.testing.assert_close(found[sequence].double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_token_is_that_of_the_log_probabilities(batch: int, way: str) -> None:
    given, drawn = problem(batch), sampling(batch, way)
    out = mixture_next_token(*given, drawn, vocab_size=VOCAB, kernels="triton")
    logprobs, _ = mixture_logprobs(*given, vocab_size=VOCAB, kernels="triton")
    assert torch.equal(out.token, choose_tokens(logprobs, drawn))
    torch.testing.assert_close(out.logprob, logprobs.gather(1, out.token[:, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_one_head_for_256_rows() -> None:
    given = list(problem(64))
    given[1] = given[1][:1].expand(EXPERTS, -1, -1)
    found, _ = mixture_logprobs(*given, vocab_size=VOCAB, kernels="triton")
    torch.testing.assert_close(found[63].double(), exact_logprobs(tuple(given), 63), rtol=2e-5, atol=2e-5)


def test_the_noise_is_that_of_the_cpu() -> None:
    key, position = torch.tensor([3, -9]), torch.tensor([0, 1 << 40])
    on_gpu = vocabulary_noise(key.cuda(), position.cuda(), VOCAB).cpu()
    torch.testing.assert_close(on_gpu, vocabulary_noise(key, position, VOCAB), rtol=1e-6, atol=1e-6)
    assert torch.equal(gumbel_noise(key.cuda(), position.cuda(), torch.arange(VOCAB, device="cuda")).cpu(), on_gpu)


def test_an_expert_and_then_a_token() -> None:
    given, drawn = problem(64), replace(sampling(64, "drawn"), temperature=torch.ones(64, device="cuda"))
    keys = torch.arange(4, device="cuda").expand(64, -1)
    ours = draw_expert_then_token(*given, keys, drawn, vocab_size=VOCAB, kernels="triton")
    alone = given[3].gather(1, ours.slot[:, None])
    one = mixture_next_token(*given[:3], alone, torch.zeros(64, 1, device="cuda"), drawn, vocab_size=VOCAB, kernels="triton")
    assert torch.equal(ours.token, one.token)
    torch.testing.assert_close(ours.expert_logprob, one.logprob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_two_runs_are_bit_equal_and_nothing_waits(way: str) -> None:
    given, drawn = problem(8), sampling(8, way)
    first = mixture_next_token(*given, drawn, vocab_size=VOCAB, kernels="triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = mixture_next_token(*given, drawn, vocab_size=VOCAB, kernels="triton")
        draw_expert_then_token(*given, given[3], replace(drawn, greedy=False, filtered=False), vocab_size=VOCAB, kernels="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("token", "logprob", "expert_logprob"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("way", WAYS)
def test_a_cuda_graph_replays_it_on_new_inputs(way: str) -> None:
    """New hidden states, weights, keys and positions, and other rows a group: `device_offsets` is read at each replay."""
    given, drawn = problem(8), sampling(8, way)
    hidden, _, groups, _, log_w = given
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mixture_next_token(*given, drawn, vocab_size=VOCAB, kernels="triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mixture_next_token(*given, drawn, vocab_size=VOCAB, kernels="triton")
    hidden.copy_(hidden.nan_to_num().roll(1, 0))
    log_w.copy_(log_w.roll(1, 0))
    drawn.key.add_(5)
    drawn.position.add_(1)
    other = RowGroups([0, 3, 20, 20, 32], "cuda")
    groups.device_offsets.copy_(other.device_offsets)
    graph.replay()
    fresh = mixture_next_token(hidden, given[1], other, given[3], log_w, drawn, vocab_size=VOCAB, kernels="triton")
    assert torch.equal(captured.token, fresh.token)
    torch.testing.assert_close(captured.logprob, fresh.logprob, rtol=1e-5, atol=1e-5)
