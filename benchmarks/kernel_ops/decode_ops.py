"""The operations of a decoding step of several experts, below the head: linear layers, attention over the cache, norms, its writing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Entry
from megaxelm_kernels.decode_attention import decode_attention, decode_attention_reference, order_slots, store_kv
from megaxelm_kernels.decode_cost import decode_attention_cost, grouped_linear_cost, grouped_norm_cost, store_kv_cost
from megaxelm_kernels.grouped_linear import grouped_linear
from megaxelm_kernels.grouped_norms import grouped_layer_norm, grouped_norm_reference
from megaxelm_kernels.row_groups import RowGroups

EXPERTS = 4
EPS = 1e-5
CACHE_BYTES = 100_000_000  # more than a CPU's cache holds


def entries(device: torch.device) -> list[Entry]:
    """XGLM-1.7B in bf16 at batch 1, 8 and 64 of four experts; on a CPU the small decoders of `decode.py` in fp32."""
    if device.type == "cuda":
        products = [(6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192)]
        rows, caches, sizes = (4, 32, 256), [(16, 16, 128, 512), (16, 16, 128, 2048), (32, 8, 64, 2048)], (2048,)
    else:
        products = [(768, 256), (256, 256), (1024, 256), (256, 1024), (1536, 512), (2048, 512), (512, 2048)]
        rows, caches, sizes = (4, 32), [(4, 4, 64, 128), (8, 8, 64, 512)], (256, 512)
    found = [linear(device, size_out, size_in, count) for (size_out, size_in), count in itertools.product(products, rows)]
    found += [attention(device, *cache, count, even) for cache, count, even in itertools.product(caches, rows, (True, False))]
    found += [norm(device, size, count) for size, count in itertools.product(sizes, rows)]
    return found + [store(device, *cache[1:], count) for cache, count in itertools.product(caches[:1], rows)]


def _about(device: torch.device) -> tuple[torch.dtype, str]:
    return (torch.bfloat16, "triton") if device.type == "cuda" else (torch.float32, "torch")


def _draw(device: torch.device, *size: int) -> Tensor:
    return torch.randn(size, device=device).to(_about(device)[0])


def _next_weight(given: dict[str, Any]) -> Tensor:
    """The weight of the next layer: of equal numbers, but not in the cache, as in a step of a whole model."""
    given["layers"].append(given["layers"].pop(0))
    return given["layers"][0]


def _grouped_mm(given: dict[str, Any]) -> list[Tensor]:
    groups = given["groups"]
    out = F.grouped_mm(given["x"], _next_weight(given).transpose(1, 2), offs=groups.device_offsets[1:])
    return [out + given["bias"][groups.group_of_row]]


def linear(device: torch.device, size_out: int, size_in: int, rows: int) -> Entry:
    """Experts with equally many rows, as when each sequence uses all of them."""
    dtype, kernels = _about(device)

    def make() -> dict[str, Any]:
        torch.manual_seed(0)
        weight = _draw(device, EXPERTS, size_out, size_in) / size_in**0.5
        # On CUDA the benchmark empties the cache itself.
        layers = 1 if device.type == "cuda" else 1 + CACHE_BYTES // weight.nbytes
        given: dict[str, Any] = {"x": _draw(device, rows, size_in), "layers": [weight.clone() for _ in range(layers)]}
        return given | {"bias": _draw(device, EXPERTS, size_out), "groups": RowGroups.from_counts([rows // EXPERTS] * EXPERTS, device)}

    def looped(given: dict[str, Any], wide: bool = False) -> list[Tensor]:
        x, weight, bias = (tensor.double() if wide else tensor for tensor in (given["x"], _next_weight(given), given["bias"]))
        parts = [F.linear(part, weight[g], bias[g]) for g, part in enumerate(x.split(rows // EXPERTS))]
        return [torch.cat(parts)]

    def batched(given: dict[str, Any]) -> list[Tensor]:
        x = given["x"].view(EXPERTS, rows // EXPERTS, size_in)
        return [torch.baddbmm(given["bias"][:, None], x, _next_weight(given).transpose(1, 2)).view(rows, size_out)]

    def ours(given: dict[str, Any]) -> list[Tensor]:
        return [grouped_linear(given["x"], _next_weight(given), given["bias"], given["groups"], kernels=kernels)]

    cost = grouped_linear_cost(rows, EXPERTS, size_out, size_in, dtype.itemsize, bias=True)
    return Entry(
        op="grouped_linear", shape=f"{EXPERTS} x {size_out} x {size_in}, {rows} rows {str(dtype)[6:]}", bytes=cost.bytes,
        flops=2 * rows * size_in * size_out, make=make,
        sides={
            f"ours ({kernels})": ours, "F.linear an expert": looped, "torch.baddbmm": batched, "F.grouped_mm": _grouped_mm,
        },
        truth=lambda given: looped(given, wide=True), judge="F.linear an expert",
    )  # fmt: skip


def attention(device: torch.device, heads: int, kv_heads: int, head_dim: int, context: int, rows: int, even: bool) -> Entry:
    """Rows of one length, or of lengths from a quarter of the context to all of it."""
    dtype, kernels = _about(device)

    def make() -> dict[str, Any]:
        torch.manual_seed(0)
        lengths = torch.full((rows,), context) if even else torch.linspace(context // 4, context, rows).long()
        cache = [_draw(device, rows, kv_heads, context + 64, head_dim) for _ in range(2)]
        given: dict[str, Any] = {"q": _draw(device, rows, heads, head_dim), "keys": cache[0], "values": cache[1]}
        given |= {"slots": torch.arange(rows, device=device), "lengths": lengths.to(device)}
        mask = torch.arange(context)[None, :] < lengths[:, None]
        given["order"] = order_slots(given["keys"], given["slots"], given["lengths"], longest=context)
        return given | {"mask": mask[:, None, None].to(device), "host_lengths": lengths.tolist()}

    def tensors(given: dict[str, Any]) -> list[Tensor]:
        return [given[name] for name in ("q", "keys", "values", "slots", "lengths")]

    def ours(given: dict[str, Any]) -> list[Tensor]:
        return [decode_attention(*tensors(given), longest=context, slot_order=given["order"], kernels=kernels)]

    def masked(given: dict[str, Any]) -> list[Tensor]:
        seen = [given[name][:, :, :context] for name in ("keys", "values")]
        out = F.scaled_dot_product_attention(given["q"][:, :, None], *seen, attn_mask=given["mask"], enable_gqa=heads != kv_heads)
        return [out[:, :, 0]]

    def looped(given: dict[str, Any]) -> list[Tensor]:
        parts = []
        for row, length in enumerate(given["host_lengths"]):
            seen = [given[name][row, None, :, :length] for name in ("keys", "values")]
            parts.append(F.scaled_dot_product_attention(given["q"][row, None, :, None], *seen, enable_gqa=heads != kv_heads)[0, :, 0])
        return [torch.stack(parts)]

    def truth(given: dict[str, Any]) -> list[Tensor]:
        wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors(given)]
        return [decode_attention_reference(*wide, scale=head_dim**-0.5)]

    seen = context if even else round(context * 5 / 8)
    cost = decode_attention_cost(rows, heads, kv_heads, head_dim, seen, context, dtype.itemsize)
    return Entry(
        op="decode_attention",
        shape=f"{heads}/{kv_heads} x {head_dim}, {'' if even else 'up to '}{context} of {rows} rows {str(dtype)[6:]}",
        bytes=cost.bytes, flops=4 * rows * heads * head_dim * seen, make=make,
        sides={f"ours ({kernels})": ours, "SDPA with a mask": masked, "SDPA a row": looped}, truth=truth, judge="SDPA a row",
    )  # fmt: skip


def norm(device: torch.device, size: int, rows: int) -> Entry:
    dtype, kernels = _about(device)
    tensors = ("x", "weight", "bias")

    def make() -> dict[str, Any]:
        torch.manual_seed(0)
        given: dict[str, Any] = {"x": _draw(device, rows, size), "residual": _draw(device, rows, size)}
        given |= {name: _draw(device, EXPERTS, size) for name in ("weight", "bias")}
        return given | {"groups": RowGroups.from_counts([rows // EXPERTS] * EXPERTS, device)}

    def looped(given: dict[str, Any]) -> list[Tensor]:
        total = given["x"] + given["residual"]
        parts = total.split(rows // EXPERTS)
        return [torch.cat([F.layer_norm(part, (size,), given["weight"][g], given["bias"][g], EPS) for g, part in enumerate(parts)]), total]

    def truth(given: dict[str, Any]) -> list[Tensor]:
        total = given["x"] + given["residual"]
        wide = [given[name].double() for name in tensors[1:]]
        return [grouped_norm_reference(total.double(), *wide, EPS, given["groups"]), total]

    cost = grouped_norm_cost(rows, EXPERTS, size, dtype.itemsize, centred=True, residual=True)
    return Entry(
        op="add + grouped_layer_norm", shape=f"{rows} x {size} {str(dtype)[6:]}", bytes=cost.bytes, flops=0.0, make=make,
        sides={
            f"ours ({kernels})": lambda given: list(grouped_layer_norm(**given, eps=EPS, kernels=kernels)), "layer_norm an expert": looped
        },
        truth=truth, judge="layer_norm an expert",
    )  # fmt: skip


def store(device: torch.device, kv_heads: int, head_dim: int, context: int, rows: int) -> Entry:
    dtype, kernels = _about(device)

    def make() -> dict[str, Any]:
        torch.manual_seed(0)
        given: dict[str, Any] = {name: _draw(device, rows, kv_heads, context, head_dim) for name in ("keys", "values")}
        given |= {name: _draw(device, rows, kv_heads, head_dim) for name in ("k", "v")}
        return given | {"slots": torch.arange(rows, device=device), "positions": torch.full((rows,), context - 1, device=device)}

    def side(function: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], list[Tensor]]:
        def run(given: dict[str, Any]) -> list[Tensor]:
            function(given)
            return [given["keys"][:, :, -1], given["values"][:, :, -1]]

        return run

    def looped(given: dict[str, Any]) -> None:
        for row in range(rows):
            given["keys"][row, :, context - 1], given["values"][row, :, context - 1] = given["k"][row], given["v"][row]

    return Entry(
        op="store_kv", shape=f"{rows} x {kv_heads} x {head_dim} {str(dtype)[6:]}",
        bytes=store_kv_cost(rows, kv_heads, head_dim, dtype.itemsize).bytes, flops=0.0, make=make,
        sides={f"ours ({kernels})": side(lambda given: store_kv(**given, kernels=kernels)), "a copy a row": side(looped)},
        truth=side(looped), judge="a copy a row",
    )  # fmt: skip
