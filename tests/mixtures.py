"""Small mixtures for the tests of the next token, with their log-probabilities by the formula in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaxelm_kernels.mixture import Sampling
from megaxelm_kernels.row_groups import RowGroups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NONE = -torch.inf
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {},
    "cool": {"temperature": 0.6},
    "hot and filtered": {"temperature": 1.4, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
}


@dataclass
class Problem:
    hidden: Tensor
    heads: Tensor
    groups: RowGroups
    rows: Tensor
    log_w: Tensor
    vocab: int

    def __iter__(self) -> Iterator[Any]:
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


def poison_memory(monkeypatch: Any) -> None:
    """Memory that is not written is NaN, or a token that is none."""

    def poison(original: Any) -> Any:
        def poisoned(*given: Any, **options: Any) -> Tensor:
            out = original(*given, **options)
            return out.fill_(torch.nan) if out.is_floating_point() else out.fill_(1 << 29)

        return poisoned

    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """p value of counts under probabilities; what is expected fewer than 5 times is taken together."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    wanted = torch.cat([expected[~rare], expected[rare].sum().clamp_min(1e-9)[None]])
    seen = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64), statistic / 2))
