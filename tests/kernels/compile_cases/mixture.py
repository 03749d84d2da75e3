"""The kernels of a mixture's next token at the shape of XGLM-1.7B, 4 experts: 4, 32 and 256 rows, in groups or with one head."""

from dataclasses import replace
from typing import Any

from compile_only import Case

from megaxelm_kernels import mixture_head_triton as head
from megaxelm_kernels import mixture_tiles_triton as tiles
from megaxelm_kernels import token_filter_triton as filters
from megaxelm_kernels.mixture_triton import BLOCK_V, MIX_TILES, SCAN, head_launch

TYPES = {
    "rows": "*i64", "keys": "*i64", "positions": "*i64", "source": "*i64", "order": "*i64", "expert_keys": "*i64", "slot_out": "*i64",
    "order_out": "*i64", "source_out": "*i64", "token_out": "*i64", "offsets": "*i32", "offsets_in": "*i32", "offsets_out": "*i32",
    "best_token": "*i32", "tile_token": "*i32", "top_k": "*i64", "found_in": "*i64", "found_out": "*i64", "bound": "*i64", "cut": "*i64",
    "cut_out": "*i64",
}  # fmt: skip
NUMBERS = """num_rows vocab_size size hidden_stride group_stride head_stride logits_stride num_tiles num_head_tiles m batch num_groups
    num_best blocks""".split()


def case(
    name: str, kernel: Any, constants: dict[str, Any], *, num_warps: int = 4, num_stages: int = 3, dot: bool = False, **types: str
) -> Case:
    """Arguments that are neither in `constants` nor numbers are pointers, to fp32 if nothing else is said."""
    signature = {}
    for argument in kernel.arg_names:
        if argument not in constants:
            signature[argument] = types.get(argument) or ("i32" if argument in NUMBERS else TYPES.get(argument, "*fp32"))
    aligned = tuple(key for key, kind in signature.items() if kind.startswith("*") or key.endswith("stride") or key == "size")
    return Case(name, kernel, signature, constants, num_warps, num_stages, divisible=aligned, tensor_cores=dot)


def product(rows: int, dtype: str, *, shared: bool = False, draws: bool = False, size: int = 2048) -> Case:
    at = head_launch(rows, 4 if dtype == "fp32" else 2, draws)
    constants: dict[str, Any] = {"SHARED": shared, "DRAW": draws, "EVEN": size % at.block_k == 0, "UPCAST": False}
    constants |= {"BLOCK_V": BLOCK_V, "BLOCK_R": at.block_r, "BLOCK_K": at.block_k}
    absent = ("logits",) if draws else ("source", "order", "keys", "positions", "tile_best", "tile_token", "tile_logit")
    constants |= dict.fromkeys((*absent, "offsets") if shared else absent)
    name = f"head of {rows} rows a group, {dtype}{', shared' * shared}{', drawn' * draws}, {size}"
    pointer = f"*{dtype}"
    return case(
        name,
        head.head_product,
        constants,
        num_warps=at.num_warps,
        num_stages=at.num_stages,
        dot=dtype != "fp32",
        hidden=pointer,
        heads=pointer,
    )


def mixing(name: str, *absent: str, **flags: int) -> Case:
    given = {key: False for key in ("MEAN", "SKIP", "NOISE", "TEMPERED", "ON_EXPERTS", "WRITE")} | flags
    return case(name, tiles.mix_tiles, given | {"TILES": MIX_TILES, "BLOCK": BLOCK_V * MIX_TILES} | dict.fromkeys(absent))


