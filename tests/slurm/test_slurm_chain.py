"""The chain prepare -> seed -> experts -> evaluate on a real Slurm with two nodes, with what goes wrong on clusters in the middle of it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from slurm_daemons import Slurm, nodes_are_idle, wait_for
from tiny_run import REPOSITORY, run_module, tiny_recipe, write_corpus

from megaxelm.files import read_json
from megaxelm.run import RunFolder
from megaxelm.train.attempts import last_ending

pytestmark = pytest.mark.slurm


@pytest.fixture
def cluster(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """What sbatch hands on to the jobs, as a user's shell would have it."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "kernels"))))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return slurm


def until(ready: Callable[[], Any], seconds: float, say: Callable[[], str]) -> Any:
    """The first true value of `ready`."""
    deadline = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < deadline, say()
        time.sleep(0.2)
    return value


def squeue(*arguments: str) -> str:
    return subprocess.run(["squeue", "--noheader", "--array", *arguments], capture_output=True, text=True).stdout


def job_field(job: str, name: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True).stdout
    found = re.search(rf"\s{name}=(\S*)", shown)
    return found[1] if found else ""


def step_of(run: Path, name: str) -> int:
    path = run / "experts" / name / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if '"loss"' in line] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def logs(run: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted((run / "slurm").glob("*.log")))


def status(run: Path) -> dict[str, dict[str, Any]]:
    done = run_module("megaxelm.cli", "status", str(run), "--json")
    assert done.returncode == 0, done.stderr
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_the_chain_survives_preemption_and_a_lost_node(cluster: Slurm, tmp_path: Path) -> None:
    last = 1600  # a member must still be in its middle when what became of another has been asked
    train = {"batch_sequences": 8, "steps": last, "checkpoint_every": 20, "log_every": 5}
    tree = tiny_recipe(write_corpus(tmp_path / "corpus"), train=train, clusters={"k": 4}, experts={"dense": False}, seed={"steps": 20})
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    run = tmp_path / "runs" / "tiny"
    arguments = ["submit", str(recipe), "--runs", str(tmp_path / "runs"), "--gpus-per-node", "0"]

    planned = run_module("megaxelm.cli", *arguments, "--dry-run", "--", "--exclusive")
    assert planned.returncode == 0 and not run.exists(), planned.stderr
    assert "--array=0-3" in planned.stdout and "--dependency=afterok:<seed>" in planned.stdout

    submitted = run_module("megaxelm.cli", *arguments, "--", "--exclusive")
    assert submitted.returncode == 0, submitted.stderr
    again = run_module("megaxelm.cli", *arguments)
    assert again.returncode == 2 and "are still in the queue" in again.stderr
    array = read_json(run / "slurm.json", jobs=dict)["jobs"]["experts"]["job"]

    until(lambda: "RUNNING" in squeue(f"--jobs={array}", "--format=%T"), 300, lambda: squeue() + logs(run))
    names = read_json(run / "clusters" / "report.json", names=list)["names"]
    assert len(names) == 4

    def running_beyond(task: int, step: int) -> bool:
        return step_of(run, names[task]) >= step

    def message() -> str:
        return squeue() + subprocess.run(["sinfo"], capture_output=True, text=True).stdout + logs(run)

    until(lambda: running_beyond(0, 30), 300, message)
    shown = status(run)
    assert shown["seed"]["state"] == "done" and shown[names[0]]["state"] == "running" and shown[names[3]]["state"] == "waiting"
    assert shown[names[0]]["slurm"].startswith(f"job {array}_0 running on n") and "pending" in shown[names[3]]["slurm"]
    subprocess.run(["scontrol", "requeue", f"{array}_0"], check=True)
    until(lambda: running_beyond(1, 30), 300, message)
    # by its own number: of a task of an array scancel asks again and again
    job = squeue(f"--jobs={array}_1", "--format=%A").strip()
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    # read here: by the time that `status` has started, the job may run again
    ended = until(lambda: last_ending(run / "experts" / names[1]), 200, message)
    assert ended.state == "preempted" and ended.by.startswith("Slurm job"), ended

    # whichever member is then in its middle on the second node loses that node
    def on_second_node() -> int | None:
        for line in squeue(f"--jobs={array}", "--format=%K|%T|%N").splitlines():
            task, state, node = line.split("|")
            if state == "RUNNING" and node == "n2" and 30 <= step_of(run, names[int(task)]) < last - 400:
                return int(task) + 1
        return None

    task = until(on_second_node, 300, message) - 1
    job = until(lambda: squeue(f"--jobs={array}_{task}", "--format=%A").strip(), 5, message)
    cluster.lose_node("n2", job)
    try:
        until(lambda: (run / "evaluation" / "results.json").exists() and not squeue().strip(), 600, message)
    finally:
        cluster.start_node("n2")
    folder = RunFolder(run)
    assert all(folder.marker(f"experts/{name}") for name in names), message()
    resumed = {name: read_json(run / "experts" / name / "choices.json")["resumed_from_step"] for name in names}
    assert all(0 < resumed[name] < last for name in (names[0], names[1], names[task])), (resumed, task)
    for name in names:
        steps = [
            json.loads(line)["step"] for line in (run / "experts" / name / "metrics.jsonl").read_text().splitlines() if '"loss"' in line
        ]
        assert steps == list(range(5, last + 1, 5)), "no step is lost, none is done twice"
    assert {line["state"] for line in status(run).values()} == {"done"}
    wait_for(nodes_are_idle, cluster.folder)


def test_a_model_on_two_nodes_reads_a_staged_index_and_goes_on_after_a_signal(cluster: Slurm, indexed_run: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load((indexed_run / "recipe.yaml").read_text())
    tree["train"] |= {"steps": 200, "checkpoint_every": 50, "log_every": 5}
    (indexed_run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--exclusive", f"--output={tmp_path}/seed.log"]
    script = [str(REPOSITORY / "slurm" / "seed.sbatch"), str(indexed_run), "--stage", str(tmp_path / "local")]
    env = os.environ | {"MEGAXELM_PYTHON": sys.executable}
    job = subprocess.run([*sbatch, *script], capture_output=True, text=True, check=True, env=env).stdout.strip()

    def message() -> str:
        log = tmp_path / "seed.log"
        return squeue() + (log.read_text(errors="replace")[-6000:] if log.exists() else "no log")

    until(lambda: step_of(indexed_run, "seed") >= 20, 300, message)
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    until(lambda: not squeue().strip(), 300, message)
    log = (tmp_path / "seed.log").read_text()
    assert RunFolder(indexed_run).marker("experts/seed") is not None, log
    choices = read_json(indexed_run / "experts" / "seed" / "choices.json")
    assert (choices["processes"], choices["started_by"]) == (2, "srun")
    assert choices["resumed_from_step"] % 50 != 0, "it saved when it was told, and went on from there"
    assert log.count("copied and checked") == 4 and "0 files, 0.0 MB copied" in log, "staged once, found again after the restart"
    assert f"job {job}, start 2: `seed` on 2 x 1 tasks" in log
