"""RMSNorm and LayerNorm of rows whose weights differ by group, alone or of a sum with the residual stream.

Inference only: no gradients. `x` is [N, H], rows sorted by group; `weight` and `bias` are [groups, H] in the type of `x` or in fp32, a
stride of 0 over the groups being one row that all share. Statistics are in fp32 and each element is rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megaxelm_kernels.norms import KERNELS, LARGEST_SIZE, layer_norm_reference, rms_norm_reference
from megaxelm_kernels.row_groups import RowGroups

_HALF_OR_SINGLE = (torch.bfloat16, torch.float16, torch.float32)
Result = Tensor | tuple[Tensor, Tensor]


def grouped_rms_norm(
    x: Tensor, weight: Tensor, eps: float, groups: RowGroups, *, residual: Tensor | None = None, kernels: str = "torch"
) -> Result:
    """`norms.rms_norm` of each row by the weight of its group; with `residual` [N, H] that of x + residual, and that sum.

    Raises:
        ValueError: shapes or types that do not fit, unknown `kernels`.
    """
    return _norm(x, weight, None, eps, groups, residual, kernels)


def grouped_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, groups: RowGroups, *, residual: Tensor | None = None, kernels: str = "torch"
) -> Result:
    """`norms.layer_norm` of each row by weight and bias of its group; with `residual` [N, H] that of x + residual, and that sum.

    Raises:
        ValueError: as `grouped_rms_norm`.
    """
    return _norm(x, weight, bias, eps, groups, residual, kernels)


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, groups: RowGroups, residual: Tensor | None, kernels: str) -> Result:
    _check(x, weight, bias, groups, residual, kernels)
    if kernels == "triton":
        from megaxelm_kernels import grouped_norms_triton

        normed, total = grouped_norms_triton.forward(x, residual, weight, bias, eps, groups)
        return normed if total is None else (normed, total)
    total = x if residual is None else x + residual
    normed = _by_torch(total, weight, bias, eps, groups)
    return normed if residual is None else (normed, total)


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, groups: RowGroups) -> Tensor:
    shape, size = x.shape, (x.shape[1],)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = groups.counts[0] if groups.counts else 0
    if weight.stride(0) == 0 and (bias is None or bias.stride(0) == 0):
        weight, bias = weight[0], None if bias is None else bias[0]
    elif count and groups.counts == (count,) * groups.num_groups:
        # Groups of one count are a dimension: no row of the weights is copied for each row of x.
        wide = wide.view(groups.num_groups, count, shape[1])
        weight, bias = weight[:, None], None if bias is None else bias[:, None]
    else:
        of_row = groups.group_of_row
        weight, bias = weight[of_row], None if bias is None else bias[of_row]
    if bias is None:
        normed = F.rms_norm(wide, size, None, eps).mul_(weight)
    else:
        normed = torch.addcmul(bias.to(wide.dtype), F.layer_norm(wide, size, None, None, eps), weight.to(wide.dtype))
    return normed.reshape(shape).to(x.dtype)


def grouped_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, groups: RowGroups) -> Tensor:
    """The formula of either norm in the type of `x`: the truth, in fp64, that it is tested against."""
    of_row = groups.group_of_row
    if bias is None:
        return rms_norm_reference(x, weight[of_row], eps)
    return layer_norm_reference(x, weight[of_row], bias[of_row], eps)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, groups: RowGroups, residual: Tensor | None, kernels: str) -> None:
    if kernels not in KERNELS:
        raise ValueError(f"kernels = {kernels!r}: choose {' or '.join(KERNELS)}")
    if x.ndim != 2 or x.shape[0] != groups.num_rows or x.shape[1] < 1:
        raise ValueError(f"x {tuple(x.shape)}: expected [{groups.num_rows}, H], the rows of the groups, with H of at least 1")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual {residual.dtype} {tuple(residual.shape)} and x {x.dtype} {tuple(x.shape)}: give both one shape and one type"
        )
    expected = (groups.num_groups, x.shape[1])
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.shape != expected:
            raise ValueError(f"{name} {tuple(parameter.shape)}: expected {list(expected)}, one row a group")
        if parameter.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name} is {parameter.dtype}, x is {x.dtype}: give it the type of x, or float32")
    if kernels == "triton":
        if x.dtype not in _HALF_OR_SINGLE:
            raise ValueError(f"x is {x.dtype}: the Triton kernels take bfloat16, float16 and float32; choose kernels = torch")
        if x.shape[1] > LARGEST_SIZE:
            raise ValueError(f"x has {x.shape[1]} features: the Triton kernels take at most {LARGEST_SIZE}; choose kernels = torch")
