"""The kernels of `grouped_linear` for the layers of four experts of XGLM-1.7B's size, for a lone expert (splits), and for odd sizes."""

from __future__ import annotations

import triton
from compile_only import Case

from megaxelm_kernels import grouped_linear_triton as kernels

SHAPES = {"qkv": (6144, 2048), "out": (2048, 2048), "up": (8192, 2048), "down": (2048, 8192)}
INTEGERS = ("num_rows", "size_out", "size_in", "features_a_split")


def _cases(name: str, dtype: str, num_rows: int, num_groups: int, size_out: int, size_in: int, shared: bool = False) -> list[Case]:
    itemsize = 4 if dtype == "fp32" else 2
    tile = kernels.launch(num_rows, 1 if shared else num_groups, size_out, size_in, itemsize)
    split = tile.splits > 1
    even = size_out % tile.outs == 0 and size_in % tile.features_a_split == 0
    strides = ("x_row_stride", "weight_group_stride", "bias_group_stride", "out_row_stride", "out_split_stride")
    groups = {"NUM_GROUPS": num_groups, "GROUPS": triton.next_power_of_2(max(num_groups, 2)), "SHARED": shared}
    signature = {key: f"*{dtype}" for key in ("x_ptr", "weight_ptr", "bias_ptr", "out_ptr")} | {"offsets_ptr": "*i32"}
    signature |= {key: "i32" for key in (*INTEGERS, *strides)}
    if split:
        signature["out_ptr"] = "*fp32"
    divisible = tuple(key for key in signature if key != "num_rows") if size_in % 16 == 0 else ("x_ptr", "weight_ptr", "out_ptr")
    constants = groups | {"HAS_BIAS": not split, "EVEN": even, "ROWS": tile.rows, "OUTS": tile.outs, "FEATURES": tile.features}
    label = f"{name} {dtype} {num_rows} rows of {num_groups} groups"
    found = [
        Case(
            label, kernels.grouped_linear_kernel, signature, constants | {"UPCAST": False}, tile.warps, tile.stages, divisible,
            tensor_cores=dtype == "bf16" and tile.rows >= 64,
        )
    ]  # fmt: skip
    if split:
        summed = {"partial_ptr": "*fp32", "bias_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "offsets_ptr": "*i32"}
        summed |= {key: "i32" for key in ("num_rows", "size_out", "bias_group_stride", "out_row_stride")}
        constants = groups | {"HAS_BIAS": True, "SPLITS": tile.splits, "BLOCK": kernels.SUM_BLOCK}
        found.append(Case(f"{label} sum", kernels.add_splits_kernel, summed, constants, 4, divisible=divisible_of(summed)))
    return found


def divisible_of(signature: dict[str, str]) -> tuple[str, ...]:
    return tuple(key for key in signature if key != "num_rows")


CASES = [
    *(case for name, shape in SHAPES.items() for rows in (4, 32, 64, 256) for case in _cases(name, "bf16", rows, 4, *shape)),
    *(case for rows in (4, 32, 256, 4096) for case in _cases("up", "fp32", rows, 4, *SHAPES["up"])),
    *(case for shared in (False, True) for case in _cases("out", "bf16", 1, 1, *SHAPES["out"], shared=shared)),
    *_cases("up", "bf16", 4096, 4, *SHAPES["up"]),
    *_cases("odd", "bf16", 33, 3, 2049, 127),
]
