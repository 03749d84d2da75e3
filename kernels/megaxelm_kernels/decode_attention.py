"""Attention of one new token a sequence over its cached keys and values, and the writing of that cache.

The cache of a layer is a slab: keys and values [slots, kv_heads, capacity, D], one slot a sequence (of one expert). Inference only: no
gradients. A place that a row may not see has no part in its result, whatever lies there: NaN too.

By Triton what is launched depends on shapes and `longest` alone, so a CUDA graph can be replayed with other slots and lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaxelm_kernels.decode_attention_torch import SlotOrder, attend, order_slots

__all__ = ["KERNELS", "SlotOrder", "decode_attention", "decode_attention_reference", "order_slots", "store_kv"]

KERNELS = ("torch", "triton")
LARGEST_HEAD = 256
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
    slot_order: SlotOrder | None = None,
    kernels: str = "torch",
) -> Tensor:
    """Softmax of the scaled scores of `q` and the first `lengths[row]` keys of slot `slots[row]`, times the values: [R, heads, D].

    Args:
        q: [R, heads, D], the new token of each row.
        keys, values: [slots, kv_heads, capacity, D], contiguous; the new token's are already there (`store_kv`).
        slots: [R] int64; two rows may share a slot.
        lengths: [R] int64, places to read, the new token's included; a row of length 0 gives zeros.
        longest: bound of `lengths` that the host knows, at most the capacity.
        scale: of the scores; 1 / sqrt(D) if None.
        sliding_window: a token sees itself and the `sliding_window - 1` places before it.
        slot_order: `order_slots` of the same arguments, made once a step for all layers; only the torch path has a use for it, and
            then reads neither `slots` nor `lengths`.

    Raises:
        ValueError: shapes or types that do not fit, unknown `kernels`; by torch also slots and lengths out of range. By Triton those
            are the caller's promise (a check would wait for the device).
    """
    _check_cache(keys, values, kernels)
    _check(q, keys, slots, lengths, longest, sliding_window)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if kernels == "triton":
        from megaxelm_kernels import decode_attention_triton

        return decode_attention_triton.forward(q, keys, values, slots, lengths, longest, scale, sliding_window)
    if slot_order is None:
        slot_order = order_slots(keys, slots, lengths, longest=longest, sliding_window=sliding_window)
    return attend(q, keys, values, slot_order, scale)


def decode_attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor, *, scale: float, sliding_window: int | None = None
) -> Tensor:
    """The formula of `decode_attention`, a row at a time, in the type of `q`: the truth, in fp64, that it is tested against."""
    out = torch.zeros_like(q)
    for row, (slot, length) in enumerate(zip(slots.tolist(), lengths.tolist(), strict=True)):
        if length:
            first = 0 if sliding_window is None else max(0, length - sliding_window)
            k, v = keys[slot, :, first:length], values[slot, :, first:length]
            scores = q[row].view(k.shape[0], -1, q.shape[-1]) @ k.transpose(1, 2) * scale
            out[row] = (scores.softmax(-1) @ v).reshape(q.shape[1:])
    return out


def store_kv(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor, *, kernels: str = "torch") -> None:
    """Write `k` and `v` [N, kv_heads, D] to the places `positions` [N] of the slots `slots` [N] of `keys` and `values`, in place.

    A row whose position is outside 0 to capacity - 1 is skipped, whatever its slot: so is the padding of a bucket of rows. Of two rows
    for one place either may be kept.

    Raises:
        ValueError: shapes or types that do not fit, unknown `kernels`.
    """
    _check_cache(keys, values, kernels)
    expected = (slots.shape[0], keys.shape[1], keys.shape[3])
    for name, new in (("k", k), ("v", v)):
        if new.shape != expected or new.dtype != keys.dtype:
            raise ValueError(f"{name} {new.dtype} {tuple(new.shape)}: expected {keys.dtype} {list(expected)}, a row for each slot")
    _check_indices("positions", positions, slots)
    if kernels == "triton":
        from megaxelm_kernels import decode_attention_triton

        decode_attention_triton.store(keys, values, k, v, slots, positions)
        return
    if any(not 0 <= position < keys.shape[2] for position in positions.tolist()):
        inside = (positions >= 0) & (positions < keys.shape[2])
        k, v, slots, positions = k[inside], v[inside], slots[inside], positions[inside]
    for cache, new in ((keys, k), (values, v)):
        cache.transpose(1, 2).index_put_((slots, positions), new)


def _check_cache(keys: Tensor, values: Tensor, kernels: str) -> None:
    if kernels not in KERNELS:
        raise ValueError(f"kernels = {kernels!r}: choose {' or '.join(KERNELS)}")
    if keys.ndim != 4 or values.shape != keys.shape or values.dtype != keys.dtype:
        raise ValueError(
            f"keys {keys.dtype} {tuple(keys.shape)} and values {values.dtype} {tuple(values.shape)}: "
            "give both one type and one shape [slots, kv_heads, capacity, D]"
        )
    if not keys.is_contiguous() or not values.is_contiguous():
        raise ValueError(f"keys and values have strides {keys.stride()} and {values.stride()}: both must be contiguous")
    if kernels == "triton":
        if keys.dtype not in _HALF_OR_SINGLE:
            raise ValueError(f"keys are {keys.dtype}: the Triton kernels take bfloat16, float16 and float32; choose kernels = torch")
        if keys.shape[3] > LARGEST_HEAD:
            raise ValueError(f"heads of {keys.shape[3]} features: the Triton kernels take at most {LARGEST_HEAD}; choose kernels = torch")


def _check(q: Tensor, keys: Tensor, slots: Tensor, lengths: Tensor, longest: int, sliding_window: int | None) -> None:
    kv_heads, capacity, head_dim = keys.shape[1:]
    if q.ndim != 3 or q.shape[2] != head_dim or q.dtype != keys.dtype or q.shape[1] % kv_heads or q.shape[0] != slots.shape[0]:
        raise ValueError(
            f"q {q.dtype} {tuple(q.shape)}: expected {keys.dtype} [{slots.shape[0]}, a multiple of {kv_heads} heads, {head_dim}]"
        )
    _check_indices("lengths", lengths, slots)
    if not 0 <= longest <= capacity:
        raise ValueError(f"longest = {longest}: choose 0 to {capacity}, the capacity of a slot")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window = {sliding_window}: choose 1 or more tokens, or None for no window")


def _check_indices(name: str, given: Tensor, slots: Tensor) -> None:
    if slots.ndim != 1 or given.shape != slots.shape or slots.dtype != torch.int64 or given.dtype != torch.int64:
        raise ValueError(
            f"slots {slots.dtype} {tuple(slots.shape)} and {name} {given.dtype} {tuple(given.shape)}: give one int64 of each for a row"
        )
