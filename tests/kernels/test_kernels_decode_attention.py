"""Attention of one token over a cache, and the cache's writing: every way of the torch path, and Triton (by its interpreter without a GPU).

Places that no row may see, and slots of nobody, hold NaN: whoever reads one spoils the result.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megaxelm_kernels import decode_attention_torch
from megaxelm_kernels.decode_attention import KERNELS, decode_attention, decode_attention_reference, order_slots, store_kv
from megaxelm_kernels.decode_tiles import ATTENTION_PROGRAMS, attention_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of NaN, so an element that no program writes is seen."""
    pytest.importorskip("triton", reason="triton is not installed")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))


def inputs(
    lengths: Sequence[int],
    *,
    heads: tuple[int, int] = (2, 2),
    head_dim: int = 16,
    num_slots: int | None = None,
    slots: Sequence[int] | None = None,
    capacity: int | None = None,
    dtype: torch.dtype = torch.float32,
    sliding_window: int | None = None,
    spoil: float = torch.nan,
) -> dict[str, Any]:
    """Arguments of `decode_attention`; `heads` are query heads and key heads."""
    generator = torch.Generator().manual_seed(len(lengths) + head_dim)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    slots = list(range(len(lengths))) if slots is None else slots
    num_slots = max([*slots, 0]) + 1 if num_slots is None else num_slots
    capacity = max([*lengths, 1]) if capacity is None else capacity
    keys, values = (torch.full((num_slots, heads[1], capacity, head_dim), spoil, dtype=dtype, device=DEVICE) for _ in range(2))
    for slot, length in zip(slots, lengths, strict=True):
        first = 0 if sliding_window is None else max(0, length - sliding_window)
        for cache in (keys, values):
            # A slot of two rows: what the first has put there stays.
            cache[slot, :, first:length] = torch.where(
                cache[slot, :, first:length].isfinite(), cache[slot, :, first:length], draw(heads[1], length - first, head_dim)
            )
    given = {"q": draw(len(lengths), heads[0], head_dim) * 2, "keys": keys, "values": values, "longest": max([*lengths, 0])}
    given |= {name: torch.tensor(list(value), dtype=torch.int64, device=DEVICE) for name, value in (("slots", slots), ("lengths", lengths))}
    return given | {"sliding_window": sliding_window}


def reference(given: dict[str, Any], dtype: torch.dtype) -> Tensor:
    wide = {name: value.to(dtype) if name in ("q", "keys", "values") else value for name, value in given.items()}
    scale = wide.pop("scale", None) or wide["q"].shape[-1] ** -0.5
    return decode_attention_reference(**{name: value for name, value in wide.items() if name not in ("longest", "slot_order")}, scale=scale)


def check(given: dict[str, Any], factor: float = 2.0, **options: Any) -> Tensor:
    """Error at most `factor` times that of explicit scores in the same type, plus a few roundings of the largest element."""
    found = decode_attention(**given, **options)
    truth, judge = reference(given, torch.float64), reference(given, given["q"].dtype)
    assert found.dtype == given["q"].dtype and found.shape == truth.shape
    if truth.numel():
        floor = 4 * torch.finfo(torch.float32).eps * truth.abs().max().clamp_min(1.0)
        if found.dtype not in (torch.float32, torch.float64):
            # The interpreter cuts off where a GPU rounds to bf16.
            floor += torch.finfo(found.dtype).eps * truth.abs().max()
        assert (found.double() - truth).abs().max() <= factor * (judge.double() - truth).abs().max() + floor
    return found


WAYS = {
    "neighbours of one length": {"lengths": [7] * 4},
    "neighbours of many lengths": {"lengths": [7, 1, 0, 5]},
    "some slots of nobody": {"lengths": [4, 3, 6], "slots": [4, 1, 3], "num_slots": 7},
    "one length, some slots of nobody": {"lengths": [4, 4, 4], "slots": [4, 1, 3], "num_slots": 7},
    "far slots": {"lengths": [4, 3], "slots": [20, 1], "num_slots": 30},
    "far slots of one length": {"lengths": [4, 4], "slots": [20, 1], "num_slots": 30},
    "a slot of two rows": {"lengths": [4, 3, 5], "slots": [2, 0, 2]},
    "a capacity beyond all lengths": {"lengths": [3, 2], "capacity": 64},
    "no row": {"lengths": [], "num_slots": 2},
    "rows without a place": {"lengths": [0, 0]},
}
KERNELS_BOTH = pytest.mark.parametrize("kernels", KERNELS)


