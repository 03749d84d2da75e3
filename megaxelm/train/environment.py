"""Which process of how many this is, found in the environment of `deepspeed`, `torchrun`, `srun`, or of a plain `python -m`."""

from __future__ import annotations

import os
import shutil
import socket
import sysconfig
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from megaxelm.errors import TrainError

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """Place of this process among those that train one model. `found` says who set it up."""

    rank: int
    world_size: int
    local_rank: int
    found: str


def find_processes(environment: MutableMapping[str, str] | None = None) -> Processes:
    """Read rank and world size, and complete the environment for `torch.distributed` when this process is alone.

    Raises:
        TrainError: the environment is set by half.
    """
    env = os.environ if environment is None else environment
    given = [name for name in _NEEDED if env.get(name)]
    if "RANK" not in given and "WORLD_SIZE" not in given:
        if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in env:
            raise TrainError(
                f"SLURM_NTASKS = {env['SLURM_NTASKS']}: srun started several tasks without RANK and WORLD_SIZE; start one task a node "
                "that runs `deepspeed` (see slurm/README.md)"
            )
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        return Processes(0, 1, 0, "a single process")
    missing = [name for name in _NEEDED if name not in given]
    if missing:
        raise TrainError(
            f"the environment has {', '.join(given)} but not {', '.join(missing)}: start through `deepspeed` or `torchrun`, or unset these"
        )
    found = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed or another launcher"
    return Processes(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]), found)


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
