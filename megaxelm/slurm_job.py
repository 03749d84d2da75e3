"""One model's training inside a Slurm job: what the batch scripts in `slurm/` run.

    python -m megaxelm.slurm_job RUN --expert seed
    python -m megaxelm.slurm_job RUN --task $SLURM_ARRAY_TASK_ID --stage /local/scratch -- --deepspeed_config zero3

Starts one task a device by `srun`, passes requests to stop on to them, and settles how it ended:

- trained: exit code 0;
- stopped and saved, or ended by a signal of Slurm: the job asks Slurm to run it again (`scontrol requeue`); exit code 75;
- a device failed (a CUDA or NCCL error, an Xid): the node is excluded from this job, and the job is requeued, three times at most;
- a mistake: told in a sentence, exit code 2. The job is not requeued, since it would fail again.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaxelm.console import TRY_AGAIN, end_on_signals, run_guarded
from megaxelm.errors import Preempted, StageError, TrainError
from megaxelm.files import read_json, write_json
from megaxelm.recipe import load_recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages
from megaxelm.train.attempts import begin_attempt, end_attempt, reason_in_log
from megaxelm.train.launch import child_environment
from megaxelm.train.members import Member, find_member
from megaxelm.train.preemption import STOP_FILE
from megaxelm.train.staging import VARIABLE, staged_folder

MAX_FAULTS = 3
"""Device faults after which a model is not started again."""
CLAIM_SECONDS = 600.0
"""How long a restarted job waits for the processes of its earlier life to let go of the model."""
_FAULTS = "device_faults.json"
# The first names the device itself; collective errors are also seen by those that only waited for it.
_DEVICE_FAULT = re.compile(r"CUDA error: (?!out of memory|device-side assert)|\bXid\b|uncorrectable (NVLink|ECC)", re.IGNORECASE)
_COLLECTIVE_FAULT = re.compile(r"NCCL error|ncclSystemError|ncclRemoteError|ncclUnhandledCudaError")


@dataclass(frozen=True)
class SlurmJob:
    """The job that this process is the batch script of."""

    id: str
    restarts: int
    nodes: int
    tasks_per_node: int

    @classmethod
    def from_environment(cls) -> SlurmJob:
        """
        Raises:
            TrainError: this is no batch script, or it does not say how many tasks a node has.
        """
        env = os.environ
        if "SLURM_JOB_ID" not in env:
            raise TrainError(
                "SLURM_JOB_ID is not set: this runs inside a Slurm job; start it by `megaxelm submit` or sbatch (slurm/README.md)"
            )
        if not env.get("SLURM_NTASKS_PER_NODE", "").isdigit():
            raise TrainError("SLURM_NTASKS_PER_NODE is not set: give sbatch --ntasks-per-node, the devices of a node (slurm/README.md)")
        nodes = int(env.get("SLURM_JOB_NUM_NODES", "1"))
        return cls(env["SLURM_JOB_ID"], int(env.get("SLURM_RESTART_COUNT", "0")), nodes, int(env["SLURM_NTASKS_PER_NODE"]))

    def field(self, name: str) -> str:
        """A field of `scontrol show job`; empty when Slurm does not answer."""
        done = subprocess.run(["scontrol", "show", "job", self.id, "--oneliner"], capture_output=True, text=True)
        found = re.search(rf"(?:^|\s){name}=(\S*)", done.stdout)
        return found[1] if found else ""

    def is_replaced(self) -> bool:
        """Whether the job's next life has begun. A script whose node was thought lost may live on beside it, and must not disturb it."""
        return self.field("Restarts") not in ("", str(self.restarts))

    def requeue(self) -> bool:
        """Ask Slurm to run this job again. False when it does so anyway, or when the job was cancelled."""
        if self.field("JobState") != "RUNNING" or self.is_replaced():
            return False
        done = subprocess.run(["scontrol", "requeue", self.id], capture_output=True, text=True)
        if done.returncode:
            raise TrainError(f"scontrol requeue {self.id}: {done.stderr.strip()}; submit it again and it goes on from its checkpoint")
        return True

    def exclude(self, node: str) -> None:
        """Keep the requeued job from `node`; what is excluded already stays so."""
        known = self.field("ExcNodeList").replace("(null)", "")
        nodes = f"{known},{node}" if known else node
        done = subprocess.run(["scontrol", "update", f"JobId={self.id}", f"ExcNodeList={nodes}"], capture_output=True, text=True)
        if done.returncode:
            print(f"scontrol update ExcNodeList={nodes}: {done.stderr.strip()}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="megaxelm.slurm_job", description="Train one model of a run inside a Slurm job.")
    parser.add_argument("run", type=Path, help="run directory")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--expert", help="seed, dense, or the name of a cluster")
    which.add_argument("--task", type=int, help="number of the array task: the members but the seed, in order")
    parser.add_argument("--stage", type=Path, metavar="DIR", help="copy the token index to DIR of each node first")
    parser.epilog = "What follows -- are options of megaxelm.train."
    given = sys.argv[1:] if arguments is None else arguments
    cut = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:cut])
    end_on_signals()
    # Until there is a training to pass it on to. Not SIG_IGN, which the processes that are started would inherit.
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    return run_guarded(lambda: _train(options, given[cut + 1 :]))


