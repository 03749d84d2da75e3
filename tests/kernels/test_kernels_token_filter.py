"""Top-k, top-p and min-p by their kernels, without sorting: what is kept, and the token that is drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaxelm_kernels.token_choice import Sampling, allowed_tokens, choose_tokens

pytest.importorskip("triton", reason="triton is not installed")
from megaxelm_kernels import token_filter_triton as filters  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 512
FILTERS = [(0, 1.0, 0.0), (1, 1.0, 0.0), (9000, 1.0, 0.0), (0, 0.3, 0.0), (40, 0.8, 0.02), (0, 0.9, 0.0), (700, 0.999, 0.0)]
MORE = [(0, 1e-6, 0.0), (0, 1.0, 0.1), (3, 0.999, 0.0), (0, 0.5, 0.05), (30, 1.0, 0.2), (0, 0.999, 1e-3), (5, 0.9, 0.999)]


def draw(scores: Tensor, given: Sampling, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """The token that is drawn, and which tokens were allowed, from the cut and the number of its equals."""
    cuts: list[Tensor] = []
    last = filters.draw_pass

    class Spy:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *rest, **options: (cuts.extend(rest[2:4]), last[grid](*rest, **options))

    monkeypatch.setattr(filters, "draw_pass", Spy())
    monkeypatch.setattr(filters, "BLOCKS", 2)
    blocks = -(-scores.shape[1] // BLOCK)
    padded = torch.nn.functional.pad(scores, (0, blocks * BLOCK - scores.shape[1]), value=-torch.inf)
    tops = padded.view(len(scores), blocks, BLOCK).amax(-1)
    best, tokens = filters.draw_filtered(scores, tops, given, BLOCK)
    token = tokens.gather(1, best.argmax(-1)[:, None])[:, 0].long()
    bits = (scores + 0.0).view(torch.int32).long()
    place = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + (1 << 31)
    equal = place == cuts[0][:, None]
    return token, (place > cuts[0][:, None]) | (equal & (equal.cumsum(-1) <= cuts[1][:, None]))


def sampling(rows: list[tuple[int, float, float]], temperature: float = 1.0) -> Sampling:
    top_k, top_p, min_p = (torch.tensor(column, device=DEVICE) for column in zip(*rows, strict=True))
    heat = torch.full((len(rows),), temperature, device=DEVICE)
    key = torch.arange(len(rows), device=DEVICE)
    return Sampling(heat, top_k, top_p, min_p, key, key + 3, False, True)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not written is NaN, or far from any cut."""
    new = torch.Tensor.new_empty

    def poison(*given: Any, **options: Any) -> Tensor:
        out = new(*given, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(1 << 30)

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


SLOW = pytest.mark.slow  # the interpreter takes 10 ms and more a program


@pytest.mark.parametrize(
    ("vocab", "spread", "kinds"),
    [
        (1, 1.0, FILTERS[:2]),
        (600, 3.0, [FILTERS[4], (513, 1.0, 0.0)]),
        pytest.param(255, 3.0, FILTERS, marks=SLOW),
        pytest.param(1100, 0.05, FILTERS, marks=SLOW),
        pytest.param(1100, 3.0, MORE, marks=SLOW),
        pytest.param(1100, 30.0, FILTERS, marks=SLOW),
    ],
)
def test_what_is_kept_and_drawn_is_what_sorting_keeps(
    vocab: int, spread: float, kinds: list[tuple[int, float, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.randn(len(kinds), vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    scores, given = scores.log_softmax(-1).to(DEVICE), sampling(kinds)
    # Neighbours in fp32, falling: the cut may be the best of its block, and differ from others in the last bit alone.
    scores[-1] = (torch.tensor(-1.0).view(torch.int32) + torch.arange(vocab, dtype=torch.int32)).view(torch.float32).to(DEVICE)
    token, allowed = draw(scores, given, monkeypatch)
    expected = allowed_tokens(scores, given.top_k, given.top_p, given.min_p)
    assert torch.equal(allowed, expected), (allowed != expected).sum(-1)
    assert torch.equal(token, choose_tokens(scores, given))


@pytest.mark.parametrize("sign", [pytest.param(1.0, marks=SLOW), -1.0, pytest.param(0.0, marks=SLOW)])
def test_equal_scores_are_kept_by_their_id(sign: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of 9 values, both signs and both zeros, over several blocks and programs."""
    kinds = [(700, 1.0, 0.0), (0, 0.31, 0.0)]
    if sign >= 0:
        kinds += [(5, 1.0, 0.0), (0, 1.0, 0.4), (300, 0.5, 0.01)]
    scores = torch.randint(0, 9, (len(kinds), 1100), generator=torch.Generator().manual_seed(1)).float() * 0.25
    scores = (scores * sign if sign else scores - 1.0).to(DEVICE)
    scores[:, ::5] *= -0.0 if sign == 0 else 1.0
    given = sampling(kinds)
    token, allowed = draw(scores, given, monkeypatch)
    expected = allowed_tokens(scores, given.top_k, given.top_p, given.min_p)
    assert torch.equal(allowed, expected), (allowed != expected).sum(-1)
    assert torch.equal(token, choose_tokens(scores, given))


def test_greedy_sequences_among_filtered_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(2, 700, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    scores[:, [5, 600]] = 9.0
    token, _ = draw(scores, sampling([(7, 0.9, 0.0), (0, 1.0, 0.0)], temperature=0.0), monkeypatch)
    assert token.tolist() == [5, 5]


def test_of_equal_tokens_only_so_many_are_drawn() -> None:
    """The last pass alone: 3 of the tokens that are equal to the cut, over two programs of two blocks, for many keys."""
    many, vocab = 24, 60
    scores = torch.full((many, vocab), -2.0, device=DEVICE)
    scores[:, [4, 20, 33, 35, 50]] = -1.0
    given = sampling([(3, 1.0, 0.0)] * many)
    cut = (scores[:, 4].view(torch.int32) ^ 0x7FFFFFFF).long() + (1 << 31)
    ties, equal = torch.full((many,), 3.0, device=DEVICE), torch.tensor([[2.0, 3.0]], device=DEVICE).repeat(many, 1)
    best, tokens = torch.empty(many, 2, device=DEVICE), torch.empty(many, 2, dtype=torch.int32, device=DEVICE)
    tops = torch.full((many, 4), -1.0, device=DEVICE)
    filters.draw_pass[(2, many)](
        scores, tops, cut, ties, equal, given.temperature, given.key, given.position, best, tokens, vocab, 4,
        BLOCKS=2, BLOCK=16, MANY_PROGRAMS=2,
    )  # fmt: skip
    token = tokens.gather(1, best.argmax(-1)[:, None])[:, 0]
    assert torch.equal(token.long(), choose_tokens(scores, given)) and set(token.tolist()) == {4, 20, 33}
