"""Several trainings at once: devices of their own, a lost one, a request to stop. The trainer is a script that ends as its name says."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import REPOSITORY, run_module, tiny_recipe

from megaxelm.console import Interrupted
from megaxelm.errors import Preempted, TrainError
from megaxelm.recipe import Recipe, parse_recipe
from megaxelm.run import RunFolder
from megaxelm.train import launch
from megaxelm.train.attempts import last_ending
from megaxelm.train.launch import LaunchOptions, device_slices, train_members, training_command
from megaxelm.train.members import Member, plan_members
from megaxelm.train.preemption import STOP_FILE

TRAINER = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
name = folder.name
(folder / "began").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none") + " " + os.environ["OMP_NUM_THREADS"])
if name == "fails":
    sys.exit("error: no sample is left")
if name == "lies":
    sys.exit(0)
deadline = time.monotonic() + (0.2 if name.startswith("quick") else 60)
while time.monotonic() < deadline:
    if name != "deaf" and (folder / "stop").exists():
        (folder / "stop").unlink()
        sys.exit(75)
    time.sleep(0.02)
(folder / "stage.json").write_text("{}")
"""


@pytest.fixture
def trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunFolder, Recipe, list[Member]]]:
    """A run whose members are trained by the script."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(launch, "check_compiler", lambda: None)
    monkeypatch.setattr(launch, "visible_devices", lambda: [])

    def command(recipe: Recipe, arguments: list[str], devices: object, hostfile: object) -> list[str]:
        return [sys.executable, str(script), str(run.expert(arguments[3]))]

    monkeypatch.setattr(launch, "training_command", command)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def make(*names: str, **train: object) -> tuple[RunFolder, Recipe, list[Member]]:
        recipe = parse_recipe(
            tiny_recipe(tmp_path, train=train, clusters={"k": len(names)}, experts={"batch_sequences": 2, "allow_unequal_tokens": True})
        )
        members = plan_members(recipe, names)
        for name in names:
            run.expert(name).mkdir(parents=True)
        return run, recipe, [members[name] for name in names]

    return make


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def signal_when(paths: list[Path], *numbers: signal.Signals) -> threading.Thread:
    """Send signals to this process, one after the other, when the trainings have begun."""

    def send() -> None:
        wait_for(*paths)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_a_training_that_fails_or_lies_does_not_stop_the_others(trainings: Callable[..., tuple[RunFolder, Recipe, list[Member]]]) -> None:
    run, recipe, members = trainings("fails", "quick", "lies", "quick2", concurrent_experts=2)
    with pytest.raises(TrainError) as caught:
        train_members(run, recipe, members)
    assert "`fails` was not trained (exit code 1" in str(caught.value) and "): no sample is left" in str(caught.value)
    assert "`lies` was not trained (exit code 0" in str(caught.value), "a return code is not trusted"
    assert "quick" not in str(caught.value)
    ending = last_ending(run.expert("fails"))
    assert ending is not None and (ending.state, ending.reason) == ("failed", "no sample is left")
    assert last_ending(run.expert("quick")) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_lets_the_trainings_save_and_starts_no_more(
    trainings: Callable[..., tuple[RunFolder, Recipe, list[Member]]], number: signal.Signals
) -> None:
    run, recipe, members = trainings("a", "b", "c", concurrent_experts=2)
    thread = signal_when([run.expert("a") / "began", run.expert("b") / "began"], number)
    with pytest.raises(Preempted, match=r"`a` was stopped and has saved its state\n`b` was stopped"):
        train_members(run, recipe, members)
    thread.join()
    assert not (run.expert("c") / "began").exists() and not list(run.path.glob(f"experts/*/{STOP_FILE}"))
    ending = last_ending(run.expert("a"))
    assert ending is not None and (ending.state, ending.exit_code) == ("preempted", 75)
    assert signal.getsignal(number) is not None and "launch" not in repr(signal.getsignal(number))


def test_a_training_that_does_not_save_in_time_is_ended(trainings: Callable[..., tuple[RunFolder, Recipe, list[Member]]]) -> None:
    run, recipe, members = trainings("deaf", "a", concurrent_experts=2, grace_seconds=1.0)
    thread = signal_when([run.expert("deaf") / "began", run.expert("a") / "began"], signal.SIGTERM)
    began = time.monotonic()
    with pytest.raises(Interrupted):
        train_members(run, recipe, members)
    thread.join()
    assert 1.0 < time.monotonic() - began < 10
    assert not (run.expert("deaf") / STOP_FILE).exists(), "or the next attempt would stop at once"


def test_a_second_signal_ends_at_once(trainings: Callable[..., tuple[RunFolder, Recipe, list[Member]]]) -> None:
    run, recipe, members = trainings("deaf", grace_seconds=60.0)
    thread = signal_when([run.expert("deaf") / "began"], signal.SIGINT, signal.SIGINT)
    with pytest.raises(Interrupted):
        train_members(run, recipe, members)
    thread.join()


def test_experts_train_at_once_on_disjoint_devices(
    trainings: Callable[..., tuple[RunFolder, Recipe, list[Member]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "visible_devices", lambda: ["1", "3", "4", "6", "7"])
    run, recipe, members = trainings("quick1", "quick2", num_devices=2)
    train_members(run, recipe, members)
    shown = [(run.expert(member.name) / "began").read_text().split()[0] for member in members]
    assert shown == ["1,3", "4,6"]


def test_devices_that_do_not_suffice_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse_recipe(tiny_recipe(tmp_path, train={"num_devices": 4}))
    monkeypatch.setattr(launch, "visible_devices", lambda: ["0", "1"])
    with pytest.raises(TrainError, match=r"train.num_devices = 4: this machine shows 2 \(0, 1\)"):
        device_slices(recipe, LaunchOptions())
    monkeypatch.setattr(launch, "visible_devices", lambda: ["GPU-a", "GPU-b", "GPU-c", "GPU-d"])
    with pytest.raises(TrainError, match="takes numbers alone"):
        device_slices(recipe, LaunchOptions())
    with pytest.raises(TrainError, match="no such file"):
        device_slices(recipe, LaunchOptions(hostfile=tmp_path / "none"))


def test_deepspeed_is_told_devices_in_the_way_it_heeds(tmp_path: Path) -> None:
    recipe = parse_recipe(tiny_recipe(tmp_path, train={"num_devices": 2}))
    on_cpu = training_command(recipe, ["megaxelm.train"], None, None)
    assert on_cpu[-4:] == ["--num_gpus", "2", "--module", "megaxelm.train"]
    # with --num_gpus it would ignore CUDA_VISIBLE_DEVICES and take the first two for every expert
    assert "--num_gpus" not in training_command(recipe, ["megaxelm.train"], ["2", "3"], None)
    assert training_command(recipe, ["megaxelm.train"], None, tmp_path)[5:7] == ["--hostfile", str(tmp_path)]


def test_the_command_refuses_a_hostfile_that_is_missing_and_all_beside_one(indexed_run: Path) -> None:
    done = run_module("megaxelm.cli", "train", str(indexed_run), "--hostfile", str(indexed_run / "hosts"))
    assert done.returncode == 2 and "hosts: no such file; write one line a node" in done.stderr and "Traceback" not in done.stderr
    done = run_module("megaxelm.cli", "train", str(indexed_run), "--all", "--expert", "seed")
    assert done.returncode == 2 and "--all and --expert seed: give one of them" in done.stderr


@pytest.mark.slow
def test_ranks_under_deepspeed_save_when_the_command_is_asked_to_stop(indexed_run: Path) -> None:
    sets = ["train.num_devices=2", "train.steps=2000", "train.checkpoint_every=1000"]
    command = ["megaxelm.cli", "train", str(indexed_run), "--expert", "seed", *[part for item in sets for part in ("--set", item)]]
    env = dict(os.environ) | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    process = subprocess.Popen([sys.executable, "-m", *command], stderr=subprocess.PIPE, text=True, env=env)
    metrics = indexed_run / "experts" / "seed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "`seed` was stopped and has saved its state" in errors, errors
    assert 0 < int((indexed_run / "experts" / "seed" / "checkpoints" / "latest").read_text()) < 1000
    ending = last_ending(indexed_run / "experts" / "seed")
    assert ending is not None and ending.state == "preempted"
