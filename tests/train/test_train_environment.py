"""Rank, world size and address as each launcher leaves them, and environments that are set by half."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import REPOSITORY

from megaxelm.errors import TrainError
from megaxelm.files import read_json
from megaxelm.run import MARKER
from megaxelm.train.environment import Processes, check_device, find_processes, first_host, free_port
from megaxelm.train.hostfile import read_hostfile

MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = MEETING | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2"}
DEEPSPEED = MEETING | {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_SIZE": "2"}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "localhost,n[2-3]",
}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
# a batch script runs on the first node, and is no task of a step
BATCH = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, Processes(0, 1, 0, "a single process")),
        (BATCH, Processes(0, 1, 0, "a single process")),
        (TORCHRUN, Processes(3, 4, 1, "torchrun")),
        (DEEPSPEED, Processes(3, 4, 1, "deepspeed")),
        (BATCH | DEEPSPEED, Processes(3, 4, 1, "deepspeed")),
        (SRUN, Processes(3, 4, 1, "srun")),
        (SRUN | {"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "4"}, Processes(3, 4, 1, "srun")),
        (SRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"} | TORCHRUN, Processes(3, 4, 1, "torchrun")),
        (OPEN_MPI, Processes(1, 2, 1, "Open MPI")),
        (MEETING | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, Processes(0, 2, 0, "RANK and WORLD_SIZE in the environment")),
    ],
)
def test_each_way_to_start_is_recognised(environment: dict[str, str], found: Processes) -> None:
    env = dict(environment)
    assert find_processes(env) == found
    place = {"RANK": found.rank, "WORLD_SIZE": found.world_size, "LOCAL_RANK": found.local_rank}
    assert {name: int(env[name]) for name in place} == place and env["MASTER_ADDR"] and 1024 < int(env["MASTER_PORT"]) < 65536


def test_the_tasks_of_a_step_meet_at_its_first_node_and_steps_at_different_ports() -> None:
    ports = set()
    for job, step in (("77", "0"), ("77", "1"), ("78", "0")):
        env = SRUN | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}
        find_processes(env)
        assert env["MASTER_ADDR"] == "localhost"
        ports.add(env["MASTER_PORT"])
    assert len(ports) == 3
    env = SRUN | MEETING
    find_processes(env)
    assert {name: env[name] for name in MEETING} == MEETING, "what the user gives goes before"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n[03-07,9],m1", "n03"), ("m1,n[1-2]", "m1"), ("rack[2,4]-n[01-16]", "rack2-n01"), ("a[9]", "a9")],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "1"}, "has LOCAL_RANK but not RANK"),
        (TORCHRUN | {"RANK": "4"}, "RANK = 4 and WORLD_SIZE = 4: ranks are numbered from 0"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE = 'four': must be a whole number"),
        (TORCHRUN | {"RANK": "-1"}, "RANK = '-1': must be a whole number"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT = 70000: a port is"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK = 4 is above RANK = 3"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, "srun: SLURM_PROCID, SLURM_LOCALID missing"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, "neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST"),
        (SRUN | {"SLURM_STEP_NODELIST": "no-such-node-[1-2]"}, "the first node, no-such-node-1, cannot be looked up: set MASTER_ADDR"),
        (SRUN | DEEPSPEED, "two ways at once: srun has 4 tasks, and deepspeed in each of them counts 2 nodes"),
        (
            SRUN | MEETING | {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
            "RANK = 0 of WORLD_SIZE = 4, but this is task 3 of 4 of srun",
        ),
        ({name: OPEN_MPI[name] for name in list(OPEN_MPI)[:2]}, "Open MPI: OMPI_COMM_WORLD_LOCAL_RANK missing"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun -x MASTER_ADDR"),
    ],
)
def test_an_environment_that_is_set_by_half_or_contradicts_itself(environment: dict[str, str], words: str) -> None:
    with pytest.raises(TrainError) as caught:
        find_processes(dict(environment))
    assert words in str(caught.value)


def test_a_local_rank_needs_a_device_of_its_own() -> None:
    check_device(Processes(5, 8, 1, "srun"), 2)
    with pytest.raises(TrainError, match=r"LOCAL_RANK = 2: this process sees 2 of the node's devices"):
        check_device(Processes(6, 8, 2, "srun"), 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file; write one line a node"),
        ("# nothing\n", "names no node"),
        ("n1 slots=8\nn2 slots\n", "line 2: 'n2 slots' is not of the form"),
        ("n1 slots=8\nn1 slots=8\n", "line 2: n1 comes twice"),
    ],
)
def test_a_hostfile_is_read_before_deepspeed_does(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "hosts"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TrainError) as caught:
        read_hostfile(path)
    assert words in str(caught.value)
    path.write_text("n1 slots=8 # the first\n\nn2 slots=4\n")
    assert read_hostfile(path) == {"n1": 8, "n2": 4}


def start(*command: str) -> subprocess.Popen[str]:
    env = dict(os.environ) | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'kernels'}"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


@pytest.mark.slow
def test_two_nodes_of_deepspeed_without_ssh_train_one_model(indexed_run: Path, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("first slots=1\nsecond slots=1\n")
    common = ["--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--module"]
    nodes = [
        start("deepspeed.launcher.runner", "--node_rank", str(rank), *common, "megaxelm.train", str(indexed_run), "--expert", "seed")
        for rank in (0, 1)
    ]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert (indexed_run / "experts" / "seed" / MARKER).exists(), said
    choices = read_json(indexed_run / "experts" / "seed" / "choices.json")
    assert (choices["processes"], choices["started_by"]) == (2, "deepspeed")


@pytest.mark.slow
def test_torchrun_trains_on_two_ranks(indexed_run: Path) -> None:
    launcher = ["torch.distributed.run", "--nproc_per_node=2", "--master_port", str(free_port()), "-m", "megaxelm.train"]
    torchrun = start(*launcher, str(indexed_run), "--expert", "seed")
    said = torchrun.communicate(timeout=120)[0]
    assert (indexed_run / "experts" / "seed" / MARKER).exists(), said
    choices = read_json(indexed_run / "experts" / "seed" / "choices.json")
    assert (choices["processes"], choices["started_by"]) == (2, "torchrun")
