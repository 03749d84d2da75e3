"""RMSNorm and LayerNorm, alone and of a sum with the residual stream: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import Entry, Side
from megaxelm_kernels import norms

EPS = 1e-5
Function = Callable[[dict[str, Any]], tuple[Tensor, ...]]


def ours(given: dict[str, Any], kernels: str, add: bool, centred: bool) -> tuple[Tensor, ...]:
    if add and centred:
        return norms.add_layer_norm(given["x"], given["residual"], given["weight"], given["bias"], EPS, kernels=kernels)
    if add:
        return norms.add_rms_norm(given["x"], given["residual"], given["weight"], EPS, kernels=kernels)
    if centred:
        return (norms.layer_norm(given["x"], given["weight"], given["bias"], EPS, kernels=kernels),)
    return (norms.rms_norm(given["x"], given["weight"], EPS, kernels=kernels),)


def formulas(given: dict[str, Any], add: bool, centred: bool) -> tuple[Tensor, ...]:
    """The reference in fp64."""
    x, weight = given["x"].double(), given["weight"].double()
    total = x + given["residual"].double() if add else x
    if centred:
        normed = norms.layer_norm_reference(total, weight, given["bias"].double(), EPS)
    else:
        normed = norms.rms_norm_reference(total, weight, EPS)
    return (normed, total) if add else (normed,)


def side(function: Function, names: list[str], backward: bool) -> Side:
    def run(given: dict[str, Any]) -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return list(function(given))
        outputs = function(given)
        upstream = [given["upstream"].to(out.dtype) for out in outputs]
        return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, [given[name] for name in names], upstream)]

    return run


def liger(add: bool, centred: bool) -> Function | None:
    """Liger's kernel of the same operation; None where it has none."""
    if add and centred:
        return None
    if add:
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm

        return lambda given: liger_fused_add_rms_norm(given["x"], given["residual"], given["weight"], EPS)
    if centred:
        from liger_kernel.transformers.functional import liger_layer_norm

        return lambda given: (liger_layer_norm(given["x"], given["weight"], given["bias"], EPS),)
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda given: (liger_rms_norm(given["x"], given["weight"], EPS),)


def make(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device=device).manual_seed(0)
    shapes = {"x": (rows, size), "residual": (rows, size), "weight": (size,), "bias": (size,)}
    given = {name: torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for name, shape in shapes.items()}
    return given | {"upstream": torch.randn(rows, size, generator=generator, device=device).to(dtype)}


def entry(device: torch.device, rows: int, size: int, add: bool, centred: bool, backward: bool) -> Entry:
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    names = ["x"] + ["residual"] * add + ["weight"] + ["bias"] * centred
    plain: Function = partial(ours, kernels="torch", add=add, centred=centred)
    fused: Function = partial(ours, kernels="triton" if cuda else "torch", add=add, centred=centred)
    functions = {f"ours ({'triton' if cuda else 'torch'})": fused, "torch": plain}
    missing: dict[str, str] = {}
    if cuda:
        functions["torch.compile"] = torch.compile(plain, dynamic=False)
        try:
            theirs = liger(add, centred)
            if theirs is not None:
                functions["liger"] = theirs
        except ImportError as error:
            missing["liger"] = str(error)
    else:
        missing = {name: "only on CUDA" for name in ("torch.compile", "liger")}
    # Forward: x in, norm out; with the residual one more each. Backward: x and its gradients in and out; with the residual one more in.
    tensors = (4 if add else 2) + ((4 if add else 3) if backward else 0)
    op = f"{'add + ' if add else ''}{'layer_norm' if centred else 'rms_norm'}{', backward too' if backward else ''}"
    truth = side(partial(formulas, add=add, centred=centred), names, backward)
    return Entry(
        op=op, shape=f"{rows} x {size} {str(dtype)[6:]}", bytes=tensors * rows * size * dtype.itemsize, flops=0.0,
        make=partial(make, rows, size, dtype, device), sides={name: side(f, names, backward) for name, f in functions.items()},
        truth=truth, judge="torch", missing=missing,
    )  # fmt: skip


def entries(device: torch.device) -> list[Entry]:
    """The norms of XGLM-1.7B at 16384 tokens and q/k norm of 16 heads; on a CPU a small batch."""
    shapes = [(16384, 2048), (16384 * 16, 128)] if device.type == "cuda" else [(4096, 2048)]
    kinds = [(add, centred, backward) for centred in (False, True) for add in (False, True) for backward in (False, True)]
    return [entry(device, rows, size, *kind) for rows, size in shapes for kind in kinds]