MEANS = ("mean_max", "mean_sum")
SIZES = {"BLOCKS": filters.BLOCKS, "BLOCK": BLOCK_V * MIX_TILES, "MANY_BLOCKS": 256, "MANY_PROGRAMS": 32}
SMALL = {"batch": 1, "vocab_size": 1, "blocks": 1, "MANY_BLOCKS": 1, "MANY_PROGRAMS": 1}
HEAVY = [
    *(product(rows, "bf16") for rows in (1, 64)),
    *(product(rows, "bf16", shared=True) for rows in (4, 32, 256)),
    product(8, "bf16", size=2056),
    *(product(rows, "fp32") for rows in (8, 64)),
    *(product(rows, "bf16", draws=True) for rows in (1, 64)),
    product(64, "fp32", draws=True),
    mixing("greedy", "temperature", "keys", "positions", "scores", *MEANS, SKIP=True),
    mixing("sample", "scores", *MEANS, NOISE=True, TEMPERED=True),
    case("draw of 1024 experts", head.draw_experts, {"SHARED": False, "BATCH": 1024, "GROUPS": 8}),
]
LIGHT = [
    case("sums of rows", head.row_sums, {"SCAN": SCAN}),
    mixing("sample of tempered experts", "scores", *MEANS, NOISE=True, TEMPERED=True, ON_EXPERTS=True),
    mixing("sample of mean logits", "scores", MEAN=True, NOISE=True, TEMPERED=True),
    mixing("log-probabilities", "temperature", "keys", "positions", "best_token", *MEANS, WRITE=True),
    mixing("mean logits", "temperature", "keys", "positions", "best_token", WRITE=True, MEAN=True),
    case("sums of tempered logits", tiles.tempered_sums, {"BLOCK": 4096}, num_warps=8),
    case("token", tiles.finish, {"MEAN": False, "SCAN": SCAN, "mean_max": None, "mean_sum": None}),
    case("token of mean logits", tiles.finish, {"MEAN": True, "SCAN": SCAN}),
    case("drawn token", head.finish_draw, {"BLOCK_V": BLOCK_V, "SCAN": SCAN}),
    *(
        case(f"{'probability' if mass else 'count'}, pass {number}", filters.count_pass, SIZES | {"MASS": mass, "PASS": number})
        for mass, number in ((False, 0), (False, 7), (True, 0), (True, 1), (True, 2))
    ),
    case("tokens equal to the cut", filters.tie_pass, SIZES),
    case("draw from what is left", filters.draw_pass, {key: SIZES[key] for key in SIZES if key != "MANY_BLOCKS"}),
]
# Numbers that are 1 at a launch are constants to Triton: one sequence of one expert, and a vocabulary of one tile or token.
ONES = [
    case(
        "one row, one tile",
        head.head_product,
        product(1, "bf16", shared=True).constants | {"num_rows": 1, "num_tiles": 1, "vocab_size": 1},
        hidden="*bf16",
        heads="*bf16",
    ),
    case(
        "one drawn row",
        head.head_product,
        product(1, "bf16", shared=True, draws=True).constants | {"num_rows": 1, "num_tiles": 1},
        hidden="*bf16",
        heads="*bf16",
    ),
    case("sums of one tile", head.row_sums, {"SCAN": SCAN, "num_tiles": 1}),
    case("one expert of one sequence", head.draw_experts, {"SHARED": False, "BATCH": 2, "GROUPS": 4, "batch": 1, "m": 1}),
    mixing("greedy, one expert", "temperature", "keys", "positions", "scores", *MEANS, SKIP=True, m=1, vocab_size=1, num_head_tiles=1),
    case("token, one expert", tiles.finish, {"MEAN": True, "SCAN": SCAN, "m": 1, "num_best": 1, "num_tiles": 1, "vocab_size": 1}),
    case("one drawn token", head.finish_draw, {"BLOCK_V": BLOCK_V, "SCAN": SCAN, "num_tiles": 1, "vocab_size": 1}),
    case("sums of one tempered expert", tiles.tempered_sums, {"BLOCK": 4096, "m": 1, "vocab_size": 1}),
    *(
        case(f"filter of one sequence, {mass} {number}", filters.count_pass, SIZES | SMALL | {"MASS": mass, "PASS": number})
        for mass, number in ((False, 0), (False, 1), (True, 0), (True, 1))
    ),
    case("equal tokens of one sequence", filters.tie_pass, SIZES | SMALL),
    case(
        "draw of one sequence",
        filters.draw_pass,
        {key: value for key, value in (SIZES | SMALL).items() if key not in ("MANY_BLOCKS", "batch")},
    ),
]
# The light ones keep far below any limit: one generation stands for three.
CASES = HEAVY + [replace(light, architectures=("90",)) for light in LIGHT + ONES]
