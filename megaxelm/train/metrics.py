"""Training figures: one JSON line and one TensorBoard point every `train.log_every` steps, and a line on the console.

A line holds what the loop knows: step (done), loss (nats per predicted token, mean since the last line), lr, grad_norm (before clipping),
tokens (consumed so far), language_tokens ({language: tokens}, which add up to `tokens`); and what a `Meter` measured since the last line:

    tokens_per_second, tokens_per_second_per_device
    attended_tokens    tokens that a token sees on average, itself included, counted from the documents of the batches
    model_tflops       TFLOP/s a device that the model needs (train/throughput.py says how they are counted)
    mfu                model_tflops / the device's dense bf16 peak; null where that is not known (set train.peak_tflops)
    memory             bytes, the largest over the ranks: allocated, reserved, peak_allocated, peak_reserved on CUDA; resident,
                       peak_resident on a CPU; peaks since the first step of this process
    data_share         share of the time that was spent waiting for data, the largest over the ranks
    seconds            of training in this process
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megaxelm.corpus.packing import PackedBatch
from megaxelm.model.config import DecoderConfig
from megaxelm.train.memory import memory, reset_peak
from megaxelm.train.throughput import attended, peak_tflops, token_flops


class Meter:
    """Speed, work and memory of one rank between two lines. Make it when the engine stands, right before the first step.

    with meter.data():
        batch = read()
    meter.count(batch)
    ...
    line = meter.line({"step": 10, "loss": 2.5}, tokens=40960)

    Args:
        config: of the model that is trained.
        sequence_length: tokens of a window; what a token sees is counted by it as long as no batch was.
        peak: dense peak of a device in TFLOP/s where the recipe gives one (train.peak_tflops).
        delta_parameters: of a model that is trained as low-rank deltas.
    """

    def __init__(
        self,
        config: DecoderConfig,
        sequence_length: int,
        world_size: int,
        device: torch.device,
        peak: float | None,
        delta_parameters: int = 0,
    ) -> None:
        self.config, self.sequence_length, self.world_size, self.device = config, sequence_length, world_size, device
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.peak = peak_tflops(self.device_name, peak)
        self.delta_parameters = delta_parameters
        self._began = self._since = time.monotonic()
        self._waited = 0.0
        self._pairs = self._tokens = 0
        reset_peak(device)

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Around the reading of a batch: this time counts as waiting for data."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - began

    def count(self, batch: PackedBatch) -> None:
        """Take notice of the documents of a batch that is trained on."""
        self._pairs += attended(batch.cu_seqlens.diff().tolist(), self.config.sliding_window)
        self._tokens += batch.tokens.shape[0]

    def line(self, known: Mapping[str, Any], tokens: int) -> dict[str, Any]:
        """`known` and the figures since the last line, for `tokens` tokens over all ranks. Collective: every rank calls it."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        seen = (
            self._pairs / self._tokens
            if self._tokens
            else attended([self.sequence_length], self.config.sliding_window) / (self.sequence_length)
        )
        used = memory(self.device)
        largest = self._max_over_ranks([self._waited / seconds, *map(float, used.values())])
        speed = tokens / seconds
        tflops = speed / self.world_size * token_flops(self.config, seen, self.delta_parameters) / 1e12
        line = dict(known) | {
            "tokens_per_second": speed,
            "tokens_per_second_per_device": speed / self.world_size,
            "attended_tokens": seen,
            "model_tflops": tflops,
            "mfu": None if self.peak is None else tflops / self.peak,
            "memory": dict(zip(used, map(int, largest[1:]), strict=True)),
            "data_share": min(1.0, largest[0]),
            "seconds": now - self._began,
        }
        self._since, self._waited, self._pairs, self._tokens = now, 0.0, 0, 0
        return line

    def _max_over_ranks(self, values: list[float]) -> list[float]:
        if self.world_size == 1:
            return values
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()


def console_line(name: str, steps: int, line: Mapping[str, Any]) -> str:
    """What a log file shows of a line."""
    mfu = "n/a (set train.peak_tflops)" if line["mfu"] is None else f"{line['mfu']:.1%}"
    peak = max((value for key, value in line["memory"].items() if key.startswith("peak")), default=0)
    parts = [
        f"{name}: step {line['step']:,}/{steps:,}",
        "loss n/a (skipped)" if line["loss"] is None else f"loss {line['loss']:.4f}",
        f"lr {line['lr']:.3g}",
    ]
    parts += [f"grad norm {line['grad_norm']:.3g}"] if line.get("grad_norm") is not None else []
    parts += [f"{line['tokens_per_second']:,.0f} tokens/s ({line['tokens_per_second_per_device']:,.0f} a device)"]
    parts += [f"{line['model_tflops']:.3g} TFLOP/s a device", f"MFU {mfu}", f"peak memory {peak / 1e9:.2f} GB"]
    parts += [f"data {line['data_share']:.1%}", f"{line['tokens']:,} tokens"]
    return ", ".join(parts)


class Metrics:
    """Writer of `metrics.jsonl` and `tensorboard/` in an expert's folder; used by rank 0 alone.

    `monitor` is the DeepSpeed engine's: where its configuration enables W&B, Comet, CSV or TensorBoard, it gets the same figures.
    """

    def __init__(self, folder: Path, resume_step: int, monitor: Any = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        self._drop_after(resume_step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the writer
        self._monitor = monitor if monitor is not None and monitor.enabled else None

    def _drop_after(self, step: int) -> None:
        """Lines of steps that will be done again are dropped, and so is a line that a kill cut in half."""
        if not self.path.exists():
            return
        kept = [json.dumps(line) for line in read_metrics(self.path) if line["step"] <= step]
        aside = self.path.with_suffix(".new")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        aside.replace(self.path)

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        points = [(f"train/{name}", value) for name, value in _points(line)]
        for name, value in points:
            self._board.add_scalar(name, value, line["step"])
        if self._monitor is not None:
            self._monitor.write_events([(name, value, line["step"]) for name, value in points])

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _points(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers of a line by name, those of nested tables as `table/name`; what is null is no point."""
    for key, value in line.items():
        parts = {f"{key}/{name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
        yield from ((name, part) for name, part in parts.items() if name != "step" and isinstance(part, (int, float)))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a `metrics.jsonl`; a last line cut by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
