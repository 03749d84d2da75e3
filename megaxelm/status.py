"""`megaxelm status`: how far each model of a run is, from its directory alone; and what Slurm says where it has jobs for the run.

States: `done`; `running`; `preempted` (stopped and saved, or ended by a device fault: it goes on when it is started again); `failed`
(with its reason); `interrupted` (it had begun and ended without a word, with its machine for instance); `waiting` (not begun). A model
that runs on another machine is known by its lock and by metrics that are still being written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaxelm.errors import MegaxelmError, StageError
from megaxelm.ingredients import STAGES
from megaxelm.recipe import Recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages
from megaxelm.submit import array_of, submitted_jobs, tasks_of
from megaxelm.train.attempts import last_ending
from megaxelm.train.members import Member

SILENT_SECONDS = 600.0
"""A training on another machine that has written nothing for so long does not count as running."""


@dataclass(frozen=True)
class MemberStatus:
    """One model: `step` of `steps` done, `loss` in nats a token, `tokens_per_second`, `seconds_left`; None where nothing is known."""

    name: str
    state: str
    steps: int
    step: int
    checkpoint: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    note: str
    slurm: str


def run_status(run: RunFolder) -> tuple[list[str], list[MemberStatus]]:
    """Lines about the stages and about Slurm, and the state of every model.

    Raises:
        StageError: not a run directory.
    """
    recipe = run.recipe()
    stages = Stages(run, recipe, check_sources=False)
    lines = ["stages: " + ", ".join(f"{stage} {'made' if run.marker(stage) else 'missing'}" for stage in STAGES if stage not in _MODELS)]
    jobs = submitted_jobs(run)
    queue, told = _queue() if jobs else ({}, None)
    if told:
        lines.append(told)
    if not (run.folder("clusters") / "report.json").exists():
        lines += [f"Slurm, {name}: {queue[note['job']]}" for name, note in jobs.items() if note["job"] in queue]
        return [*lines, "the models are known when the clusters are made"], []
    try:
        members = stages.members()
    except StageError as error:
        return [*lines, str(error)], []
    in_slurm = _jobs_of_members(jobs, members, recipe)
    statuses = [_member_status(stages, member, queue.get(in_slurm.get(member.name, ""), "")) for member in members.values()]
    others = [
        f"Slurm, {name}: {queue[jobs[name]['job']]}" for name in ("prepare", "evaluate") if name in jobs and jobs[name]["job"] in queue
    ]
    return lines + others, statuses


_MODELS = ("seed", "experts")


def _member_status(stages: Stages, member: Member, slurm: str) -> MemberStatus:
    run, name = stages.folder, member.name
    folder = run.expert(name)
    line = _last_metrics(folder / "metrics.jsonl")
    step, speed = int(line.get("step", 0)), line.get("tokens_per_second")
    state, note = _state(stages, member, line)
    left = (member.steps - step) * member.batch_sequences * member.sequence_length
    return MemberStatus(
        name,
        state,
        member.steps,
        member.steps if state == "done" else step,
        _checkpoint(folder),
        line.get("loss"),
        speed,
        left / speed if speed and state == "running" else None,
        note,
        slurm,
    )


def _state(stages: Stages, member: Member, line: dict[str, Any]) -> tuple[str, str]:
    run, unit = stages.folder, f"experts/{member.name}"
    folder = run.expert(member.name)
    if run.marker(unit) is not None:
        try:
            reason = run.status(unit, stages.made_from(unit))
        except MegaxelmError as error:
            reason = str(error)
        return "done", reason or ""
    owner = _lock_owner(run, unit)
    if owner is not None and _is_alive(owner, folder):
        return "running", f"{owner[1]}"
    ending = last_ending(folder)
    if ending is not None:
        return ending.state, f"{ending.reason} ({ending.by}, {_ago(time.time() - ending.when)} ago)"
    begun = bool(line) or _checkpoint(folder) is not None or owner is not None
    return ("interrupted", "ended without a word; it goes on from its last checkpoint") if begun else ("waiting", "")


def _lock_owner(run: RunFolder, unit: str) -> tuple[int, str] | None:
    """Process and machine that the lock of a unit names; it names none once it has been given back."""
    path = run.lock_file(unit)
    match = re.match(r"process (\d+) on (\S+)", path.read_text(encoding="utf-8")) if path.exists() else None
    return (int(match[1]), match[2]) if match else None


def _is_alive(owner: tuple[int, str], folder: Path) -> bool:
    """Whether the owner of a lock still works: by its process on this machine, by what it writes on another."""
    if owner[1] == os.uname().nodename:
        return Path(f"/proc/{owner[0]}").exists()
    written = [
        path.stat().st_mtime for path in (folder / "metrics.jsonl", folder / "train.log", folder / "made_from.json") if path.exists()
    ]
    return bool(written) and time.time() - max(written) < SILENT_SECONDS


def _last_metrics(path: Path) -> dict[str, Any]:
    """The last whole line of training figures; empty without one."""
    if not path.exists():
        return {}
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 1_000_000))
        tail = file.read()
    for text in reversed(tail[: tail.rfind(b"\n") + 1].splitlines()):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "loss" in line:
            return line
    return {}


def _checkpoint(folder: Path) -> int | None:
    latest = folder / "checkpoints" / "latest"
    text = latest.read_text(encoding="utf-8").strip() if latest.exists() else ""
    return int(text) if text.isdigit() else None


def _jobs_of_members(jobs: dict[str, dict[str, Any]], members: dict[str, Member], recipe: Recipe) -> dict[str, str]:
    """The job, or task of an array, that trains each member."""
    found = {"seed": jobs["seed"]["job"]} if "seed" in jobs else {}
    for task, member in tasks_of(members).items():
        array = array_of(recipe, member)
        if array in jobs:
            found[member.name] = f"{jobs[array]['job']}_{task}"
    return found


def _queue() -> tuple[dict[str, str], str | None]:
    """What squeue says of each job and array task, in words; and a line where it cannot be asked. No accounting is needed."""
    if shutil.which("squeue") is None:
        return {}, "squeue is not on the PATH: what follows is from the run directory alone"
    done = subprocess.run(["squeue", "--noheader", "--array", "--format=%i|%T|%r|%N"], capture_output=True, text=True)
    if done.returncode:
        return {}, f"squeue does not answer ({done.stderr.strip()}): what follows is from the run directory alone"
    found = {}
    for line in done.stdout.splitlines():
        number, state, reason, nodes = line.strip().split("|", 3)
        found[number] = f"job {number} {state.lower()}" + (f" on {nodes}" if nodes else f" ({reason})" if reason != "None" else "")
    return found, None


def status_text(lines: list[str], members: list[MemberStatus]) -> str:
    """A table for the console."""
    rows = [["model", "state", "step", "checkpoint", "loss", "tokens/s", "left", ""]]
    for item in members:
        figures = [f"{item.step}/{item.steps}", *(_or_dash(value, form) for value, form in ((item.checkpoint, "d"), (item.loss, ".3f")))]
        figures += [_or_dash(item.tokens_per_second, ",.0f"), "-" if item.seconds_left is None else _ago(item.seconds_left)]
        rows.append([item.name, item.state, *figures, "; ".join(part for part in (item.slurm, item.note) if part)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    table = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]
    return "\n".join([*lines, *(table if members else [])])


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ago(seconds: float) -> str:
    whole = int(seconds)
    if whole >= 86400:
        return f"{whole // 86400} d {whole % 86400 // 3600} h"
    return f"{whole // 3600} h {whole % 3600 // 60} min" if whole >= 3600 else f"{whole // 60} min {whole % 60} s"
