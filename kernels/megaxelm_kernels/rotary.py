"""Rotary positions (RoPE): pairs of features of queries and keys turn by an angle that grows with the position.

Two layouts of the pairs: half-split, feature i with i + rotary_dim / 2, as in Hugging Face checkpoints; interleaved, 2i with 2i + 1, as
in GPT-J. The first rotary_dim = 2 x (columns of the tables) features of a head are turned, the others pass. Tables come from
`rotary_frequencies.py`. By torch, tables and each of two steps are rounded to the type of q; by Triton, the fp32 tables are used as they
are and only the result is rounded.

Sources: Su et al. 2021, arXiv 2104.09864; q/k norm: Henry et al. 2020, arXiv 2010.04245, as RMSNorm in Qwen3, arXiv 2505.09388.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megaxelm_kernels.norms import rms_norm
from megaxelm_kernels.rotary_frequencies import ROPE_TYPES, inverse_frequencies, rotary_parameters, rotary_tables

__all__ = [
    "ROPE_TYPES",
    "apply_rotary",
    "apply_rotary_qk",
    "apply_rotary_reference",
    "inverse_frequencies",
    "norm_rotary_qk",
    "norm_rotary_qk_reference",
    "rotary_parameters",
    "rotary_tables",
    "split_qkv",
]

_TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def _pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    first, second = _pairs(x, half, interleaved)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = _pairs(out, half, interleaved)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=direction)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out


class _Rotate(torch.autograd.Function):
    """Rotation by the tables; its backward is the rotation by the negative angle, so nothing but the tables is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(x, cos, sin, 1, interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1, ctx.interleaved), None, None, None


class _RotateBoth(torch.autograd.Function):
    """q and k in one launch. The outputs of a rotation in place are new tensors on the old memory; `increment_version` makes autograd
    refuse what was kept of the old values for another backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, direction: int, interleaved: bool, in_place: bool, kernels: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.direction, ctx.interleaved, ctx.in_place, ctx.kernels = direction, interleaved, in_place, kernels
        if kernels == "torch":
            cos, sin = (table.to(q.dtype).unsqueeze(1) for table in (cos, sin))
            turned = [_rotate(x, cos, sin, direction, interleaved) for x in (q, k)]
            if in_place:
                return q.detach().copy_(turned[0]), k.detach().copy_(turned[1])
            return turned[0], turned[1]
        from megaxelm_kernels.rotary_triton import turn

        if in_place:
            q_out, k_out = q.detach(), k.detach()
        else:
            q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
            q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
        if q.shape[0] > 0:
            turn(q, k, q_out, k_out, *(table.float().contiguous() for table in (cos, sin)), interleaved=interleaved, backward=direction < 0)
        if in_place:
            torch.autograd.graph.increment_version((q, k))
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k = grads
        in_place = ctx.in_place and not torch.is_grad_enabled() and _overlap(grad_q, grad_k) is None
        turned = _RotateBoth.apply(grad_q, grad_k, *ctx.saved_tensors, -ctx.direction, ctx.interleaved, in_place, ctx.kernels)
        return *turned, None, None, None, None, None, None


class _SplitQKV(torch.autograd.Function):
    """Three views of one projection. To autograd they are tensors of their own, so that q and k may be written in place."""

    @staticmethod
    def forward(ctx: Any, projection: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        q, k, v = (x.unflatten(1, (-1, head_dim)).detach() for x in projection.split(sizes, dim=1))
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return torch.cat([grad.flatten(1) for grad in grads], 1), None, None, None


class _NormRotateBoth(torch.autograd.Function):
    """Per-head RMSNorm and rotation by Triton. The inputs are kept and the root mean square is taken again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        from megaxelm_kernels.norm_rotary_triton import norm_turn

        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        q_weight, k_weight, cos, sin = (x.contiguous() for x in (q_weight, k_weight, cos.float(), sin.float()))
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.eps, ctx.interleaved = eps, interleaved
        if q.shape[0] == 0:
            return torch.empty_like(q), torch.empty_like(k)
        return norm_turn(q, k, q_weight, k_weight, eps, cos, sin, interleaved=interleaved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from megaxelm_kernels.norm_rotary_triton import norm_turn_backward

        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        if q.shape[0] == 0:
            return *(torch.zeros_like(x) for x in (q, k, q_weight, k_weight)), None, None, None, None
        grad_q, grad_k = (x if x.stride(-1) == 1 else x.contiguous() for x in grads)
        dq, dq_weight = norm_turn_backward(q, grad_q, q_weight, ctx.eps, cos, sin, interleaved=ctx.interleaved)
        dk, dk_weight = norm_turn_backward(k, grad_k, k_weight, ctx.eps, cos, sin, interleaved=ctx.interleaved)
        return dq, dk, dq_weight, dk_weight, None, None, None, None


def _overlap(q: Tensor, k: Tensor) -> str | None:
    """Why `q` and `k` cannot be written where they lie, or None."""
    for name, x in (("q", q), ("k", k)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            return f"{name} of strides {x.stride()}: its features do not lie one after another"
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            return f"{name} of strides {x.stride()}: it is expanded, several places share one value"
    if q.numel() > 0 and q.data_ptr() == k.data_ptr():
        return "q and k lie in the same memory"
    return None


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, kernels: str) -> None:
    if kernels not in ("torch", "triton"):
        raise ValueError(f"kernels = {kernels!r}: choose torch or triton")
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.dtype != k.dtype:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}: expected [N, heads, head_dim], [N, kv_heads, head_dim], one type"
        )
    _check_tables(q, cos, sin)
    if kernels == "triton" and q.dtype not in _TRITON_TYPES:
        raise ValueError(f"q of {q.dtype}: the Triton kernel takes float32, bfloat16 or float16; choose kernels = torch")


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[0] != x.shape[0] or not 2 <= 2 * cos.shape[1] <= x.shape[-1]:
        raise ValueError(
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)} do not fit {tuple(x.shape)}: expected [{x.shape[0]}, rotary_dim / 2] each, "
            f"rotary_dim from 2 to {x.shape[-1]}"
        )