def _train(options: argparse.Namespace, trainer: list[str]) -> None:
    job = SlurmJob.from_environment()
    run = RunFolder(options.run)
    run.recipe()
    stages = Stages(run, load_recipe(run.path / "recipe.yaml"), check_sources=False)
    members = stages.members()
    member = find_member(members, options.expert) if options.expert else _member_of_task(members, options.task)
    print(f"job {job.id}, start {job.restarts + 1}: `{member.name}` on {job.nodes} x {job.tasks_per_node} tasks", flush=True)
    unit = f"experts/{member.name}"
    if run.status(unit, stages.made_from(unit)) is None:
        print(f"`{member.name}` is trained and fresh: nothing to do", flush=True)
        return
    claim(run, member.name, wait=job.restarts > 0)
    moved = run.open_expert(member.name, stages.made_from(unit))
    if moved:
        print(f"the earlier `{member.name}` belongs to other settings and is kept in {moved}", flush=True)
    env = child_environment(job.tasks_per_node)
    if "SLURM_CPUS_PER_TASK" in os.environ:
        env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", os.environ["SLURM_CPUS_PER_TASK"])
    if options.stage is not None:
        env[VARIABLE] = str(_stage(job, run, member, options.stage, env))
    begin_attempt(run.expert(member.name))
    code, lines, asked = _run_tasks(job, run, member, trainer, env)
    if run.status(unit, stages.made_from(unit)) is None:
        print(f"`{member.name}` is trained", flush=True)
    else:
        _settle(job, run, member, code, lines, asked)


def _member_of_task(members: dict[str, Member], task: int) -> Member:
    branches = [member for member in members.values() if member.kind != "seed"]
    if not 0 <= task < len(branches):
        raise TrainError(f"--task {task}: this run has tasks 0 to {len(branches) - 1}: {', '.join(member.name for member in branches)}")
    return branches[task]


def claim(run: RunFolder, name: str, wait: bool) -> None:
    """Make sure that nobody else trains the model; a restarted job asks its earlier life, which may be cut off but alive, to stop.

    Raises:
        StageError: another process trains it.
    """
    stop = run.expert(name) / STOP_FILE
    deadline = time.monotonic() + (CLAIM_SECONDS if wait else 0.0)
    asked = False
    while True:
        try:
            with run.lock(f"experts/{name}"):
                stop.unlink(missing_ok=True)
                return
        except StageError as error:
            if time.monotonic() > deadline:
                raise
            if not asked:
                print(f"{error}; this job was restarted, so it asks that one to stop", flush=True)
                stop.touch()
                asked = True
            time.sleep(1)


def _srun(job: SlurmJob, tasks_per_node: int, *options: str) -> list[str]:
    nodes = ["--nodes", str(job.nodes), "--ntasks", str(job.nodes * tasks_per_node), "--ntasks-per-node", str(tasks_per_node)]
    cpus = os.environ.get("SLURM_CPUS_PER_TASK")
    # Slurm 22.05 and later do not hand the batch job's --cpus-per-task on to srun.
    return ["srun", *nodes, "--distribution=block", *(["--cpus-per-task", cpus] if cpus else []), *options]


def _stage(job: SlurmJob, run: RunFolder, member: Member, place: Path, env: dict[str, str]) -> Path:
    command = [*_srun(job, 1), sys.executable, "-m", "megaxelm.train.staging", str(run.path), member.name, str(place)]
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise TrainError(f"--stage {place} on the nodes of this job: {reason_in_log(done.stderr)}")
    return staged_folder(run, place)


