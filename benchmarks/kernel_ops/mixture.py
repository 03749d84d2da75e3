"""The next token of a mixture, from hidden states to token and log-probabilities, beside plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import Entry, Side
from megaxelm_kernels.backend import choose_kernels
from megaxelm_kernels.gumbel import vocabulary_noise
from megaxelm_kernels.mixture import Sampling, mixture_next_token
from megaxelm_kernels.mixture_cost import mixture_cost
from megaxelm_kernels.row_groups import RowGroups

WAYS = ("greedy", "drawn", "filtered")


def _inputs(batch: int, m: int, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device, way: str) -> dict[str, Any]:
    g = torch.Generator(device=device).manual_seed(0)

    def fill(value: float, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.full((batch,), value, dtype=kind, device=device)

    on = way == "filtered"
    sampling = Sampling(
        fill(0.0 if way == "greedy" else 0.8), fill(50 if on else 0, torch.int64), fill(0.95 if on else 1.0), fill(0.0),
        torch.arange(batch, device=device), fill(7, torch.int64), way == "greedy", on,
    )  # fmt: skip
    columns = -(-vocab // 128) * 128
    return {
        "hidden": torch.randn(batch * m, hidden, device=device, generator=g).to(dtype),
        "heads": (torch.randn(m, columns, hidden, device=device, generator=g) * (3 * hidden**-0.5)).to(dtype),
        "groups": RowGroups.from_counts([batch] * m, device),
        "rows": torch.arange(batch * m, device=device).view(m, batch).T.contiguous(),
        "log_w": torch.randn(batch, m, device=device, generator=g).log_softmax(-1),
        "sampling": sampling,
        "noise": vocabulary_noise(sampling.key, sampling.position, vocab),
        "vocab": vocab,
    }


def _given(inputs: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(inputs[name] for name in ("hidden", "heads", "groups", "rows", "log_w"))


def _ours(kernels: str) -> Side:
    def side(inputs: dict[str, Any]) -> list[Tensor]:
        out = mixture_next_token(*_given(inputs), inputs["sampling"], vocab_size=inputs["vocab"], kernels=kernels)
        return [out.logprob]

    return side


def _torch(inputs: dict[str, Any]) -> list[Tensor]:
    """What one would write: a log-softmax an expert, their mixture, filters by a sort. The noise is given, so the token is the same."""
    hidden, heads, vocab, (batch, m) = inputs["hidden"], inputs["heads"][:, : inputs["vocab"]], inputs["vocab"], inputs["rows"].shape
    logits = torch.bmm(hidden.view(m, batch, -1), heads.transpose(1, 2)).float()
    logp = (logits.log_softmax(-1) + inputs["log_w"].T[..., None]).logsumexp(0)
    sampling = inputs["sampling"]
    if sampling.greedy:
        token = logp.argmax(-1)
    elif sampling.filtered:
        values, order = (logp / sampling.temperature[:, None]).sort(-1, descending=True)
        values.masked_fill_(torch.arange(vocab, device=values.device) >= sampling.top_k[:, None], -torch.inf)
        p = values.softmax(-1)
        values.masked_fill_(p.cumsum(-1) - p >= sampling.top_p[:, None], -torch.inf)
        token = order.gather(1, (values + inputs["noise"].gather(1, order)).argmax(-1)[:, None])[:, 0]
    else:
        token = (logp / sampling.temperature[:, None] + inputs["noise"]).argmax(-1)
    return [logp.gather(1, token[:, None])[:, 0]]


def _truth(inputs: dict[str, Any]) -> list[Tensor]:
    """In fp64, of the token that ours chooses."""
    kernels = choose_kernels("auto", inputs["hidden"].device)
    out = mixture_next_token(*_given(inputs), inputs["sampling"], vocab_size=inputs["vocab"], kernels=kernels)
    batch, m = inputs["rows"].shape
    parts = []
    for expert in range(m):
        state = inputs["hidden"][expert * batch : (expert + 1) * batch]
        lse = torch.full((batch,), -torch.inf, dtype=torch.float64, device=state.device)
        head = inputs["heads"][expert]
        for start in range(0, inputs["vocab"], 1 << 14):
            z = state.double() @ head[start : min(start + (1 << 14), inputs["vocab"])].double().T
            lse = torch.logaddexp(lse, z.logsumexp(-1))
        at = (state.double() * head[out.token].double()).sum(-1)
        parts.append(at - lse + inputs["log_w"][:, expert].double())
    return [torch.stack(parts).logsumexp(0)]


def entries(device: torch.device) -> list[Entry]:
    """4 experts at 1, 8 and 64 sequences: of XGLM-1.7B on CUDA; on a CPU of the two sizes of the decoding benchmark."""
    cuda = device.type == "cuda"
    kernels, dtype = choose_kernels("auto", device), torch.bfloat16 if cuda else torch.float32
    shapes = [(b, 256008, 2048) for b in (1, 8, 64)] if cuda else [(1, 8192, 256), (8, 8192, 256), (1, 32000, 512), (8, 32000, 512)]
    found = []
    for batch, vocab, hidden in shapes:
        for way in WAYS:
            cost = mixture_cost(
                batch=batch, experts_a_sequence=4, experts_in_use=4, vocab_size=vocab, hidden_size=hidden, itemsize=dtype.itemsize, way=way
            )
            sides: dict[str, Side] = {"ours": _ours(kernels), "torch": _torch}
            if cuda:
                sides["ours by torch"] = _ours("torch")
            found.append(
                Entry(
                    "mixture",
                    f"{batch} x 4 x {vocab} x {hidden} {str(dtype).removeprefix('torch.')} {way}",
                    bytes=float(cost.floor_bytes),
                    flops=float(2 * batch * 4 * vocab * hidden),
                    make=lambda shape=(batch, 4, vocab, hidden), way=way: _inputs(*shape, dtype, device, way),  # type: ignore[misc]
                    sides=sides,
                    truth=_truth,
                    judge="torch",
                )
            )
    return found
