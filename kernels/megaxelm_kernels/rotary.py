"""Rotary positions (RoPE), in the half-split layout of Hugging Face checkpoints: feature i turns with feature i + d/2.

Source: Su et al. 2021, arXiv 2104.09864; `llama3` scaling as in the Llama 3.1 release.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROPE_TYPES = ("linear", "llama3")


def inverse_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Radians a position of each pair of features, fp32 [head_dim / 2].

    `scaling`: None, or a mapping with `rope_type` `linear` (`factor`) or `llama3` (`factor`, `low_freq_factor`,
    `high_freq_factor`, `original_max_position_embeddings`).

    Raises:
        ValueError: odd head_dim, unknown `rope_type`.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim}: rotary positions need an even number of features a head")
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if scaling is None:
        return frequencies
    kind = scaling.get("rope_type")
    factor = float(scaling.get("factor", 1.0))
    if kind == "linear":
        return frequencies / factor
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        turns = float(scaling["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
        # Pairs that turn fewer than `low` times over the old context are slowed by `factor`, those over `high` are kept.
        kept_share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return frequencies / factor * (1.0 - kept_share) + frequencies * kept_share
    raise ValueError(f"rope_type = {kind!r}: choose {', '.join(ROPE_TYPES)} or no scaling")


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [N, head_dim / 2] each, of `positions` [N] int64 and `frequencies` [head_dim / 2] fp32."""
    angles = positions.to(torch.float32)[:, None] * frequencies[None, :]
    return angles.cos(), angles.sin()


class _Rotate(torch.autograd.Function):
    """Rotation by the tables; its backward is the rotation by the negative angle, so nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=direction)
    return out


@torch.compiler.disable
def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x` [N, heads, head_dim] by the tables [N, head_dim / 2]; the tables are rounded to the type of `x` first."""
    return _Rotate.apply(x, cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1))