@torch.compiler.disable
def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn `x` [N, heads, head_dim] by the tables [N, rotary_dim / 2]; the tables are rounded to the type of `x` first.

    Raises:
        ValueError: tables that do not fit.
    """
    _check_tables(x, cos, sin)
    return _Rotate.apply(x, cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1), interleaved)


@torch.compiler.disable
def split_qkv(projection: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, num_heads, head_dim], k and v [N, num_kv_heads, head_dim] as views of `projection` [N, their features one after another].

    The backward is one copy. Unlike the views of `torch.split`, q and k may then be turned in place.

    Raises:
        ValueError: a projection of another width.
    """
    width = (num_heads + 2 * num_kv_heads) * head_dim
    if projection.ndim != 2 or projection.shape[1] != width:
        raise ValueError(f"projection {tuple(projection.shape)}: expected [N, {width}], q, k and v of {num_heads}, {num_kv_heads} heads")
    return _SplitQKV.apply(projection, num_heads, num_kv_heads, head_dim)


@torch.compiler.disable
def apply_rotary_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, kernels: str = "torch", in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Turn `q` [N, heads, head_dim] and `k` [N, kv_heads, head_dim] by the tables [N, rotary_dim / 2]; by Triton in one launch.

    Views of one packed projection are read by their strides, without a copy; `split_qkv` makes them.

    `in_place`: the results lie where q and k lay. Say so only where both memories belong to this call: q and k are not used
    afterwards, nor kept by what made them, and the results go to one operation that makes new gradients for them and keeps none, as every
    attention backend here does. Then the gradients are turned in place too. Otherwise a gradient may be shared (that of `a + b`
    is one tensor for both), and nothing a backward can see tells; so gradients are never overwritten unasked, nor, even when asked, if
    they are expanded, share memory, or are themselves to be differentiated.

    Raises:
        ValueError: shapes or types that do not fit, or memory that cannot be written in place.
    """
    _check(q, k, cos, sin, kernels)
    if in_place:
        reason = _overlap(q, k)
        if reason is not None:
            raise ValueError(f"in_place: {reason}; pass in_place=False")
        if torch.is_grad_enabled() and any(
            x.requires_grad and (x.is_leaf or (x._base is not None and x._base.is_leaf and x._base.requires_grad)) for x in (q, k)
        ):
            raise ValueError("in_place: q or k is a leaf that needs its gradient, or a view of one; pass in_place=False")
    return _RotateBoth.apply(q, k, cos, sin, 1, interleaved, in_place, kernels)


@torch.compiler.disable
def norm_rotary_qk(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    kernels: str = "torch",
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head of `q` [N, heads, head_dim] and `k` [N, kv_heads, head_dim] with weights [head_dim], then the rotation.

    By Triton each is read and written once; the gradients of the weights are sums in a fixed order.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    _check(q, k, cos, sin, kernels)
    if q_weight.shape != q.shape[2:] or k_weight.shape != k.shape[2:]:
        raise ValueError(f"q_weight {tuple(q_weight.shape)}, k_weight {tuple(k_weight.shape)}: expected [{q.shape[2]}], the size of a head")
    if kernels == "torch":
        normed = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
        return _RotateBoth.apply(*normed, cos, sin, 1, interleaved, False, "torch")
    return _NormRotateBoth.apply(q, k, q_weight, k_weight, eps, cos, sin, interleaved)


def apply_rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """The rotation as a matrix [[cos, -sin], [sin, cos]] for each pair, in the type of `x`: what the others are tested against."""
    half = cos.shape[-1]
    matrix = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2).to(x.dtype)  # [N, half, 2, 2]
    turned = torch.einsum("npij,nhpj->nhpi", matrix, torch.stack(_pairs(x, half, interleaved), -1))
    parts = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    return torch.cat([parts, x[..., 2 * half :]], -1)


def norm_rotary_qk_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """The norm by its formula, then `apply_rotary_reference`, in the types of `q` and `k`."""
    normed = (x * x.square().mean(-1, keepdim=True).add(eps).rsqrt() * weight for x, weight in ((q, q_weight), (k, k_weight)))
    q_out, k_out = (apply_rotary_reference(x, cos, sin, interleaved=interleaved) for x in normed)
    return q_out, k_out
