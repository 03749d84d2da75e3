"""One linear layer of many experts: rows sorted by group, each group with a weight of its own, in one launch.

Inference only: no gradients. The number of launches does not depend on the number of groups, and no weight is copied. The counts of the
groups may differ from call to call; an empty group costs nothing.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from megaxelm_kernels.row_groups import RowGroups

KERNELS = ("torch", "triton")
FEW_ROWS, FEWEST_ROWS = 8, 2  # of a group, up to which the torch path in fp32 has the weight on the left: out >= in, out < in
WIDE, FOUR = 5, 4
PIECES = 4  # of a lone matrix
_HALF_OR_SINGLE = (torch.bfloat16, torch.float16, torch.float32)


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: RowGroups, *, kernels: str = "torch", out: Tensor | None = None
) -> Tensor:
    """`x[row] @ weight[group of row].T + bias[group of row]`: [N, out].

    Args:
        x: [N, in], rows sorted by group.
        weight: [groups, out, in], each group's matrix contiguous. A stride of 0 over the groups (`expand`) is one weight that all share.
        bias: [groups, out], or None.
        groups: which rows belong to which group; `groups.num_rows` is N.
        out: [N, out] to write to, with the features of a row one after another; a new tensor if None.

    Raises:
        ValueError: shapes, types or strides that do not fit, unknown `kernels`.
    """
    _check(x, weight, bias, groups, kernels, out)
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[1], dtype=x.dtype, device=x.device)
    if not x.shape[0] or not weight.shape[1]:
        return out
    if kernels == "triton":
        from megaxelm_kernels import grouped_linear_triton

        grouped_linear_triton.forward(x, weight, bias, groups, out)
        return out
    return _by_torch(x, weight, bias, groups, out)


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None, groups: RowGroups, out: Tensor) -> Tensor:
    if weight.stride(0) == 0:
        shared = bias[:1] if bias is not None and bias.stride(0) == 0 else None
        _one_count(x, weight[:1], shared, out, 1, groups.num_rows)
        if bias is not None and shared is None:
            out += bias[groups.group_of_row]
        return out
    for first, num_groups, begin, count in _runs(groups.counts):
        if num_groups == groups.num_groups:
            _one_count(x, weight, bias, out, num_groups, count)
        else:
            some, rows = slice(first, first + num_groups), slice(begin, begin + num_groups * count)
            _one_count(x[rows], weight[some], None if bias is None else bias[some], out[rows], num_groups, count)
    return out


@lru_cache(maxsize=256)
def _runs(counts: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """First group, groups, first row and rows of each group, of each run of neighbours of one count; empty groups are left out."""
    runs, first, begin = [], 0, 0
    while first < len(counts):
        last = first + 1
        while last < len(counts) and counts[last] == counts[first]:
            last += 1
        if counts[first]:
            runs.append((first, last - first, begin, counts[first]))
        begin += (last - first) * counts[first]
        first = last
    return runs


def _one_count(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, num_groups: int, count: int) -> None:
    """Groups of one count: x [groups * count, in], weight [groups, out, in], bias [groups, out], out [groups * count, out].

    Products of few rows are bound by the reading of the weight. While it comes from memory, MKL's batched product with the weight on the
    left is 1.3 to 2.5 times as fast as `F.linear`, for one matrix too if it is cut into pieces; with more features in than out only for
    the fewest rows. In half types both orders are alike. A small model's step is mostly the calls themselves: so each way makes few.
    """
    size_out, size_in = weight.shape[1:]
    if x.dtype != torch.float32 or count > (FEW_ROWS if size_out >= size_in else FEWEST_ROWS):
        if num_groups == 1:
            if bias is None:
                torch.mm(x, weight[0].t(), out=out)
            else:
                torch.addmm(bias[0], x, weight[0].t(), out=out)
            return
        rows, out_rows = x.view(num_groups, count, size_in), out.view(num_groups, count, size_out)
        if bias is None:
            torch.bmm(rows, weight.transpose(1, 2), out=out_rows)
        else:
            torch.baddbmm(bias[:, None], rows, weight.transpose(1, 2), out=out_rows)
        return
    products, columns = num_groups, x.view(num_groups, count, size_in).transpose(1, 2)
    if num_groups == 1 and size_out % PIECES == 0:
        products, weight = PIECES, weight.view(PIECES, size_out // PIECES, size_in)
        columns = columns.expand(PIECES, -1, -1)
    if count == 1:
        column = out.view(products, -1, 1)
        if bias is None:
            torch.bmm(weight, columns, out=column)
        else:
            torch.baddbmm(bias.reshape(products, -1, 1), weight, columns, out=column)
        return
    turned = out.view(num_groups, count, size_out)
    # Of a wide layer four rows at a time are read faster than eight together, though the weight is then read twice.
    step = count if size_out < WIDE * size_in else FOUR
    for begin in range(0, count, step):
        found = torch.bmm(weight, columns[:, :, begin : begin + step]).view(num_groups, size_out, -1)
        # A copy turns the products faster than the addition of the bias would.
        turned[:, begin : begin + step].copy_(found.transpose(1, 2))
    if bias is not None:
        turned.add_(bias[:, None])


def grouped_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, groups: RowGroups) -> Tensor:
    """The formula of `grouped_linear`, a row at a time, in the type of `x`: the truth, in fp64, that it is tested against."""
    of_row = groups.group_of_row
    out = torch.einsum("nd,nod->no", x, weight[of_row])
    return out if bias is None else out + bias[of_row]


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, groups: RowGroups, kernels: str, out: Tensor | None) -> None:
    if kernels not in KERNELS:
        raise ValueError(f"kernels = {kernels!r}: choose {' or '.join(KERNELS)}")
    if weight.ndim != 3 or weight.shape[0] != groups.num_groups:
        raise ValueError(f"weight {tuple(weight.shape)}: expected [{groups.num_groups}, out, in], one matrix a group")
    if x.ndim != 2 or x.shape[0] != groups.num_rows or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x {tuple(x.shape)}: expected [{groups.num_rows}, {weight.shape[2]}], the rows of the groups and `in` of the weight"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype}, x is {x.dtype}: give both one type")
    if weight.shape[1] > 1 and weight.shape[2] > 1 and weight.stride()[1:] != (weight.shape[2], 1):
        raise ValueError(f"weight has strides {weight.stride()}: each group's matrix must be contiguous")
    if bias is not None:
        if bias.shape != weight.shape[:2] or bias.dtype != x.dtype:
            raise ValueError(f"bias {bias.dtype} {tuple(bias.shape)}: expected {x.dtype} {list(weight.shape[:2])}")
        if bias.shape[1] > 1 and bias.stride(1) != 1:
            raise ValueError(f"bias has strides {bias.stride()}: the features of a group must lie one after another")
    if out is not None:
        if out.shape != (x.shape[0], weight.shape[1]) or out.dtype != x.dtype or out.device != x.device:
            raise ValueError(
                f"out {out.dtype} {tuple(out.shape)} on {out.device}: expected {x.dtype} {[x.shape[0], weight.shape[1]]} on {x.device}"
            )
        if out.shape[1] > 1 and out.stride(1) != 1:
            raise ValueError(f"out has strides {out.stride()}: the features of a row must lie one after another")
    if kernels == "triton" and x.dtype not in _HALF_OR_SINGLE:
        raise ValueError(f"x is {x.dtype}: the Triton kernels take bfloat16, float16 and float32; choose kernels = torch")
