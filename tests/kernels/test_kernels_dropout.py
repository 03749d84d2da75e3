"""The dropout mask is a function of the token, the place in the model and the feature, and looks random in each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megaxelm_kernels.dropout import drop_mask, drop_probability, dropout_keys, keyed_dropout

TOKENS, FEATURES, P = 1000, 256, 0.1


def keys(seed: int = 0, step: int = 0, first_sample: int = 0) -> Tensor:
    samples = first_sample + torch.arange(TOKENS) // 100
    return dropout_keys(seed, step, samples, torch.arange(TOKENS) % 100).token_keys


def splitmix(z: int) -> int:
    m = (1 << 64) - 1
    z &= m
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & m
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & m
    return z ^ (z >> 31)


def test_the_tensor_hash_is_splitmix64_on_unsigned_integers() -> None:
    """Pins the mask: another hash would change the meaning of every run that is resumed."""
    golden, m = 0x9E3779B97F4A7C15, (1 << 64) - 1
    key = splitmix(5 + golden)
    for part in (6, 7, 8):
        key = splitmix((key ^ part) + golden)
    token_keys = dropout_keys(5, 6, torch.tensor([7]), torch.tensor([8])).token_keys
    assert token_keys.item() & m == key
    words = [splitmix(key ^ splitmix((((3 << 32) + i) * golden) & m)) for i in range(3)]
    levels = [(word >> (16 * j)) & 0xFFFF for word in words for j in range(4)]
    signed = [level - 65536 if level >= 32768 else level for level in levels]
    assert drop_mask(token_keys, 3, 11, 0.3)[0].tolist() == [level < round(0.3 * 65536) - 32768 for level in signed][:11]


def test_a_sample_gets_its_mask_wherever_it_lies_in_the_batch() -> None:
    together = drop_mask(keys(), 4, FEATURES, P)
    alone = drop_mask(dropout_keys(0, 0, torch.full((100,), 7), torch.arange(100)).token_keys, 4, FEATURES, P)
    assert torch.equal(together[700:800], alone)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_dropped_is_p(p: float) -> None:
    dropped = drop_mask(keys(), 0, FEATURES, p).double().mean().item()
    deviation = (p * (1 - p) / (TOKENS * FEATURES)) ** 0.5
    assert abs(dropped - p) < 4 * deviation


def test_share_dropped_is_p_in_every_feature_and_token() -> None:
    mask = drop_mask(keys(), 0, FEATURES, P).double()
    for share, count in ((mask.mean(0), TOKENS), (mask.mean(1), FEATURES)):
        z = (share - P) / (P * (1 - P) / count) ** 0.5
        assert z.abs().max() < 5.5
        assert 0.85 < z.std() < 1.15


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 1}, {"first_sample": 10}, {"layer_site": 1}])
def test_masks_of_another_seed_step_sample_or_layer_are_independent(other: dict[str, int]) -> None:
    site = other.pop("layer_site", 0)
    first = drop_mask(keys(), 0, FEATURES, 0.5).double() - 0.5
    second = drop_mask(keys(**other), site, FEATURES, 0.5).double() - 0.5
    assert abs((first * second).mean().item()) < 4 * 0.25 / (TOKENS * FEATURES) ** 0.5


def test_features_are_uncorrelated() -> None:
    mask = drop_mask(keys(), 2, 64, 0.5).double() - 0.5
    correlation = mask.T @ mask / TOKENS / 0.25
    off_diagonal = correlation - torch.diag(correlation.diag())
    assert off_diagonal.abs().max() < 5 / TOKENS**0.5


def test_expectation_is_kept_exactly_for_the_probability_used() -> None:
    x = torch.ones(TOKENS, FEATURES, dtype=torch.float64)
    out = keyed_dropout(x, keys(), 0, P)
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - drop_probability(P))))


def test_gradient_has_the_mask_of_the_forward() -> None:
    x = torch.randn(TOKENS, 33, requires_grad=True)
    out = keyed_dropout(x, keys(), 5, 0.4)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad == 0, out == 0)
    torch.testing.assert_close(grad * x, out)


def test_what_is_dropped_is_zero_even_when_it_was_not_finite() -> None:
    out = keyed_dropout(torch.full((TOKENS, 8), torch.inf), keys(), 0, 0.5)
    assert not out.isnan().any()


def test_p_zero_returns_the_input_itself() -> None:
    x = torch.randn(3, 4)
    assert keyed_dropout(x, torch.zeros(3, dtype=torch.int64), 0, 0.0) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, 1e-7, 0.9999999])
def test_a_probability_out_of_range_is_named(p: float) -> None:
    with pytest.raises(ValueError, match="dropout = "):
        keyed_dropout(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), 0, p)
