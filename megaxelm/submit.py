"""`megaxelm submit`: the jobs that make a run on a Slurm cluster, each after those it needs; what is fresh is left out.

    prepare -> seed -> experts (an array, one member a task) -> evaluate

and with rounds an array for each, since its experts branch from those of the round before; the dense model trains beside them:

    prepare -> seed -> round1 -> round2 ... -> evaluate
                    -> dense               -> evaluate

Each job waits until the ones before it have ended well (`afterok`): evaluation compares all members, so without one of them it would
only fail. A job that can never start any more is cancelled by Slurm (`--kill-on-invalid-dep=yes`). The job numbers are kept in
`slurm.json` of the run, for `megaxelm status`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaxelm.errors import StageError, TrainError
from megaxelm.files import read_json, write_json
from megaxelm.ingredients import STAGES
from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages
from megaxelm.train.ds_config import fill_ds_config, find_ds_config
from megaxelm.train.members import Member, expected_members

JOBS = "slurm.json"


@dataclass(frozen=True)
class SubmitOptions:
    """What the jobs of a run ask Slurm for. `nodes` and `gpus_per_node` are those of one model's training; 0 GPUs: train on CPUs."""

    nodes: int = 1
    gpus_per_node: int | None = None
    """Null: `train.num_devices`."""
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    stage: Path | None = None
    extra: Sequence[str] = ()
    """Further options of sbatch, for every job."""


