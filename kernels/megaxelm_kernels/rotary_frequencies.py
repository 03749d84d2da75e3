"""How fast each pair of features turns, and the tables of cos and sin that `rotary.py` turns queries and keys by.

Sources: Su et al. 2021, arXiv 2104.09864; `linear` scaling: Chen et al. 2023, arXiv 2306.15595; `llama3` as in the Llama 3.1 release;
`yarn`: Peng et al. 2023, arXiv 2309.00071, section 3 (NTK-by-parts and the temperature of attention).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROPE_TYPES = ("linear", "llama3", "yarn")


def rotary_parameters(
    head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None, *, rotary_dim: int | None = None
) -> tuple[Tensor, float]:
    """Radians a position of each pair of features, fp32 [rotary_dim / 2], and the factor of the tables (1 without `yarn`).

    Give both to `rotary_tables`, which multiplies cos and sin by the factor: q and k then carry it once each, the scores twice.

    Args:
        head_dim: features of a head.
        theta: the base; pair i turns by theta^(-2 i / rotary_dim) radians a position.
        scaling: None, or a mapping as Hugging Face's `rope_scaling`, with `rope_type` `linear` (`factor`), `llama3` (`factor`,
            `low_freq_factor`, `high_freq_factor`, `original_max_position_embeddings`) or `yarn` (`factor`,
            `original_max_position_embeddings`, and where wanted `beta_fast` 32, `beta_slow` 1, `truncate` true, `attention_factor`
            0.1 ln(factor) + 1, or `mscale` and `mscale_all_dim`, whose two such terms are divided).
        rotary_dim: how many of the first features are turned; None: all.

    Raises:
        ValueError: an odd or too large number of features, an unknown `rope_type`, a field that is missing or out of range.
    """
    turned = head_dim if rotary_dim is None else rotary_dim
    if head_dim % 2 and rotary_dim is None:
        raise ValueError(f"head_dim = {head_dim}: rotary positions need an even number of features a head")
    if turned % 2 or not 2 <= turned <= head_dim:
        raise ValueError(f"rotary_dim = {rotary_dim}: choose an even number from 2 to head_dim = {head_dim}")
    frequencies = 1.0 / (theta ** (torch.arange(0, turned, 2, dtype=torch.float32) / turned))
    if scaling is None:
        return frequencies, 1.0
    kind = scaling.get("rope_type")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type = {kind!r}: choose {', '.join(ROPE_TYPES)} or no scaling")
    if kind == "linear":
        return frequencies / float(scaling.get("factor", 1.0)), 1.0
    if kind == "llama3":
        factor = float(scaling.get("factor", 1.0))
        low, high, length = (_field(scaling, name) for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
        turns = length * frequencies / (2 * math.pi)
        # Pairs that turn fewer than `low` times over the old context are slowed by `factor`, those over `high` are kept.
        kept_share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return frequencies / factor * (1.0 - kept_share) + frequencies * kept_share, 1.0
    return _yarn(frequencies, turned, theta, scaling)


def inverse_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None = None, *, rotary_dim: int | None = None) -> Tensor:
    """The frequencies of `rotary_parameters` alone, for scalings without a factor of the tables.

    Raises:
        ValueError: as there, and for `yarn` with a factor other than 1, which would be lost.
    """
    frequencies, attention_factor = rotary_parameters(head_dim, theta, scaling, rotary_dim=rotary_dim)
    if attention_factor != 1.0:
        raise ValueError(
            f"rope_type = yarn: cos and sin must be multiplied by {attention_factor:.6g}; take rotary_parameters(...), "
            "and give its second value to rotary_tables(attention_factor=...)"
        )
    return frequencies


def _field(scaling: Mapping[str, Any], name: str) -> float:
    if scaling.get(name) is None:
        raise ValueError(f"rope_scaling: rope_type = {scaling.get('rope_type')} needs {name}; add it")
    return float(scaling[name])


def _yarn(frequencies: Tensor, turned: int, theta: float, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    factor, length = _field(scaling, "factor"), _field(scaling, "original_max_position_embeddings")
    if factor < 1:
        raise ValueError(f"rope_scaling.factor = {factor}: yarn lengthens the context; choose 1 or more")
    fast, slow = float(scaling.get("beta_fast") or 32.0), float(scaling.get("beta_slow") or 1.0)
    if fast < slow:
        raise ValueError(f"rope_scaling.beta_fast = {fast:g}: choose at least beta_slow = {slow:g}")

    def pair_of(turns: float) -> float:
        """The index, with its fraction, of the pair that turns so many times over the old context."""
        return turned * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(fast), pair_of(slow)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, turned - 1)
    if first == last:
        last += 0.001
    # Pairs up to `first` turn fast and are kept; from `last` on they are slowed by `factor`; a ramp lies between.
    slowed = ((torch.arange(turned // 2, dtype=torch.float32) - first) / (last - first)).clamp(0.0, 1.0)
    scaled = frequencies / factor * slowed + frequencies * (1.0 - slowed)
    return scaled, _attention_factor(factor, scaling)


def _attention_factor(factor: float, scaling: Mapping[str, Any]) -> float:
    given, mscale, mscale_all = (scaling.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        if not float(given) > 0:
            raise ValueError(f"rope_scaling.attention_factor = {given}: choose a positive number, or leave it out")
        return float(given)
    growth = 0.1 * math.log(factor)
    if mscale and mscale_all:
        return (float(mscale) * growth + 1.0) / (float(mscale_all) * growth + 1.0)
    return growth + 1.0


def rotary_tables(positions: Tensor, frequencies: Tensor, *, attention_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin times `attention_factor`, fp32 [N, rotary_dim / 2] each; `positions` [N] int64, `frequencies` [rotary_dim / 2].

    `positions` of packed documents start anew in each.
    """
    angles = positions.to(torch.float32)[:, None] * frequencies[None, :]
    if attention_factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * attention_factor, angles.sin() * attention_factor
