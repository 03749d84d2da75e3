"""RMSNorm and LayerNorm over the last dimension, alone or of a sum with the residual stream.

`x` is [..., H], `weight` and `bias` are [H] in the type of `x` or in fp32. With `kernels="triton"` (bf16, fp16 or fp32, H to 16384)
statistics and sums are in fp32, each element is read and written once, and the gradients have no atomic addition: two runs agree to the
bit. Second derivatives are torch's alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KERNELS = ("torch", "triton")
LARGEST_SIZE = 16384  # features of a row that one program of the Triton kernels holds
_HALF_OR_SINGLE = (torch.bfloat16, torch.float16, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, kernels: str = "torch") -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; `x` [..., H], `weight` [H]; statistics in fp32 for half types.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.

    Raises:
        ValueError: shapes or types that do not fit, unknown `kernels`.
    """
    _check(x, None, weight, None, kernels)
    if kernels == "triton":
        return _one(x, None, weight, None, eps)[0]
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, kernels: str = "torch") -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; `x` [..., H], `weight` and `bias` [H].

    Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450.

    Raises:
        ValueError: as `rms_norm`.
    """
    _check(x, None, weight, bias, kernels)
    if kernels == "triton":
        return _one(x, None, weight, bias, eps)[0]
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, kernels: str = "torch") -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum in the type of `x`: the new residual stream. Both results carry gradients.

    The statistics are those of the sum after its rounding, so the results are those of the addition and `rms_norm` one after the other.

    Raises:
        ValueError: as `rms_norm`; `x` and `residual` that differ in shape or type.
    """
    _check(x, residual, weight, None, kernels)
    if kernels == "triton":
        return _one(x, residual, weight, None, eps)
    total = x + residual
    return F.rms_norm(total, (x.shape[-1],), weight, eps), total


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, kernels: str = "torch"
) -> tuple[Tensor, Tensor]:
    """`layer_norm` of x + residual, and that sum in the type of `x`: as `add_rms_norm`."""
    _check(x, residual, weight, bias, kernels)
    if kernels == "triton":
        return _one(x, residual, weight, bias, eps)
    total = x + residual
    return F.layer_norm(total, (x.shape[-1],), weight, bias, eps), total


def _check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, kernels: str) -> None:
    if kernels not in KERNELS:
        raise ValueError(f"kernels = {kernels!r}: choose {' or '.join(KERNELS)}")
    size = x.shape[-1] if x.ndim else 0
    if size < 1:
        raise ValueError(f"x {tuple(x.shape)}: expected [..., H] with H of at least 1")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual {residual.dtype} {tuple(residual.shape)} and x {x.dtype} {tuple(x.shape)}: give both one shape and one type"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (size,):
            raise ValueError(f"{name} {tuple(parameter.shape)}: expected [{size}], one a feature of x {tuple(x.shape)}")
    if kernels == "torch":
        return
    if x.dtype not in _HALF_OR_SINGLE:
        raise ValueError(f"x is {x.dtype}: the Triton kernels take bfloat16, float16 and float32; choose kernels = torch")
    if size > LARGEST_SIZE:
        raise ValueError(f"x has {size} features: the Triton kernels take at most {LARGEST_SIZE}; choose kernels = torch")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} is {parameter.dtype}, x is {x.dtype}: give it the type of x, or float32")


@torch.compiler.disable
def _one(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return _Norm.apply(x, residual, weight, bias, eps)


class _Norm(torch.autograd.Function):
    """Norm and sum (`x` itself without a residual). Kept for the backward pass: the sum, the weight, and two fp32 numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        from megaxelm_kernels import norms_triton

        x, weight = x.contiguous(), weight.contiguous()
        residual = None if residual is None else residual.contiguous()
        normed, total, mean, rstd = norms_triton.forward(x, residual, weight, None if bias is None else bias.contiguous(), eps)
        ctx.save_for_backward(total if residual is not None else x, weight, mean, rstd)
        ctx.set_materialize_grads(False)  # a result that nobody used has no gradient to be read
        ctx.bias_dtype = None if bias is None else bias.dtype
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from megaxelm_kernels import norms_triton

        total, weight, mean, rstd = ctx.saved_tensors
        grad_normed, grad_total = grads
        if grad_normed is None:
            return grad_total, grad_total, None, None, None
        grad_x, grad_weight, grad_bias = norms_triton.backward(
            grad_normed.contiguous(),
            None if grad_total is None else grad_total.contiguous(),
            total,
            weight,
            mean,
            rstd,
            sums=any(ctx.needs_input_grad[2:4]),
        )
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(ctx.bias_dtype)
        return grad_x, grad_x if ctx.needs_input_grad[1] else None, grad_weight, grad_bias, None


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula of `rms_norm` in the type of `x`: the truth, in fp64, that it is tested against."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The formula of `layer_norm` in the type of `x`: the truth, in fp64, that it is tested against."""
    return rms_norm_reference(x - x.mean(-1, keepdim=True), weight, eps) + bias
