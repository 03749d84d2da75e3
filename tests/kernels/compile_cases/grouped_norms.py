"""The kernel of `grouped_norms` for few rows, as in decoding, and for many."""

from __future__ import annotations

from compile_only import Case

from megaxelm_kernels import grouped_norms_triton as kernels


def _case(dtype: str, num_rows: int, size: int, centred: bool, add: bool) -> Case:
    rows, block, warps = kernels.launch(num_rows, size, 4 if dtype == "fp32" else 2)
    pointers = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "normed_ptr", "total_ptr")
    numbers = ("num_rows", "size", "x_row_stride", "residual_row_stride", "weight_group_stride", "bias_group_stride")
    signature = {key: f"*{dtype}" for key in pointers} | {"group_ptr": "*i64"} | {key: "i32" for key in numbers} | {"eps": "fp32"}
    constants = {"ADD": add, "CENTRED": centred, "ROWS": rows, "BLOCK": block}
    divisible = (*pointers, "group_ptr", *(numbers[1:] if size % 16 == 0 else ()))
    name = f"{'layer' if centred else 'rms'}_norm{'_add' if add else ''} {dtype} {num_rows} x {size}"
    return Case(name, kernels.grouped_norm_kernel, signature, constants, warps, divisible=divisible)


SHAPES = [("bf16", 4, 2048), ("fp32", 4, 2048), ("bf16", 4096, 2048), ("bf16", 256, 127), ("fp32", 64, 16384), ("fp32", 4096, 16384)]
CASES = [_case(*shape, centred, add) for shape in SHAPES for centred in (False, True) for add in (False, True)]
