"""How many rows of logits exist at one time, and the sum of the chunks' gradients of the head."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

CUDA_CHUNK_BYTES = 1 << 31  # 4096 rows of 256128 columns in bf16: 16384 tokens pass over the weight and its gradient 4 times
CPU_CHUNK_BYTES = 1 << 27  # 128 rows of 256008 columns in fp32; the products of 64 rows take a quarter longer
_ROW_STEP = 128  # rows of a tile of the matrix product
_SLICE_ROWS = 1 << 14  # rows of the head whose gradient is made at one time where the product itself cannot add it


def is_exact(dtype: torch.dtype) -> bool:
    """Whether losses are counted in `dtype` itself; those of shorter types are in fp32."""
    return dtype in (torch.float32, torch.float64)


def rows_per_chunk(
    num_rows: int,
    columns: int,
    dtype: torch.dtype,
    device_type: str,
    *,
    chunk_rows: int | None = None,
    chunk_bytes: int | None = None,
    capped: bool = False,
    kernels: str = "torch",
) -> int:
    """Rows of logits that exist at one time: `chunk_rows` if given, else equal chunks that each take at most `chunk_bytes`.

    Counted are the logits [rows, columns] in `dtype`, with torch in fp32 as well where that is another type, and the slope of a soft
    cap. `chunk_bytes`: None is 2 GiB on CUDA, 128 MiB elsewhere.

    Raises:
        ValueError: chunk_rows or chunk_bytes below 1.
    """
    if chunk_rows is not None:
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows = {chunk_rows}: choose at least 1")
        return chunk_rows
    if chunk_bytes is None:
        chunk_bytes = CUDA_CHUNK_BYTES if device_type == "cuda" else CPU_CHUNK_BYTES
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes = {chunk_bytes}: choose at least 1; a chunk has one row at the least")
    element = dtype.itemsize
    if kernels == "torch":
        wide = dtype.itemsize if is_exact(dtype) else 4
        element += (0 if is_exact(dtype) else wide) + (wide if capped else 0)
    most = max(1, chunk_bytes // (element * columns))
    step = _ROW_STEP if most >= _ROW_STEP else 1
    most -= most % step
    chunks = max(1, -(-num_rows // most))
    even = -(-num_rows // chunks)
    return max(1, min(num_rows, -(-even // step) * step))


@cache
def _adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's product of two `dtype` matrices can be added to an fp32 matrix as it is made (CUDA, recent releases)."""
    if device.type != "cuda":
        return False
    total, factor = torch.zeros(16, 16, device=device), torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # refused, or an argument that this release does not know
        return False
    return True


def add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """`total` [V, H] += grad_logits [rows, V].T @ hidden [rows, H], without another tensor of the size of `total`."""
    if total.dtype == hidden.dtype:
        torch.addmm(total.T, hidden.T, grad_logits, out=total.T)
    elif _adds_in_fp32(total.device, hidden.dtype):
        torch.addmm(total, grad_logits.T, hidden, out_dtype=torch.float32, out=total)
    else:
        for start in range(0, total.shape[0], _SLICE_ROWS):
            part = slice(start, start + _SLICE_ROWS)
            total[part] += grad_logits[:, part].T @ hidden
