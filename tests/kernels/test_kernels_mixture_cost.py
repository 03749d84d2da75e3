"""Bytes and launches of the next token: launches are counted as they happen, bytes against their reckoning by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megaxelm_kernels.mixture import Sampling, draw_expert_then_token, mixture_next_token
from megaxelm_kernels.mixture_cost import WAYS, mixture_cost
from megaxelm_kernels.row_groups import RowGroups

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the logarithm of what lies beyond the vocabulary
XGLM = {"vocab_size": 256008, "hidden_size": 2048, "experts_a_sequence": 4, "experts_in_use": 4}


@pytest.mark.parametrize(("way", "temperature_on"), [(way, "mixture") for way in WAYS] + [("drawn", "experts")])
def test_launches_are_counted_right(way: str, temperature_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from megaxelm_kernels import mixture_triton, token_filter_triton

    launched: list[str] = []

    class Spy:
        def __init__(self, kernel: Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

        def __call__(self, *given: Any) -> Any:
            return self.kernel(*given)

    for module in (mixture_triton, token_filter_triton):
        for name, value in vars(module).copy().items():
            if type(value).__name__ in ("JITFunction", "InterpretedFunction") and not name.startswith("_"):
                monkeypatch.setattr(module, name, Spy(value, name))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state, head = torch.randn(1, 8, device=device), torch.randn(1, 20, 8, device=device)
    rows, log_w = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.zeros(1, 1, device=device)
    one, none = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    sampling = Sampling(one, none, one, 0 * one, none, none, way == "greedy", way == "filtered")
    given = (state, head, RowGroups([0, 1], device), rows, log_w)
    if way == "expert_then_token":
        draw_expert_then_token(*given, none[None], sampling, vocab_size=20, kernels="triton")
    else:
        mixture_next_token(*given, sampling, vocab_size=20, temperature_on=temperature_on, kernels="triton")
    cost = mixture_cost(
        batch=1, experts_a_sequence=1, experts_in_use=1, vocab_size=20, hidden_size=8, way=way, temperature_on=temperature_on
    )
    assert cost.launches == len(launched), launched


def test_bytes_of_xglm() -> None:
    heads = 4 * 256008 * 2048 * 2
    for batch in (1, 8, 64):
        greedy, drawn = (mixture_cost(batch=batch, **XGLM, way=way) for way in ("greedy", "drawn"))
        logits = 4 * batch * 256008 * 4
        assert greedy.floor_bytes == drawn.floor_bytes == heads + 4 * batch * 2048 * 2 + batch * 28
        assert logits < greedy.bytes - greedy.floor_bytes < 1.05 * logits
        assert 2 * logits < drawn.bytes - drawn.floor_bytes < 2.05 * logits
    assert greedy.floor_share > 0.93 and drawn.floor_share > 0.88
    alone = mixture_cost(batch=8, **(XGLM | {"experts_in_use": 1}), way="expert_then_token")
    assert alone.floor_bytes == heads // 4 + 8 * 2048 * 2 + 8 * 24 and alone.floor_share > 0.99
    shared = mixture_cost(batch=1, **XGLM, shared_head=True)
    assert shared.floor_bytes == heads // 4 + 4 * 2048 * 2 + 28


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="way = 'top': choose one of greedy"):
        mixture_cost(batch=1, **XGLM, way="top")
    with pytest.raises(ValueError, match="batch = 0: choose at least 1"):
        mixture_cost(batch=0, **XGLM)
