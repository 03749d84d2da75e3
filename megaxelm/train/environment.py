"""Which process of how many this is, found in the environment of `deepspeed`, `torchrun`, `srun`, Open MPI, or of a plain `python -m`.

The launcher nearest to the process counts: `torchrun` under `srun` is `torchrun`, as long as both tell the same story.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sysconfig
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from megaxelm.errors import TrainError
from megaxelm.train.extensions import extensions_folder, remove_stale_locks

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
# Below the range from which Linux gives out ports on its own (32768).
_FIRST_PORT, _NUM_PORTS = 10000, 20000
_OPEN_MPI_PORT = 29500


@dataclass(frozen=True)
class Processes:
    """Place of this process among those that train one model. `found` says who set it up."""

    rank: int
    world_size: int
    local_rank: int
    found: str


def find_processes(environment: MutableMapping[str, str] | None = None) -> Processes:
    """Read rank and world size, and complete the environment for `torch.distributed` where the launcher does not do so.

    Raises:
        TrainError: the environment is set by half, holds impossible numbers, or two launchers contradict each other.
    """
    env = os.environ if environment is None else environment
    outer = _from_srun(env) or _from_open_mpi(env)
    if any(env.get(name) for name in _PLACE):
        processes = _from_variables(env)
        _check_agreement(env, processes, outer)
        return processes
    if outer is None:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        return Processes(0, 1, 0, "a single process")
    address, port = _meeting_of_srun(env) if outer.found == "srun" else _meeting_of_open_mpi(env, outer)
    env.update(RANK=str(outer.rank), WORLD_SIZE=str(outer.world_size), LOCAL_RANK=str(outer.local_rank))
    env.update(MASTER_ADDR=address, MASTER_PORT=port)
    return outer


def check_device(processes: Processes, num_devices: int) -> None:
    """Look whether this process has a device of its own.

    Args:
        num_devices: devices that this process sees.

    Raises:
        TrainError: its local rank is beyond them.
    """
    if processes.local_rank >= num_devices:
        raise TrainError(
            f"LOCAL_RANK = {processes.local_rank}: this process sees {num_devices} of the node's devices. Start as many processes a "
            "node as it has devices; every process must see all devices of its node (no --gpus-per-task, no --gpu-bind)"
        )


def _from_variables(env: MutableMapping[str, str]) -> Processes:
    """What `deepspeed`, `torchrun` or the user wrote down for `torch.distributed`."""
    given = [name for name in (*_PLACE, *_MEETING) if env.get(name)]
    missing = [name for name in (*_PLACE, *_MEETING) if name not in given]
    if missing:
        raise TrainError(
            f"the environment has {', '.join(given)} but not {', '.join(missing)}: start through `deepspeed`, `torchrun` or `srun`, or "
            "unset these"
        )
    if not 1 <= _number(env, "MASTER_PORT") <= 65535:
        raise TrainError(f"MASTER_PORT = {env['MASTER_PORT']}: a port is a number from 1 to 65535")
    if "TORCHELASTIC_RUN_ID" in env:
        found = "torchrun"
    elif "CROSS_SIZE" in env and "LOCAL_SIZE" in env:
        found = "deepspeed"
    else:
        found = "RANK and WORLD_SIZE in the environment"
    return _place(env, _PLACE, found)


def _from_srun(env: MutableMapping[str, str]) -> Processes | None:
    """The task of a job step. A batch script is none, although it has some of the variables."""
    if "SLURM_STEP_ID" not in env:
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    return _place(env, ("SLURM_PROCID", tasks, "SLURM_LOCALID"), "srun")


def _from_open_mpi(env: MutableMapping[str, str]) -> Processes | None:
    if not any(name in env for name in _OPEN_MPI):
        return None
    return _place(env, _OPEN_MPI, "Open MPI")


def _place(env: MutableMapping[str, str], names: tuple[str, str, str], found: str) -> Processes:
    missing = [name for name in names if not env.get(name)]
    if missing:
        raise TrainError(f"{found}: {', '.join(missing)} missing in the environment; start all processes by {found}, or none")
    rank, world_size, local_rank = (_number(env, name) for name in names)
    if world_size < 1 or rank >= world_size:
        raise TrainError(f"{names[0]} = {rank} and {names[1]} = {world_size}: ranks are numbered from 0 to one below their number")
    if local_rank > rank:
        raise TrainError(
            f"{names[2]} = {local_rank} is above {names[0]} = {rank}: the ranks of a node are numbered in the order of all ranks"
        )
    return Processes(rank, world_size, local_rank, found)


def _number(env: MutableMapping[str, str], name: str) -> int:
    value = env[name]
    if not re.fullmatch(r"[0-9]+", value):
        raise TrainError(f"{name} = {value!r}: must be a whole number from 0; correct or unset it")
    return int(value)


def _check_agreement(env: MutableMapping[str, str], inner: Processes, outer: Processes | None) -> None:
    """One launcher under another: it must have one group of processes for each task of the outer one, or be the same numbering."""
    if outer is None or outer.world_size == 1:
        return
    groups = {"torchrun": "GROUP_WORLD_SIZE", "deepspeed": "CROSS_SIZE"}.get(inner.found)
    if groups is not None:
        if _number(env, groups) != outer.world_size:
            raise TrainError(
                f"started two ways at once: {outer.found} has {outer.world_size} tasks, and {inner.found} in each of them counts "
                f"{env[groups]} nodes. Start one task a node that runs `{inner.found}`, or one task a device that runs "
                "`python -m megaxelm.train`"
            )
    elif (inner.rank, inner.world_size) != (outer.rank, outer.world_size):
        raise TrainError(
            f"RANK = {inner.rank} of WORLD_SIZE = {inner.world_size}, but this is task {outer.rank} of {outer.world_size} of "
            f"{outer.found}: unset RANK, WORLD_SIZE and LOCAL_RANK (one may be left over from another training), and they are found"
        )


def _meeting_of_srun(env: MutableMapping[str, str]) -> tuple[str, str]:
    """Where the ranks meet: the first node of the step, and a port that follows from job and step; what is given goes before."""
    port = env.get("MASTER_PORT") or str(_FIRST_PORT + (_number(env, "SLURM_JOB_ID") * 16 + _number(env, "SLURM_STEP_ID")) % _NUM_PORTS)
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"], port
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise TrainError(
            "srun: neither SLURM_STEP_NODELIST nor SLURM_JOB_NODELIST is in the environment: set MASTER_ADDR to the first node"
        )
    return _address(first_host(nodes)), port


def _meeting_of_open_mpi(env: MutableMapping[str, str], processes: Processes) -> tuple[str, str]:
    port = env.get("MASTER_PORT") or str(_OPEN_MPI_PORT)
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"], port
    if env.get("OMPI_COMM_WORLD_LOCAL_SIZE") != str(processes.world_size):
        raise TrainError("Open MPI on several nodes does not tell where rank 0 is: mpirun -x MASTER_ADDR=<first host> -x MASTER_PORT=29500")
    return "127.0.0.1", port


def first_host(nodes: str) -> str:
    """The first name of a Slurm host list: `n[03-07,9],m1` is `n03`."""
    first = re.split(r",(?![^\[]*\])", nodes.strip())[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _address(host: str) -> str:
    """`host` if its name can be looked up, otherwise the address under which Slurm reaches that node."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        told = subprocess.run(["scontrol", "show", "node", host, "--oneliner"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        told = ""
    found = re.search(r"\bNodeAddr=(\S+)", told)
    if found is None:
        raise TrainError(f"srun: the name of the first node, {host}, cannot be looked up: set MASTER_ADDR to its address")
    return found[1]


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def build_extension() -> None:
    """Compile what DeepSpeed needs on a CPU, once a machine and torch version, so that the first training does not wait for it.

    Raises:
        TrainError: a tool is missing.
    """
    check_compiler()
    remove_stale_locks(extensions_folder())
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        get_accelerator().create_op_builder("ShareMemCommBuilder").load()


def check_compiler() -> None:
    """DeepSpeed compiles a small extension when it starts; without the tools it prints an error, goes on, and exits with 0.

    Raises:
        TrainError: what is missing, with its Debian package.
    """
    missing = []
    if not shutil.which(os.environ.get("CXX", "c++")) and not shutil.which("g++"):
        missing.append("a C++ compiler (Debian: g++)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("the Python headers (Debian: python3-dev)")
    if not shutil.which("ninja"):
        missing.append("ninja on the PATH (pip install ninja, in the active environment)")
    if missing:
        raise TrainError(f"DeepSpeed cannot compile its extension; missing: {'; '.join(missing)}")
