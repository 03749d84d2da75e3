"""Activations of the feed-forward block: gated SiLU (SwiGLU) and GELU, with the bias of the product before it.

Nothing but the inputs is kept for the backward pass, which computes the rest anew. With `kernels="triton"` (bf16, fp16 or fp32)
arithmetic is in fp32 and rounded once, and the gradient of the bias has no atomic addition: two runs agree to the bit. Second derivatives
are torch's alone.

`in_place=True` (Triton) writes the gradients over the inputs, which saves their memory at the peak of the backward pass. It is right where
nobody else wants the inputs' values after that: the product of a linear layer that goes nowhere else. What goes wrong otherwise:

- A leaf, or a view of one, is refused. An input that needs no gradient is never written to.
- An operation whose backward pass comes later and reads the same values, or a second backward pass through this one, raises torch's
  error about a tensor modified by an in-place operation. Code of your own that reads the input after the backward pass sees gradients.
- Activation checkpointing (`torch.utils.checkpoint`, not reentrant): what is overwritten are the inputs as they were recomputed. But
  torch compares no versions there, so a second operation inside the checkpointed function that keeps the same tensor may go wrong unseen.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KERNELS = ("torch", "triton")
APPROXIMATIONS = ("none", "tanh")
_HALF_OR_SINGLE = (torch.bfloat16, torch.float16, torch.float32)


def swiglu(gate: Tensor, up: Tensor, *, in_place: bool = False, kernels: str = "torch") -> Tensor:
    """silu(gate) * up, with silu(x) = x / (1 + exp(-x)); `gate` and `up` of one shape and type.

    `in_place`: write the gradients over `gate` and `up`; see the module's text. By torch it changes nothing.

    Source: Shazeer 2020, arXiv 2002.05202.

    Raises:
        ValueError: shapes or types that do not fit, unknown `kernels`, `in_place` for a leaf.
    """
    _check_kernels(gate, "gate", kernels)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {gate.dtype} {tuple(gate.shape)} and up {up.dtype} {tuple(up.shape)}: give both one shape and one type")
    if in_place:
        _check_in_place(gate, "gate")
        _check_in_place(up, "up")
    if kernels == "triton":
        return _swiglu(gate, up, in_place)
    return F.silu(gate) * up


def gelu_bias(
    x: Tensor, bias: Tensor | None = None, approximate: str = "none", *, in_place: bool = False, kernels: str = "torch"
) -> Tensor:
    """gelu(x + bias), `x` [..., H], `bias` [H] in the type of `x` or fp32, or None.

    gelu(x) = x * (1 + erf(x / sqrt(2))) / 2, or with `approximate="tanh"` x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) / 2.
    `in_place`: write the gradient over `x`; see the module's text. By torch it changes nothing.

    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.

    Raises:
        ValueError: shapes or types that do not fit, unknown `kernels` or `approximate`, `in_place` for a leaf.
    """
    _check_kernels(x, "x", kernels)
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate = {approximate!r}: choose {' or '.join(APPROXIMATIONS)}")
    if bias is not None and (x.ndim == 0 or bias.shape != x.shape[-1:]):
        raise ValueError(f"bias {tuple(bias.shape)}: expected [H], one a feature of x {tuple(x.shape)}")
    if kernels == "triton" and bias is not None and bias.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"bias is {bias.dtype}, x is {x.dtype}: give it the type of x, or float32")
    if in_place:
        _check_in_place(x, "x")
    if kernels == "triton":
        return _gelu(x, bias, approximate == "tanh", in_place)
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def _check_kernels(x: Tensor, name: str, kernels: str) -> None:
    if kernels not in KERNELS:
        raise ValueError(f"kernels = {kernels!r}: choose {' or '.join(KERNELS)}")
    if kernels == "triton" and x.dtype not in _HALF_OR_SINGLE:
        raise ValueError(f"{name} is {x.dtype}: the Triton kernels take bfloat16, float16 and float32; choose kernels = torch")


def _check_in_place(x: Tensor, name: str) -> None:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return
    if x.is_leaf or (x._base is not None and x._base.is_leaf):
        raise ValueError(
            f"in_place = True: {name} {tuple(x.shape)} is a leaf or a view of one, whose values the gradient would destroy; "
            "choose in_place = False"
        )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors of one size share memory."""
    same = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
    return same and abs(int(a.storage_offset()) - int(b.storage_offset())) < a.numel()


def _gradient(x: Tensor, needed: bool, in_place: bool) -> Tensor | None:
    """Where the gradient of the kept input `x` goes. The new version number makes every later reader of the old values an error."""
    if not needed:
        return None
    if not in_place:
        return torch.empty_like(x)
    torch.autograd.graph.increment_version(x)
    return x.detach()


@torch.compiler.disable
def _swiglu(gate: Tensor, up: Tensor, in_place: bool) -> Tensor:
    return _SwiGLU.apply(gate, up, in_place)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, in_place: bool) -> Tensor:
        from megaxelm_kernels import activations_triton

        gate, up = gate.contiguous(), up.contiguous()
        if in_place and _overlap(gate, up):
            raise ValueError("in_place = True: gate and up share memory, which has no place for two gradients; choose in_place = False")
        ctx.save_for_backward(gate, up)
        ctx.in_place = in_place
        return activations_triton.swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from megaxelm_kernels import activations_triton

        gate, up = ctx.saved_tensors
        grad_gate = _gradient(gate, ctx.needs_input_grad[0], ctx.in_place)
        grad_up = _gradient(up, ctx.needs_input_grad[1], ctx.in_place)
        activations_triton.swiglu_backward(grads[0].contiguous(), gate, up, grad_gate, grad_up)
        return grad_gate, grad_up, None


@torch.compiler.disable
def _gelu(x: Tensor, bias: Tensor | None, tanh: bool, in_place: bool) -> Tensor:
    return _GELU.apply(x, bias, tanh, in_place)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, tanh: bool, in_place: bool) -> Tensor:
        from megaxelm_kernels import activations_triton

        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        ctx.save_for_backward(x, bias)
        ctx.tanh, ctx.in_place = tanh, in_place
        return activations_triton.gelu_forward(x, bias, tanh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from megaxelm_kernels import activations_triton

        x, bias = ctx.saved_tensors
        grad_x = _gradient(x, ctx.needs_input_grad[0], ctx.in_place)
        sums = activations_triton.gelu_backward(grads[0].contiguous(), x, bias, grad_x, ctx.tanh, sums=ctx.needs_input_grad[1])
        return grad_x, None if sums is None else sums.to(bias.dtype), None, None


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula of `swiglu` in the type of `gate`: the truth, in fp64, that it is tested against."""
    return gate / (1 + (-gate).exp()) * up


def gelu_bias_reference(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """The formula of `gelu_bias` in the type of `x`: the truth, in fp64, that it is tested against."""
    x = x if bias is None else x + bias
    if approximate == "tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x * torch.erfc(-x / math.sqrt(2)) / 2
