"""Batches of documents that the tests of attention share."""

from __future__ import annotations

import torch
from torch import Tensor

from megaxelm_kernels.attention import PackedLayout

LAYOUTS = {
    "one": [50],
    "equal": [32] * 4,
    "nearly equal": [30, 32, 31, 29],
    "windows cut into documents": [100, 28, 128, 64, 64, 1, 127],
    "tiny": [20, 3, 1, 17, 9, 22, 30, 1, 1, 5, 40, 12, 33, 28],
    "one long, many tiny": [200] + [7] * 30,
}


def layout_of(lengths: list[int]) -> PackedLayout:
    return PackedLayout(torch.tensor([0, *lengths]).cumsum(0))


def inputs(tokens: int, heads: int, kv_heads: int, d: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, heads, d), (tokens, kv_heads, d), (tokens, kv_heads, d))
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v
