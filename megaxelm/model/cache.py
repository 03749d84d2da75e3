"""Keys and values of the text so far, for generation. Sequences of different lengths share a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megaxelm.errors import ModelError
from megaxelm.model.config import DecoderConfig


class KVCache:
    """`keys` and `values`: one [batch, kv_heads, max_length + 1, head_dim] a layer; `lengths` [batch] int64 tokens stored.

    The last place of each row takes what is written for padding and is never read.
    """

    def __init__(self, config: DecoderConfig, batch: int, max_length: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (batch, config.num_kv_heads, max_length + 1, config.head_dim)
        self.max_length = max_length
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = 0  # an upper bound of lengths.max(), kept on the host

    def select(self, rows: Tensor) -> KVCache:
        """A new cache with the rows `rows` [new batch] int64, in that order; a row may occur more than once."""
        other = object.__new__(KVCache)
        other.max_length, other.longest = self.max_length, self.longest
        other.keys = [x.index_select(0, rows) for x in self.keys]
        other.values = [x.index_select(0, rows) for x in self.values]
        other.lengths = self.lengths.index_select(0, rows)
        return other

    def reserve(self, lengths: Tensor, width: int) -> int:
        """Places that are read after `lengths` [batch] more tokens, given in `width` columns.

        Raises:
            ModelError: a row would outgrow max_length.
        """
        bound = self.longest + width
        if bound > self.max_length:
            # The bound counts padding; the exact value needs a wait on a GPU, so it is read only here.
            bound = int((self.lengths + lengths).max())
            if bound > self.max_length:
                raise ModelError(
                    f"cache: {bound} tokens do not fit max_length = {self.max_length}: make the cache longer or the text shorter"
                )
        return bound


@dataclass
class CachedSurroundings:
    """One call of cached decoding: `width` new columns a row, of which the first `new` [batch] are tokens."""

    cache: KVCache
    rotary: tuple[Tensor, Tensor] | None
    slots: Tensor  # [batch, width] where each new token is stored
    mask: Tensor  # additive [batch, 1, width, places]
    kernels: str = "torch"
    exclusive: bool = True

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, width = self.slots.shape
        places = self.mask.shape[-1]
        rows = torch.arange(batch, device=q.device)[:, None]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[rows, :, self.slots] = k.view(batch, width, *k.shape[1:]).to(keys.dtype)
        values[rows, :, self.slots] = v.view(batch, width, *v.shape[1:]).to(values.dtype)
        out = F.scaled_dot_product_attention(
            q.view(batch, width, *q.shape[1:]).transpose(1, 2),
            keys[:, :, :places].to(q.dtype),
            values[:, :, :places].to(q.dtype),
            attn_mask=self.mask.to(q.dtype),
            enable_gqa=k.shape[1] != q.shape[1],
        )
        return out.transpose(1, 2).reshape(q.shape)

    def drop(self, x: Tensor, site: int, p: float | None = None) -> Tensor:
        return x


def surroundings(
    cache: KVCache,
    lengths: Tensor,
    width: int,
    sliding_window: int | None,
    rotary: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    kernels: str = "torch",
) -> CachedSurroundings:
    """Who sees whom in one call of cached decoding; `positions` [batch, width] continue each row's text."""
    places = cache.reserve(lengths, width)
    device = positions.device
    fresh = torch.arange(width, device=device)[None, :] < lengths[:, None]
    slots = torch.where(fresh, positions, cache.max_length)
    distance = positions[:, :, None] - torch.arange(places, device=device)
    seen = distance >= 0
    if sliding_window is not None:
        seen = seen & (distance < sliding_window)
        # Columns of padding may lie a whole window behind the last place; the first place keeps their softmax from being empty.
        seen = seen | (~fresh[:, :, None] & (torch.arange(places, device=device) == 0))
    mask = torch.zeros(seen.shape, dtype=torch.float32, device=device).masked_fill_(~seen, -torch.inf)[:, None]
    return CachedSurroundings(cache, rotary, slots, mask, kernels)