def _run_tasks(job: SlurmJob, run: RunFolder, member: Member, trainer: list[str], env: dict[str, str]) -> tuple[int, list[str], bool]:
    """Train by one task a device; returns srun's exit code, the lines that were printed, and whether it was asked to stop.

    srun gives a rank that ended 60 s for the others to follow, so that all save, and none waits for ever for one that failed.
    """
    options = ("--kill-on-bad-exit=0", "--wait=60", "--label", "--unbuffered")
    arguments = ["-u", "-m", "megaxelm.train", str(run.path), "--expert", member.name, *trainer]
    command = [*_srun(job, job.tasks_per_node, *options), sys.executable, *arguments]
    print("+ " + " ".join(command), flush=True)
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    asked = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        process.send_signal(signal.SIGUSR1)  # which srun hands on to the tasks; SIGTERM would end them

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    assert process.stdout is not None
    with open(run.expert(member.name) / "train.log", "a", encoding="utf-8") as log:
        lines = list(_tee(process.stdout, log))
    return process.wait(), lines, bool(asked)


def _tee(source: Iterator[str], log: object) -> Iterator[str]:
    for line in source:
        print(line, end="", flush=True)
        print(line, end="", flush=True, file=log)  # type: ignore[call-overload]
        yield line.rstrip("\n")


def _settle(job: SlurmJob, run: RunFolder, member: Member, code: int, lines: list[str], asked: bool) -> None:
    """Say why the training has not come to its end, note it in the model's folder, and have the job requeued where that helps."""
    name, folder, by = member.name, run.expert(member.name), f"Slurm job {job.id}"
    if job.is_replaced():
        raise Preempted(f"`{name}`: Slurm has started this job again elsewhere")
    fault = find_fault(lines)
    if fault is not None:
        _settle_fault(job, folder, name, *fault, by=by)
    if asked or code in (TRY_AGAIN, 128 + signal.SIGUSR1, 128 + signal.SIGTERM):
        reason = "stopped and saved" if code == TRY_AGAIN else f"ended by a signal (exit code {code}); its checkpoints stay"
        end_attempt(folder, "preempted", code, reason, by)
        again = "requeued" if job.requeue() else "Slurm runs it again, or it was cancelled"
        raise Preempted(f"`{name}`: {reason}; {again}")
    state = job.field("JobState")
    if state not in ("RUNNING", ""):
        end_attempt(folder, "preempted", code, f"Slurm took the job back ({state.lower()})", by)
        raise Preempted(f"`{name}`: Slurm took the job back ({state.lower()}); its checkpoints stay")
    reason = reason_in_log("\n".join(lines))
    end_attempt(folder, "failed", code, reason, by)
    raise TrainError(f"`{name}` was not trained (exit code {code}): {reason}")


def find_fault(lines: list[str]) -> tuple[int | None, str] | None:
    """The first line that tells of a broken device, and the task that wrote it by the label of srun; None when none does."""
    for pattern in (_DEVICE_FAULT, _COLLECTIVE_FAULT):
        for line in lines:
            if pattern.search(line):
                label = re.match(r"\s*(\d+): ", line)
                return (int(label[1]) if label else None), line.strip()
    return None


def _settle_fault(job: SlurmJob, folder: Path, name: str, task: int | None, line: str, by: str) -> None:
    faults = read_json(folder / _FAULTS, faults=list)["faults"] if (folder / _FAULTS).exists() else []
    node = _node_of(job, task)
    write_json(folder / _FAULTS, {"faults": [*faults, {"job": job.id, "node": node, "line": line}]})
    if len(faults) + 1 >= MAX_FAULTS:
        end_attempt(folder, "failed", 1, f"{len(faults) + 1} device faults, the last on {node}: {line}", by)
        raise TrainError(
            f"`{name}`: {len(faults) + 1} device faults, the last on {node} ({line}): have the nodes looked at; remove "
            f"{folder / _FAULTS} and submit again"
        )
    end_attempt(folder, "preempted", TRY_AGAIN, f"device fault on {node}: {line}", by)
    if job.requeue():
        job.exclude(node)
        raise Preempted(f"`{name}`: device fault on {node} ({line}): the job is requeued and keeps away from {node}")
    raise Preempted(f"`{name}`: device fault on {node} ({line}); Slurm runs the job again, or it was cancelled")


def _node_of(job: SlurmJob, task: int | None) -> str:
    """The node on which a task ran. Tasks fill one node after the other; without a number it is the first node."""
    done = subprocess.run(["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True)
    return done.stdout.split()[(task or 0) // job.tasks_per_node]


if __name__ == "__main__":
    sys.exit(main())
