"""The torch path of `decode_attention`: how the rows of a step lie in the slab, and the attention of a layer made from that.

One call of torch serves all rows where their slots are neighbours. Where that would read or copy far more than the rows see, it is a call
a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CALL_BYTES = 200_000  # of keys and values that the CPU reads in about the time of one more call of torch


@dataclass(frozen=True)
class SlotOrder:
    """How the rows of one step read the slab; from `order_slots`. Places are those that any of the rows sees."""

    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    sliding_window: int | None
    places: slice
    """Of the capacity."""
    view: slice | None
    """Of the slots, read where they lie. None: the slots of the rows are copied, or read row by row."""
    rows: Tensor | None
    """[R], each row's place in `view`; None if they lie there one after another."""
    index: Tensor | None
    """[R], the slots to be copied; None with a view."""
    hidden: Tensor | None
    """bool [slots of the view or rows, 1, 1, places], True where a row may not look; None if all see the same places."""
    empty: Tensor | None
    """[rows of length 0], or None."""
    row_by_row: bool


def order_slots(keys: Tensor, slots: Tensor, lengths: Tensor, *, longest: int, sliding_window: int | None = None) -> SlotOrder:
    """What `decode_attention` by torch makes of its arguments (see there): once a step, for all layers.

    Raises:
        ValueError: slots or lengths out of range.
    """
    slot_list, length_list = slots.tolist(), lengths.tolist()
    if any(not 0 <= slot < keys.shape[0] for slot in slot_list):
        raise ValueError(f"slots from {min(slot_list)} to {max(slot_list)}: choose 0 to {keys.shape[0] - 1}")
    if any(not 0 <= length <= longest for length in length_list):
        raise ValueError(f"lengths from {min(length_list)} to {max(length_list)}: choose 0 to longest = {longest}")
    seen = [(0 if sliding_window is None else max(0, length - sliding_window), length) for length in length_list if length]
    places = slice(min((first for first, _ in seen), default=0), max((length for _, length in seen), default=0))
    width = places.stop - places.start
    place_bytes = 2 * keys.shape[1] * keys.shape[3] * keys.element_size()
    wanted = sum(length - first for first, length in seen)
    view, places_of_rows, count = _view(slot_list)
    rows = None if places_of_rows is None else torch.tensor(places_of_rows, device=keys.device)
    # A copy is read, written and read again.
    read = count * width if view is not None else 3 * len(slot_list) * width
    row_by_row = (read - wanted) * place_bytes > CALL_BYTES * len(slot_list)
    empty = [row for row, length in enumerate(length_list) if not length]
    hidden = None
    if not row_by_row and (empty or len(set(seen)) > 1):
        hidden = _hidden(lengths, rows, count, places, sliding_window)
    return SlotOrder(
        slots=tuple(slot_list),
        lengths=tuple(length_list),
        sliding_window=sliding_window,
        places=places,
        view=view,
        rows=rows,
        index=slots if view is None else None,
        hidden=hidden,
        empty=torch.tensor(empty, device=keys.device) if empty else None,
        row_by_row=row_by_row,
    )


def _view(slots: list[int]) -> tuple[slice | None, list[int] | None, int]:
    """The slots from the first to the last one used, the rows' places there if not in order, and how many slots are read; no view if a
    slot is used twice or most of them by none."""
    if not slots:
        return slice(0, 0), None, 0
    first, count = min(slots), max(slots) - min(slots) + 1
    if count > 2 * len(slots) or len(set(slots)) < len(slots):
        return None, None, len(slots)
    if slots == list(range(first, first + count)):
        return slice(first, first + count), None, count
    return slice(first, first + count), [slot - first for slot in slots], count


def _hidden(lengths: Tensor, rows: Tensor | None, count: int, places: slice, sliding_window: int | None) -> Tensor:
    if rows is not None:
        lengths = lengths.new_zeros(count).index_copy_(0, rows, lengths)
    place = torch.arange(places.start, places.stop, device=lengths.device)
    hidden = place >= lengths[:, None]
    if sliding_window is not None:
        hidden |= place < lengths[:, None] - sliding_window
    return hidden[:, None, None]


def attend(q: Tensor, keys: Tensor, values: Tensor, order: SlotOrder, scale: float) -> Tensor:
    """`decode_attention` of one layer."""
    if order.places.stop == order.places.start:
        return torch.zeros_like(q)
    if order.row_by_row:
        return _attend_rows(q, keys, values, order, scale, range(len(order.slots)), torch.zeros_like(q))
    if order.index is None:
        keys_seen, values_seen = (cache[order.view, :, order.places] for cache in (keys, values))
    else:
        keys_seen, values_seen = (cache[:, :, order.places].index_select(0, order.index) for cache in (keys, values))
    slots_seen, kv_heads = keys_seen.shape[:2]
    in_order = q if order.rows is None else q.new_zeros(slots_seen, *q.shape[1:]).index_copy_(0, order.rows, q)
    # The query heads of one key head are rows of one product: keys and values are read once for all of them.
    queries = in_order.reshape(slots_seen, kv_heads, -1, q.shape[-1])
    if order.hidden is None:
        out = F.scaled_dot_product_attention(queries, keys_seen, values_seen, scale=scale)
    else:
        out = _masked(queries, keys_seen, values_seen, order.hidden, scale)
    out = out.reshape(in_order.shape)
    if order.rows is not None:
        out = out.index_select(0, order.rows)
    if order.hidden is None:
        return out
    if order.empty is not None:
        out[order.empty] = 0
    if not math.isfinite(float(out.sum())):
        # 0 times an infinite value at a hidden place: those rows once more, with their own places alone.
        spoilt = (~out.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist()
        _attend_rows(q, keys, values, order, scale, spoilt, out)
    return out


def _masked(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Not torch's fused attention: that adds a mask to the scores, and a score of NaN stays one."""
    slots, kv_heads, shared, head_dim = queries.shape
    products = torch.bmm(keys.flatten(0, 1), (queries * scale).flatten(0, 1).transpose(1, 2))
    scores = products.transpose(1, 2).unflatten(0, (slots, kv_heads)).masked_fill_(hidden, torch.finfo(queries.dtype).min)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(queries.dtype, torch.float32)).to(queries.dtype)
    return torch.bmm(weights.flatten(0, 1), values.flatten(0, 1)).view(slots, kv_heads, shared, head_dim)


def _attend_rows(q: Tensor, keys: Tensor, values: Tensor, order: SlotOrder, scale: float, rows: range | list[int], out: Tensor) -> Tensor:
    """The attention of these rows, each by a call of its own over the places it sees, into `out`; rows of length 0 are left alone."""
    for row in rows:
        slot, length = order.slots[row], order.lengths[row]
        if length:
            seen = slice(0 if order.sliding_window is None else max(0, length - order.sliding_window), length)
            queries = q[row].reshape(1, keys.shape[1], -1, q.shape[-1])
            found = F.scaled_dot_product_attention(queries, keys[slot, None, :, seen], values[slot, None, :, seen], scale=scale)
            out[row] = found.reshape(q.shape[1:])
    return out
