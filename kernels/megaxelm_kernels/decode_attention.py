"""Attention of one new token a sequence over its cached keys and values, and the cache's writing.

The cache of a layer is a slab: keys and values [slots, kv_heads, capacity, D], a slot a sequence (of an expert). Inference only: no
gradients. No place that a row may not see has a part in the result, whatever lies there, NaN too.
"""

from __future__ import annotations

import torch
from torch import Tensor

KERNELS = ("torch", "triton")
_HALF_OR_SINGLE = (torch.bfloat16, torch.float16, torch.float32)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
    *,
    longest: int,
    scale: float | None = None,
    sliding_window: int | None = None,
    slot_order: Tensor | None = None,
    kernels: str = "torch",
) -> Tensor:
    """Softmax of the scaled scores of `q` and the first `lengths[row]` keys of slot `slots[row]`, times the values: [R, heads, D].

    Args:
        q: [R, heads, D], the new token of each row.
        keys, values: [slots, kv_heads, capacity, D]; the new token's are already there (`store_kv`).
        slots: [R] int64; two rows may share a slot.
        lengths: [R] int64, places to read, the new token's included; a row of length 0 gives zeros.
        longest: bound of `lengths` known to the host, at most the capacity; what is launched depends on it and not on `lengths`.
        scale: of the scores; 1 / sqrt(D) if None.
        sliding_window: a token sees itself and the `sliding_window - 1` places before it.
        slot_order: [slots] int64, the row that reads each slot or -1: spares the torch path its finding. Only where no slot is shared.

    Raises:
        ValueError: shapes or types that do not fit, unknown `kernels`.
    """
    _check(q, keys, values, slots, lengths, longest, sliding_window, kernels)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return decode_attention_reference(q, keys, values, slots, lengths, scale=scale, sliding_window=sliding_window)


def decode_attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, *, scale: float, sliding_window: int | None = None
) -> Tensor:
    """The formula of `decode_attention`, a row at a time, in the type of `q`: the truth, in fp64, that it is tested against."""
    out = torch.zeros_like(q)
    kv_heads = keys.shape[1]
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        if length:
            first = 0 if sliding_window is None else max(0, length - sliding_window)
            k, v = keys[slot, :, first:length], values[slot, :, first:length]
            scores = q[row].view(kv_heads, -1, q.shape[-1]) @ k.transpose(1, 2) * scale
            out[row] = (scores.softmax(-1) @ v).reshape(q.shape[1:])
    return out


def store_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor, *, kernels: str = "torch") -> None:
    """Write `k` and `v` [N, kv_heads, D] to the places `positions` [N] of the slots `slots` [N] of `keys` and `values`, in place.

    A row whose position is outside 0 to capacity - 1 is skipped: so is the padding of a bucket of rows. Two rows for one place: either
    may be kept.

    Raises:
        ValueError: shapes or types that do not fit, unknown `kernels`.
    """
    inside = (positions >= 0) & (positions < keys.shape[2])
    if not bool(inside.all()):
        k, v, slots, positions = k[inside], v[inside], slots[inside], positions[inside]
    keys[slots, :, positions] = k
    values[slots, :, positions] = v


def _check(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, longest: int, sliding_window: int | None, kernels: str
) -> None:
    if kernels not in KERNELS:
        raise ValueError(f"kernels = {kernels!r}: choose {' or '.join(KERNELS)}")
