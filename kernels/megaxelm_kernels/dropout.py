"""Stateless dropout: the mask is a hash of what the token is, not of when or where it is computed.

The mask of one feature of one token depends on (seed, step, sample, position in the sample, layer and site, feature) and nothing
else. So it is the same after a resume, when a layer is recomputed in the backward pass, on another number of ranks and with
another packing, and on CPU and GPU bit for bit. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014) in
wrapping int64 arithmetic; one hash serves four features with 16 bits each, so probabilities are multiples of 2^-16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LEVELS = 1 << 16
_FEATURES_A_HASH = 4


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


@dataclass(frozen=True)
class DropoutKey:
    """Identity of each token of a packed batch for dropout: `token_keys` [N] int64, from `dropout_keys`."""

    token_keys: Tensor


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place. The masks after the shifts make int64's arithmetic shift a logical one."""
    z ^= (z >> 30) & ((1 << 34) - 1)
    z *= _MIX_1
    z ^= (z >> 27) & ((1 << 37) - 1)
    z *= _MIX_2
    z ^= (z >> 31) & ((1 << 33) - 1)
    return z


def dropout_keys(seed: int, step: int, sample_ids: Tensor, positions_in_sample: Tensor) -> DropoutKey:
    """Keys of the tokens of one step.

    Args:
        seed, step: any non-negative integers below 2^63; `step` is the optimiser step.
        sample_ids: [N] int64, number of the sample in the run (not in the batch).
        positions_in_sample: [N] int64, place of the token in its sample.
    """
    if sample_ids.shape != positions_in_sample.shape:
        raise ValueError(f"sample_ids {tuple(sample_ids.shape)} and positions_in_sample {tuple(positions_in_sample.shape)} differ in shape")
    keys = torch.full_like(sample_ids, seed, dtype=torch.int64)
    keys = _mix(keys + _GOLDEN)
    for part in (step, sample_ids, positions_in_sample):
        keys = _mix((keys ^ part) + _GOLDEN)
    return DropoutKey(keys)


def drop_mask(token_keys: Tensor, layer_site: int, features: int, p: float) -> Tensor:
    """True where a feature is dropped: bool [N, features]. `p` is rounded to a multiple of 2^-16 (see `drop_probability`)."""
    hashes = -(-features // _FEATURES_A_HASH)
    counters = torch.arange(hashes, dtype=torch.int64, device=token_keys.device) + (layer_site << 32)
    site = _mix(counters * _GOLDEN)
    z = _mix(token_keys[:, None] ^ site[None, :])
    # Little-endian on every machine we run on; the int16 view is signed, so the threshold is too.
    levels = z.view(torch.int16)[:, :features]
    return levels < round(p * _LEVELS) - _LEVELS // 2


def drop_probability(p: float) -> float:
    """The probability that is really used for `p`: the nearest multiple of 2^-16."""
    return round(p * _LEVELS) / _LEVELS


class _KeyedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token_keys: Tensor, layer_site: int, p: float) -> Tensor:
        dropped = drop_mask(token_keys, layer_site, x.shape[-1], p)
        ctx.scale = 1.0 / (1.0 - drop_probability(p))
        ctx.save_for_backward(dropped)
        return (x * ctx.scale).masked_fill_(dropped, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (dropped,) = ctx.saved_tensors
        return (grads[0] * ctx.scale).masked_fill_(dropped, 0.0), None, None, None


def keyed_dropout(x: Tensor, token_keys: Tensor, layer_site: int, p: float) -> Tensor:
    """Drop features of `x` [N, H] with probability `p` and scale the rest by 1 / (1 - p).

    Args:
        token_keys: [N] int64 of `DropoutKey`.
        layer_site: a number of its own for every place in the model that drops, 0 to 2^31 - 1.
        p: 0 returns `x` itself.

    Raises:
        ValueError: p outside 0 <= p < 1 or so small that it rounds to nothing; shapes that do not fit; a layer_site out of range.
    """
    if p == 0:
        return x
    if not 1 / (2 * _LEVELS) < p < 1 or drop_probability(p) == 1.0:
        raise ValueError(f"dropout = {p}: choose 0, or a probability from {1 / _LEVELS:.2g} to below 1")
    if x.ndim != 2 or token_keys.shape != x.shape[:1] or token_keys.dtype != torch.int64:
        raise ValueError(f"token_keys {token_keys.dtype} {tuple(token_keys.shape)} do not fit x {tuple(x.shape)}: one int64 a row")
    if not 0 <= layer_site < 1 << 31:
        raise ValueError(f"layer_site = {layer_site}: choose 0 to 2^31 - 1")
    return _KeyedDropout.apply(x, token_keys, layer_site, p)
