"""Head and cross-entropy: ours in chunks against full logits in torch; forward and backward, time and memory side by side.

    python benchmarks/head_loss.py [--rows 2048 --vocab 32000 --hidden 512] [--repeats 7]

On CUDA the default shape is that of XGLM-1.7B: 16384 x 256008 x 2048 in bf16. Results are compared first; both are then timed turn by turn.
Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megaxelm_kernels.linear_cross_entropy import linear_cross_entropy

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, labels, chunk_rows=1024)


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


LOSSES: dict[str, Loss] = {"ours": ours, "torch, full logits": full_logits}


def make(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device=device).manual_seed(0)
    hidden = torch.randn(options.rows, options.hidden, device=device, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(options.vocab, options.hidden, device=device, generator=generator) * 0.02).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(options.vocab, (options.rows,), device=device, generator=generator)


def step(loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> float:
    hidden.grad = weight.grad = None
    value = loss(hidden, weight, labels)
    value.backward()
    return value.item()


def peak_bytes(name: str, options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int:
    """Peak beyond the inputs. On a CPU in a process of its own, since the peak of a process never falls."""
    if device.type == "cuda":
        inputs = make(options, device, dtype)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(LOSSES[name], *inputs)
        return torch.cuda.max_memory_allocated() - before
    shape = ["--rows", str(options.rows), "--vocab", str(options.vocab), "--hidden", str(options.hidden)]
    done = subprocess.run([sys.executable, __file__, *shape, "--peak-of", name], capture_output=True, text=True, check=True)
    return int(done.stdout)


def print_own_peak(name: str, options: argparse.Namespace) -> None:
    inputs = make(options, torch.device("cpu"), torch.float32)
    # Not getrusage: its peak is inherited from the parent process. Writing 5 sets the peak of this one back to what it holds now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    step(LOSSES[name], *inputs)
    print(_status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384 if cuda else 1024)
    parser.add_argument("--vocab", type=int, default=256008 if cuda else 64000)
    parser.add_argument("--hidden", type=int, default=2048 if cuda else 256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak-of", choices=list(LOSSES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_own_peak(options.peak_of, options)
        return
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    hidden, weight, labels = make(options, device, dtype)
    values, gradients = {}, {}
    for name, loss in LOSSES.items():
        values[name] = step(loss, hidden, weight, labels)
        gradients[name] = hidden.grad.float().clone()
    names = list(LOSSES)
    difference = abs(values[names[0]] - values[names[1]]) / abs(values[names[1]])
    gradient_difference = float((gradients[names[0]] - gradients[names[1]]).norm() / gradients[names[1]].norm())
    assert difference < 1e-3 and gradient_difference < 2e-2, (difference, gradient_difference)
    gradients.clear()
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(options.repeats):
        for name, loss in LOSSES.items():
            gc.collect()
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            step(loss, hidden, weight, labels)
            times[name].append((time.perf_counter() - began) * 1e3)
    del hidden, weight, labels
    result: dict[str, object] = {
        "benchmark": "head_loss",
        "shape": [options.rows, options.vocab, options.hidden],
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "loss_difference": difference,
        "gradient_difference": gradient_difference,
    }
    for name in LOSSES:
        low, median, high = np.percentile(times[name], [10, 50, 90]).round(2).tolist()
        megabytes = round(peak_bytes(name, options, device, dtype) / 2**20)
        result[name] = {"ms": median, "p10": low, "p90": high, "peak_mib": megabytes}
        print(f"{name:<20} {median:10.1f} ms   (p10 {low:.1f}, p90 {high:.1f})   {megabytes:8,} MiB beyond the inputs")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
