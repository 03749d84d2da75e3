"""Attention of one token over 2048 cached places at the shapes of models: heads x size of a head, and the writing of the cache."""

from __future__ import annotations

import triton
from compile_only import Case

from megaxelm_kernels import decode_attention_triton as kernels

SHAPES = {
    "16x128": (16, 16, 128),
    "16x64": (16, 16, 64),
    "32x64 kv 8": (32, 8, 64),
    "64x128 kv 8": (64, 8, 128),
    "8x256": (8, 8, 256),
    "4x80": (4, 4, 80),
}
CONTEXT = 2048


def _cases(name: str, dtype: str, rows: int, heads: int, kv_heads: int, head_dim: int) -> list[Case]:
    itemsize = 4 if dtype == "fp32" else 2
    tile = kernels.launch(rows, kv_heads, heads // kv_heads, head_dim, CONTEXT, itemsize)
    label = f"{name} {dtype} {rows} rows, {tile.splits} splits"
    pointers = {key: f"*{dtype}" for key in ("q_ptr", "keys_ptr", "values_ptr", "out_ptr")}
    pointers |= {"slots_ptr": "*i64", "lengths_ptr": "*i64", "sums_ptr": "*fp32"}
    if tile.splits > 1:
        pointers["out_ptr"] = "*fp32"
    numbers = {key: "i32" for key in ("capacity", "longest", "window", "places_a_split", "q_row_stride", "q_head_stride")}
    constants = {"HEADS_A_KEY": heads // kv_heads, "SPLITS": tile.splits, "HEADS": tile.heads, "PLACES": tile.places, "HEAD_DIM": head_dim}
    constants |= {"WIDTH": tile.head_dim, "UPCAST": False}
    divisible = (*pointers, "capacity", "places_a_split", "q_row_stride", "q_head_stride")
    signature = pointers | numbers | {"scale": "fp32"}
    found = [Case(label, kernels.decode_attention_kernel, signature, constants, tile.warps, tile.stages, divisible)]
    if tile.splits > 1:
        signature = {"partial_ptr": "*fp32", "sums_ptr": "*fp32", "lengths_ptr": "*i64", "out_ptr": f"*{dtype}"}
        divisible = tuple(signature)
        signature |= {key: "i32" for key in ("longest", "window", "places_a_split")}
        constants = {"SPLITS": tile.splits, "PADDED": triton.next_power_of_2(tile.splits), "HEAD_DIM": head_dim, "WIDTH": tile.head_dim}
        found.append(Case(f"{label}, joined", kernels.join_splits_kernel, signature, constants, 4, divisible=divisible))
    return found


def _store(dtype: str, kv_heads: int, head_dim: int) -> Case:
    signature = {key: f"*{dtype}" for key in ("keys_ptr", "values_ptr", "k_ptr", "v_ptr")} | {"slots_ptr": "*i64", "positions_ptr": "*i64"}
    signature |= {key: "i32" for key in ("capacity", "k_row_stride", "k_head_stride", "v_row_stride", "v_head_stride")}
    constants = {"NUM_HEADS": kv_heads, "HEAD_DIM": head_dim, "BLOCK": kernels.STORE_BLOCK}
    return Case(f"store {dtype} {kv_heads} x {head_dim}", kernels.store_kv_kernel, signature, constants, 4, divisible=tuple(signature))


SIZES = [(name, dtype, rows) for name in SHAPES for dtype in ("bf16", "fp32") for rows in (4, 256)]
CASES = [case for name, dtype, rows in SIZES for case in _cases(name, dtype, rows, *SHAPES[name])]
CASES += [_store(dtype, *shape) for dtype in ("bf16", "fp32") for shape in ((16, 128), (8, 64), (3, 80))]
