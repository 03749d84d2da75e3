"""Packed attention against explicit scores in fp64, its isolation of documents, and its memory."""

from __future__ import annotations

import pytest
import torch
from packed_batches import LAYOUTS, inputs, layout_of

from megaxelm_kernels.attention import PackedLayout, choose_backend, packed_attention, packed_attention_reference


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 6, 64, 1000])
def test_output_and_gradients_equal_the_reference_in_fp64(name: str, kv_heads: int, window: int | None) -> None:
    layout = layout_of(LAYOUTS[name])
    q, k, v = inputs(layout.num_tokens, 4, kv_heads)
    out = packed_attention(q, k, v, layout, sliding_window=window)
    truth = packed_attention_reference(q, k, v, layout, sliding_window=window)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(out)
    for ours, exact in zip(torch.autograd.grad(out, (q, k, v), direction), torch.autograd.grad(truth, (q, k, v), direction), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_low_precision_error_is_that_of_the_reference_in_the_same_type(name: str, dtype: torch.dtype) -> None:
    layout = layout_of(LAYOUTS[name])
    q, k, v = inputs(layout.num_tokens, 4, 2, dtype=dtype)
    with torch.no_grad():
        truth = packed_attention_reference(q.double(), k.double(), v.double(), layout)
        error = (packed_attention(q, k, v, layout).double() - truth).norm()
        assert error <= 2 * (packed_attention_reference(q, k, v, layout).double() - truth).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_documents_do_not_see_each_other_bit_for_bit(name: str, window: int | None, dtype: torch.dtype) -> None:
    lengths = LAYOUTS[name]
    layout = layout_of(lengths)
    before = inputs(layout.num_tokens, 4, 2, dtype=dtype)
    changed = len(lengths) // 2
    start = sum(lengths[:changed])
    stop = start + lengths[changed]
    after = [x.detach().clone() for x in before]
    for x in after:
        x[start:stop] = 100.0 * torch.randn_like(x[start:stop])
    others = torch.ones(layout.num_tokens, dtype=torch.bool)
    others[start:stop] = False
    first, second = (packed_attention(*xs, layout, sliding_window=window) for xs in (before, after))
    assert torch.equal(first[others], second[others])
    assert not torch.equal(first[~others], second[~others])


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_cover_the_tokens_without_much_padding(name: str) -> None:
    layout = layout_of(LAYOUTS[name])
    rows = layout.rows
    assert rows.length <= max(2 * layout.longest, 256)
    assert rows.num_rows * rows.length * rows.length <= 4 * layout.num_tokens * max(layout.longest, 128)


def test_windows_that_are_cut_into_documents_need_no_copies() -> None:
    rows = layout_of(LAYOUTS["windows cut into documents"]).rows
    assert (rows.num_rows, rows.length, rows.slots) == (4, 128, None)


def test_masks_stay_small_for_many_documents() -> None:
    layout = layout_of([19, 23, 40] * 200)
    mask = layout.mask(None, torch.float32)
    assert mask is not None
    assert mask.numel() <= layout.num_tokens * 256 < layout.num_tokens**2 / 50


def test_dropout_of_attention_weights_keeps_the_mean() -> None:
    layout = layout_of([64] * 2)
    q, k, _ = inputs(128, 4, 4, dtype=torch.float32)
    v = torch.ones_like(q)
    torch.manual_seed(0)
    out = packed_attention(q, k, v, layout, dropout_p=0.5)
    assert out.std() > 0.05
    assert abs(out.mean() - 1) < 0.05


@pytest.mark.parametrize("cu_seqlens", [[0, 5, 5, 9], [1, 4], [0], [0, 4, 3]])
def test_empty_documents_and_wrong_starts_are_errors(cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        PackedLayout(torch.tensor(cu_seqlens))


def test_shapes_that_do_not_fit_are_errors() -> None:
    q, k, v = inputs(10, 4, 3)
    with pytest.raises(ValueError, match="do not fit"):
        packed_attention(q, k, v, layout_of([10]))


def test_a_backend_that_is_missing_is_an_error_and_auto_is_not() -> None:
    assert choose_backend("auto", "cpu", 0.1) == "sdpa"
    assert choose_backend("sdpa", "cuda", 0.1) == "sdpa"
    with pytest.raises(ValueError, match="CUDA only"):
        choose_backend("varlen", "cpu", 0.0)
    with pytest.raises(ValueError, match="attention = 'flash'"):
        choose_backend("flash", "cpu", 0.0)


def test_varlen_with_attention_dropout_is_an_error() -> None:
    with pytest.raises(ValueError, match="no attention dropout|no torch.nn.attention.varlen"):
        choose_backend("varlen", "cuda", 0.1)


def test_tokens_beyond_the_last_document_are_an_error() -> None:
    q, k, v = inputs(12, 4, 4)
    with pytest.raises(ValueError, match="the layout's 10 tokens"):
        packed_attention(q, k, v, layout_of([4, 6]))


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_the_token_itself_is_an_error(window: int) -> None:
    with pytest.raises(ValueError, match=f"sliding_window = {window}"):
        packed_attention(*inputs(10, 4, 4), layout_of([10]), sliding_window=window)


def test_head_sizes_that_differ_are_an_error() -> None:
    q = torch.zeros(10, 4, 8)
    with pytest.raises(ValueError, match="last sizes must be equal"):
        packed_attention(q, q[..., :4], q[..., :4], layout_of([10]))
