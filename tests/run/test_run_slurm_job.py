"""One model inside a Slurm job, with programs of Slurm that write down what they are asked: how it ended, and what is done about it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import REPOSITORY

from megaxelm import slurm_job
from megaxelm.errors import StageError
from megaxelm.run import RunFolder
from megaxelm.slurm_job import SlurmJob, claim, find_fault
from megaxelm.train.attempts import last_ending
from megaxelm.train.preemption import STOP_FILE

SCONTROL = """#!/bin/sh
echo "scontrol $*" >> "$CALLS"
case "$1 $2" in
"show job") echo "JobId=77 JobState=${FAKE_STATE:-RUNNING} Restarts=${FAKE_RESTARTS:-0} ExcNodeList=${FAKE_EXCLUDED:-(null)} Requeue=1" ;;
"show hostnames") printf 'n1\\nn2\\n' ;;
esac
"""


@pytest.fixture
def job(indexed_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs the program for the seed with an `srun` that does what `script` says; returns exit code, output and calls of Slurm."""
    tools = tmp_path / "bin"
    tools.mkdir()
    calls = tmp_path / "calls"
    calls.touch()
    (tools / "scontrol").write_text(SCONTROL)

    def run(script: str, *arguments: str, send: signal.Signals | None = None, **variables: str) -> tuple[int, str, str]:
        (tools / "srun").write_text('#!/bin/bash\necho "srun $*" >> "$CALLS"\n' + script)
        for tool in tools.iterdir():
            tool.chmod(0o755)
        env = dict(os.environ) | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}", "CALLS": str(calls)}
        env |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NODELIST": "n[1-2]"}
        env |= {"PATH": f"{tools}{os.pathsep}{env['PATH']}", "RUN": str(indexed_run)} | variables
        command = [sys.executable, "-m", "megaxelm.slurm_job", str(indexed_run), *(arguments or ("--expert", "seed"))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        if send is not None:
            deadline = time.monotonic() + 60
            while "srun" not in calls.read_text():
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
            time.sleep(0.2)
            process.send_signal(send)
        said = process.communicate(timeout=60)[0]
        return process.returncode, said, calls.read_text()

    return run


def test_one_task_a_device_is_started_and_its_mistake_told(job: Callable[..., tuple[int, str, str]], indexed_run: Path) -> None:
    script = "echo '5: rank 5: error: no sample is left'\necho 'srun: error: n2: task 5: Exited with exit code 2'\nexit 2\n"
    code, said, calls = job(script, "--expert", "seed", "--", "--deepspeed_config", "zero3")
    assert code == 2 and "`seed` was not trained (exit code 2): no sample is left" in said and "Traceback" not in said
    srun = next(line for line in calls.splitlines() if line.startswith("srun"))
    assert "--nodes 2 --ntasks 8 --ntasks-per-node 4 --distribution=block" in srun and srun.endswith(
        "--expert seed --deepspeed_config zero3"
    )
    assert "requeue" not in calls, "it would fail again"
    ending = last_ending(indexed_run / "experts" / "seed")
    assert ending is not None and (ending.state, ending.by) == ("failed", "Slurm job 77")
    assert "no sample is left" in (indexed_run / "experts" / "seed" / "train.log").read_text()


@pytest.mark.parametrize("script", ["exit 75\n", "exit 138\n", "exit 143\n"])
def test_a_training_that_was_stopped_is_requeued(job: Callable[..., tuple[int, str, str]], indexed_run: Path, script: str) -> None:
    code, said, calls = job(script)
    assert code == 75 and "scontrol requeue 77" in calls and "requeued" in said
    ending = last_ending(indexed_run / "experts" / "seed")
    assert ending is not None and ending.state == "preempted"


def test_a_signal_to_the_batch_script_is_passed_on(job: Callable[..., tuple[int, str, str]]) -> None:
    script = "trap 'echo told; exit 75' USR1\nfor i in $(seq 300); do sleep 0.1; done\n"
    code, said, calls = job(script, send=signal.SIGTERM)
    assert code == 75 and "told" in said and "scontrol requeue 77" in calls


@pytest.mark.parametrize(
    ("exit_code", "state", "words"),
    [
        ("75", {"FAKE_RESTARTS": "1"}, "Slurm has started this job again elsewhere"),
        ("75", {"FAKE_STATE": "PENDING"}, "Slurm runs it again, or it was cancelled"),
        ("1", {"FAKE_STATE": "REQUEUED"}, "Slurm took the job back (requeued)"),
    ],
)
def test_a_job_that_slurm_has_already_taken_back_is_left_alone(
    job: Callable[..., tuple[int, str, str]], indexed_run: Path, exit_code: str, state: dict[str, str], words: str
) -> None:
    code, said, calls = job(f"exit {exit_code}\n", **state)
    assert code == 75 and "scontrol requeue" not in calls and words in said
    ending = last_ending(indexed_run / "experts" / "seed")
    assert (ending is None) == ("FAKE_RESTARTS" in state), "a next life must not find the note of this one"


def test_an_earlier_model_of_other_settings_is_set_aside_once(job: Callable[..., tuple[int, str, str]], indexed_run: Path) -> None:
    (indexed_run / "experts" / "seed").mkdir(parents=True)
    code, said, _ = job("exit 75\n")
    assert "is kept in replaced/seed-1" in said
    code, said, _ = job("exit 75\n")
    assert "replaced" not in said and (indexed_run / "experts" / "seed" / "made_from.json").exists()


@pytest.mark.slow
def test_a_device_fault_excludes_its_node_and_a_third_one_ends_it(job: Callable[..., tuple[int, str, str]]) -> None:
    script = "echo '1: NCCL error: remote process exited'\necho '6: RuntimeError: CUDA error: unspecified launch failure'\nexit 1\n"
    code, said, calls = job(script)
    assert code == 75 and "scontrol update JobId=77 ExcNodeList=n2" in calls
    assert calls.index("requeue") < calls.index("ExcNodeList"), "only a pending job can be changed"
    assert "device fault on n2" in said and "keeps away from n2" in said
    code, said, calls = job(script, FAKE_EXCLUDED="n7")
    assert code == 75 and "ExcNodeList=n7,n2" in calls
    code, said, calls = job(script)
    assert code == 2 and "3 device faults, the last on n2" in said and calls.count("requeue") == 2


def test_what_is_a_device_fault() -> None:
    assert find_fault(["0: step 1", " 3: RuntimeError: CUDA error: an illegal memory access"]) == (
        3,
        "3: RuntimeError: CUDA error: an illegal memory access",
    )
    assert find_fault(["NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."]) is not None
    for line in ("torch.OutOfMemoryError: CUDA out of memory", "CUDA error: out of memory", "CUDA error: device-side assert triggered"):
        assert find_fault([line]) is None, "another node would not help"


def test_a_restarted_job_asks_its_earlier_life_to_stop(indexed_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(indexed_run)
    run.expert("seed").mkdir(parents=True)
    code = """
import pathlib, sys, time
from megaxelm.run import RunFolder
run = RunFolder(sys.argv[1])
with run.lock("experts/seed"):
    print("locked", flush=True)
    while not (run.expert("seed") / "stop").exists():
        time.sleep(0.05)
"""
    env = dict(os.environ) | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    earlier = subprocess.Popen([sys.executable, "-c", code, str(indexed_run)], stdout=subprocess.PIPE, text=True, env=env)
    assert earlier.stdout is not None and earlier.stdout.readline() == "locked\n"
    with pytest.raises(StageError, match="another megaxelm works here"):
        claim(run, "seed", wait=False)
    assert earlier.poll() is None
    claim(run, "seed", wait=True)
    assert earlier.wait(timeout=10) == 0
    assert not (run.expert("seed") / STOP_FILE).exists(), "or this life would stop as well"
    monkeypatch.setattr(slurm_job, "CLAIM_SECONDS", 0.5)
    with run.lock("experts/seed"), pytest.raises(StageError, match="another megaxelm works here"):
        claim(run, "seed", wait=True)


def test_array_tasks_are_members_in_order(job: Callable[..., tuple[int, str, str]]) -> None:
    code, said, _ = job("exit 2\n", "--task", "9")
    assert code == 2 and "--task 9: this run has tasks 0 to 2: dense, bg-en, de-ru" in said
    code, said, _ = job("exit 2\n", "--task", "1")
    assert "`bg-en` on 2 x 4 tasks" in said


def test_outside_of_slurm_it_says_how_to_start(job: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    code, said, _ = job("exit 0\n", SLURM_NTASKS_PER_NODE="")
    assert code == 2 and "give sbatch --ntasks-per-node" in said
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(Exception, match="start it by `megaxelm submit` or sbatch"):
        SlurmJob.from_environment()
