"""The kernels of `norms` for the rows of XGLM-1.7B (2048), of a head's q/k norm (128), an odd size and the largest ones."""

from __future__ import annotations

from compile_only import Case

from megaxelm_kernels import norms_triton as kernels


def _cases(dtype: str, size: int, centred: bool, add: bool) -> list[Case]:
    itemsize = 4 if dtype == "fp32" else 2
    rows, block, warps = kernels.launch(size, itemsize)
    fewer = kernels.launch(size, itemsize, kernels.BACKWARD_WARPS)[2]
    name = f"{'layer' if centred else 'rms'}_norm{'_add' if add else ''} {dtype} {size}"
    tensors = {key: f"*{dtype}" for key in ("x_ptr", "weight_ptr")} | {key: "*fp32" for key in ("mean_ptr", "rstd_ptr")}
    numbers = {"num_rows": "i32", "size": "i32"}
    divisible = ("num_rows", "size") if size % 16 == 0 else ("num_rows",)
    constants = {"ADD": add, "CENTRED": centred, "ROWS": rows, "BLOCK": block}
    outputs = {key: f"*{dtype}" for key in ("residual_ptr", "bias_ptr", "normed_ptr", "total_ptr")}
    forward = tensors | outputs | numbers | {"eps": "fp32"}
    grads = {key: f"*{dtype}" for key in ("grad_normed_ptr", "grad_total_ptr", "grad_x_ptr")} | {"partial_ptr": "*fp32"}
    backward = tensors | grads | numbers
    found = [Case(f"{name} forward", kernels.norm_forward, forward, constants, warps, divisible=pointers(forward) + divisible)]
    if block <= kernels._ONE_PASS:
        constants = constants | {"SUMS": True}
        found.append(Case(f"{name} backward", kernels.norm_backward, backward, constants, fewer, divisible=pointers(backward) + divisible))
        return found
    long = {key: value for key, value in backward.items() if key not in ("partial_ptr", "num_rows")}
    constants = {"ADD": add, "CENTRED": centred, "BLOCK": kernels.LONG_BLOCK}
    aligned = pointers(long) + divisible[1:]
    found.append(Case(f"{name} backward", kernels.norm_backward_long, long, constants, kernels.LONG_WARPS, divisible=aligned))
    tall = {"CENTRED": centred, "ROWS": kernels._COLUMN_TILE[0], "COLUMNS": kernels._COLUMN_TILE[1]}
    part = {key: value for key, value in backward.items() if key not in ("weight_ptr", "grad_total_ptr", "grad_x_ptr")}
    found.append(Case(f"{name} sums", kernels.norm_sums, part, tall, 8, divisible=pointers(part) + divisible))
    return found


def pointers(signature: dict[str, str]) -> tuple[str, ...]:
    return tuple(key for key, kind in signature.items() if kind.startswith("*"))


SHAPES = [("bf16", 2048), ("fp32", 2048), ("bf16", 128), ("bf16", 2049), ("fp32", 8192), ("fp32", 16384)]
CASES = [
    case for dtype, size in SHAPES for centred in (False, True) for add in (False, True) if add or size == 2048 or size == 16384
    for case in _cases(dtype, size, centred, add)
]  # fmt: skip
