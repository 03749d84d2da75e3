"""Each operation of `kernels/` beside its peers: time, share of the floor, peak memory; outputs are compared first.

    python benchmarks/kernels.py [--ops head_loss,norms] [--rounds 20] [--output results.jsonl]

On CUDA the shapes are those of XGLM-1.7B and its like, on a CPU small ones, where only the ratios mean something. Peers that do not import
are named and left out. Operations lie in `kernel_ops/`, one file each with `entries(device)`. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

OPS = ("head_loss", "norms", "activations", "rotary", "attention", "decode_ops", "mixture")
COPY_RATE, BF16_RATE = 4.3e12, 790e12  # bytes/s and FLOP/s measured on one H200: what a floor is reckoned with

Side = Callable[[dict[str, Any]], list[torch.Tensor]]


@dataclass
class Entry:
    """One operation at one shape. `sides`: ours first, then the peers; each takes the inputs and returns outputs and gradients, which
    are compared: the error of each against `truth` (or the first peer) is at most `factor` times that of the peer `judge`."""

    op: str
    shape: str
    bytes: float
    flops: float
    make: Callable[[], dict[str, Any]]
    sides: dict[str, Side]
    truth: Side
    judge: str
    factor: float = 2.0
    missing: dict[str, str] = field(default_factory=dict)
    """Peers that are not here, and why."""
    cpu_peak: bool = False
    """Whether the peak is measured on a CPU too, which takes a process for each side."""

    def floor_ms(self) -> float:
        """Time of the bytes at the copy rate or of the FLOPs at the rate of the tensor cores, whichever is longer, on one H200."""
        return 1e3 * max(self.bytes / COPY_RATE, self.flops / BF16_RATE)


@dataclass
class Row:
    """What was measured of one side. Times in ms, peak in bytes beyond the inputs, error relative to the judge's."""

    op: str
    shape: str
    side: str
    median: float
    p10: float
    p90: float
    floor_share: float | None
    peak_bytes: int | None
    error_of_judge: float


def errors(outputs: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) for a, b in zip(outputs, truth, strict=True)]


def measure(entry: Entry, device: torch.device, rounds: int) -> list[Row]:
    """Compare, then time all sides in turns."""
    inputs = entry.make()
    truth = entry.truth(inputs)
    ours, *peers = entry.sides
    of_side = {ours: errors(entry.sides[ours](inputs), truth)}
    for name in peers:
        try:
            of_side[name] = errors(entry.sides[name](inputs), truth)
        except Exception as error:  # another release of the peer, or a shape that it refuses: told, and the others are measured
            if name == entry.judge:
                raise
            del entry.sides[name]
            print(f"{entry.op} {entry.shape}: {name} is left out: {type(error).__name__}: {str(error)[:200]}")
    judge = [max(error, 1e-7) for error in of_side[entry.judge]]
    worst = {name: max(error / limit for error, limit in zip(found, judge, strict=True)) for name, found in of_side.items()}
    if not worst[ours] <= entry.factor:
        raise SystemExit(f"{entry.op} {entry.shape}: {ours} is {worst[ours]:.2f} times as far from the truth as {entry.judge}")
    del truth
    times: dict[str, list[float]] = {name: [] for name in entry.sides}
    peaks: dict[str, int | None] = {}
    for name, side in entry.sides.items():
        side(inputs)
        peaks[name] = peak(entry, name, inputs, device)
    for _ in range(rounds):
        for name, side in entry.sides.items():
            times[name].append(timed(side, inputs, device))
    rows = []
    for name, taken in times.items():
        low, middle, high = np.percentile(taken, [10, 50, 90])
        share = entry.floor_ms() / middle if device.type == "cuda" else None
        rows.append(Row(entry.op, entry.shape, name, middle, low, high, share, peaks[name], worst[name]))
    return rows


def peak(entry: Entry, name: str, inputs: dict[str, Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return own_process_peak(entry, name) if entry.cpu_peak else None
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    entry.sides[name](inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def own_process_peak(entry: Entry, name: str) -> int:
    """On a CPU a process of its own tells, since what one has freed may stay with it."""
    command = [sys.executable, __file__, "--peak-of", entry.op, entry.shape, name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"the peak of {entry.op} {entry.shape}, {name}:\n{done.stderr}")
    return int(done.stdout.splitlines()[-1])


def print_own_peak(op: str, shape: str, name: str) -> None:
    module = importlib.import_module(f"kernel_ops.{op.split(',')[0]}")
    entry = next(e for e in module.entries(torch.device("cpu")) if (e.op, e.shape) == (op, shape))
    inputs = entry.make()
    # Not getrusage: its peak is inherited from the parent process. Writing 5 sets the peak of this one back to what it holds now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    entry.sides[name](inputs)
    print(_status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


_flush: list[torch.Tensor] = []


def timed(side: Side, inputs: dict[str, Any], device: torch.device) -> float:
    """Milliseconds of one call; on CUDA with a cold L2 cache."""
    if device.type != "cuda":
        began = time.perf_counter()
        side(inputs)
        return 1e3 * (time.perf_counter() - began)
    if not _flush:
        _flush.append(torch.empty(256 << 20, dtype=torch.uint8, device=device))
    _flush[0].zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    side(inputs)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="file to which a JSON line is added after each operation")
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Operations import this file by its name: let them find this module and not a second one.
    sys.path.insert(0, str(Path(__file__).parent))
    sys.modules["kernels"] = sys.modules["__main__"]
    if options.peak_of:
        print_own_peak(*options.peak_of)
        return
    unknown = set(options.ops.split(",")) - set(OPS)
    if unknown:
        parser.error(f"--ops {','.join(sorted(unknown))}: choose of {', '.join(OPS)}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    about = {"device": torch.cuda.get_device_name(0) if device.type == "cuda" else "CPU", "torch": torch.__version__}
    found: list[dict[str, Any]] = []
    print(f"{'operation and shape':58} {'side':26} {'ms':>9} {'p10':>9} {'p90':>9} {'floor':>6} {'peak MB':>8} {'error':>6}")
    for op in options.ops.split(","):
        part: list[dict[str, Any]] = []
        for entry in importlib.import_module(f"kernel_ops.{op}").entries(device):
            for name, why in entry.missing.items():
                print(f"{entry.op} {entry.shape}: {name} is left out: {why}")
            for row in measure(entry, device, options.rounds):
                part.append(asdict(row))
                share = "" if row.floor_share is None else f"{row.floor_share:6.0%}"
                memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:8.0f}"
                times = f"{row.median:9.3f} {row.p10:9.3f} {row.p90:9.3f}"
                print(f"{row.op + ' ' + row.shape:58} {row.side:26} {times} {share:>6} {memory:>8} {row.error_of_judge:6.2f}", flush=True)
        found += part
        if options.output is not None:
            with open(options.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(about | {"op": op, "rows": part}) + "\n")
    print(json.dumps(about | {"benchmark": "kernels", "rows": found}))


if __name__ == "__main__":
    main()
