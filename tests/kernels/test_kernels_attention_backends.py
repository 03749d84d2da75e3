"""The choice of an attention backend, what each is handed, and flex attention against explicit scores."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from packed_batches import LAYOUTS, inputs, layout_of
from torch import Tensor
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import create_block_mask

from megaxelm_kernels import attention, attention_backends
from megaxelm_kernels.attention import BACKENDS, choose_backend, describe_backend, packed_attention, packed_attention_reference

TOKENS = [3, 5, 4]


@pytest.fixture(autouse=True)
def _loaded_anew() -> Iterator[None]:
    attention_backends.load.cache_clear()
    yield
    attention_backends.load.cache_clear()


class Fakes:
    """Stands in for packages and a GPU that are not here: `calls` holds the arguments that a kernel was handed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.calls: list[dict[str, Any]] = []
        for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "torch.nn.attention.varlen"):
            monkeypatch.setitem(sys.modules, name, None)  # importing it fails

    def install(self, name: str, function: str, value: Callable[..., Any]) -> None:
        for parent in (name.rpartition(".")[0], name):
            if parent and sys.modules.get(parent) is None:
                self.patch.setitem(sys.modules, parent, types.ModuleType(parent))
        setattr(sys.modules[name], function, value)
        attention_backends.load.cache_clear()

    def gpu(self, major: int, minor: int = 0) -> None:
        self.patch.setattr(attention, "capability", lambda device: (major, minor))

    def flash2(self) -> None:
        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
            window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
        ):  # fmt: skip
            self.calls.append(dict(locals()))
            return q.clone()

        self.install("flash_attn", "flash_attn_varlen_func", flash_attn_varlen_func)

    def flash3(self) -> None:
        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
            causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
            softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
        ):  # fmt: skip
            self.calls.append(dict(locals()))
            return q.clone()

        self.install("flash_attn_interface", "flash_attn_varlen_func", flash_attn_varlen_func)

    def flash4(self) -> None:
        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None, seqused_k=None,
            page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
            num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, mask_mod=None, aux_tensors=None, return_lse=False,
        ):  # fmt: skip
            self.calls.append(dict(locals()))
            return q.clone(), None

        self.install("flash_attn.cute", "flash_attn_varlen_func", flash_attn_varlen_func)

    def flash4_early(self) -> None:
        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None,
            causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
        ):  # fmt: skip
            self.calls.append(dict(locals()))
            return q.clone(), None

        self.install("flash_attn.cute", "flash_attn_varlen_func", flash_attn_varlen_func)

    def varlen(self) -> None:
        def varlen_attn(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False
        ):
            self.calls.append(dict(locals()))
            return query.clone()

        self.install("torch.nn.attention.varlen", "varlen_attn", varlen_attn)

    def varlen_without_groups(self) -> None:
        def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
            self.calls.append(dict(locals()))
            return query.clone()

        self.install("torch.nn.attention.varlen", "varlen_attn", varlen_attn)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def attend(monkeypatch: pytest.MonkeyPatch, backend: str, window: int | None = None, dropout_p: float = 0.0, dim: int = 64) -> Tensor:
    """`packed_attention` by a fake kernel, on CPU tensors that pass for CUDA's in the choice."""
    choose = attention.choose_backend
    monkeypatch.setattr(attention, "choose_backend", lambda name, device, *rest, **more: choose(name, "cuda", *rest, **more))
    q, k, v = (x.detach() for x in inputs(sum(TOKENS), 4, 2, d=dim, dtype=torch.bfloat16))
    return packed_attention(q, k, v, layout_of(TOKENS), sliding_window=window, dropout_p=dropout_p, backend=backend)


@pytest.mark.parametrize("which", ["flash2", "flash3", "flash4", "flash4_early"])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_flash_attention_is_handed_causal_documents(fakes: Fakes, monkeypatch: pytest.MonkeyPatch, which: str, window: int | None) -> None:
    getattr(fakes, which)()
    fakes.gpu(9)
    out = attend(monkeypatch, which.removesuffix("_early"), window)
    (call,) = fakes.calls
    assert call["causal"] is True
    assert call["softmax_scale"] is None  # 1 / sqrt(d) by default
    none = -1 if which in ("flash2", "flash3") else None
    assert call["window_size"] == ((none, none) if window in (None, 50) else (window - 1, 0))
    assert call["cu_seqlens_q"].tolist() == call["cu_seqlens_k"].tolist() == [0, 3, 8, 12]
    assert call["cu_seqlens_q"].dtype == torch.int32
    if which != "flash4_early":
        assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (5, 5)
        assert call["deterministic"] is False
    assert call["k"].shape[1] == call["v"].shape[1] == 2
    assert torch.equal(out, call["q"])