@pytest.mark.usefixtures("poisoned")
@KERNELS_BOTH
@pytest.mark.parametrize(
    ("heads", "window", "spoil"),
    [((2, 2), None, torch.nan), ((6, 2), None, torch.inf), ((6, 2), 3, torch.nan), ((2, 2), 1, torch.inf)],
)
@pytest.mark.parametrize("way", WAYS)
def test_every_place_of_a_row_and_no_other(way: str, heads: tuple[int, int], window: int | None, spoil: float, kernels: str) -> None:
    given = inputs(**WAYS[way], heads=heads, sliding_window=window, spoil=spoil)
    found = check(given, kernels=kernels)
    assert found[given["lengths"] == 0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call_bytes", [0, 3000, 1 << 60])
def test_the_torch_path_at_random(call_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention_torch, "CALL_BYTES", call_bytes)
    draw = random.Random(call_bytes)
    ways = set()
    for _ in range(60):
        rows, num_slots, longest = draw.choice([1, 3, 8]), draw.choice([8, 9, 40]), draw.choice([1, 9, 65])
        slots = draw.sample(range(num_slots), rows) if draw.random() < 0.6 else sorted(draw.choices(range(8), k=rows))
        lengths = [draw.randint(0, longest)] * rows if draw.random() < 0.3 else [draw.randint(0, longest) for _ in range(rows)]
        window, heads = draw.choice([None, 1, 8]), draw.choice([(1, 1), (3, 3), (8, 2)])
        given = inputs(lengths, slots=slots, num_slots=num_slots, heads=heads, head_dim=8, dtype=dtype, sliding_window=window)
        order = order_slots(given["keys"], given["slots"], given["lengths"], longest=given["longest"], sliding_window=window)
        ways.add((order.view is None, order.rows is None, order.hidden is None, order.row_by_row))
        assert torch.equal(check(given), decode_attention(**given, slot_order=order))
    assert len(ways) >= 5


def test_a_row_that_sees_much_less_than_the_longest_is_not_read_to_its_end() -> None:
    given = inputs([2000, 1, 2], heads=(8, 8), head_dim=64)
    assert order_slots(given["keys"], given["slots"], given["lengths"], longest=2000).row_by_row
    given = inputs([2000, 1990, 1995], heads=(8, 8), head_dim=64)
    order = order_slots(given["keys"], given["slots"], given["lengths"], longest=2000, sliding_window=100)
    assert not order.row_by_row and order.places == slice(1890, 2000)


def test_a_nan_that_a_row_does_see_stays() -> None:
    given = inputs([3, 5])
    given["values"][1, :, 4] = torch.nan
    for kernels in KERNELS:
        if kernels == "triton":
            pytest.importorskip("triton", reason="triton is not installed")
        found = decode_attention(**given, kernels=kernels)
        assert found[0].isfinite().all() and found[1].isnan().all()


SHAPES = [
    {"lengths": [1, 127, 63], "heads": (1, 1), "head_dim": 63},
    {"lengths": [127, 0, 130, 64], "heads": (4, 1), "head_dim": 64},
    {"lengths": [65], "heads": (20, 1), "head_dim": 8},
    {"lengths": [100, 3], "heads": (3, 3), "head_dim": 127},
]


@pytest.mark.usefixtures("poisoned")
@KERNELS_BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape: dict[str, Any], dtype: torch.dtype, kernels: str) -> None:
    check(inputs(**shape, dtype=dtype), kernels=kernels)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("window", [None, 300])
def test_a_long_context_in_splits(window: int | None) -> None:
    assert attention_tiles(3, 1, 2, 16, 2049, 4).splits == 17
    given = inputs([2049, 100, 0, 1025], heads=(2, 1), sliding_window=window)
    found = check(given, kernels="triton")
    assert torch.equal(found, decode_attention(**given, kernels="triton"))


@pytest.mark.usefixtures("poisoned")
def test_the_bound_may_be_far_above_the_lengths() -> None:
    """A CUDA graph is made for the longest that may come."""
    for lengths in ([1, 5], [130, 0], [300, 299]):
        check(inputs(lengths, capacity=1000, head_dim=8) | {"longest": 1000}, kernels="triton")


@pytest.mark.usefixtures("poisoned")
@KERNELS_BOTH
def test_queries_with_room_between_them(kernels: str) -> None:
    given = inputs([9, 4], heads=(6, 3))
    packed = torch.full((2, 9, 20), torch.nan, device=DEVICE)
    packed[:, 2:8, 1:17] = given["q"]
    check(given | {"q": packed[:, 2:8, 1:17]}, kernels=kernels)
    check(given | {"q": given["q"].transpose(1, 2).contiguous().transpose(1, 2)}, kernels=kernels)


