"""The kernels of `activations` for 16384 tokens with 8192 features, and for an odd number of them."""

from __future__ import annotations

from typing import Any

from compile_only import Case

from megaxelm_kernels import activations_triton as kernels


def _case(name: str, kernel: Any, dtype: str, size: int, **constants: Any) -> Case:
    kinds = {key: f"*{'fp32' if key == 'partial_ptr' else dtype}" for key in kernel.arg_names if key.endswith("_ptr")}
    numbers = {key: "i32" for key in kernel.arg_names if key in ("count", "num_rows", "size")}
    divisible = (*kinds, *numbers) if size % 16 == 0 else (*kinds, "num_rows")
    warps = kernels._BACKWARD_WARPS if kernel is kernels.gelu_backward_kernel else kernels._WARPS
    return Case(f"{name} {dtype} {size}", kernel, kinds | numbers, constants, warps, divisible=divisible)


def _cases(dtype: str, size: int) -> list[Case]:
    rows, columns = kernels.tile(size)
    tile: dict[str, Any] = {"ROWS": rows, "COLUMNS": columns}
    found = []
    for tanh in (False, True):
        for bias in (False, True):
            name = f"gelu{'_tanh' if tanh else ''}{'_bias' if bias else ''}"
            shared = tile | {"BIAS": bias, "TANH": tanh}
            found.append(_case(f"{name} forward", kernels.gelu_forward_kernel, dtype, size, **shared))
            found.append(_case(f"{name} backward", kernels.gelu_backward_kernel, dtype, size, **shared, INPUT=True, SUMS=bias))
    return found


CASES = [case for dtype, size in (("bf16", 8192), ("fp32", 8192), ("bf16", 127)) for case in _cases(dtype, size)]
for _dtype in ("bf16", "fp32"):
    _wide = {"BLOCK": kernels._BLOCK}
    CASES.append(_case("swiglu forward", kernels.swiglu_forward_kernel, _dtype, 8192, **_wide))
    CASES.append(_case("swiglu backward", kernels.swiglu_backward_kernel, _dtype, 8192, **_wide, GATE=True, UP=True))
