"""The row kernel of the head at its widest, and over a small vocabulary that is not padded."""

from compile_only import Case

from megaxelm_kernels.linear_cross_entropy_triton import WIDTH, head_loss_kernel, launch_shape


def case(name: str, dtype: str, columns: int, *, gradient: bool, cap: bool = False, z: bool = False) -> Case:
    lanes, num_warps = launch_shape(columns)
    pointers = {"labels": "*i64"} | {key: "*fp32" for key in ("row_weights", "lse_out", "target_out", "nll_out")}
    numbers = {key: "i32" for key in ("stride", "columns", "vocab_size")} | {key: "fp32" for key in ("z_loss", "soft_cap")}
    constants = {"IGNORE": -100, "HAS_CAP": cap, "HAS_Z": z, "WITH_GRADIENT": gradient, "LANES": lanes, "WIDTH": WIDTH}
    divisible = ("logits", *pointers) + (("stride", "columns") if columns % 16 == 0 else ())
    return Case(name, head_loss_kernel, {"logits": f"*{dtype}"} | pointers | numbers, constants, num_warps=num_warps, divisible=divisible)


CASES = [
    case("loss and gradient", "bf16", 256128, gradient=True),
    case("loss and gradient, fp32", "fp32", 256128, gradient=True),
    case("loss and gradient, fp16", "fp16", 256128, gradient=True),
    case("soft cap and z-loss", "bf16", 256128, gradient=True, cap=True, z=True),
    case("soft cap and z-loss, fp32", "fp32", 256128, gradient=True, cap=True, z=True),
    case("loss alone", "bf16", 256128, gradient=False),
    case("loss alone, soft cap", "bf16", 256128, gradient=False, cap=True),
    case("small vocabulary, not padded", "bf16", 1003, gradient=True, z=True),
    case("tiny vocabulary, fp32", "fp32", 101, gradient=True),
]
