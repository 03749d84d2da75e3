"""Start the training processes of several models, show a bar for each, and find out honestly how they ended.

A return code is not trusted: `deepspeed` may return 0 when a rank died. A model counts as trained when rank 0 has written its marker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from megaxelm.errors import TrainError
from megaxelm.recipe import Recipe
from megaxelm.run import MARKER, RunFolder
from megaxelm.train.environment import check_compiler, free_port
from megaxelm.train.members import Member

_POLL_SECONDS = 0.3


@dataclass
class _Job:
    member: Member
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    bar: tqdm
    folder: Path
    log_start: int
    metrics_read: int = 0

    def update(self) -> None:
        """Advance the bar by what `metrics.jsonl` has gained."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        with open(path, "rb") as file:
            file.seek(self.metrics_read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self.metrics_read += len(whole)
        if whole:
            line = json.loads(whole.splitlines()[-1])
            self.bar.update(line["step"] - self.bar.n)
            self.bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s", refresh=False)


def train_members(run: RunFolder, recipe: Recipe, members: Sequence[Member]) -> None:
    """Train models whose parents are done, at most `train.concurrent_experts` at a time; one that fails does not stop the others.

    Raises:
        TrainError: after all have ended, naming those that failed and their logs.
    """
    check_compiler()
    at_once = min(recipe.train.concurrent_experts, len(members))
    waiting = list(members)
    running: list[_Job] = []
    failed: list[str] = []
    try:
        while waiting or running:
            taken = {job.bar.pos for job in running}
            while waiting and len(running) < at_once:
                place = next(number for number in range(at_once) if -number not in taken)
                taken.add(-place)
                running.append(_start(run, recipe, waiting.pop(0), at_once, place))
            time.sleep(_POLL_SECONDS)
            for job in running[:]:
                job.update()
                if job.process.poll() is not None:
                    running.remove(job)
                    failed += _finish(run, job)
    except BaseException:
        for job in running:
            _stop(job)
        raise
    if failed:
        raise TrainError("\n".join(failed) + "\nwhat was finished stays; start again and only the rest is trained")


def _start(run: RunFolder, recipe: Recipe, member: Member, at_once: int, place: int) -> _Job:
    devices = recipe.train.num_devices
    env = dict(os.environ)
    # ninja and deepspeed lie beside the interpreter, which need not be on the PATH.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    # Spinning OpenMP threads of several processes on the same cores slow each other down many times over.
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // (at_once * devices))))
    arguments = ["megaxelm.train", str(run.path.resolve()), "--expert", member.name]
    if devices > 1:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(devices)]
        command += ["--master_port", str(free_port()), "--module", *arguments]
    else:
        command = [sys.executable, "-m", *arguments]
    folder = run.expert(member.name)
    log = open(folder / "train.log", "ab")  # noqa: SIM115 - lives as long as the process
    log_start = log.tell()
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
    bar = tqdm(
        total=member.steps, desc=f"train {member.name}", unit="step", file=sys.stderr, position=place, mininterval=0.5, dynamic_ncols=True
    )
    return _Job(member, process, log, bar, folder, log_start)


def _finish(run: RunFolder, job: _Job) -> list[str]:
    job.update()
    job.bar.close()
    job.log.close()
    if (job.folder / MARKER).exists():
        return []
    with open(job.folder / "train.log", "rb") as file:
        file.seek(job.log_start)  # what earlier attempts said is not the reason of this one
        log = file.read().decode("utf-8", errors="replace").splitlines()
    reason = next((line for line in reversed(log) if line.startswith("error: ")), None)
    where = f"{run.path}/experts/{job.member.name}/train.log"
    shown = reason.removeprefix("error: ") if reason else "last lines of its log:\n    " + "\n    ".join(log[-8:])
    return [f"`{job.member.name}` was not trained (exit code {job.process.returncode}; log {where}): {shown}"]


def _stop(job: _Job) -> None:
    """End a job when the user interrupts: its checkpoints stay."""
    job.process.terminate()
    try:
        job.process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        job.process.kill()
        job.process.wait()
    job.bar.close()
    job.log.close()
