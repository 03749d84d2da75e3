"""Start the training processes of several models, show a bar for each, and find out honestly how they ended.

A return code is not trusted: `deepspeed` may return 0 when a rank died. A model counts as trained when rank 0 has written its marker.
On GPUs as many models train at once as there are slices of `train.num_devices` devices; on a CPU `train.concurrent_experts`.
SIGINT, SIGTERM and SIGUSR1 ask the trainings, through the stop file of each, to save and end; a second signal, or
`train.grace_seconds`, ends those that have not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from megaxelm.console import TRY_AGAIN, Interrupted
from megaxelm.errors import Preempted, TrainError
from megaxelm.recipe import Recipe
from megaxelm.run import MARKER, RunFolder
from megaxelm.train.attempts import begin_attempt, end_attempt, reason_in_log
from megaxelm.train.environment import check_compiler, free_port
from megaxelm.train.hostfile import read_hostfile
from megaxelm.train.members import Member
from megaxelm.train.preemption import STOP_FILE

_POLL_SECONDS = 0.3


@dataclass(frozen=True)
class LaunchOptions:
    """How trainings are started. `hostfile`: nodes reached by ssh; then one model trains at a time, on all of them. `module`: the program
    that
    trains a model, with the arguments of `megaxelm.train`."""

    hostfile: Path | None = None
    module: str = "megaxelm.train"


@dataclass
class _Job:
    member: Member
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    bar: tqdm
    folder: Path
    log_start: int
    place: int
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
            if "loss" in line:
                self.bar.update(line["step"] - self.bar.n)
                loss = "skipped" if line["loss"] is None else f"{line['loss']:.3f}"
                self.bar.set_postfix_str(f"loss {loss}, {line['tokens_per_second']:,.0f} tokens/s", refresh=False)

    def end(self) -> None:
        """Kill all processes of the training; they are a session of their own."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class _Signals:
    """Counts the requests to stop; `asked` after the first, `insisted` after the second."""

    def __init__(self) -> None:
        self.count = 0

    @property
    def asked(self) -> bool:
        return self.count > 0

    @property
    def insisted(self) -> bool:
        return self.count > 1

    def _note(self, number: int, frame: object) -> None:
        self.count += 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread is told of signals
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train_members(run: RunFolder, recipe: Recipe, members: Sequence[Member], options: LaunchOptions | None = None) -> None:
    """Train models whose parents are done, several at a time; one that fails does not stop the others.

    Raises:
        TrainError: after all have ended, naming those that failed and their logs.
        Preempted: it was asked to stop, and every training that ran has saved itself.
        Interrupted: it was asked to stop, and a training had to be ended without that.
    """
    options = options or LaunchOptions()
    check_compiler()
    slices = device_slices(recipe, options)[: len(members)]
    waiting, running = list(members), list[_Job]()
    failed, stopped, ended = list[str](), list[str](), list[str]()
    deadline: float | None = None
    signals = _Signals()
    with signals.listening():
        try:
            while running or (waiting and not signals.asked):
                free = [place for place in range(len(slices)) if place not in {job.place for job in running}]
                while waiting and free and not signals.asked:
                    running.append(_start(run, recipe, waiting.pop(0), slices, free.pop(0), options))
                time.sleep(_POLL_SECONDS)
                if signals.asked and deadline is None:
                    deadline = time.monotonic() + recipe.train.grace_seconds
                    _ask_to_stop(running, recipe.train.grace_seconds)
                if deadline is not None and (signals.insisted or time.monotonic() > deadline):
                    for job in running:
                        job.end()
                for job in running[:]:
                    job.update()
                    if job.process.poll() is not None:
                        running.remove(job)
                        _finish(run, job, signals.asked, failed, stopped, ended)
        except BaseException:
            for job in running:
                job.end()
                job.process.wait()
            raise
    if failed:
        raise TrainError("\n".join([*failed, *stopped]) + "\nwhat was finished stays; start again and only the rest is trained")
    if ended or (signals.asked and not stopped and waiting):
        raise Interrupted
    if stopped:
        raise Preempted("\n".join(stopped) + "\nthe same command goes on from there")


