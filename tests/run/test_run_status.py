"""The state of every model, from the run directory alone and with what squeue says."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from tiny_run import run_module

from megaxelm.files import write_json
from megaxelm.recipe import load_recipe
from megaxelm.run import RunFolder
from megaxelm.stages import Stages
from megaxelm.status import MemberStatus, run_status, status_text
from megaxelm.submit import JOBS
from megaxelm.train.attempts import end_attempt


def of(run: Path, name: str) -> MemberStatus:
    return next(item for item in run_status(RunFolder(run))[1] if item.name == name)


def write_metrics(run: Path, name: str, *steps: int) -> None:
    folder = run / "experts" / name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "loss": 5 - step / 10, "tokens_per_second": 64.0, "tokens": 256 * step}) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5, "evaluation": {}}', '{"step": 6, "lo']))


def test_a_model_waits_runs_is_interrupted_fails_and_is_done(indexed_run: Path) -> None:
    run = RunFolder(indexed_run)
    assert (of(indexed_run, "seed").state, of(indexed_run, "seed").steps) == ("waiting", 6)
    write_metrics(indexed_run, "seed", 1, 2, 4)
    with run.lock("experts/seed"):
        seed = of(indexed_run, "seed")
    assert (seed.state, seed.step, seed.tokens_per_second) == ("running", 4, 64.0)
    assert seed.loss == pytest.approx(4.6) and seed.seconds_left == pytest.approx(2 * 8 * 32 / 64)
    assert of(indexed_run, "seed").state == "interrupted", "the lock was given back, and it is not done"
    end_attempt(run.expert("seed"), "failed", 2, "no sample is left", "megaxelm train")
    assert of(indexed_run, "seed").state == "failed" and "no sample is left (megaxelm train, 0 min 0 s ago)" in of(indexed_run, "seed").note
    end_attempt(run.expert("seed"), "preempted", 75, "stopped and saved", "Slurm job 7")
    (run.expert("seed") / "checkpoints").mkdir()
    (run.expert("seed") / "checkpoints" / "latest").write_text("4")
    assert (of(indexed_run, "seed").state, of(indexed_run, "seed").checkpoint) == ("preempted", 4)
    (run.expert("seed") / "export").mkdir()
    (run.expert("seed") / "export" / "config.json").write_text("{}")
    run.close_expert("seed", Stages(run, run.recipe(), check_sources=False).made_from("experts/seed"), "0")
    assert (of(indexed_run, "seed").state, of(indexed_run, "seed").step, of(indexed_run, "seed").note) == ("done", 6, "")
    run.write_recipe(load_recipe(indexed_run / "recipe.yaml", ["train.steps=9"]))
    assert "stale: member.steps 6 -> 9" in of(indexed_run, "seed").note


def test_a_lock_of_a_process_that_is_gone_or_elsewhere(indexed_run: Path) -> None:
    run = RunFolder(indexed_run)
    gone = subprocess.Popen(["true"])
    gone.wait()
    lock = run.lock_file("experts/seed")
    lock.parent.mkdir(exist_ok=True)
    write_metrics(indexed_run, "seed", 1)
    lock.write_text(f"process {gone.pid} on {os.uname().nodename}")
    assert of(indexed_run, "seed").state == "interrupted"
    lock.write_text("process 1 on another-machine")
    assert (of(indexed_run, "seed").state, of(indexed_run, "seed").note) == ("running", "another-machine")
    long_ago = time.time() - 3600
    os.utime(run.expert("seed") / "metrics.jsonl", (long_ago, long_ago))
    assert of(indexed_run, "seed").state == "interrupted"


def test_what_squeue_says_is_told_beside_it(indexed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(indexed_run / JOBS, {"jobs": {"seed": {"job": "4"}, "experts": {"job": "5"}, "evaluate": {"job": "6"}}})
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "squeue").write_text(
        "#!/bin/sh\nprintf '5_0|RUNNING|None|n1\\n5_2|PENDING|BeginTime|\\n6|PENDING|Dependency|\\n15_1|RUNNING|None|n7\\n'\n"
    )
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    lines, members = run_status(RunFolder(indexed_run))
    assert [member.slurm for member in members] == ["", "job 5_0 running on n1", "", "job 5_2 pending (BeginTime)"]
    assert "Slurm, evaluate: job 6 pending (Dependency)" in lines
    (tools / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error' >&2; exit 1\n")
    assert any("squeue does not answer (slurm_load_jobs error)" in line for line in run_status(RunFolder(indexed_run))[0])


def test_the_table_of_a_run(indexed_run: Path, tmp_path: Path) -> None:
    write_metrics(indexed_run, "dense", 1, 3)
    text = status_text(*run_status(RunFolder(indexed_run)))
    assert text.splitlines()[0].startswith("stages: corpus made, tokenizer made") and "evaluation missing" in text
    row = next(line for line in text.splitlines() if line.startswith("dense"))
    assert row.split()[1:6] == ["interrupted", "3/6", "-", "4.700", "64"]
    (tmp_path / "none").mkdir()
    done = run_module("megaxelm.cli", "status", str(tmp_path / "none"))
    assert done.returncode == 2 and "not a run directory" in done.stderr