@KERNELS_BOTH
@pytest.mark.parametrize("call_bytes", [0, 1 << 60])
@pytest.mark.parametrize("lengths", [[9, 9], [9, 4]])
def test_a_scale_of_the_callers(lengths: list[int], call_bytes: int, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(decode_attention_torch, "CALL_BYTES", call_bytes)
    check(inputs(lengths, heads=(6, 3)) | {"scale": 0.7}, kernels=kernels)


@pytest.mark.usefixtures("poisoned")
@KERNELS_BOTH
@pytest.mark.parametrize("heads", [(1, 1), (3, 7), (5, 250)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_stored_in_its_place_and_nothing_else_is_touched(heads: tuple[int, int], dtype: torch.dtype, kernels: str) -> None:
    kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    keys, values, k, v = (
        torch.randn(size, kv_heads, *rest, head_dim, generator=generator).to(dtype).to(DEVICE)
        for size, rest in ((4, (6,)),) * 2 + ((6, ()),) * 2
    )
    expected = keys.clone(), values.clone()
    slots, positions = [3, 0, 3, 1, 2, -77], [5, 0, 2, 6, -1, -1]  # the last three are padding
    for row in range(3):
        for cache, new in zip(expected, (k, v), strict=True):
            cache[slots[row], :, positions[row]] = new[row]
    index = [torch.tensor(value, dtype=torch.int64, device=DEVICE) for value in (slots, positions)]
    store_kv(keys, values, k.transpose(0, 1).contiguous().transpose(0, 1), v, *index, kernels=kernels)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
    for some in (slice(0), slice(3, 4), slice(4, 5)):  # no row, and padding of either kind alone
        store_kv(keys, values, k[some], v[some], index[0][some], index[1][some], kernels=kernels)
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def test_grids_do_not_depend_on_the_lengths_and_fill_the_device() -> None:
    for rows in (1, 4, 32, 256):
        tile = attention_tiles(rows, 16, 1, 128, 2048, 2)
        assert tile.splits * tile.places_a_split >= 2048 > (tile.splits - 1) * tile.places_a_split
        assert tile.splits * rows * 16 >= min(ATTENTION_PROGRAMS, rows * 16 * 16)
        assert tile.places_a_split % tile.places == 0
    assert attention_tiles(256, 16, 1, 128, 2048, 2).splits == 1  # no second kernel
    assert attention_tiles(4, 16, 1, 128, 100, 2).splits == 1


@pytest.mark.parametrize(
    ("changed", "kernels", "text"),
    [
        ({}, "cuda", "kernels = 'cuda': choose torch or triton"),
        ({"q": (2, 3, 16)}, "torch", r"q .* \(2, 3, 16\): expected"),
        ({"q": (2, 2, 8)}, "triton", r"q .* \(2, 2, 8\): expected"),
        ({"q": torch.float16}, "torch", "q torch.float16"),
        ({"values": (2, 2, 4, 16)}, "torch", "one type and one shape"),
        ({"slots": torch.int32}, "triton", "slots torch.int32"),
        ({"lengths": (3,)}, "torch", r"lengths torch.float32 \(3,\)"),
        ({"longest": 6}, "torch", "longest = 6: choose 0 to 5"),
        ({"sliding_window": 0}, "triton", "sliding_window = 0"),
        ({"q": torch.float64, "keys": torch.float64, "values": torch.float64}, "triton", "choose kernels = torch"),
        ({"longest": 4}, "torch", "lengths from 3 to 5: choose 0 to longest = 4"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], kernels: str, text: str) -> None:
    given = inputs([3, 5])
    for name, change in changed.items():
        if isinstance(change, torch.dtype):
            given[name] = given[name].to(change)
        else:
            given[name] = torch.ones(change, device=DEVICE) if isinstance(change, tuple) else change
    with pytest.raises(ValueError, match=text):
        decode_attention(**given, kernels=kernels)


def test_what_cannot_be_stored_is_named() -> None:
    keys = torch.zeros(2, 3, 4, 8, device=DEVICE)
    new, index = torch.zeros(5, 3, 8, device=DEVICE), torch.zeros(5, dtype=torch.int64, device=DEVICE)
    for arguments, text in (
        ((keys, keys, new, new[:, :2], index, index), r"v .* \(5, 2, 8\): expected"),
        ((keys, keys, new.half(), new, index, index), "k torch.float16"),
        ((keys, keys, new, new, index, index[:2]), "positions"),
        ((keys.transpose(0, 1), keys.transpose(0, 1), new, new, index, index), "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=text):
            store_kv(*arguments)


def test_a_slot_that_does_not_exist_is_named() -> None:
    given = inputs([3, 5])
    given["slots"] = torch.tensor([0, 2], device=DEVICE)
    with pytest.raises(ValueError, match="slots from 0 to 2: choose 0 to 1"):
        decode_attention(**given)
