"""Every attention backend that is on this machine, at real sizes, against explicit scores."""

from __future__ import annotations

import pytest
import torch
from packed_batches import LAYOUTS, inputs
from torch import Tensor

from megaxelm_kernels.attention import BACKENDS, PackedLayout, choose_backend, packed_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MIXED = [2048, 1500, 548, 2048, 37, 1, 1010, 1000, 2048, 700, 700, 648, 2048, 2048, 0]  # 16384 tokens after the last is filled up
MIXED[-1] = 16384 - sum(MIXED)


def here(backend: str, head_dim: int) -> None:
    try:
        choose_backend(backend, "cuda", 0.0, head_dim=head_dim, dtype=torch.bfloat16)
    except ValueError as error:
        pytest.skip(str(error))


def layout_of(lengths: list[int]) -> PackedLayout:
    return PackedLayout(torch.tensor([0, *lengths]).cumsum(0), torch.device("cuda"))


def outputs(q: Tensor, k: Tensor, v: Tensor, direction: Tensor, layout: PackedLayout, window: int | None, backend: str) -> list[Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = packed_attention(q, k, v, layout, sliding_window=window, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), direction.to(out.dtype))]


def compare(lengths: list[int], heads: int, kv_heads: int, head_dim: int, window: int | None, backend: str) -> None:
    here(backend, head_dim)
    layout = layout_of(lengths)
    q, k, v = (x.detach().cuda() for x in inputs(layout.num_tokens, heads, kv_heads, d=head_dim, dtype=torch.bfloat16))
    direction = torch.randn_like(q)
    exact = torch.float64 if layout.num_tokens < 2000 else torch.float32
    truth = outputs(*(x.to(exact) for x in (q, k, v, direction)), layout, window, "reference")
    plain = outputs(q, k, v, direction, layout, window, "reference")
    found = outputs(q, k, v, direction, layout, window, backend)
    for ours, peer, right in zip(found, plain, truth, strict=True):
        assert (ours.double() - right.double()).norm() <= 2 * (peer.double() - right.double()).norm()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_backends_agree_with_the_reference_forward_and_backward(name: str, window: int | None, backend: str) -> None:
    compare(LAYOUTS[name], 4, 2, 64, window, backend)


@pytest.mark.parametrize("window", [None, 256])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_backends_agree_at_the_size_of_a_training_batch(window: int | None, backend: str) -> None:
    compare(MIXED, 16, 8, 128, window, backend)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_documents_do_not_see_each_other_bit_for_bit(backend: str) -> None:
    here(backend, 64)
    layout = layout_of([300, 200, 128, 401])
    before = [x.detach().cuda() for x in inputs(layout.num_tokens, 4, 2, d=64, dtype=torch.bfloat16)]
    after = [x.clone() for x in before]
    for x in after:
        x[300:500] = 10 * torch.randn_like(x[300:500])
    first, second = (packed_attention(*xs, layout, backend=backend) for xs in (before, after))
    assert torch.equal(first[:300], second[:300]) and torch.equal(first[500:], second[500:])
    assert not torch.equal(first[300:500], second[300:500])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_no_call_waits_for_the_device(backend: str) -> None:
    here(backend, 128)
    layout = layout_of([1000, 24, 1024])
    q, k, v = (x.detach().cuda() for x in inputs(2048, 16, 8, d=128, dtype=torch.bfloat16))
    direction = torch.randn_like(q)
    for _ in range(2):  # masks and compiled kernels are made once
        outputs(q, k, v, direction, layout, None, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs(q, k, v, direction, layout, None, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_compiled_flex_kernel_serves_several_layouts() -> None:
    here("flex", 64)
    compare([100, 28, 128], 4, 2, 64, None, "flex")
    compare([1, 255], 4, 2, 64, None, "flex")
    compare([90, 90, 120], 4, 2, 64, 7, "flex")