def test_flash2_is_handed_dropout_and_the_wish_for_determinism(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.flash2()
    fakes.gpu(8)
    torch.use_deterministic_algorithms(True)
    try:
        attend(monkeypatch, "flash2", dropout_p=0.25)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (fakes.calls[0]["dropout_p"], fakes.calls[0]["deterministic"]) == (0.25, True)


@pytest.mark.parametrize("window", [None, 3])
def test_varlen_is_handed_a_causal_window_and_grouped_queries(fakes: Fakes, monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    fakes.varlen()
    fakes.gpu(9)
    attend(monkeypatch, "varlen", window)
    (call,) = fakes.calls
    assert call["window_size"] == (-1 if window is None else 2, 0)
    assert call["enable_gqa"] is True and call["key"].shape[1] == 2
    assert (call["max_q"], call["max_k"], call["cu_seq_k"].tolist()) == (5, 5, [0, 3, 8, 12])


def test_a_varlen_without_groups_gets_repeated_keys_and_refuses_a_window(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.varlen_without_groups()
    fakes.gpu(9)
    attend(monkeypatch, "varlen")
    call = fakes.calls[0]
    assert call["is_causal"] is True
    assert torch.equal(call["key"][:, 0], call["key"][:, 1]) and call["key"].shape == call["query"].shape
    with pytest.raises(ValueError, match="no sliding window"):
        attend(monkeypatch, "varlen", 3)


def test_auto_takes_the_newest_that_fits_the_device(fakes: Fakes) -> None:
    fakes.gpu(9)
    assert choose_backend("auto", "cuda", 0.0) == "sdpa"
    for name in ("varlen", "flash2", "flash3", "flash4"):
        getattr(fakes, name)()
        assert choose_backend("auto", "cuda", 0.0) == name
        assert choose_backend("auto", "cpu", 0.0) == "sdpa"
    expected = {7: "sdpa", 8: "flash2", 9: "flash4", 10: "flash4", 12: "flash2"}
    for major, name in expected.items():
        fakes.gpu(major)
        assert choose_backend("auto", "cuda", 0.0) == name
    fakes.gpu(9)
    assert choose_backend("auto", "cuda", 0.1) == "flash2"
    assert choose_backend("auto", "cuda", 0.0, head_dim=192) == "flash3"
    assert choose_backend("auto", "cuda", 0.0, head_dim=100) == "sdpa"
    assert choose_backend("auto", "cuda", 0.0, dtype=torch.float32) == "sdpa"


@pytest.mark.parametrize(
    ("name", "major", "options", "text"),
    [
        ("flash3", 8, {}, r"flash3: needs compute capability 9.x, this device has 8.0; choose auto or sdpa"),
        ("flash4", 8, {}, r"flash4: needs compute capability 9.x, 10.x, 11.x"),
        ("varlen", 7, {}, "varlen: needs compute capability 8.x"),
        ("flash3", 9, {"attention_dropout": 0.1}, "flash3: has no attention dropout, which is 0.1; set it to 0 or choose flash2 or sdpa"),
        ("flash4", 9, {"attention_dropout": 0.1}, "no attention dropout"),
        ("varlen", 9, {"attention_dropout": 0.1}, "no attention dropout"),
        ("flex", 9, {"attention_dropout": 0.1}, "no attention dropout"),
        ("reference", 9, {"attention_dropout": 0.1}, "no attention dropout"),
        ("flash2", 9, {"head_dim": 257}, "takes 8 to 256 features a head in multiples of 8, not head_dim = 257"),
        ("flash2", 9, {"head_dim": 20}, "multiples of 8, not head_dim = 20"),
        ("flash4", 9, {"head_dim": 256}, "takes 8 to 128 features"),
        ("flex", 9, {"head_dim": 8}, "takes 16 to 256 features a head, not head_dim = 8"),
        ("varlen", 9, {"dtype": torch.float32}, "takes bfloat16 or float16, not float32"),
    ],
)
def test_what_a_backend_cannot_do_is_said(fakes: Fakes, name: str, major: int, options: dict[str, Any], text: str) -> None:
    for install in (fakes.flash2, fakes.flash3, fakes.flash4, fakes.varlen):
        install()
    fakes.gpu(major)
    with pytest.raises(ValueError, match=text):
        choose_backend(name, "cuda", **({"attention_dropout": 0.0} | options))


@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4", "varlen"])
def test_a_backend_that_is_not_here_is_an_error_with_the_way_out(fakes: Fakes, name: str) -> None:
    fakes.gpu(9)
    with pytest.raises(ValueError, match=rf"attention = {name}: .* does not import \(ModuleNotFoundError.*\); install .* or choose auto"):
        choose_backend(name, "cuda", 0.0)
    with pytest.raises(ValueError, match=f"attention = {name}: works on CUDA only, this is cpu"):
        choose_backend(name, "cpu", 0.0)


def test_a_broken_package_is_named_with_its_error(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.gpu(9)
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    attention_backends.load.cache_clear()
    with pytest.raises(ValueError, match="AttributeError.*flash_attn_varlen_func"):
        choose_backend("flash2", "cuda", 0.0)


def test_the_choice_is_explained_in_a_line(fakes: Fakes) -> None:
    fakes.gpu(8)
    fakes.flash3()
    fakes.varlen()
    line = describe_backend("auto", "cuda", 0.0)
    assert line.startswith("varlen (torch.nn.attention.varlen") and "\n" not in line
    assert "flash4 flash_attn.cute does not import" in line
    assert "flash3 needs compute capability 9.x" in line
    assert describe_backend("sdpa", "cuda", 0.1).endswith("asked for")
    assert "this is cpu" in describe_backend("auto", "cpu", 0.0)
    with pytest.raises(ValueError, match="choose auto"):
        describe_backend("flash9", "cpu", 0.0)


def test_packed_attention_makes_the_same_checks() -> None:
    q, k, v = inputs(12, 4, 2)
    for name in BACKENDS:
        if name != "sdpa":
            with pytest.raises(ValueError, match=f"attention = {name}: "):
                packed_attention(q, k, v, layout_of(TOKENS), dropout_p=0.1, backend=name)
    with pytest.raises(ValueError, match="attention backend = 'flash'"):
        packed_attention(q, k, v, layout_of(TOKENS), backend="flash")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 1, 6, 130, 255, 1000])
def test_blocks_of_flex_attention_are_those_of_the_whole_mask(name: str, window: int | None) -> None:
    lengths = LAYOUTS[name] if name != "one" else [700]
    layout = layout_of(lengths)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (documents[query] == documents[key]) & (key <= query)
        return seen if window is None else seen & (query - key < window)

    ours = layout.block_mask(window)
    torchs = create_block_mask(sees, None, None, layout.num_tokens, layout.num_tokens, device="cpu")
    assert ours.shape == torchs.shape
    assert ours is layout.block_mask(window)
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, places = (getattr(ours, f"{kind}_{what}") for what in ("num_blocks", "indices"))
        wanted, wanted_places = (getattr(torchs, f"{kind}_{what}") for what in ("num_blocks", "indices"))
        assert torch.equal(counts, wanted), kind
        for row in range(counts.shape[-1]):
            count = int(counts[0, 0, row])
            assert places[0, 0, row, :count].sort().values.tolist() == wanted_places[0, 0, row, :count].sort().values.tolist()
    index = torch.arange(layout.num_tokens)
    assert torch.equal(ours.mask_mod(0, 0, index[:, None], index[None, :]), sees(index, index, index[:, None], index[None, :]))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_flex_attention_equals_the_reference(name: str, window: int | None, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch has the gradient of its plain formula on a CPU too, and only refuses to use it there.
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)
    layout = layout_of(LAYOUTS[name])
    q, k, v = inputs(layout.num_tokens, 4, kv_heads, dtype=torch.float32)
    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = packed_attention_reference(*exact_inputs, layout, sliding_window=window)
    direction = torch.randn_like(truth)
    exact = [truth, *torch.autograd.grad(truth, exact_inputs, direction)]
    plain = packed_attention_reference(q, k, v, layout, sliding_window=window)
    peers = [plain, *torch.autograd.grad(plain, (q, k, v), direction.float())]
    out = packed_attention(q, k, v, layout, sliding_window=window, backend="flex")
    found = [out, *torch.autograd.grad(out, (q, k, v), direction.float())]
    for ours, peer, right in zip(found, peers, exact, strict=True):
        assert ours.shape == right.shape
        assert (ours.double() - right).norm() <= 3 * (peer.double() - right).norm() + 1e-6 * right.norm()


def test_flex_attention_on_a_cpu_has_no_gradient_and_says_so() -> None:
    q, k, v = inputs(12, 4, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="attention = flex: .*CPU"):
        packed_attention(q, k, v, layout_of(TOKENS), backend="flex")


def test_the_reference_is_a_backend() -> None:
    q, k, v = inputs(12, 4, 2)
    out = packed_attention(q, k, v, layout_of(TOKENS), backend="reference")
    torch.testing.assert_close(out, packed_attention(q, k, v, layout_of(TOKENS)))
