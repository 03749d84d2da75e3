"""Causal attention over packed documents of mixed lengths, forward and backward, by every backend that is here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import Entry, Side
from megaxelm_kernels.attention import BACKENDS, PackedLayout, choose_backend, packed_attention

# 8 x 2048 tokens: whole windows, windows cut into a few documents, one of many short ones, a ragged rest.
MIXED = [2048, 2048, 1024, 1024, 700, 700, 648, 1500, 37, 511, 2048, *[64] * 32, 2000, 48]


def lengths(tokens: int) -> list[int]:
    """The mixture, its documents shortened in proportion."""
    shortened = [max(1, length * tokens // sum(MIXED)) for length in MIXED]
    left = tokens - sum(shortened)
    return shortened if left == 0 else [*shortened, left]


def entries(device: torch.device) -> list[Entry]:
    cuda = device.type == "cuda"
    shapes = [(16384, 16, 16, 128), (16384, 32, 8, 128)] if cuda else [(2048, 4, 2, 64)]
    return [entry(shape, window, device) for shape in shapes for window in (None, 512 if cuda else 128)]


def inputs(shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    tokens, heads, kv_heads, head_dim = shape
    torch.manual_seed(0)
    layout = PackedLayout(torch.tensor([0, *lengths(tokens)]).cumsum(0), device)
    made = [torch.randn(tokens, n, head_dim, device=device, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads, heads)]
    return {"layout": layout, "q": made[0], "k": made[1], "v": made[2], "grad": made[3]}


def side(backend: str, window: int | None, dtype: torch.dtype = torch.bfloat16) -> Side:
    def run(given: dict[str, Any]) -> list[Tensor]:
        q, k, v = (given[name].to(dtype).detach().requires_grad_() for name in ("q", "k", "v"))
        out = packed_attention(q, k, v, given["layout"], sliding_window=window, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), given["grad"].to(dtype))]

    return run


def entry(shape: tuple[int, ...], window: int | None, device: torch.device) -> Entry:
    tokens, heads, kv_heads, head_dim = shape
    seen = sum(
        n * (n + 1) // 2 if window is None or window >= n else window * (window + 1) // 2 + (n - window) * window for n in lengths(tokens)
    )
    chosen = choose_backend("auto", device, 0.0, head_dim=head_dim, dtype=torch.bfloat16)
    sides, missing = {f"auto: {chosen}": side(chosen, window)}, {}
    for name in BACKENDS:
        if name == "reference" or (name == "flex" and device.type != "cuda"):
            continue
        try:
            choose_backend(name, device, 0.0, head_dim=head_dim, dtype=torch.bfloat16)
        except ValueError as error:
            missing[name] = str(error)
        else:
            sides[name] = side(name, window)
    if device.type != "cuda":
        missing["flex"] = "has no gradient on a CPU"
        sides["reference"] = side("reference", window)
    return Entry(
        op="attention",
        shape=" x ".join(map(str, shape)) + ("" if window is None else f", window {window}"),
        # Forward: read q, k, v, write the output. Backward: read those and its gradient, write three gradients. In bf16.
        bytes=2 * tokens * head_dim * (2 * heads + 2 * kv_heads + 4 * heads + 4 * kv_heads),
        flops=(4 + 10) * heads * head_dim * seen,  # 2 products forward, 5 backward, of the pairs that are seen
        make=lambda: inputs(shape, device),
        sides=sides,
        truth=side("reference", window, torch.float64 if device.type != "cuda" else torch.float32),
        judge="sdpa",
        missing=missing,
    )
