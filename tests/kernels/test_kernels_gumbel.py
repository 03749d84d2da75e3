"""The keyed noise: which bits, which distribution, and that it is the same however it is asked for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaxelm_kernels import gumbel
from megaxelm_kernels.gumbel import LARGEST_NOISE, expert_noise, gumbel_noise, vocabulary_noise


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_the_numbers_are_those_of_splitmix64() -> None:
    """By Python's integers: what was drawn last year must be drawn again."""
    whole = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & whole
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & whole
        return z ^ (z >> 31)

    golden, key, position = 0x9E3779B97F4A7C15, -5, 1234567
    stream = mix((mix((key + golden) & whole) ^ position) + golden & whole)
    for token in (0, 1, 255, 256007):
        bits = mix((stream + (token >> 1) * golden) & whole) >> (32 * (token & 1)) & 0x7FFFFFFF
        x = (bits + 0.5) / 2**31
        found = float(gumbel_noise(ids(key), ids(position), ids(token)))
        assert found == pytest.approx(-math.log(-math.log1p(-x)), rel=1e-5, abs=1e-6)
    assert float(gumbel_noise(ids(7), ids(0), ids(3))) == pytest.approx(1.3987311, abs=1e-6)


@pytest.mark.parametrize("vocab", [1, 2, 63, 2048, 2049])
def test_a_token_has_one_noise_however_it_is_asked_for(vocab: int) -> None:
    keys, positions = ids(3, -9, 1 << 62), ids(0, 5, 5)
    whole = vocabulary_noise(keys, positions, vocab)
    some = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[:40]
    assert whole.shape == (3, vocab) and whole.dtype == torch.float32
    assert torch.equal(gumbel_noise(keys, positions, some), whole[:, some])
    assert torch.equal(gumbel_noise(keys[2:], positions[2:], some), whole[2:, some])


def test_the_extremes_are_finite_and_bounded() -> None:
    found = gumbel._noise(torch.tensor([0, 1, 0x7FFFFFFF, 0x7FFFFFFE, -1, -(1 << 31)], dtype=torch.int32))
    assert found.isfinite().all() and found.max() <= LARGEST_NOISE and found.min() > -2.9
    assert found[0] == found[5] > 22 and found[2] == found[4]


def test_it_is_gumbel_noise() -> None:
    g = vocabulary_noise(ids(11), ids(0), 1 << 20)[0].double()
    assert abs(float(g.mean()) - 0.5772156649) < 0.005 and abs(float(g.var()) - math.pi**2 / 6) < 0.01
    exact = torch.exp(-torch.exp(-g.sort().values))
    steps = (torch.arange(1 << 20, dtype=torch.float64) + 0.5) / (1 << 20)
    assert float((exact - steps).abs().max()) < 1.63 / 1024  # Kolmogorov-Smirnov at 1 %


def test_neighbours_share_nothing() -> None:
    """Sequences, positions and tokens next to each other, where a weak hash shows."""
    keys, positions = ids(*range(64)).repeat_interleave(8), ids(*range(8)).repeat(64)
    g = vocabulary_noise(keys, positions, 4096).double()
    g = (g - g.mean()) / g.std()
    by_row = (g @ g.T / 4096).fill_diagonal_(0).abs().max()
    by_token = (g[:, :-1] * g[:, 1:]).mean().abs()
    assert float(by_row) < 6 / 64 and float(by_token) < 5 / math.sqrt(512 * 4095)
    assert g.unique().numel() > 0.9 * g.numel()


def test_the_noise_of_experts_is_keyed_by_their_names_and_apart_from_that_of_tokens() -> None:
    keys, positions = ids(1, 2), ids(4, 4)
    names = torch.tensor([[10, 20, 30], [30, 10, 99]])
    found = expert_noise(keys, positions, names)
    assert torch.equal(expert_noise(keys, positions, names.flip(1)), found.flip(1))
    assert torch.equal(expert_noise(keys[:1], positions[:1], names[:1]), found[:1])
    assert found[0, 2] != found[1, 0] and found[0, 0] != found[1, 1]
    assert not torch.isin(found, gumbel_noise(keys, positions, torch.arange(100))).any()
    many = expert_noise(ids(5).expand(1), ids(0), torch.arange(1 << 16)[None]).double()
    assert abs(float(many.mean()) - 0.5772) < 0.02 and abs(float(many.var()) - math.pi**2 / 6) < 0.05
