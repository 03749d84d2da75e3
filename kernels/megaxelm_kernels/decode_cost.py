"""Bytes and launches of the operations of a decoding step, and of a whole step: what a benchmark sets beside the time it measured."""

from __future__ import annotations

from dataclasses import dataclass

from megaxelm_kernels.decode_tiles import attention_tiles, linear_tiles


@dataclass(frozen=True)
class Cost:
    """What one call reads and writes at least once, in bytes, and its kernels by Triton."""

    weight_bytes: int = 0
    """Of the parameters of the groups that rows use."""
    cache_bytes: int = 0
    """Of keys and values."""
    other_bytes: int = 0
    """Of activations and partial sums; mostly in the cache of the device."""
    launches: int = 0

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.weight_bytes + self.cache_bytes + self.other_bytes

    @property
    def floor_bytes(self) -> int:
        """What no implementation can leave in a cache between two steps: parameters, keys and values."""
        return self.weight_bytes + self.cache_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
            self.other_bytes + other.other_bytes,
            self.launches + other.launches,
        )

    def __mul__(self, times: int) -> Cost:
        return Cost(self.weight_bytes * times, self.cache_bytes * times, self.other_bytes * times, self.launches * times)


def grouped_linear_cost(
    rows: int, groups: int, size_out: int, size_in: int, itemsize: int, *, bias: bool = False, shared: bool = False
) -> Cost:
    """Of `grouped_linear`, every group with at least one row where the rows are enough."""
    used = 1 if shared else min(groups, rows)
    splits = linear_tiles(rows, 1 if shared else groups, size_out, size_in, itemsize).splits
    partial = 2 * 4 * splits * rows * size_out if splits > 1 else 0
    return Cost(
        weight_bytes=used * size_out * (size_in + bias) * itemsize,
        other_bytes=rows * (size_in + size_out) * itemsize + partial,
        launches=2 if splits > 1 else 1,
    )


def grouped_norm_cost(rows: int, groups: int, size: int, itemsize: int, *, centred: bool = False, residual: bool = False) -> Cost:
    """Of `grouped_layer_norm` (`centred`) or `grouped_rms_norm`, with the residual stream or without."""
    return Cost(
        weight_bytes=min(groups, rows) * size * (1 + centred) * itemsize,
        other_bytes=rows * size * (4 if residual else 2) * itemsize,
        launches=1,
    )


def decode_attention_cost(rows: int, heads: int, kv_heads: int, head_dim: int, context: int, longest: int, itemsize: int) -> Cost:
    """Of `decode_attention` over `context` places a row, launched for `longest` ones."""
    splits = attention_tiles(rows, kv_heads, heads // kv_heads, head_dim, longest, itemsize).splits
    partial = 2 * 4 * splits * rows * heads * (head_dim + 1) if splits > 1 else 0
    return Cost(
        cache_bytes=2 * rows * kv_heads * head_dim * context * itemsize,
        other_bytes=2 * rows * heads * head_dim * itemsize + partial,
        launches=2 if splits > 1 else 1,
    )


def store_kv_cost(rows: int, kv_heads: int, head_dim: int, itemsize: int) -> Cost:
    """Of `store_kv`."""
    one = 2 * rows * kv_heads * head_dim * itemsize
    return Cost(cache_bytes=one, other_bytes=one, launches=1)


@dataclass(frozen=True)
class DecodeShape:
    """A decoder and the rows of one step. `rows` are (sequence, expert) pairs, `context` places that each sees, `experts` those in use."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    experts: int
    rows: int
    context: int
    itemsize: int = 2
    """Bytes a number."""
    shared_embedding: bool = False
    """One head (and embedding) for all experts."""
    gated: bool = False
    """SwiGLU: gate and up are one product of twice the width."""
    biases: bool = False
    centred: bool = False
    """LayerNorm, not RMSNorm."""
    rotary: bool = False
    head_launches: int = 2
    """Of the head and the choice of the token, whose kernels are not counted here."""


def decode_step_cost(shape: DecodeShape) -> Cost:
    """Of one new token of each row: embedding, layers, last norm, head. The head's bytes are those of its weight alone."""
    rows, experts, hidden, size = shape.rows, shape.experts, shape.hidden, shape.itemsize
    head_dim = hidden // shape.heads
    queries_keys_values = (shape.heads + 2 * shape.kv_heads) * head_dim
    widened = shape.intermediate * (2 if shape.gated else 1)

    def linear(size_out: int, size_in: int) -> Cost:
        return grouped_linear_cost(rows, experts, size_out, size_in, size, bias=shape.biases)

    def norm(residual: bool) -> Cost:
        return grouped_norm_cost(rows, experts, hidden, size, centred=shape.centred, residual=residual)

    turned = Cost(other_bytes=2 * rows * (shape.heads + shape.kv_heads) * head_dim * size, launches=1) if shape.rotary else Cost()
    activation = Cost(other_bytes=rows * (widened + shape.intermediate) * size, launches=1)
    layer = (
        norm(residual=True) * 2
        + linear(queries_keys_values, hidden)
        + turned
        + store_kv_cost(rows, shape.kv_heads, head_dim, size)
        + decode_attention_cost(rows, shape.heads, shape.kv_heads, head_dim, shape.context, shape.context, size)
        + linear(hidden, shape.heads * head_dim)
        + linear(widened, hidden)
        + activation
        + linear(hidden, shape.intermediate)
    )
    embedding = Cost(other_bytes=2 * rows * hidden * size, launches=1)
    heads = 1 if shape.shared_embedding else min(experts, rows)
    head = Cost(weight_bytes=heads * shape.vocab * hidden * size, other_bytes=rows * hidden * size, launches=shape.head_launches)
    return embedding + layer * shape.layers + norm(residual=True) + head
