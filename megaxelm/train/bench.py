"""How fast a recipe trains with which configuration: `megaxelm bench train`.

Every combination of DeepSpeed configuration, micro-batch and recomputation is measured in processes of its own, so that one that runs out
of memory, or fails in another way, is a row of the table and not the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megaxelm.errors import TrainError
from megaxelm.recipe import Recipe, dump_recipe
from megaxelm.train.ds_config import check_ds_config, find_ds_config, micro_batch
from megaxelm.train.environment import free_port

_OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError", "bad_alloc", "can't allocate memory", "Cannot allocate memory", "MemoryError")


@dataclass(frozen=True)
class Case:
    """One way to train."""

    config: str
    micro_batch_size: int
    activation_checkpointing: str


@dataclass(frozen=True)
class Row:
    """What came of a case: `outcome` is `ok`, `out of memory`, or what was said last. Bytes of `peak_memory` are of the fullest rank."""

    case: Case
    outcome: str
    tokens_per_second: float | None = None
    mfu: float | None = None
    model_tflops: float | None = None
    peak_memory: int | None = None


def cases(recipe: Recipe, configs: Sequence[str], micro_batches: Sequence[int], checkpointing: Sequence[str]) -> list[Case]:
    """All combinations that differ; a micro-batch that does not divide a rank's share becomes the largest divisor below it.

    Raises:
        TrainError: a value that is none of these, a configuration that the recipe contradicts, or ranks that cannot share the batch.
    """
    train = recipe.train
    wrong = [value for value in checkpointing if value not in ("none", "full") and not (value.isdigit() and int(value) >= 2)]
    if wrong:
        raise TrainError(f"--checkpointing {','.join(wrong)}: give none, full, or a number of at least 2, with commas")
    if min(micro_batches, default=0) < 1:
        raise TrainError("--micro-batches: give whole numbers of at least 1, with commas, for example 1,2,4")
    if train.batch_sequences % train.num_devices:
        raise TrainError(
            f"train.batch_sequences = {train.batch_sequences} cannot be shared by train.num_devices = {train.num_devices}: change one"
        )
    share = train.batch_sequences // train.num_devices
    found: dict[Case, None] = {}
    for config, size, recompute in product(configs, micro_batches, checkpointing):
        path = find_ds_config(config)
        section = "activation_checkpointing" in json.loads(path.read_text(encoding="utf-8"))
        if section and recompute == "none":
            continue
        value: Any = int(recompute) if recompute.isdigit() else recompute
        check_ds_config(path, train.model_copy(update={"activation_checkpointing": value}))
        found[Case(config, micro_batch(share, size), recompute)] = None
    if not found:
        raise TrainError(f"--configs {','.join(configs)} needs recomputation, and --checkpointing has none: add full")
    return list(found)


def bench(
    recipe: Recipe, chosen: Sequence[Case], steps: int, vocab_size: int | None, timeout: float, say: Callable[[str], None]
) -> Iterator[Row]:
    """Measure each case, one after the other."""
    for number, case in enumerate(chosen):
        say(f"{number + 1}/{len(chosen)}: {case.config}, micro-batch {case.micro_batch_size}, recompute {case.activation_checkpointing}")
        yield _measure(recipe, case, steps, vocab_size, timeout)


def _measure(recipe: Recipe, case: Case, steps: int, vocab_size: int | None, timeout: float) -> Row:
    with tempfile.TemporaryDirectory(prefix="megaxelm-bench-") as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        output, log = folder / "result.json", folder / "log"
        arguments = ["megaxelm.train.bench_worker", str(folder / "recipe.yaml"), "--steps", str(steps), "--output", str(output)]
        arguments += ["--vocab-size", str(vocab_size)] if vocab_size else []
        for key, value in asdict(case).items():
            arguments += ["--set", f"train.{'deepspeed_config' if key == 'config' else key}={value}"]
        devices = recipe.train.num_devices
        launcher = ["deepspeed.launcher.runner", "--num_gpus", str(devices), "--master_port", str(free_port()), "--module"]
        command = [sys.executable, "-m", *(launcher if devices > 1 else []), *arguments]
        env = dict(os.environ)
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
        with open(log, "wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True
            )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return Row(case, f"no result after {timeout:.0f} s")
        finally:
            _end_group(process)
        if not output.exists():
            return Row(case, _reason(code, log.read_text(encoding="utf-8", errors="replace")))
        result = json.loads(output.read_text(encoding="utf-8"))
        peak = max(value for key, value in result["memory"].items() if key.startswith("peak"))
        return Row(case, "ok", result["tokens_per_second"], result["mfu"], result["model_tflops"], peak)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End what a case has left running: ranks outlive a launcher that was killed."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _reason(code: int, log: str) -> str:
    """Why a case has no result, in a few words."""
    if (
        any(words in log for words in _OUT_OF_MEMORY)
        or code in (-signal.SIGKILL, 128 + signal.SIGKILL)
        or "exits with return code = -9" in log
    ):
        return "out of memory"
    said = [line for line in log.splitlines() if line.startswith(("error: ", "rank "))]
    lines = said or [line for line in log.splitlines() if line.strip()]
    return f"failed (exit code {code}): {lines[-1].removeprefix('error: ')[:200] if lines else 'it said nothing'}"


def recommend(rows: Sequence[Row]) -> Row | None:
    """The fastest row; among those within 2 % of it the one with the least memory."""
    measured = [row for row in rows if row.tokens_per_second is not None]
    fastest = max((row.tokens_per_second or 0.0 for row in measured), default=0.0)
    near = [row for row in measured if (row.tokens_per_second or 0.0) >= 0.98 * fastest]
    return min(near, key=lambda row: row.peak_memory or 0, default=None)


def table(rows: Sequence[Row]) -> str:
    """The rows as text, in the order in which they were measured."""
    lines = [f"{'configuration':<16}{'micro':>6}{'recompute':>11}{'tokens/s':>12}{'MFU':>8}{'peak GB':>9}  outcome"]
    for row in rows:
        case = row.case
        speed = "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
        mfu = "" if row.tokens_per_second is None else "n/a" if row.mfu is None else f"{row.mfu:.1%}"
        peak = "" if row.peak_memory is None else f"{row.peak_memory / 1e9:.2f}"
        lines.append(
            f"{case.config:<16}{case.micro_batch_size:>6}{case.activation_checkpointing:>11}{speed:>12}{mfu:>8}{peak:>9}  {row.outcome}"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars of tokens a second, with the peak memory written beside them; a case without a result has no bar and says why."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    best = recommend(rows)
    fastest = max((row.tokens_per_second or 0.0 for row in rows), default=0.0) or 1.0
    for place, row in enumerate(rows):
        speed = row.tokens_per_second or 0.0
        axes.barh(place, speed, color="#1f77b4" if row is best else "#a8c8e4")
        said = f"{speed:,.0f} tokens/s, {(row.peak_memory or 0) / 1e9:.1f} GB" if row.outcome == "ok" else row.outcome[:60]
        axes.text(speed + 0.01 * fastest, place, said, va="center", fontsize=8)
    names = [f"{row.case.config}, micro-batch {row.case.micro_batch_size}, recompute {row.case.activation_checkpointing}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, fastest * 1.35)
    axes.set_xlabel("tokens a second")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
