"""Turning and norming queries and keys at the shapes of models: heads x size of a head."""

from compile_only import Case

from megaxelm_kernels.norm_rotary_triton import BACKWARD_PAIRS, BACKWARD_TILE, norm_turn_backward_kernel, norm_turn_kernel
from megaxelm_kernels.rotary_triton import heads_at_a_time, num_warps, turn_kernel, widths

SHAPES = {"16x128": (16, 16, 128, 64), "32x64 kv 8": (32, 8, 64, 32), "64x128 kv 8": (64, 8, 128, 64), "16x256 partial": (16, 16, 256, 32)}


def tile(num_heads: int, head_dim: int, half: int) -> tuple[dict[str, int], int, int]:
    sizes = widths(head_dim, half)
    width = max(sizes["WIDTH"], sizes["REST_WIDTH"])
    return sizes, heads_at_a_time(num_heads, width), width


def cases() -> list[Case]:
    found = []
    for shape, (q_heads, k_heads, head_dim, half) in SHAPES.items():
        sizes, q_tile, width = tile(q_heads, head_dim, half)
        k_tile = heads_at_a_time(k_heads, width)
        back_tile = heads_at_a_time(q_heads, width, BACKWARD_TILE)
        heads = {"NUM_Q_HEADS": q_heads, "NUM_K_HEADS": k_heads, "Q_HEADS": q_tile, "K_HEADS": k_tile}
        for dtype in ("fp32", "bf16"):
            for interleaved in (False, True):
                name = f"{shape} {dtype}{' interleaved' if interleaved else ''}"
                for kernel, label, constants, warps in (
                    (turn_kernel, "turn", heads | sizes | {"BACKWARD": False}, num_warps(q_tile, width)),
                    (norm_turn_kernel, "norm and turn", heads | sizes, num_warps(q_tile, width)),
                    (
                        norm_turn_backward_kernel,
                        "norm and turn backward",
                        {"NUM_HEADS": q_heads, "HEADS": back_tile} | sizes,
                        num_warps(back_tile, width, BACKWARD_PAIRS),
                    ),
                ):
                    constants = constants | {"INTERLEAVED": interleaved}
                    signature = {argument: "i32" for argument in kernel.arg_names if argument not in constants}
                    for argument in signature:
                        if argument in ("cos_table", "sin_table", "partial"):
                            signature[argument] = "*fp32"
                        elif argument == "eps":
                            signature[argument] = "fp32"
                        elif not argument.endswith("stride") and argument not in ("num_tokens", "tokens_a_program"):
                            signature[argument] = f"*{dtype}"
                    divisible = tuple(x for x, kind in signature.items() if kind.startswith("*") or x.endswith("stride"))
                    found.append(Case(f"{label} {name}", kernel, signature, constants, num_warps=warps, divisible=divisible))
    return found


CASES = cases()
