"""Head and cross-entropy, forward and backward, and forward alone for scoring, beside other ways to have the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Entry, Side
from megaxelm_kernels.backend import choose_kernels
from megaxelm_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_stats

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def _inputs(rows: int, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    generator = torch.Generator(device=device).manual_seed(0)
    columns = -(-vocab // 128) * 128
    h = torch.randn(rows, hidden, device=device, generator=generator).to(dtype)
    w = (torch.randn(columns, hidden, device=device, generator=generator) * hidden**-0.5).to(dtype)
    return {"hidden": h, "weight": w, "labels": torch.randint(vocab, (rows,), device=device, generator=generator), "vocab": vocab}


def _with_gradients(loss: Callable[..., Tensor], *, padded: bool = False, wide: bool = False) -> Side:
    """A side of `loss`. Peers that know nothing of padding get the head without it."""

    def side(inputs: dict[str, Any]) -> list[Tensor]:
        dtype = torch.float64 if wide else inputs["hidden"].dtype
        h = inputs["hidden"].detach().to(dtype).requires_grad_()
        w = inputs["weight"].detach().to(dtype)
        w = (w if padded else w[: inputs["vocab"]]).requires_grad_()
        options = {"vocab_size": inputs["vocab"]} if padded else {}
        value = loss(h, w, inputs["labels"], **options)
        grad_h, grad_w = torch.autograd.grad(value, (h, w))
        return [value.detach(), grad_h, grad_w[: inputs["vocab"]]]

    return side


def _full_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def _ours(device: torch.device) -> Callable[..., Tensor]:
    kernels = choose_kernels("auto", device)
    return lambda h, w, labels, **options: linear_cross_entropy(h, w, labels, kernels=kernels, **options)


def _peers(device: torch.device) -> tuple[dict[str, Side], dict[str, str]]:
    sides: dict[str, Side] = {"torch": _with_gradients(_full_logits)}
    missing: dict[str, str] = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        # On a CPU with as many rows a chunk as ours: its own choice takes over ten times as long.
        chunked = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=None if device.type == "cuda" else 128)
        sides["F.linear_cross_entropy"] = _with_gradients(
            lambda h, w, labels: F.linear_cross_entropy(h, w, labels, reduction="sum", options=chunked)
        )
    else:
        missing["F.linear_cross_entropy"] = f"torch {torch.__version__} has none in chunks"
    if device.type != "cuda":
        return sides, missing
    sides["torch.compile"] = _with_gradients(torch.compile(_full_logits))
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        sides["Liger"] = _with_gradients(lambda h, w, labels: liger(w, h, labels))
    except Exception as error:
        missing["Liger"] = f"{type(error).__name__}: {error}"
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        sides["CCE"] = _with_gradients(lambda h, w, labels: cut(h, w, labels, reduction="sum"))
    except Exception as error:
        missing["CCE"] = f"{type(error).__name__}: {error}"
    return sides, missing


def _scores(device: torch.device) -> tuple[dict[str, Side], Side]:
    kernels = choose_kernels("auto", device)

    def ours(inputs: dict[str, Any]) -> list[Tensor]:
        h, w, labels = inputs["hidden"], inputs["weight"], inputs["labels"]
        return list(linear_cross_entropy_stats(h, w, labels, vocab_size=inputs["vocab"], kernels=kernels))

    def full(inputs: dict[str, Any], wide: bool = False) -> list[Tensor]:
        h, w, labels = inputs["hidden"], inputs["weight"][: inputs["vocab"]], inputs["labels"]
        parts = []
        for rows in (slice(i, i + 1024) for i in range(0, len(h), 1024 if wide else len(h))):
            z = h[rows].double() @ w.double().T if wide else (h @ w.T).float()
            at = labels[rows] if wide else labels
            parts.append((z.logsumexp(-1), z.gather(1, at[:, None])[:, 0]))
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    return {"ours": ours, "torch": full}, lambda inputs: full(inputs, wide=True)


def entries(device: torch.device) -> list[Entry]:
    """On CUDA the shape of XGLM-1.7B and one of a small vocabulary, on a CPU some seconds a call with the same vocabulary as XGLM."""
    cuda = device.type == "cuda"
    shapes = [(16384, 256008, 2048), (16384, 32000, 2048)] if cuda else [(1024, 256008, 256)]
    dtype = torch.bfloat16 if cuda else torch.float32
    found = []
    for rows, vocab, hidden in shapes:
        name = f"{rows} x {vocab} x {hidden} {str(dtype).removeprefix('torch.')}"
        peers, missing = _peers(device)
        flops, size = float(2 * rows * vocab * hidden), dtype.itemsize
        found.append(
            Entry(
                "head_loss",
                name,
                bytes=float(2 * size * (rows + vocab) * hidden),
                flops=3 * flops,
                make=lambda shape=(rows, vocab, hidden): _inputs(*shape, dtype, device),  # type: ignore[misc]
                sides={"ours": _with_gradients(_ours(device), padded=True), **peers},
                # In chunks too: full logits in fp64 would not fit.
                truth=_with_gradients(linear_cross_entropy, padded=True, wide=True),
                judge="torch",
                missing=missing,
                cpu_peak=True,
            )
        )
        sides, truth = _scores(device)
        found.append(
            Entry(
                "head_loss, scores",
                name,
                bytes=float(size * (rows + vocab) * hidden),
                flops=flops,
                make=lambda shape=(rows, vocab, hidden): _inputs(*shape, dtype, device),  # type: ignore[misc]
                sides=sides,
                truth=truth,
                judge="torch",
                cpu_peak=True,
            )
        )
    return found