@dataclass(frozen=True)
class Job:
    """One sbatch command. `members`: what the tasks of an array train, by task number; empty for names that are not known yet. `after`:
    names of the jobs that it waits for."""

    name: str
    arguments: list[str]
    script: Path
    script_arguments: list[str]
    members: dict[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()

    @property
    def is_array(self) -> bool:
        return any(argument.startswith("--array=") for argument in self.arguments)

    def command(self, after: str | None) -> list[str]:
        """The command, with the number of the job that it waits for, or several joined by colons."""
        wait = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        return ["sbatch", "--parsable", *wait, *self.arguments, str(self.script), *self.script_arguments]


def plan_jobs(run: RunFolder, recipe: Recipe, options: SubmitOptions) -> list[Job]:
    """The jobs that make what is missing or stale of a run, in order; none when everything is fresh.

    Raises:
        MegaxelmError: the recipe's sources are missing, the ranks cannot share a batch, or the number of experts is not known yet.
    """
    stages = Stages(run, recipe)
    tasks = recipe.train.num_devices if not options.gpus_per_node else options.gpus_per_node
    gpus = tasks if options.gpus_per_node is None else options.gpus_per_node
    common = _common(options)
    training = [*common, f"--nodes={options.nodes}", f"--ntasks-per-node={tasks}", *([f"--gpus-per-node={gpus}"] if gpus else [])]
    folder = str(run.path.resolve())
    trainer = ["--stage", str(options.stage)] if options.stage else []

    stale = {stage: _is_stale(stages, stage) for stage in STAGES[: STAGES.index("seed")]}
    prepare = any(stale.values())
    members = _members(stages, recipe, known=not prepare)
    for member in members.values():
        fill_ds_config(find_ds_config(recipe.train.deepspeed_config), recipe.train, member, options.nodes * tasks, gpus > 0)
    jobs = []
    if prepare:
        runs = str(run.path.resolve().parent)
        jobs.append(Job("prepare", common, find_script("prepare"), [str(run.path.resolve() / "recipe.yaml"), "--runs", runs]))
    if prepare or _is_stale(stages, "seed"):
        jobs.append(Job("seed", training, find_script("seed"), [folder, *trainer], {"": "seed"}, after=("prepare",) if prepare else ()))
    units = {} if prepare else stages.units("experts")
    arrays: dict[str, dict[str, str]] = {}
    for task, member in tasks_of(members).items():
        if jobs or run.status(f"experts/{member.name}", units[f"experts/{member.name}"]) is not None:
            arrays.setdefault(array_of(recipe, member), {})[task] = member.name
    before = tuple(job.name for job in jobs[-1:])
    last = {"dense": before, "experts": before}
    for name, wanted in arrays.items():
        named = wanted if not prepare else {task: member for task, member in wanted.items() if member == "dense"}
        array = f"--array={_ranges([int(task) for task in wanted])}"
        line = "dense" if name == "dense" else "experts"
        jobs.append(Job(name, [*training, array], find_script("experts"), [folder, *trainer], named, after=last[line]))
        last[line] = (name,)
    if jobs or any(_is_stale(stages, stage) for stage in ("ensemble", "evaluation", "report")):
        after = tuple(name for name in dict.fromkeys(last["experts"] + last["dense"]) if name not in before)
        jobs.append(Job("evaluate", [*common, *(["--gpus-per-node=1"] if gpus else [])], find_script("evaluate"), [folder], after=after))
    return jobs


def tasks_of(members: dict[str, Member]) -> dict[str, Member]:
    """What each task of an array trains: the members but the seed, in order, by their number."""
    return {str(number): member for number, member in enumerate(member for member in members.values() if member.kind != "seed")}


def array_of(recipe: Recipe, member: Member) -> str:
    """Name of the array of jobs that trains a member: one for all, or with rounds one for each and one for the dense model."""
    if len(recipe.rounds) <= 1:
        return "experts"
    return "dense" if member.kind == "dense" else f"round{member.round}"


def submit_jobs(run: RunFolder, recipe: Recipe, jobs: Sequence[Job]) -> dict[str, str]:
    """Hand the jobs to Slurm, each after those that it waits for, and note their numbers with the run. Returns number by name.

    Raises:
        TrainError: sbatch is missing or refuses, or jobs of this run are still in the queue.
    """
    if shutil.which("sbatch") is None:
        raise TrainError("sbatch: not found on the PATH; submit from a login node of a Slurm cluster, or train here: megaxelm run RECIPE")
    _refuse_twice(run)
    run.path.mkdir(parents=True, exist_ok=True)
    run.write_recipe(recipe)  # what the jobs read: the recipe may be edited while they wait
    logs = run.path.resolve() / "slurm"
    logs.mkdir(exist_ok=True)
    numbers: dict[str, str] = {}
    notes: dict[str, Any] = {}
    env = dict(os.environ) | {"MEGAXELM_PYTHON": sys.executable}
    for job in jobs:
        log = logs / f"{job.name}-{'%A_%a' if job.is_array else '%j'}.log"
        command = job.command(":".join(numbers[name] for name in job.after))
        command.insert(1, f"--output={log}")
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            before = f"; submitted before it: {', '.join(numbers.values())} (scancel them)" if numbers else ""
            raise TrainError(f"sbatch refused the job `{job.name}`: {done.stderr.strip()}{before}\n    {shlex.join(command)}")
        numbers[job.name] = done.stdout.strip().split(";")[0]
        notes[job.name] = {"job": numbers[job.name], "members": job.members}
        write_json(run.path / JOBS, {"jobs": notes})
    return numbers


def find_script(name: str) -> Path:
    """A batch script that comes with the project."""
    homes = [Path(__file__).resolve().parents[1] / "slurm", Path(sys.prefix) / "share" / "megaxelm" / "slurm"]
    for home in homes:
        if (home / f"{name}.sbatch").is_file():
            return home / f"{name}.sbatch"
    raise StageError(f"{name}.sbatch: in none of {', '.join(map(str, homes))}; install megaxelm again")


def submitted_jobs(run: RunFolder) -> dict[str, dict[str, Any]]:
    """Jobs that were submitted for the run: {name: {job, members: {task: member}}}; none when it was never submitted."""
    path = run.path / JOBS
    return read_json(path, jobs=dict)["jobs"] if path.exists() else {}


def _refuse_twice(run: RunFolder) -> None:
    numbers = [note["job"] for note in submitted_jobs(run).values()]
    if not numbers:
        return
    done = subprocess.run(["squeue", "--noheader", "--array-unique", "--format=%i"], capture_output=True, text=True)
    queued = sorted({line.split("_")[0] for line in done.stdout.split()} & set(numbers))
    if queued:
        raise TrainError(f"{run.path}: its jobs {', '.join(queued)} are still in the queue; wait for them, or `scancel {' '.join(queued)}`")


def _is_stale(stages: Stages, stage: str) -> bool:
    return any(stages.folder.status(unit, made_from) is not None for unit, made_from in stages.units(stage).items())


def _members(stages: Stages, recipe: Recipe, known: bool) -> dict[str, Member]:
    """The members of the run; before the clusters are made, of as many as the recipe says."""
    if known:
        return stages.members()
    k = recipe.clusters.num_clusters or (len(recipe.corpus.languages) if recipe.corpus.languages else None)
    if k is None:
        raise StageError(
            "the number of experts is not known before the corpus has been read: name corpus.languages, or run `megaxelm prepare RECIPE` "
            "first and submit then"
        )
    return expected_members(recipe, [f"expert {number}" for number in range(k)])


def _common(options: SubmitOptions) -> list[str]:
    named = {"partition": options.partition, "account": options.account, "time": options.time}
    return [*(f"--{name}={value}" for name, value in named.items() if value), *options.extra]


def _ranges(numbers: list[int]) -> str:
    """`0,2-4` of sorted numbers."""
    text = ",".join(map(str, numbers))
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1 else text


def plan_text(run: RunFolder, jobs: Sequence[Job]) -> str:
    """The jobs as commands, one a line, with names where numbers will be."""
    lines = [f"{run.path}: {len(jobs)} job{'s' * (len(jobs) != 1)}"]
    for job in jobs:
        words = shlex.join(job.command(":".join(f"<{name}>" for name in job.after)))
        lines.append(f"  {job.name:<9} " + re.sub(r"'([^']*<\w+>)'", r"\1", words))
    return "\n".join(lines)
