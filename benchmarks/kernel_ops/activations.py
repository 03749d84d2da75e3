"""SwiGLU, and GELU with the bias before it: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import Entry, Side
from megaxelm_kernels import activations

KINDS = ("swiglu", "gelu + bias", "gelu + bias, tanh", "gelu")
Function = Callable[[dict[str, Any]], Tensor]


def ours(given: dict[str, Any], kind: str, kernels: str) -> Tensor:
    if kind == "swiglu":
        return activations.swiglu(given["x"], given["up"], kernels=kernels)
    return activations.gelu_bias(given["x"], given.get("bias"), "tanh" if "tanh" in kind else "none", kernels=kernels)


def formulas(given: dict[str, Any], kind: str) -> Tensor:
    """The reference in fp64."""
    x = given["x"].double()
    if kind == "swiglu":
        return activations.swiglu_reference(x, given["up"].double())
    bias = given["bias"].double() if "bias" in given else None
    return activations.gelu_bias_reference(x, bias, "tanh" if "tanh" in kind else "none")


def side(function: Function, backward: bool) -> Side:
    def run(given: dict[str, Any]) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [function(given)]
        out = function(given)
        leaves = [given[name] for name in ("x", "up", "bias") if name in given]
        return [out.detach(), *torch.autograd.grad(out, leaves, given["upstream"].to(out.dtype))]

    return run


def liger(kind: str) -> Function | None:
    """Liger's kernel of the same operation; None where it has none."""
    if kind != "swiglu":
        return None
    from liger_kernel.transformers.functional import liger_swiglu

    return lambda given: liger_swiglu(given["x"], given["up"])


def make(kind: str, rows: int, size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device=device).manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"x": (rows, size)}
    if kind == "swiglu":
        shapes["up"] = (rows, size)
    elif "bias" in kind:
        shapes["bias"] = (size,)
    given = {name: torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for name, shape in shapes.items()}
    return given | {"upstream": torch.randn(rows, size, generator=generator, device=device).to(dtype)}


def entry(device: torch.device, rows: int, size: int, kind: str, backward: bool) -> Entry:
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    plain: Function = partial(ours, kind=kind, kernels="torch")
    functions = {f"ours ({'triton' if cuda else 'torch'})": partial(ours, kind=kind, kernels="triton" if cuda else "torch"), "torch": plain}
    missing: dict[str, str] = {}
    if cuda:
        functions["torch.compile"] = torch.compile(plain, dynamic=False)
        try:
            theirs = liger(kind)
            if theirs is not None:
                functions["liger"] = theirs
        except ImportError as error:
            missing["liger"] = str(error)
    else:
        missing = {name: "only on CUDA" for name in ("torch.compile", "liger")}
    inputs = 2 if kind == "swiglu" else 1
    tensors = inputs + 1 + (2 * inputs + 1 if backward else 0)
    return Entry(
        op=f"{kind}{', backward too' if backward else ''}", shape=f"{rows} x {size} {str(dtype)[6:]}",
        bytes=tensors * rows * size * dtype.itemsize, flops=0.0, make=partial(make, kind, rows, size, dtype, device),
        sides={name: side(function, backward) for name, function in functions.items()},
        truth=side(partial(formulas, kind=kind), backward), judge="torch", missing=missing,
    )  # fmt: skip


def entries(device: torch.device) -> list[Entry]:
    """The feed-forward block of XGLM-1.7B at 16384 tokens; on a CPU a small batch."""
    rows, size = (16384, 8192) if device.type == "cuda" else (1024, 4096)
    return [entry(device, rows, size, kind, backward) for kind in KINDS for backward in (False, True)]