def device_slices(recipe: Recipe, options: LaunchOptions) -> list[list[str] | None]:
    """Devices of each training that runs at the same time; None: no choice is made for it (a CPU, or other nodes).

    Raises:
        TrainError: there are fewer devices than one model needs, or names that `deepspeed` cannot choose among.
    """
    config = recipe.train
    if options.hostfile is not None:
        read_hostfile(options.hostfile)
        return [None]
    devices = visible_devices()
    if not devices:
        return [None] * config.concurrent_experts
    each = config.num_devices
    if each > len(devices):
        raise TrainError(
            f"train.num_devices = {each}: this machine shows {len(devices)} ({', '.join(devices)}); lower it, or widen CUDA_VISIBLE_DEVICES"
        )
    if each > 1 and not all(name.isdigit() for name in devices):
        raise TrainError(
            f"CUDA_VISIBLE_DEVICES = {','.join(devices)}: `deepspeed` takes numbers alone; give numbers, or train.num_devices = 1"
        )
    return [devices[first : first + each] for first in range(0, len(devices) - each + 1, each)]


def visible_devices() -> list[str]:
    """Names of the CUDA devices that may be used, as CUDA_VISIBLE_DEVICES has them; none on a CPU."""
    import torch

    count = torch.cuda.device_count()
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given[:count] if given else [str(number) for number in range(count)]


def child_environment(ranks_here: int) -> dict[str, str]:
    """The environment of training processes, of which `ranks_here` share this machine."""
    env = dict(os.environ)
    # ninja and deepspeed lie beside the interpreter, which need not be on the PATH.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    # Spinning OpenMP threads of several processes on the same cores slow each other down many times over.
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks_here)))
    return env


def training_command(recipe: Recipe, arguments: list[str], devices: list[str] | None, hostfile: Path | None) -> list[str]:
    """The command that trains one model here, or on the nodes of `hostfile`."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    if hostfile is not None:
        return [*launcher, "--hostfile", str(hostfile), "--module", *arguments]
    if recipe.train.num_devices == 1:
        return [sys.executable, "-m", *arguments]
    # An empty hostfile keeps deepspeed from /job/hostfile; it takes the devices from CUDA_VISIBLE_DEVICES only without --num_gpus.
    here = [*launcher, "--hostfile", ""] + ([] if devices else ["--num_gpus", str(recipe.train.num_devices)])
    return [*here, "--module", *arguments]


def _start(run: RunFolder, recipe: Recipe, member: Member, slices: Sequence[list[str] | None], place: int, options: LaunchOptions) -> _Job:
    devices = slices[place]
    env = child_environment(len(slices) * recipe.train.num_devices)
    if devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    command = training_command(recipe, [options.module, str(run.path.resolve()), "--expert", member.name], devices, options.hostfile)
    folder = run.expert(member.name)
    (folder / STOP_FILE).unlink(missing_ok=True)  # a request to an earlier attempt
    begin_attempt(folder)
    log = open(folder / "train.log", "ab")  # noqa: SIM115 - lives as long as the process
    log_start = log.tell()
    # A session of its own: Ctrl-C reaches this process alone, which lets the training save.
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, start_new_session=True)
    bar = tqdm(
        total=member.steps, desc=f"train {member.name}", unit="step", file=sys.stderr, position=place, mininterval=0.5, dynamic_ncols=True
    )
    return _Job(member, process, log, bar, folder, log_start, place)


def _ask_to_stop(running: Sequence[_Job], grace_seconds: float) -> None:
    for job in running:
        (job.folder / STOP_FILE).touch()
    names = ", ".join(job.member.name for job in running)
    if names:
        tqdm.write(f"asked to stop: {names} may take {grace_seconds:g} s to save; a second signal ends at once", file=sys.stderr)


def _finish(run: RunFolder, job: _Job, asked: bool, failed: list[str], stopped: list[str], ended: list[str]) -> None:
    """Sort a training that has ended: trained, stopped and saved, ended on request, or failed."""
    job.update()
    job.bar.close()
    job.log.close()
    job.end()  # ranks that outlived their launcher
    name, code = job.member.name, job.process.returncode
    (job.folder / STOP_FILE).unlink(missing_ok=True)
    if (job.folder / MARKER).exists():
        return
    with open(job.folder / "train.log", "rb") as file:
        file.seek(job.log_start)  # what earlier attempts said is not the reason of this one
        reason = reason_in_log(file.read().decode("utf-8", errors="replace"))
    if code == TRY_AGAIN:
        stopped.append(f"`{name}` was stopped and has saved its state")
        end_attempt(job.folder, "preempted", code, "asked to stop; saved", "megaxelm train")
    elif asked:
        ended.append(name)
        end_attempt(job.folder, "preempted", code, "ended before it could save", "megaxelm train")
    else:
        where = f"{run.path}/experts/{name}/train.log"
        failed.append(f"`{name}` was not trained (exit code {code}; log {where}): {reason}")
        end_attempt(job.folder, "failed", code, reason, "megaxelm train")
