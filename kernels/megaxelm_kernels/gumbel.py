"""Gumbel noise keyed by what is drawn: argmax_v (log p(v) + g(v)) is a draw from p (Gumbel 1954; Maddison et al. 2014).

The noise of a token is a function of (key, position, token id) alone, so a sample is the same in any batch, any tiling of the vocabulary,
any order of the experts, on a CPU and a GPU. The key and the position seed one stream of SplitMix64 (Steele, Lea and Flood 2014) in
wrapping int64 arithmetic; number i of the stream serves the tokens 2i and 2i + 1 with 32 bits each, of which 31 are used:

    x = (bits + 1/2) / 2^31,  at most 1 - 2^-24        g = -log(-log(1 - x))

x is never 0 or 1, and it is finest near 0, where the noise is large: a token of probability 1e-9 is still drawn as often as it should be.
The bits are the same everywhere; the two logarithms may differ in their last digit between devices. `mixture_triton` has the same
function in Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)
LARGEST_X = 1.0 - 2.0**-24
LARGEST_NOISE = 22.2
"""No noise is above this: -log(2^-32), rounded up."""


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place. The masks after the shifts make int64's arithmetic shift a logical one."""
    z ^= (z >> 30) & ((1 << 34) - 1)
    z *= MIX_1
    z ^= (z >> 27) & ((1 << 37) - 1)
    z *= MIX_2
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


def stream_keys(key: Tensor, position: Tensor) -> Tensor:
    """The start of each sequence's stream at its position: `key` and `position` [B] int64 -> [B] int64."""
    return _mix((_mix(key + GOLDEN) ^ position) + GOLDEN)


def _noise(bits: Tensor) -> Tensor:
    """Noise, fp32, of `bits`, int32 of which the sign is not used."""
    x = (bits & 0x7FFFFFFF).to(torch.float32)
    x.add_(0.5).mul_(2.0**-31).clamp_(max=LARGEST_X)
    return x.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(key: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise of `tokens` [n] int64 for each sequence: [B, n] fp32, all of it finite.

    Args:
        key: [B] int64, identity of seed and sequence. position: [B] int64, number of the token that is drawn in its sequence.
    """
    numbers = stream_keys(key, position)[:, None] + ((tokens >> 1) * GOLDEN)[None, :]
    halves = _mix(numbers) >> ((tokens & 1) << 5)[None, :]
    # The conversion keeps the low 32 bits.
    return _noise(halves.to(torch.int32))


def vocabulary_noise(key: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """`gumbel_noise` of the tokens 0 to vocab_size - 1, at half the work: [B, vocab_size]."""
    pairs = torch.arange((vocab_size + 1) // 2, dtype=torch.int64, device=key.device)
    numbers = _mix(stream_keys(key, position)[:, None] + (pairs * GOLDEN)[None, :])
    # Little-endian on every machine we run on: the lower half comes first.
    return _noise(numbers.view(torch.int32)[:, :vocab_size])


def expert_noise(key: Tensor, position: Tensor, expert_keys: Tensor) -> Tensor:
    """Noise for a draw among experts: [B, m] fp32 from `expert_keys` [B, m] int64, a number of each expert's name."""
    numbers = stream_keys(key, position)[:, None] ^ _mix(expert_keys + GOLDEN)
    return _noise(_mix(numbers + GOLDEN).to(torch.int32))
