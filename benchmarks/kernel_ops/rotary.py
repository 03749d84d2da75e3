"""Rotary positions of q and k, and q/k norm with them, forward and backward, from views of one packed projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import Entry, Side
from megaxelm_kernels.rotary import (
    apply_rotary_qk,
    apply_rotary_reference,
    norm_rotary_qk,
    norm_rotary_qk_reference,
    rotary_parameters,
    rotary_tables,
    split_qkv,
)

EPS = 1e-6
CUDA_SHAPES = [(16384, 16, 16, 128), (16384, 32, 8, 128), (16384, 32, 8, 64)]  # tokens, heads, kv_heads, head_dim
CPU_SHAPES = [(2048, 16, 16, 128)]
Function = Callable[..., tuple[Tensor, Tensor]]


def entries(device: torch.device) -> list[Entry]:
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    return [make(shape, device) for shape in shapes for make in (rotation, norm_and_rotation)]


def hub_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The plain form of most models: x * cos + half_turned(x) * sin with tables of whole heads."""
    cos, sin = (torch.cat([table, table], -1).to(q.dtype).unsqueeze(1) for table in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return turn(q), turn(k)


def hub_norm_and_rotation(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.nn.functional.rms_norm
    return hub_rotation(norm(q, q.shape[-1:], q_weight, EPS), norm(k, k.shape[-1:], k_weight, EPS), cos, sin)


def inputs(shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    tokens, heads, kv_heads, head_dim = shape
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    cos, sin = rotary_tables(torch.arange(tokens, device=device) % 2048, rotary_parameters(head_dim, 500000.0)[0].to(device))
    return {
        "qkv": torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, **options),
        "weights": [1 + 0.1 * torch.randn(head_dim, **options) for _ in range(2)],
        "grads": [torch.randn(tokens, n, head_dim, **options) for n in (heads, kv_heads)],
        "tables": [cos, sin],
        "sizes": (heads, kv_heads, head_dim),
    }


def side(function: Function, *, normed: bool, wide: bool = False) -> Side:
    """Outputs and the gradients of q, k (and the weights)."""

    def run(given: dict[str, Any]) -> list[Tensor]:
        kind = torch.float64 if wide else torch.bfloat16
        q, k, _ = (x.to(kind) for x in split_qkv(given["qkv"], *given["sizes"]))
        variables = [x.detach().requires_grad_() for x in (q, k)]
        if normed:
            variables += [x.to(kind).detach().requires_grad_() for x in given["weights"]]
        out = function(*variables, *(x.double() if wide else x for x in given["tables"]))
        return [*(x.detach() for x in out), *torch.autograd.grad(out, variables, [x.to(kind) for x in given["grads"]])]

    return run


def liger_rotation() -> tuple[Function | None, str]:
    try:
        from liger_kernel.ops.rope import LigerRopeFunction
    except ImportError as error:
        return None, str(error)

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # It takes [batch, heads, tokens, head_dim] and turns in place, so it works on copies here, as a model must make them.
        whole = [torch.cat([table, table], -1).to(q.dtype)[None] for table in (cos, sin)]
        q, k = (x.contiguous()[None].transpose(1, 2) for x in (q * 1, k * 1))
        q, k = LigerRopeFunction.apply(q, k, *whole)
        return q.transpose(1, 2)[0], k.transpose(1, 2)[0]

    return turn, ""


def rotation(shape: tuple[int, ...], device: torch.device) -> Entry:
    kernels = "triton" if device.type == "cuda" else "torch"
    elements = shape[0] * (shape[1] + shape[2]) * shape[3]
    sides = {
        f"ours ({kernels})": side(lambda *x: apply_rotary_qk(*x, kernels=kernels), normed=False),
        "torch, plain": side(hub_rotation, normed=False),
    }
    missing: dict[str, str] = {}
    if device.type == "cuda":
        sides["ours (torch)"] = side(lambda *x: apply_rotary_qk(*x), normed=False)
        sides["torch.compile"] = side(torch.compile(hub_rotation), normed=False)
    liger, why = liger_rotation()
    if liger is None or device.type != "cuda":
        missing["Liger"] = why or "needs CUDA"
    else:
        sides["Liger"] = side(liger, normed=False)

    def exact(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_reference(q, cos, sin), apply_rotary_reference(k, cos, sin)

    return Entry(
        op="rotary",
        shape=" x ".join(map(str, shape)),
        bytes=2 * 2 * 2 * elements,  # read and written, forward and backward, in bf16; tables stay in the cache
        flops=0,
        make=lambda: inputs(shape, device),
        sides=sides,
        truth=side(exact, normed=False, wide=True),
        judge="torch, plain",
        missing=missing,
    )


def norm_and_rotation(shape: tuple[int, ...], device: torch.device) -> Entry:
    kernels = "triton" if device.type == "cuda" else "torch"
    elements = shape[0] * (shape[1] + shape[2]) * shape[3]
    sides = {
        f"ours ({kernels})": side(lambda q, k, a, b, *tables: norm_rotary_qk(q, k, a, b, EPS, *tables, kernels=kernels), normed=True),
        "torch, plain": side(hub_norm_and_rotation, normed=True),
    }
    if device.type == "cuda":
        sides["torch.compile"] = side(torch.compile(hub_norm_and_rotation), normed=True)
    return Entry(
        op="q/k norm + rotary",
        shape=" x ".join(map(str, shape)),
        bytes=(2 + 3) * 2 * elements,  # forward reads and writes; backward reads the inputs and gradients and writes
        flops=0,
        make=lambda: inputs(shape, device),
        sides=sides,
        truth=side(lambda q, k, a, b, *tables: norm_rotary_qk_reference(q, k, a, b, EPS, *tables), normed=True, wide=True),
        judge="torch, plain",
        missing={} if device.type == "cuda" else {"torch.compile": "timed on CUDA only"},
    )
